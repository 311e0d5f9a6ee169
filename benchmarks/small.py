"""Small models and small batches, where operators cost more than arithmetic: speed beside stock and beside the ceiling.

The ceiling is plain slicing: timm's own blocks, which after attention drop as many rows as the method merges, with no
matching, no sizes and nothing of vtoken. All variants of one model and batch run in one process, in an order drawn
anew every round; a factor is the median of the quotients within a round. A setting is timed only if it passes check.py;
the exit code is 1 if one does not, or if a target is missed.
"""

from __future__ import annotations

import functools
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from check import Checks
from models import build, random_images
from options import begin, parse, parser, run, write
from timm.models.vision_transformer import Block
from torch import Tensor

import vtoken
from vtoken.accounting.shadow import shared_copy
from vtoken.accounting.timing import stopwatch_for
from vtoken.core.config import MethodConfig

METHODS: dict[str, MethodConfig] = {"pitome": vtoken.PiToMe(ratio=0.9), "tome": vtoken.ToMe(r=13)}


class Case(NamedTuple):
    """A model and a batch.

    Args:
        ceiling: by method, the least share of the ceiling's speed that is aimed at.
        published: by method, what the published code's speed is of stock's: measured elsewhere, on a machine like this
            one and beside its own stock, not by this script.
        ahead: by method, the least that this speed should be of the published code's.
    """

    model: str
    batch: int
    ceiling: Mapping[str, float] = {}
    published: Mapping[str, float] = {}
    ahead: Mapping[str, float] = {}


CASES = [
    Case("vit_tiny_patch16_224", 1, {"pitome": 0.88, "tome": 0.92}, {"pitome": 1.278, "tome": 1.418},
         {"pitome": 1.10, "tome": 1.02}),
    Case("vit_small_patch16_224", 1, dict.fromkeys(METHODS, 0.95), {"pitome": 1.51, "tome": 1.50}),
    Case("vit_base_patch16_224", 1, dict.fromkeys(METHODS, 0.97)),
    Case("vit_small_patch16_224", 8, dict.fromkeys(METHODS, 0.97)),
    Case("vit_base_patch16_224", 8, dict.fromkeys(METHODS, 0.98), {"pitome": 1.72, "tome": 1.64}),
]  # fmt: skip
SMALL = [Case("test_vit", 1), Case("test_vit", 2)]


class SlicedBlock(Block):
    """timm's block; its last `num_sliced` rows end behind the attention."""

    num_sliced: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, T, C] -> [B, T - num_sliced, C]."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        x = x[:, : x.shape[1] - self.num_sliced]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def sliced(model: Any, removed: Sequence[int]) -> Any:
    """A copy of a timm model, over the same weights, whose blocks drop `removed` rows each. Its outputs are wrong."""
    copy = shared_copy(model)
    for block, count in zip(copy.blocks, removed, strict=True):
        if type(block) is not Block:
            raise vtoken.UnsupportedModelError(f"slicing is written for timm's Block, got {type(block).__name__}")
        block.__class__ = SlicedBlock
        block.num_sliced = count
    return copy


def time_in_rounds(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, rng: random.Random
) -> dict[str, list[float]]:
    """Seconds of every variant, one per round; the order is drawn anew each round, the first two do not count."""
    measure, seconds = stopwatch_for(device), {name: [] for name in variants}
    for number in range(-2, rounds):
        for name in rng.sample(list(variants), len(variants)):
            taken = measure(variants[name]).seconds
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def paired(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times as fast: the median of the rounds' quotients."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def measure(case: Case, rounds: int, device: torch.device, rng: random.Random) -> list[dict[str, Any]]:
    """One row per method: figures, or "refused" with the reason."""
    model = build(case.model, device)
    images = random_images(model, case.batch, torch.empty(0, device=device))
    checks, refused = Checks(model), {}
    models = {"stock": model}
    for name, config in METHODS.items():
        problem = checks.problem(config, images)
        if problem is not None:
            refused[name] = problem
            continue
        models[name] = vtoken.apply(shared_copy(model), config)
        models[f"ceiling of {name}"] = sliced(model, vtoken.plan(model, config).removed)
    with torch.inference_mode():
        runs = {name: functools.partial(network, images) for name, network in models.items()}
        seconds = time_in_rounds(runs, rounds, device, rng)
    about = {"model": case.model, "batch": case.batch}
    return [
        about | ({"name": name, "refused": refused[name]} if name in refused else _row(case, model, name, seconds))
        for name in METHODS
    ]


def _row(case: Case, model: Any, name: str, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    stock, ours, ceiling = seconds["stock"], seconds[name], seconds[f"ceiling of {name}"]
    cost = vtoken.report(model, METHODS[name])
    row: dict[str, Any] = {
        "name": name, "method": METHODS[name].to_dict(), "tokens": cost.tokens[-1], "flops_factor": cost.flops_factor,
        "speedup": paired(stock, ours), "speedup_min": min(stock) / min(ours),
        "ceiling_speedup": paired(stock, ceiling),
        "of_ceiling": paired(ceiling, ours), "milliseconds": statistics.median(ours) * 1e3,
        "milliseconds_min": min(ours) * 1e3, "stock_milliseconds": statistics.median(stock) * 1e3, "samples": len(ours),
    }  # fmt: skip
    if name in case.published:
        row["published_measured_elsewhere"] = case.published[name]
        row["of_published"] = row["speedup"] / case.published[name]
    targets = {"of_ceiling": case.ceiling.get(name), "of_published": case.ahead.get(name)}
    row["targets"] = {key: least for key, least in targets.items() if least is not None}
    row["missed"] = [key for key, least in row["targets"].items() if row[key] < least]
    return row


HEAD = (
    f"{'':<34} {'tokens':>6} {'FLOPs x':>8} {'speed x':>8} {'(min)':>6} {'ceiling x':>9} {'of ceiling':>10} "
    f"{'published x, measured elsewhere':>31} {'of it':>6}"
)


def line(row: Mapping[str, Any]) -> str:
    """One row as text, under `HEAD`."""
    name = f"{row['model']}, batch {row['batch']}, {row['name']}"
    if "refused" in row:
        return f"{name}: no speed-up, the check failed: {row['refused']}"
    cells = f"{row['tokens']:>6} {row['flops_factor']:>8.2f} {row['speedup']:>8.3f} {row['speedup_min']:>6.2f} "
    cells += f"{row['ceiling_speedup']:>9.3f} {row['of_ceiling']:>10.3f}"
    if "of_published" in row:
        cells += f" {row['published_measured_elsewhere']:>31.3f} {row['of_published']:>6.3f}"
    missed = ", ".join(f"{key} below {row['targets'][key]}" for key in row["missed"])
    return f"{name:<34} {cells}{f'   MISSED: {missed}' if missed else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a setting was refused or a target missed."""
    args = parse(parser("small", __doc__, rounds=41), argv, {"rounds": 3})
    device = begin(args)
    rng = random.Random(args.seed)
    rows = []
    print(HEAD)
    for case in SMALL if args.small else CASES:
        # Few rounds do for large batches: what is being resolved takes a hundred times as long.
        found = measure(case, max(2, args.rounds // (4 if case.batch > 1 else 1)), device, rng)
        rows += found
        for row in found:
            print(line(row), flush=True)
    write(args, device, rows)
    return 1 if any("refused" in row or row["missed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run(main))
