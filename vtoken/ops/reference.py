"""Slow, obviously right versions of the functions in `vtoken.ops`; the tests compare the fast ones with these.

One image at a time, Python loops, float64, plain lists of row numbers. Written from docs/methods/pitome.md 2 and
docs/methods/baselines.md, not from the fast code, with which it shares nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Row = list[float]


class ReferencePlan(NamedTuple):
    """Which rows go where, one list per image.

    Args:
        keep: input row of every output row.
        src: input rows that disappear.
        slot: output row that each of them goes to.
    """

    keep: list[list[int]]
    src: list[list[int]]
    slot: list[list[int]]


def pitome_reference(
    metric: Tensor,
    r: int,
    *,
    margin: float,
    alpha: float = 1.0,
    num_prefix: int = 0,
    variant: str = "pitome",
    energy: str = "elu",
    protect: Tensor | Sequence[int] | None = None,
) -> ReferencePlan:
    """Energy matching of a metric [B, T, d]; arguments as `vtoken.ops.plan_pitome`.

    Source: docs/methods/pitome.md 2, 6 (`protect`) and 10.1 ("eq4"); docs/methods/baselines.md 3, 6.
    """
    if variant == "tome":
        return tome_reference(metric, r, num_prefix=num_prefix)
    batch, num_mergeable = metric.shape[0], metric.shape[1] - num_prefix
    protected = _protected_sets(protect, batch)
    r = min([r, *((num_mergeable - len(rows)) // 2 for rows in protected or [set()])])
    plan = ReferencePlan([], [], [])
    for b in range(batch):
        unit = _unit_rows(metric, b, num_prefix)
        energies = _energies(unit, margin, alpha, "text" if variant == "text" else energy)
        # Highest energy first, ties by index; protected tokens after everything else.
        order = sorted(range(num_mergeable), key=lambda i: (i in protected[b], -energies[i], i))
        if variant == "text":
            destinations = order[r : 2 * r]
            pairs = [(a, _most_similar(unit, a, destinations)) for a in order[:r]]
        elif variant == "pitome":
            merge_set = order[: 2 * r]
            destinations = merge_set[1::2]
            pairs = [(a, _most_similar(unit, a, destinations)) for a in merge_set[0::2]]
        else:
            dealt = [i for i in order if i not in protected[b]]
            # Without a merge nothing is reordered either: the identity (section 10).
            destinations = dealt[1::2] if r else []
            pairs = _best_pairs(unit, dealt[0::2], destinations, r) if r else []
        _append(plan, num_mergeable, num_prefix, destinations, pairs)
    return plan


def energy_reference(
    metric: Tensor, *, margin: float, alpha: float = 1.0, num_prefix: int = 0, energy: str = "elu"
) -> list[list[float]]:
    """Energies of the mergeable tokens of every image; arguments as `vtoken.ops.plan_pitome`.

    Source: docs/methods/pitome.md 2, step 3, and 10.1 ("eq4").
    """
    return [_energies(_unit_rows(metric, b, num_prefix), margin, alpha, energy) for b in range(metric.shape[0])]


def tome_reference(metric: Tensor, r: int, *, num_prefix: int = 0) -> ReferencePlan:
    """Bipartite soft matching of a metric [B, T, d] by the parity of absolute row numbers.

    Source: docs/methods/baselines.md 1.
    """
    num_tokens = metric.shape[1]
    even = [row - num_prefix for row in range(num_prefix, num_tokens) if row % 2 == 0]
    odd = [row - num_prefix for row in range(num_prefix, num_tokens) if row % 2 == 1]
    r = min(r, (num_tokens - num_prefix) // 2, len(even))
    plan = ReferencePlan([], [], [])
    for b in range(metric.shape[0]):
        unit = _unit_rows(metric, b, num_prefix)
        pairs = _best_pairs(unit, even, odd, r) if r else []
        _append(plan, num_tokens - num_prefix, num_prefix, odd if r else [], pairs)
    return plan


def threshold_reference(metric: Tensor, r: int, *, threshold: float, num_prefix: int = 0) -> ReferencePlan:
    """`tome_reference` with as many pairs as every image has above the threshold, at most r.

    Source: docs/methods/threshold.md 2.
    """
    rows = range(num_prefix, metric.shape[1])
    even, odd = [i - num_prefix for i in rows if i % 2 == 0], [i - num_prefix for i in rows if i % 2 == 1]
    allowed = [r]
    for b in range(metric.shape[0]):
        unit, above = _unit_rows(metric, b, num_prefix), 0
        for a in even if odd else []:
            best = _most_similar(unit, a, odd)
            # Equal rows come out at 1 but for rounding, which is not above 1.
            above += min(_similarity(unit[a], unit[best]), 1.0) > threshold
        allowed.append(above)
    return tome_reference(metric, min(allowed), num_prefix=num_prefix)


def stride_reference(metric: Tensor, stride: int, *, num_prefix: int = 0) -> ReferencePlan:
    """Mergeable rows 0, k, 2k, ... are destinations, every other row joins the most similar one.

    Source: docs/methods/baselines.md 5.
    """
    rows = range(metric.shape[1] - num_prefix)
    destinations = [i for i in rows if i % stride == 0]
    plan = ReferencePlan([], [], [])
    for b in range(metric.shape[0]):
        unit = _unit_rows(metric, b, num_prefix)
        pairs = [(a, _most_similar(unit, a, destinations)) for a in rows if a % stride != 0]
        _append(plan, len(rows), num_prefix, destinations, pairs)
    return plan


def partner_reference(metric: Tensor, sources: list[list[int]], destinations: list[list[int]]) -> list[list[int]]:
    """The most similar destination of every source, the earliest one on a tie; rows of a metric [B, T, d] per image."""
    found = []
    for b in range(metric.shape[0]):
        unit = _unit_rows(metric, b, 0)
        found.append([_most_similar(unit, a, destinations[b]) for a in sources[b]])
    return found


def merge_reference(
    x: Tensor,
    size: Tensor | None,
    keep: list[list[int]],
    src: list[list[int]],
    slot: list[list[int]],
    reduction: str = "wavg",
) -> tuple[Tensor, Tensor]:
    """Rows x [B, T, C] and sizes [B, T] (None: ones) after a merge: float64 [B, T', C] and [B, T'].

    Source: docs/methods/pitome.md 2, steps 7 and 8, and docs/methods/baselines.md 4.
    """
    rows, sizes = [], []
    for b in range(x.shape[0]):
        values = x[b].detach().double()
        patches = [1.0] * x.shape[1] if size is None else size[b].double().flatten().tolist()
        for out, row in enumerate(keep[b]):
            sources = [a for a, target in zip(src[b], slot[b], strict=True) if target == out]
            members = [row] if reduction == "prune" else [row, *sources]
            total = sum(patches[m] for m in members)
            if reduction == "wavg":
                rows.append(sum((patches[m] * values[m] for m in members), torch.zeros_like(values[row])) / total)
            elif reduction == "mean":
                rows.append(sum((values[m] for m in members), torch.zeros_like(values[row])) / len(members))
            elif reduction == "amax":
                rows.append(torch.stack([values[m] for m in members]).amax(0))
            else:
                rows.append(values[row])
            sizes.append(total)
    num_out = len(keep[0]) if keep else 0
    merged = torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)
    return (
        merged.reshape(x.shape[0], num_out, x.shape[2]),
        torch.tensor(sizes, dtype=torch.float64).reshape(x.shape[0], num_out),
    )


def _protected_sets(protect: Tensor | Sequence[int] | None, batch: int) -> list[set[int]]:
    """Protected mergeable rows of every image; from a mask [B, N] or from row numbers [p] or [B, p]."""
    if protect is None:
        return [set() for _ in range(batch)]
    given = protect if isinstance(protect, Tensor) else torch.tensor(list(protect), dtype=torch.int64)
    if given.dtype == torch.bool:
        return [{i for i, flag in enumerate(row) if flag} for row in given.tolist()]
    return [set(row) for row in (given.tolist() if given.dim() == 2 else [given.tolist()] * batch)]


def _unit_rows(metric: Tensor, b: int, num_prefix: int) -> list[Row]:
    """The mergeable rows of image b divided by their length; zero rows stay zero."""
    unit = []
    for row in metric[b, num_prefix:].detach().double().tolist():
        length = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
        unit.append([v / length for v in row])
    return unit


def _similarity(a: Row, b: Row) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _energies(unit: list[Row], margin: float, alpha: float, kind: str) -> list[float]:
    """Mean of f over all tokens, the token itself included."""
    energies = []
    for i, row in enumerate(unit):
        terms = []
        for j, other in enumerate(unit):
            # Exactly 1 for a token with itself, so that the self term is the same constant for all; 0 for zero vectors.
            similarity = float(any(row)) if i == j else _similarity(row, other)
            below = alpha * (math.exp(similarity - margin) - 1.0)
            if kind == "text":
                terms.append(math.exp(-(((1.0 - similarity) / (1.0 - margin)) ** 2) / 2.0))
            elif kind == "elu":
                terms.append(similarity - margin if similarity > margin else below)
            else:
                terms.append(similarity if similarity >= margin else below)
        energies.append(math.fsum(terms) / len(unit))
    return energies


def _most_similar(unit: list[Row], a: int, destinations: list[int]) -> int:
    """The destination nearest to a; the first of equals."""
    best = destinations[0]
    for b in destinations[1:]:
        if _similarity(unit[a], unit[b]) > _similarity(unit[a], unit[best]):
            best = b
    return best


def _best_pairs(unit: list[Row], a_rows: list[int], b_rows: list[int], r: int) -> list[tuple[int, int]]:
    """Every a with its most similar b; the r most similar pairs, the first of equals first."""
    pairs = [(a, _most_similar(unit, a, b_rows)) for a in a_rows]
    return sorted(pairs, key=lambda pair: -_similarity(unit[pair[0]], unit[pair[1]]))[:r]


def _append(
    plan: ReferencePlan, num_mergeable: int, num_prefix: int, destinations: list[int], pairs: list[tuple[int, int]]
) -> None:
    """Add one image, given by row numbers among its mergeable tokens: [prefix | kept, ascending | destinations]."""
    sources = [a for a, _ in pairs]
    kept = [i for i in range(num_mergeable) if i not in sources and i not in destinations]
    out = [*kept, *destinations]
    plan.keep.append([*range(num_prefix), *(num_prefix + i for i in out)])
    plan.src.append([num_prefix + a for a in sources])
    plan.slot.append([num_prefix + out.index(b) for _, b in pairs])
