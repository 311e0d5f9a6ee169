"""What options of the command line take: each reads one word, or says in one line why it cannot. Needs no torch."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

_MOST = 2**31 - 1  # what the libraries behind the options count with


def whole(least: int = -_MOST, most: int = _MOST) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(text: str) -> int:
        value: int | None
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            low = f" from {least}" if least > -_MOST else ""
            high = f" to {most}" if most < _MOST or (value is not None and value > most) else " on" if low else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number{low}{high}")
        return value

    return read


def number(least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A finite number from `least` to `most`, or `above` the least."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            low = f" {'above' if above else 'from'} {least:g}" if least > -math.inf else ""
            high = f" to {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number{low}{high}")
        return value

    return read


def share(text: str) -> float:
    """A share of tokens: above 0, at most 1."""
    return number(0, 1, above=True)(text)


def word(text: str) -> str:
    """Any text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def path(text: str) -> Path:
    """A file or folder to read; whether it is there is said by whoever reads it."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def new_file(text: str) -> Path:
    """A file to write: no folder, and not below a file."""
    found = path(text)
    if found.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    _below_folder(found.parent, text)
    return found


def new_picture(*more: str) -> Callable[[str], Path]:
    """A file to write, in a form that pictures are written in; `more` are further endings."""
    endings = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", *more)

    def read(text: str) -> Path:
        found = new_file(text)
        if found.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text}: pictures are written as {', '.join(endings)}")
        return found

    return read


def new_folder(text: str) -> Path:
    """A folder to write into, which need not be there yet."""
    found = path(text)
    _below_folder(found, text)
    return found


def _below_folder(folder: Path, text: str) -> None:
    there = next((p for p in (folder, *folder.parents) if p.exists()), Path())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: {there} may not be written to")
