"""Attention over kept connections against dense fused attention: the operator alone, and with finding the connections.

All forms run in one process, interleaved, on q, k, v as a fused projection leaves them (H = 6, D = 64); "with
selection" adds the connectivity predictor (K = 32) and the choice of keys, which makes it end to end. A line is only
printed if the form agrees with the plain masked one. Targets: docs/methods/sparsifiner.md 8; they are for one CPU
thread.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from check import relative_error
from options import begin, parse, parser, write
from torch import Tensor

from vtoken.accounting.timing import Timing, interleaved
from vtoken.methods.sparsifiner.predictor import ConnectivityPredictor
from vtoken.ops import Connections, select_grouped, select_topk, sparse_attention

HEADS, WIDTH, BASIS = 6, 64, 32
SIDES = (14, 24, 32, 48)
RATIOS = (0.05, 0.1, 0.25)
TOLERANCE = 1e-5
#: Times faster than dense attention that (tokens, ratio, form) must reach.
TARGETS = {
    (1025, 0.05, "sparse"): 2.0,
    (1025, 0.1, "sparse"): 1.5,
    (1025, 0.1, "grouped with selection"): 1.5,
    (2305, 0.1, "grouped with selection"): 2.5,
}


class Case(NamedTuple):
    """One layer: queries, keys and values [1, H, N, D], its predictor, the share of keys that is kept."""

    q: Tensor
    k: Tensor
    v: Tensor
    predictor: ConnectivityPredictor
    ratio: float
    group: int


def make_case(side: int, ratio: float, group: int, device: torch.device) -> Case:
    """Random tokens of a square grid with one class token, and a predictor whose scores differ from key to key."""
    tokens = side * side + 1
    q, k, v = torch.randn(1, tokens, 3, HEADS, WIDTH, device=device).permute(2, 0, 3, 1, 4)
    predictor = ConnectivityPredictor(WIDTH, HEADS, num_tokens=tokens, num_basis=BASIS, device=device).eval()
    with torch.no_grad():
        for weight in (predictor.reduce_q.weight, predictor.reduce_k.weight):
            weight.normal_(std=0.2)
        predictor.w_up.normal_(std=0.05)
    return Case(q, k, v, predictor, ratio, group)


def find(case: Case, grouped: bool) -> Connections:
    """Predictor and selection."""
    coefficients, basis = case.predictor.coefficients(case.q, case.k, reorder=grouped), case.predictor.basis()
    if not grouped:
        return select_topk(coefficients, basis, case.ratio)
    assert case.predictor.grid is not None
    return select_grouped(coefficients, basis, case.ratio, grid=case.predictor.grid, group_size=case.group)


def forms(case: Case) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """What is timed, after a check of each; and how many times fewer multiply-accumulates than dense."""
    exact, grouped = find(case, grouped=False), find(case, grouped=True)

    def attend(connections: Connections, backend: str) -> Tensor:
        return sparse_attention(case.q, case.k, case.v, connections, scale=WIDTH**-0.5, backend=backend)

    runs: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: attend(exact, "sparse"),
        "masked": lambda: attend(exact, "masked"),
        "grouped": lambda: attend(grouped, "grouped"),
        "sparse with selection": lambda: attend(find(case, grouped=False), "sparse"),
        "grouped with selection": lambda: attend(find(case, grouped=True), "grouped"),
    }
    for name, run in runs.items():
        expected = attend(grouped if name.startswith("grouped") else exact, "dense_masked")
        error = relative_error([expected], [run()])
        if error > TOLERANCE:
            raise SystemExit(f"{name}, {exact.num_tokens} tokens: off by {error:.2g} (relative RMS); no times printed")
    core = exact.num_tokens**2 * HEADS / exact.count
    exact_search, grouped_search = (1 / core + _predictor_share(exact.num_tokens, group) for group in (1, case.group))
    factors = {"sparse": core, "masked": 1.0, "grouped": core, "sparse with selection": 1 / exact_search}
    return runs, factors | {"grouped with selection": 1 / grouped_search}


def _predictor_share(tokens: int, group: int) -> float:
    """Multiply-accumulates of predictor and scores over those of dense attention (section 7, scores not sparse)."""
    reduced = WIDTH // 2
    mixing = 2 * tokens * WIDTH * reduced + tokens * BASIS * reduced + (tokens - 1) * BASIS * reduced
    scores = (tokens - 1) / group * BASIS * tokens
    return (mixing + scores) / (2 * tokens**2 * WIDTH)


def time_case(case: Case, args: Any, device: torch.device) -> list[dict[str, Any]]:
    """One row per form."""
    runs, factors = forms(case)
    everything = {"dense": lambda: F.scaled_dot_product_attention(case.q, case.k, case.v), **runs}
    times = interleaved(everything, rounds=args.rounds, warmup=2, device=device)
    return [_row(case, name, times["dense"], times[name], factors[name]) for name in runs]


def _row(case: Case, name: str, dense: Timing, ours: Timing, macs: float) -> dict[str, Any]:
    tokens = case.q.shape[2]
    target = TARGETS.get((tokens, case.ratio, name))
    return {
        "case": name, "tokens": tokens, "keep_ratio": case.ratio, "keys": math.ceil(case.ratio * tokens - 1e-6),
        "milliseconds": ours.median * 1e3, "milliseconds_min": ours.minimum * 1e3,
        "other_milliseconds": dense.median * 1e3, "other_milliseconds_min": dense.minimum * 1e3,
        "factor": dense.median / ours.median, "factor_min": dense.minimum / ours.minimum, "mac_factor": macs,
        "samples": ours.samples, "dropped": ours.dropped, "target": target,
    }  # fmt: skip


HEAD = f"{'times faster than dense fused attention':<50} {'median':>6} {'(min)':>6} {'MACs':>6} {'ours ms':>9}   target"


def line(row: dict[str, Any]) -> str:
    """One measurement as text, under `HEAD`."""
    name = f"{row['case']}, {row['tokens']} tokens, {row['keep_ratio']:.0%}"
    cells = f"{row['factor']:>6.2f} {row['factor_min']:>6.2f} {row['mac_factor']:>6.1f} {row['milliseconds']:>9.2f}"
    return f"{name:<50} {cells}   {'' if row['target'] is None else '>= ' + str(row['target'])}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the result file."""
    top = parser("sparse_attention", __doc__, rounds=15)
    top.add_argument("--group", type=int, default=64, help="queries that share their keys (default 64)")
    args = parse(top, argv, {"rounds": 5})
    device = begin(args)
    rows = []
    print(HEAD)
    with torch.no_grad():
        for side in SIDES[:3] if args.small else SIDES:
            for ratio in RATIOS[1:2] if args.small else RATIOS:
                found = time_case(make_case(side, ratio, args.group, device), args, device)
                print("\n".join(line(row) for row in found), flush=True)
                rows += found
    write(args, device, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
