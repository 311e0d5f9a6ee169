"""`python -m vtoken`: demo, bench, overlay, video, and small commands that look things up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vtoken.cli import bench, demo, inspect, overlay, video
from vtoken.core.errors import VTokenError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m vtoken", description="Vision transformers that spend fewer tokens.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, module in (("demo", demo), ("bench", bench), ("overlay", overlay), ("video", video)):
        command = commands.add_parser(name, help=(module.__doc__ or "").partition(": ")[2])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    for name, function in (
        ("info", inspect.show_info),
        ("methods", inspect.show_methods),
        ("models", inspect.show_models),
        ("plan", inspect.show_plan),
        ("report", inspect.show_report),
    ):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--json", action="store_true", help="for machines")
        if name == "models":
            command.add_argument("pattern", nargs="?", default="*", help="e.g. 'deit3_*'")
            command.add_argument("--why", action="store_true", help="list the refused names and why")
        if name in ("plan", "report"):
            command.add_argument("model", help="timm architecture")
            command.add_argument("method", help="see `methods`")
            command.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="e.g. ratio=0.9")
            command.add_argument("--img-size", type=int)
        command.set_defaults(run=function)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 if it found something wanting, 2 if it was called wrongly."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except VTokenError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"ImportError: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
