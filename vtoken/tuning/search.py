"""Which tokens to remove where: constant schedules that meet a budget, and dynamic programming over the blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtoken.methods.merging.base import ScheduledMergeConfig
from vtoken.tuning.cost import Costs

#: Levels of tokens and of multiply-adds between which the dynamic programming tells apart.
_LEVELS, _UNITS = 256, 1024


class Curve(NamedTuple):
    """What the output changes by if one block removes another share of its tokens: shares, ascending, and changes."""

    shares: Sequence[float]
    changes: Sequence[float]

    def at(self, share: float) -> float:
        """On straight lines between what was measured, which go on beyond its ends."""
        x, y = self.shares, self.changes
        if len(x) == 1:
            return y[0]
        i = next((i for i in range(1, len(x) - 1) if share <= x[i]), len(x) - 1)
        return y[i - 1] + (y[i] - y[i - 1]) / (x[i] - x[i - 1]) * (share - x[i - 1])


def constant(costs: Costs, budget: float) -> dict[str, ScheduledMergeConfig]:
    """The plain schedules that cost at most `budget`, each as near to it as it comes, by name.

    One ratio, one r, and shares that fall or rise by half of their mean from the middle to either end of the model.
    """
    config, depth = costs.config, costs.spec.depth

    def fits(found: ScheduledMergeConfig) -> bool:
        return costs.of(costs.removed(found)) <= budget

    def sloped(slope: float) -> Callable[[int], ScheduledMergeConfig]:
        def make(n: int) -> ScheduledMergeConfig:
            mean, last = n / 10_000, max(1, depth - 1)
            shares = [min(0.5, mean * (1 + slope * (1 - 2 * layer / last))) for layer in range(depth)]
            return removing(config, costs.removed(config.replace(ratio=[1 - share for share in shares])))

        return make

    makers: dict[str, tuple[Callable[[int], ScheduledMergeConfig], int]] = {
        "constant ratio": (lambda n: config.replace(ratio=1 - n / 10_000), 5_000),
        "constant r": (lambda n: config.replace(r=n), costs.embedded),
        "falling": (sloped(0.5), 10_000),
        "rising": (sloped(-0.5), 10_000),
    }
    found = {}
    for name, (make, most) in makers.items():
        low, high = 0, most  # the fewest that fit lie above low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(make(middle)) else (middle, high)
        if fits(make(high)):
            found[name] = make(high)
    return found


def removing(config: ScheduledMergeConfig, removed: Sequence[int]) -> ScheduledMergeConfig:
    """The settings with so many tokens removed by each block."""
    settings: ScheduledMergeConfig = config.replace(r=list(removed))
    return settings


def shares(costs: Costs, removed: Sequence[int]) -> list[float]:
    """The share of its mergeable tokens that each block removes."""
    tokens = itertools.accumulate(removed, lambda t, r: t - r, initial=costs.embedded - costs.spec.num_prefix)
    return [r / max(1, t) for t, r in zip(tokens, removed, strict=False)]


def per_block(costs: Costs, curves: Sequence[Curve], budget: float) -> list[int] | None:
    """Tokens that each block removes where the curves rise least; within what was measured; None if nothing fits."""
    depth, prefix = costs.spec.depth, costs.spec.num_prefix
    step = math.ceil((costs.embedded - prefix) / _LEVELS)
    levels = (costs.embedded - prefix) // step + 1
    spent = torch.zeros(depth, levels, levels, dtype=torch.int64)
    changes = torch.full((depth, levels, levels), torch.inf, dtype=torch.float64)
    for layer, level in itertools.product(range(depth), range(levels)):
        tokens = costs.embedded - level * step
        low, high = (end * (tokens - prefix) / step for end in (curves[layer].shares[0], curves[layer].shares[-1]))
        for gone in range(math.floor(low), min(math.ceil(high), costs.most(tokens) // step) + 1):
            to, r = level + gone, gone * step
            spent[layer, level, to] = math.ceil(costs.block(layer, tokens, r) / budget * _UNITS)
            changes[layer, level, to] = curves[layer].at(r / max(1, tokens - prefix))
    path = cheapest(spent, changes, _UNITS)
    if path is None:
        return None
    return filled(costs, curves, [(b - a) * step for a, b in itertools.pairwise([0, *path])], budget)


def cheapest(costs: Tensor, changes: Tensor, budget: int) -> list[int] | None:
    """The path of least change that costs at most `budget`; None if there is none.

    Args:
        costs: [L, S, S] int64, from 0 on: what block l costs that takes the tokens from level s to level s'.
        changes: the same, float64: what the output changes by it; inf where there is no such step.
        budget: what all blocks may cost.

    Returns:
        The level behind every block; level 0 lies before the first.
    """
    depth, levels, _ = costs.shape
    best = torch.full((levels, budget + 1), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    spent, came = torch.arange(budget + 1), []
    for layer in range(depth):
        reached, origin = torch.full_like(best, torch.inf), torch.zeros_like(best, dtype=torch.int64)
        for level in range(levels):
            steps = changes[layer, :, level].isfinite().nonzero()[:, 0]
            if len(steps):
                left = spent - costs[layer, steps, level, None]
                through = best[steps].gather(1, left.clamp(min=0)) + changes[layer, steps, level, None]
                reached[level], nearest = through.masked_fill(left < 0, torch.inf).min(0)
                origin[level] = steps[nearest]
        best = reached
        came.append(origin)
    level = int(best[:, budget].argmin())
    if best[level, budget].isinf():
        return None
    path, left_over = [], budget
    for layer in reversed(range(depth)):
        path.append(level)
        before = int(came[layer][level, left_over])
        left_over -= int(costs[layer, before, level])
        level = before
    return path[::-1]


def filled(costs: Costs, curves: Sequence[Curve], removed: Sequence[int], budget: float) -> list[int]:
    """The schedule with tokens given back, one at a time where that changes least, until none fits the budget."""

    def change(schedule: Sequence[int]) -> float:
        return sum(curve.at(share) for curve, share in zip(curves, shares(costs, schedule), strict=True))

    now = list(removed)
    while True:
        fewer: list[Any] = [[r - (i == layer) for i, r in enumerate(now)] for layer in range(len(now)) if now[layer]]
        fewer = [(change(schedule), schedule) for schedule in fewer if costs.of(schedule) <= budget]
        if not fewer:
            return now
        now = min(fewer)[1]
