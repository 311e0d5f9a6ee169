"""`--load file.py`: run a file of the user's own, so that the methods and adapters that it registers have names here.

It is code and runs as the user; nobody else's file should be given.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
import zlib
from pathlib import Path

from vtoken.core.config import methods
from vtoken.core.host import registered
from vtoken.errors import ConfigError


def load(file: Path) -> None:
    """Run `file` once in this process, as a module that stays; what lies beside it can be imported from it.

    Raises:
        ConfigError: if it is not there, cannot be run, or registers nothing.
    """
    if not file.is_file():
        raise ConfigError(f"--load {file}: no such file")
    # Classes are pickled by the name of their module, and dataclasses look it up, so it needs one.
    path = file.resolve()
    name = f"vtoken_loaded_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--load {file}: the name of a Python file ends in .py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # behind what is installed, which a file beside it must not replace
    module = importlib.util.module_from_spec(spec)
    before = methods(), registered()
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"--load {file}{_line(error, path)}: {type(error).__name__}: {error}") from error
    if (methods(), registered()) == before:
        del sys.modules[name]
        raise ConfigError(
            f"--load {file} registers nothing: call vtoken.register_method or vtoken.register_adapter in it"
        )


def _line(error: BaseException, path: Path) -> str:
    """Where in the file an error arose."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""
