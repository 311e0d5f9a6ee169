"""How much of the saved work becomes saved time: models, batch sizes, methods and ratios, side by side.

All settings of one model and batch run interleaved in one process. Before anything is timed the patched model must
pass the checks of check.py for that very batch; a setting that fails gets no speed-up, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from check import Checks
from models import NAMES, build, random_images
from options import begin, parse, parser, run, write
from torch import Tensor

from vtoken.accounting import compare
from vtoken.cli.settings import add_sweep, sweep
from vtoken.core.config import MethodConfig

MODELS = ["vit_small_patch16_224", "vit_base_patch16_224"]


def add_options(top: argparse.ArgumentParser) -> None:
    """The options that are this script's own."""
    top.add_argument("--model", nargs="+", default=MODELS, help=NAMES)
    top.add_argument("--img-size", type=int, help="side of the input in pixels, for timm models")
    top.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default 1 8)")
    top.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    top.add_argument("--compile", action="store_true", help="time models that went through torch.compile")
    add_sweep(top, ["pitome", "tome", "random_prune"], [0.95, 0.9])


def measure(
    checks: Checks,
    configs: Sequence[MethodConfig],
    images: Tensor,
    *,
    rounds: int,
    calls: int = 1,
    compiled: bool = False,
    tick: Callable[[], object] | None = None,
) -> tuple[list[compare.Row], dict[str, str]]:
    """Rows of the settings that pass the checks, the unpatched model's first; and what is wrong with the others."""
    problems = {config: checks.problem(config, images) for config in configs}
    sound = [config for config in configs if problems[config] is None]
    refused = {compare.label(config): problem for config, problem in problems.items() if problem is not None}
    if not sound:
        return [], refused
    rows = compare.compare(
        checks.model, sound, images, rounds=rounds, warmup=2, calls=calls, compiled=compiled, tick=tick
    )  # fmt: skip
    return rows, refused


def as_rows(rows: Sequence[compare.Row], refused: dict[str, str], batch: int, **about: Any) -> list[dict[str, Any]]:
    """JSON rows: those of compare.Row, with what was measured in front; a refused setting has a reason, no figures."""
    frame = about | {"batch": batch}
    timed = [frame | asdict(row) | {"images_per_second": batch / row.milliseconds * 1e3} for row in rows]
    return timed + [frame | {"name": name, "refused": reason} for name, reason in refused.items()]


def show(title: str, rows: Sequence[compare.Row], refused: dict[str, str]) -> None:
    """One model and batch as text."""
    print(f"\n{title}")
    if rows:
        print(compare.table(rows))
    for name, reason in refused.items():
        print(f"{name}: no speed-up, the check failed: {reason}")
    dropped = sum(row.dropped for row in rows)
    if dropped:
        least = min(row.samples for row in rows)
        print(f"busy machine: {dropped} samples dropped, at least {least} left" + ("" if least else "; do not quote"))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per model and batch, write the result file; 1 if a setting was refused."""
    top = parser("throughput", __doc__, rounds=9)
    add_options(top)
    small = {"model": ["vit_tiny_patch16_224"], "batch": [1, 4], "ratio": [0.9], "rounds": 3}
    args = parse(top, argv, small)
    configs = sweep(args)
    device = begin(args)
    like = torch.empty(0, device=device, dtype=getattr(torch, args.dtype))
    rows: list[dict[str, Any]] = []
    for name in args.model:
        model = build(name, device, img_size=args.img_size).to(like.dtype)
        checks = Checks(model)
        for batch in args.batch:
            images = random_images(model, batch, like)
            found, refused = measure(checks, configs, images, rounds=args.rounds, compiled=args.compile)
            kind = f"{args.dtype}, {'compiled' if args.compile else 'eager'}"
            show(f"{name}, batch {batch}, {kind}, {args.threads} thread(s), {device}", found, refused)
            about = {"model": name, "dtype": args.dtype, "compiled": args.compile}
            rows += as_rows(found, refused, batch, **about)
    print()
    write(args, device, rows)
    return 1 if any("refused" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run(main))
