"""Budgets spread over frames: every guarantee on 3,000 random cases, against a slow bisection that shares no code."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from vtoken.errors import ConfigError, InputError
from vtoken.ops import allocate_tokens

BITS = 280  # of the reference's fixed-point level; two parts closer than 2 ** -200 are the same
FINE = 200  # of its weights


def slow_shares(scores: list[float], total: int, low: int, high: int, power: float) -> list[int]:
    """x_i = clip(level * w_i, low, high) adding up to `total`, times 2 ** BITS, by bisection on the level."""
    top = max(scores)
    weights = [(s / top) ** power if top else 1.0 for s in scores]
    unit = 1 << BITS
    fixed = [int(Fraction(w) * (1 << FINE)) for w in weights]
    assert all(Fraction(f, 1 << FINE) == w for f, w in zip(fixed, weights, strict=True)), "a weight too small for FINE"

    def shares(level: int) -> list[int]:
        return [min(max(level * f >> FINE, low * unit), high * unit) for f in fixed]

    positive = [i for i, w in enumerate(weights) if w > 0]
    empty = len(scores) - len(positive)
    if len(positive) * high + empty * low < total:
        rest = (total - len(positive) * high) * unit // empty
        return [high * unit if w > 0 else rest for w in weights]
    first, last = 0, unit
    while sum(shares(last)) < total * unit:
        last *= 2
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if sum(shares(middle)) >= total * unit else (middle, last)
    return shares(last)


def slow_tokens(scores: list[float], total: int, shares: list[int]) -> list[int]:
    """Floors, then one token each to the largest remainders; nearly equal remainders are ties."""
    unit, near = 1 << BITS, 1 << (BITS - 200)
    floors = [(x + near) // unit for x in shares]
    rest = [max(0, x - f * unit) for x, f in zip(shares, floors, strict=True)]
    for _ in range(total - sum(floors)):
        best = -1
        for i in range(len(scores)):
            if rest[i] < 0 or (best >= 0 and rest[i] < rest[best] - near):
                continue
            if best < 0 or rest[i] > rest[best] + near or scores[i] > scores[best]:
                best = i
        floors[best] += 1
        rest[best] = -(1 << 2 * BITS)
    return floors


def random_case(rng: random.Random) -> tuple[list[float], dict[str, Any]]:
    """Scores of one of eight kinds, with bounds and a budget that they allow."""
    frames = rng.choice([1, 2, 3, rng.randint(1, 12), rng.randint(1, 60)])
    kind = rng.randrange(8)
    scores = [
        [rng.random() for _ in range(frames)],
        [rng.betavariate(0.5, 2) for _ in range(frames)],
        [rng.randint(0, 4) / 4 for _ in range(frames)],
        [rng.choice([0.0, 0.0, rng.random()]) for _ in range(frames)],
        [0.97 if i == frames // 2 else 0.02 for i in range(frames)],
        [10 ** rng.uniform(-6, 3) for _ in range(frames)],
        [rng.choice([0.0, 0.7])] * frames,
        [1 - rng.randint(0, 3) * 2**-52 for _ in range(frames)],
    ][kind]
    low = rng.choice([0, 0, 0, 1, rng.randint(0, 20)])
    high = rng.choice([None, max(low, 1), max(low, 1) + rng.randint(0, 30), 196, 729])
    high = high if high is None else max(high, low, 1)
    most = frames * (high or 200)
    budget = rng.choice([max(1, frames * low), rng.randint(max(1, frames * low), max(1, frames * low, most)), most + 5])
    power = rng.choice([1.0, 2.0, 2.0, 3.0, 0.5, 1.7, 0.0])
    return scores, {"budget": max(budget, frames * low, 1), "min_tokens": low, "max_tokens": high, "power": power}


CASES = 3000


def test_every_guarantee_on_random_cases() -> None:
    rng = random.Random(20250311)
    for case in range(CASES):
        scores, options = random_case(rng)
        frames, low = len(scores), options["min_tokens"]
        tokens = allocate_tokens(scores, **options)
        where = f"case {case}: {scores}, {options} gave {tokens}"
        high = options["budget"] if options["max_tokens"] is None else options["max_tokens"]
        total = min(options["budget"], frames * high)
        assert all(type(t) is int for t in tokens), where
        assert len(tokens) == frames, where
        assert sum(tokens) == total, where
        assert all(low <= t <= high for t in tokens), where
        shares = slow_shares(scores, total, low, high, options["power"])
        assert all(abs((t << BITS) - x) < (1 << BITS) for t, x in zip(tokens, shares, strict=True)), where
        assert tokens == slow_tokens(scores, total, shares), where
        for i in range(frames):
            for j in range(frames):
                if scores[i] > scores[j]:
                    assert tokens[i] >= tokens[j], where
                elif scores[i] == scores[j] and i < j:
                    assert 0 <= tokens[i] - tokens[j] <= 1, where


def test_scaling_by_powers_of_two_and_permuting_change_nothing() -> None:
    rng = random.Random(5)
    for _ in range(300):
        scores, options = random_case(rng)
        tokens = allocate_tokens(scores, **options)
        factor = 2.0 ** rng.randint(-40, 40)
        assert allocate_tokens([s * factor for s in scores], **options) == tokens
        order = list(range(len(scores)))
        rng.shuffle(order)
        moved = allocate_tokens([scores[i] for i in order], **options)
        assert sorted(zip([scores[i] for i in order], moved, strict=True)) == sorted(zip(scores, tokens, strict=True))


def test_weights_that_underflow_still_follow_the_scores() -> None:
    scores = [1.0, 1e-200, 1e-300, 0.0, 3e-200]
    tokens = allocate_tokens(scores, 26, max_tokens=10)  # squares are 0 in float64: the four share what is left
    assert sum(tokens) == 26
    assert tokens == [10, 4, 4, 4, 4]
    assert allocate_tokens(scores, 28, max_tokens=10) == [10, 5, 4, 4, 5]
    assert allocate_tokens(scores, 12, max_tokens=10) == [10, 1, 0, 0, 1]
    assert allocate_tokens([5e-324, 0.0], 3, max_tokens=2) == [2, 1]


def test_small_cases_by_hand() -> None:
    assert allocate_tokens([1, 1, 1], 7) == [3, 2, 2]
    assert allocate_tokens([0, 0, 0], 7) == [3, 2, 2]  # no frame relevant: all equal
    assert allocate_tokens([0.2, 0.9, 0.4], 9, power=0) == [3, 3, 3]
    assert allocate_tokens([0.0, 0.9], 9, power=0) == [4, 5]  # the larger score has the odd one
    assert allocate_tokens([2, 1], 10) == [8, 2]  # 4 : 1
    assert allocate_tokens([2, 1], 10, power=1) == [7, 3]  # 6.67 and 3.33
    assert allocate_tokens([1, 0, 0], 10, max_tokens=4) == [4, 3, 3]  # the surplus goes to frames of no weight
    assert allocate_tokens([1, 0, 0], 10, min_tokens=1) == [8, 1, 1]
    assert allocate_tokens([0.4], 500, max_tokens=196) == [196]  # more budget than tokens is no error
    assert allocate_tokens([0.3, 0.2], 5, min_tokens=2, max_tokens=3) == [3, 2]


def test_half_precision_and_arrays_are_read_exactly() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scores = torch.tensor([0.1, 0.2, 0.7, 0.30004], dtype=dtype)
        assert allocate_tokens(scores, 1001) == allocate_tokens(scores.double().tolist(), 1001)
    assert allocate_tokens(np.array([1, 3], dtype=np.float32), np.int64(10)) == [1, 9]


def test_floor_is_the_published_arithmetic() -> None:
    rng = random.Random(3)
    for _ in range(300):
        scores = [rng.betavariate(0.5, 2) for _ in range(rng.randint(1, 60))]
        budget = rng.randint(1, 12544)
        squared = np.array(scores) ** 2 * 1e4  # the published code squares 100 p; the factor cancels
        expected = [math.floor(b) for b in budget * (squared / squared.sum())]
        got = allocate_tokens(scores, budget, rounding="floor")
        # Where the share is a whole number up to rounding, the order of the operations decides; random scores avoid it.
        assert got == expected
        assert sum(got) <= budget
    # One relevant frame among 95 others takes nearly the whole budget (docs/methods/quota.md 6).
    assert allocate_tokens([0.97] + [0.02] * 95, 12544, rounding="floor")[0] == 12057
    assert allocate_tokens([0, 0], 5, rounding="floor") == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (([], 5), {}, InputError, "scores are empty"),
        (([0.5, float("nan")], 5), {}, InputError, "got nan for frame 1"),
        (([float("inf")], 5), {}, InputError, "got inf for frame 0"),
        (([0.5, -0.25], 5), {}, InputError, "got -0.25 for frame 1"),
        ((torch.ones(2, 3), 5), {}, InputError, r"shape \(2, 3\)"),
        ((torch.tensor(0.5), 5), {}, InputError, "one number per frame"),
        (([0.5], 0), {}, ConfigError, "budget=0"),
        (([0.5], 2.5), {}, ConfigError, "budget=2.5.: .*must be a whole number"),
        (([0.5], True), {}, ConfigError, "budget=True.: .*must be a whole number"),
        ((["a"], 5), {}, InputError, "one number per frame: .*'a'"),
        (([None], 5), {}, InputError, "one number per frame"),
        ((None, 5), {}, InputError, "one number per frame, got None"),
        (([0.5], 5), {"min_tokens": -1}, ConfigError, "min_tokens=-1"),
        (([0.5], 5), {"max_tokens": 0}, ConfigError, "max_tokens=0"),
        (([0.5], 5), {"min_tokens": 3, "max_tokens": 2}, ConfigError, "max_tokens=2 .* min_tokens=3"),
        (([0.5] * 6, 5), {"min_tokens": 1}, ConfigError, "budget=5 is less than 6 frames x min_tokens=1 = 6"),
        (([0.5], 5), {"power": -1}, ConfigError, "power=-1"),
        (([0.5], 5), {"power": float("nan")}, ConfigError, "power=nan"),
        (([0.5], 5), {"rounding": "round"}, ConfigError, "one of exact, floor"),
        (([0.5], 5), {"rounding": "floor", "max_tokens": 3}, ConfigError, "has no bounds"),
    ],
)
def test_errors_state_the_numbers(arguments: Any, options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        allocate_tokens(*arguments, **options)
    assert issubclass(error, ValueError)
