"""vtoken: vision transformers that spend fewer tokens. See `vtoken.apply`."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtoken._public import *  # noqa: F403
    from vtoken._public import __all__ as __all__

__version__ = "0.2.0"

# The folder of this name must not take the place of the function `vtoken.methods` when one of its files is imported.
importlib.import_module("vtoken.methods")
globals().pop("methods", None)


def __getattr__(name: str) -> object:
    # The command line and whoever wants a version need no torch, so names come when the first of them is used.
    if name in ("visualize", "viz"):  # one package, two names
        return importlib.import_module("vtoken.visualize")
    # A part of the package by itself: its files import each other while the names are being collected.
    if name != "methods" and not name.startswith("_") and importlib.util.find_spec(f"vtoken.{name}") is not None:
        return importlib.import_module(f"vtoken.{name}")
    if name == "__all__" or not name.startswith("__"):
        public = importlib.import_module("vtoken._public")
        drawing = ("visualize", "viz")
        globals().update({known: getattr(public, known) for known in public.__all__ if known not in drawing})
        globals()["__all__"] = public.__all__
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'vtoken' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("vtoken._public").__all__})
