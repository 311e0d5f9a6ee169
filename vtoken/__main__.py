"""The program `vtoken`, also `python -m vtoken`: demo, bench, overlay, video, and commands that look things up."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vtoken.cli.parser import parser
from vtoken.errors import VTokenError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 if it found something wanting, 2 if it was called wrongly.

    130 if it was interrupted.
    """
    try:
        args = parser().parse_args(argv)
        for file in getattr(args, "load", ()):
            importlib.import_module("vtoken.cli.load").load(file)
        module, _, function = args.run.partition(":")
        code: int = getattr(importlib.import_module(f"vtoken.cli.{module}"), function)(args)
        sys.stdout.flush()  # so that a pipe that closed is noticed here
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has had enough of it; what is left must not be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (VTokenError, ImportError, OSError) as error:  # OSError: files, disks and hubs
        told = " ".join(str(error).split())  # one line, also of what other libraries say in many
        print(f"{type(error).__name__}: {told}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
