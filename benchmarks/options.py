"""What the scripts of this folder share: their common options, and the frame of the result file.

A script runs as `python benchmarks/NAME.py`, which puts this folder on the import path: `from options import ...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtoken.accounting import compare
from vtoken.errors import VTokenError

ROOT = Path(__file__).parents[1]


def parser(name: str, doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options of every script.

    Args:
        name: of the script; results go to out/benchmarks/NAME.json unless --out says otherwise.
        doc: the script's docstring, shown by --help.
        rounds: default number of timing samples; None for a script that times nothing.
    """
    top = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.set_defaults(benchmark=name)
    top.add_argument("--out", type=Path, default=Path(f"out/benchmarks/{name}.json"), help="result file, JSON")
    top.add_argument("--small", action="store_true", help="smallest setting: seconds to a minute, shows that it works")
    top.add_argument("--seed", type=int, default=0, help="of random weights and inputs")
    top.add_argument("--device", default="cpu", help="cpu or cuda")
    top.add_argument("--threads", type=int, default=1, help="CPU threads; 1: CPU time is measured, else wall time")
    if rounds is not None:
        top.add_argument("--rounds", type=int, default=rounds, help=f"timing samples of everything (default {rounds})")
    return top


def parse(
    top: argparse.ArgumentParser, argv: Sequence[str] | None, small: Mapping[str, Any]
) -> argparse.Namespace:  # fmt: skip
    """The options in `argv` (None: of this process); with --small, other defaults apply to what is not given."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--small" in arguments:
        top.set_defaults(**small)
    args = top.parse_args(arguments)
    if args.out.is_dir():  # found by writing it would be minutes later
        top.error(f"--out {args.out} is a folder; name a file, such as {args.out / args.benchmark}.json")
    args.command = compare.command(top.prog, arguments)
    return args


def begin(args: argparse.Namespace) -> torch.device:
    """Set threads and seed; the device of --device, or SystemExit if this machine has none."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch {torch.__version__} sees no CUDA device here")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return device


def frame(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a result file says beside its rows: "command", "settings" (every option but --out) and "environment"."""
    settings = {key: _told(value) for key, value in vars(args).items() if key not in ("benchmark", "command", "out")}
    return {
        "benchmark": args.benchmark, "command": args.command, "settings": settings,
        "environment": compare.environment(device),
    }  # fmt: skip


def _told(value: Any) -> Any:
    """A folder of the repository without what lies above that."""
    return value.relative_to(ROOT) if isinstance(value, Path) and value.is_relative_to(ROOT) else value


def write(args: argparse.Namespace, device: torch.device, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the result file ("schema", the frame, then "rows", one object per measurement) and say so."""
    path = compare.write_json(args.out, frame(args, device), rows)
    print(f"wrote {path}")
    return path


def run(main: Callable[[], int]) -> int:
    """The exit code of a script's main; what vtoken refuses, or what is not installed, is a message and 2."""
    try:
        return main()
    except (VTokenError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
