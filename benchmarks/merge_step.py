"""One merge step, and attention with token sizes, against plain forms of the same arithmetic and against a block.

The plain step is what one would write from the paper, an operation per line (plain.py); all forms run in one process,
interleaved. A factor is only printed if both forms agree. On one CPU thread there are targets, and the exit code is 1
if one is missed.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from options import begin, parse, parser, run, write
from plain import clustered, plain_step
from torch import Tensor

import vtoken
from vtoken.accounting.timing import Timing, interleaved


class Shape(NamedTuple):
    """What enters a block: images, tokens with one prefix token, channels, heads."""

    batch: int
    tokens: int
    width: int
    heads: int


def vtoken_step(keys: Tensor, x: Tensor, size: Tensor, r: int, margin: float, num_prefix: int) -> tuple[Tensor, Tensor]:
    """The same as `plain_step` through vtoken.ops; sizes [B, T]."""
    plan = vtoken.ops.plan_pitome(vtoken.ops.key_metric(keys), r, margin=margin, num_prefix=num_prefix)
    return plan.apply(x, size)


def time_step(
    shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype = torch.float32, calls: int = 1
) -> dict[str, Any]:
    """One merge step at ratio 0.9, plainly and through vtoken.ops, and one unpatched block on the same tokens."""
    from timm.models.vision_transformer import Block

    keys, x = (t.to(dtype) for t in clustered(*shape, device=device))
    size, r = torch.ones(shape.batch, shape.tokens, device=device), math.floor((shape.tokens - 1) * 0.1 + 1e-6)
    _check_step(keys.float(), x.float(), size, r)
    block = Block(shape.width, shape.heads, qkv_bias=True).to(device, dtype).eval()
    runs: dict[str, Callable[[], object]] = {
        "plain": functools.partial(plain_step, keys, x, size.unsqueeze(-1).to(dtype), r, 0.45, 1),
        "vtoken": functools.partial(vtoken_step, keys, x, size, r, 0.45, 1),
        "block": functools.partial(block, x),
    }
    times = interleaved(runs, rounds=rounds, warmup=2, calls=calls, device=device)
    row = _row("merge step", shape, dtype, times["plain"], times["vtoken"]) | {"r": r}
    share = {"block_milliseconds": times["block"].median * 1e3}
    share["share_of_block"] = times["vtoken"].median / times["block"].median
    share["share_of_block_min"] = times["vtoken"].minimum / times["block"].minimum
    return row | share


def time_attention(
    shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype = torch.float32, calls: int = 1
) -> list[dict[str, Any]]:
    """Fused attention with the size mask: against explicit softmax, and against fused attention without a mask."""
    head_dim = shape.width // shape.heads
    q, k, v = torch.randn(3, shape.batch, shape.tokens, shape.heads, head_dim, device=device).to(dtype).transpose(2, 3)
    bias = vtoken.ops.size_bias(torch.randint(1, 5, (shape.batch, shape.tokens), device=device).float(), dtype)

    def explicit() -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def unmasked() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(masked(), explicit(), **tolerance)
    runs: dict[str, Callable[[], object]] = {"explicit": explicit, "masked": masked, "unmasked": unmasked}
    times = interleaved(runs, rounds=rounds, warmup=2, calls=calls, device=device)
    return [
        _row("masked against explicit attention", shape, dtype, times["explicit"], times["masked"]),
        _row("masked against unmasked attention", shape, dtype, times["unmasked"], times["masked"]),
    ]


def line(row: dict[str, Any], target: str = "") -> str:
    """One measurement as text, under `HEAD`."""
    share = f"{row['share_of_block'] * 100:.1f} %" if "share_of_block" in row else ""
    name = f"{row['what']}, batch {row['batch']}, {row['tokens']} tokens, {row['width']} wide"
    cells = f"{row['factor']:>6.2f} {row['factor_min']:>6.2f} {row['milliseconds']:>9.3f} {share:>9}"
    return f"{name:<72} {cells}   {target}".rstrip()


HEAD = f"{'times faster than the other form':<72} {'median':>6} {'(min)':>6} {'ours ms':>9} {'of block':>9}   target"


def _row(what: str, shape: Shape, dtype: torch.dtype, other: Timing, ours: Timing) -> dict[str, Any]:
    times = {"milliseconds": ours.median * 1e3, "milliseconds_min": ours.minimum * 1e3,
             "other_milliseconds": other.median * 1e3, "other_milliseconds_min": other.minimum * 1e3}  # fmt: skip
    factors = {"factor": other.median / ours.median, "factor_min": other.minimum / ours.minimum}
    counts = {"samples": ours.samples, "dropped": ours.dropped}
    return {"what": what, **shape._asdict(), "dtype": str(dtype).removeprefix("torch.")} | times | factors | counts


def _check_step(keys: Tensor, x: Tensor, size: Tensor, r: int) -> None:
    """Both forms agree in float32, in sums over tokens: near-ties in the order differ by rounding, sums do not."""
    slow, slow_size = plain_step(keys, x, size.unsqueeze(-1), r, 0.45, 1)
    fast, fast_size = vtoken_step(keys, x, size, r, 0.45, 1)
    fast_size = fast_size.unsqueeze(-1)
    for ours, theirs in ((fast * fast_size, slow * slow_size), (fast_size, slow_size)):
        torch.testing.assert_close(ours.sum(1), theirs.sum(1), rtol=1e-3, atol=1e-2)


class Target(NamedTuple):
    """What a form is meant to reach on one CPU thread.

    Args:
        factor: times as fast as the other form, at least.
        share: of an unpatched block's time, at most.
    """

    factor: float
    share: float | None = None

    def __str__(self) -> str:
        return f">= {self.factor}" + ("" if self.share is None else f", <= {self.share * 100:g} % of the block")

    def is_met(self, row: dict[str, Any]) -> bool:
        """Whether a measurement reaches it."""
        return bool(row["factor"] >= self.factor and (self.share is None or row["share_of_block"] <= self.share))


STEPS: list[tuple[Shape, Target | None]] = [
    (Shape(8, 197, 768, 12), Target(1.3, 0.02)),
    (Shape(8, 197, 384, 6), Target(1.1, 0.05)),
    (Shape(32, 197, 768, 12), None),
    (Shape(2, 577, 1024, 16), None),
    (Shape(1, 197, 768, 12), Target(1.0)),
    (Shape(1, 197, 192, 3), Target(1.0)),
]
# Explicit attention at 577 tokens was 1.7 to 3.3 times slower, the masked one always as fast: on AVX-512 machines exp,
# which is most of a softmax, has a slow and a fast state; what ran before in the process decides. The target is what
# holds in the fast one; 1.8, its first value, was measured in the slow one.
ATTENTIONS: list[tuple[Shape, tuple[Target | None, Target | None]]] = [
    (Shape(8, 197, 768, 12), (None, Target(0.93))),
    (Shape(2, 577, 1024, 16), (Target(1.5), Target(0.93))),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file; 1 if a target was missed."""
    args = parse(parser("merge_step", __doc__, rounds=41), argv, {"rounds": 5})
    device = begin(args)
    calls = 1 if device.type == "cpu" else 20
    judged = device.type == "cpu" and args.threads == 1 and not args.small  # too few rounds decide nothing
    rows = []

    def add(row: dict[str, Any], target: Target | None) -> None:
        verdict = {"target": str(target), "met": target.is_met(row)} if judged and target is not None else {}
        rows.append(row | verdict)
        print(line(row, "" if target is None else f"{target}{'' if verdict.get('met', True) else '   MISSED'}"))

    print(HEAD)
    with torch.inference_mode():
        for shape, target in STEPS[:1] if args.small else STEPS:
            add(time_step(shape, args.rounds, device, calls=calls), target)
        for shape, targets in ATTENTIONS[1:] if args.small else ATTENTIONS:
            for row, target in zip(time_attention(shape, args.rounds, device, calls=calls), targets, strict=True):
                add(row, target)
    write(args, device, rows)
    return 0 if all(row.get("met", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(run(main))
