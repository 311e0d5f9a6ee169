"""What is asked of a vLLM before a class is built on it: the versions and signatures that the classes rely on."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from vllm import __version__

from vtoken.errors import UnsupportedModelError, VTokenWarning

#: Versions under which the tests ran.
TESTED = ("0.32.0",)

if __version__.partition("+")[0] not in TESTED:
    warnings.warn(
        f"vtoken was tested with vLLM {', '.join(TESTED)}, this is {__version__}: compare with "
        "`python -m vtoken serve-check` before you rely on it",
        VTokenWarning,
        stacklevel=2,
    )


def need(owner: Any, name: str, *arguments: str) -> None:
    """Raise UnsupportedModelError unless `owner.name` is there and takes these arguments."""
    found = getattr(owner, name, None)
    takes = tuple(inspect.signature(found).parameters)[1:] if callable(found) else None
    if takes != arguments:
        what = "is missing" if takes is None else f"takes ({', '.join(takes)}), expected ({', '.join(arguments)})"
        raise UnsupportedModelError(
            f"vLLM {__version__} differs from what vtoken builds on: {owner.__name__}.{name} {what}. Tested with vLLM "
            f"{', '.join(TESTED)}; install one of these, or serve ready embeddings on the stock classes "
            "(docs/serving.md 2)"
        )
