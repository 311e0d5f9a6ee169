"""How many tokens every frame of a video gets: a budget spread by relevance, exactly (docs/methods/quota.md 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError

ROUNDINGS = ("exact", "floor")


def allocate_tokens(
    scores: Sequence[float] | Tensor,
    budget: int,
    *,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    power: float = 2.0,
    rounding: str = "exact",
) -> list[int]:
    """Tokens per frame, proportional to (score / highest score) ** power as far as the bounds allow.

    The counts add up to min(budget, T * max_tokens), each lies within its bounds and less than 1 from the real-valued
    optimum (proportional shares, clipped to the bounds), a higher score never gets fewer tokens, and equal scores
    differ by at most one token, the earlier frame having it. Computed in whole numbers on the CPU, so the result does
    not depend on device or torch version.

    Args:
        scores: one per frame, T of them, finite, at least 0; any scale. All zero means all equal.
        budget: tokens of the whole video, at least 1 and at least T * min_tokens. More than T * max_tokens is no error.
        min_tokens, max_tokens: bounds per frame; None means no upper bound.
        power: at least 0; 0 spreads evenly.
        rounding: "exact"; or "floor", the published code's floor(budget * share) without bounds or repair, which
            spends less than the budget (for comparisons).

    Raises:
        InputError: if there are no scores, or one is negative or not finite.
        ConfigError: if budget, bounds, power or rounding cannot be served.

    Source: arXiv 2503.08689 section 3.3; the exact rule is docs/methods/quota.md 6.

    Example:
        >>> from vtoken.ops import allocate_tokens
        >>> allocate_tokens([0.9, 0.1, 0.5], 100, max_tokens=60)
        [60, 2, 38]
    """
    values = checked_scores(scores)
    power = checks.number("allocate_tokens", "power", power, 0)
    checks.choice("allocate_tokens", "rounding", rounding, ROUNDINGS)
    budget, low, high = _bounds(len(values), budget, min_tokens, max_tokens)
    weights = _weights(values, power)
    if rounding == "floor":
        if low or max_tokens is not None:
            raise ConfigError('rounding="floor" has no bounds; leave min_tokens and max_tokens out')
        total = math.fsum(weights)
        return [math.floor(budget * weight / total) for weight in weights]
    parts, whole = _water_fill(weights, min(budget, len(values) * high), low, high)
    tokens = [part // whole for part in parts]
    missing = min(budget, len(values) * high) - sum(tokens)
    # Scores, not weights, break ties: a power can make two different scores equal.
    order = sorted(range(len(values)), key=lambda i: (-(parts[i] % whole), -values[i], i))
    for i in order[:missing]:
        tokens[i] += 1
    return tokens


def checked_scores(scores: Sequence[float] | Tensor) -> list[float]:
    """Scores of any form and precision as Python floats.

    Raises:
        InputError: if they are not one per frame, there are none, or one is negative or not finite.
    """
    try:
        found: Any = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    except TypeError as error:
        raise InputError(f"scores are one number per frame, got {scores!r}") from error
    if not isinstance(found, list) or any(isinstance(value, list) for value in found):
        raise InputError(f"scores are one number per frame, got shape {tuple(getattr(scores, 'shape', ()))}")
    if not found:
        raise InputError("scores are empty: there is no frame to give tokens to")
    try:
        values = [float(value) for value in found]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"scores are one number per frame: {error}") from error
    wrong = [i for i, value in enumerate(values) if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise InputError(
            f"scores must be finite and at least 0, got {values[wrong[0]]} for frame {wrong[0]} "
            f"({len(wrong)} such of {len(values)})"
        )
    return values


def _bounds(frames: int, budget: int, min_tokens: int, max_tokens: int | None) -> tuple[int, int, int]:
    """Budget and bounds as plain ints; without an upper bound the budget itself is one."""
    budget = checks.whole("allocate_tokens", "budget", budget, 1)
    low = checks.whole("allocate_tokens", "min_tokens", min_tokens, 0)
    high = budget if max_tokens is None else checks.whole("allocate_tokens", "max_tokens", max_tokens)
    if max_tokens is not None and high < max(low, 1):
        raise ConfigError(f"max_tokens={high} must be at least 1 and at least min_tokens={low}")
    if budget < frames * low:
        raise ConfigError(
            f"budget={budget} is less than {frames} frames x min_tokens={low} = {frames * low}; "
            "take fewer frames, a larger budget or min_tokens=0"
        )
    return budget, low, high


def _weights(values: list[float], power: float) -> list[float]:
    """(score / highest) ** power, never decreasing in the score whatever the platform's pow rounds to."""
    highest = max(values)
    if highest == 0:
        return [1.0] * len(values)
    weights = [0.0] * len(values)
    reached = 0.0
    for i in sorted(range(len(values)), key=values.__getitem__):
        reached = weights[i] = max(reached, (values[i] / highest) ** power)
    return weights


def _water_fill(weights: list[float], total: int, low: int, high: int) -> tuple[list[int], int]:
    """Numerators and common denominator of x_i = clip(level * w_i, low, high), which add up to `total`, exactly.

    Floats are whole multiples of a power of two, so the weights are scaled to whole numbers first.
    """
    ratios = [weight.as_integer_ratio() for weight in weights]
    scale = max(denominator for _, denominator in ratios)
    scaled = [numerator * (scale // denominator) for numerator, denominator in ratios]
    positive = [weight for weight in scaled if weight]
    zeros = len(scaled) - len(positive)
    target = total - zeros * low
    if target > len(positive) * high:  # all frames of any weight are full: the rest goes to those of none
        rest = total - len(positive) * high
        return [high * zeros if weight else rest for weight in scaled], zeros
    level = _level(positive, target, low, high)
    over = level.denominator
    return [min(max(level.numerator * weight, low * over), high * over) for weight in scaled], over


def _level(weights: list[int], target: int, low: int, high: int) -> Fraction:
    """The level at which the clipped shares of whole-number weights add up to `target`."""

    def spent(level: Fraction) -> int:
        """Sum of the clipped shares, times the level's denominator."""
        over = level.denominator
        return sum(min(max(level.numerator * weight, low * over), high * over) for weight in weights)

    distinct = set(weights)
    bends = sorted({Fraction(bound, weight) for weight in distinct for bound in (low, high)})
    at = _last(bends, lambda level: spent(level) <= target * level.denominator)
    # From this bend to the next the sum is linear: frames at a bound stay there, the others share what is left.
    rising = [w for w in weights if low <= at * w < high]
    if not rising:
        return at
    left = target - sum(low if at * w < low else high for w in weights if not low <= at * w < high)
    return Fraction(left, sum(rising))


def _last(values: list[Fraction], holds: Callable[[Fraction], bool]) -> Fraction:
    """The last value for which `holds`, which is true up to some point and for the first value."""
    first, end = 0, len(values)
    while end - first > 1:
        middle = (first + end) // 2
        first, end = (middle, end) if holds(values[middle]) else (first, middle)
    return values[first]
