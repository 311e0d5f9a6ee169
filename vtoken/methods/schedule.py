"""How many tokens each layer removes: `ratio` or `r`, the same everywhere, per layer, or along a line (pitome.md 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from vtoken.core.errors import ConfigError

Ratio = float | Sequence[float] | None
Removal = int | Sequence[float] | None
DEFAULT_RATIO = 0.925


def removed_by_ratio(mergeable: int, ratio: float) -> int:
    """Tokens to remove so that the share `ratio` of `mergeable` stays.

    The 1e-6 undoes float accidents: 100 - 100 * 0.55 is 44.99..., not 45.
    """
    return math.floor(mergeable - mergeable * ratio + 1e-6)


def check_amount(owner: str, ratio: Any, r: Any) -> tuple[Any, Any]:
    """Validate `ratio` and `r` of a config; returns them hashable, with the default ratio if both are None."""
    if ratio is not None and r is not None:
        raise ConfigError(f"{owner}(ratio={ratio!r}, r={r!r}): give ratio or r, not both")
    if ratio is None and r is None:
        ratio = DEFAULT_RATIO
    if ratio is not None:
        ratio = numbers(owner, "ratio", ratio, float)
        for value in ratio if isinstance(ratio, tuple) else (ratio,):
            if not 0.0 < value <= 1.0:
                hint = f" Did you mean ratio={2 - value:.4g}?" if 1.0 < value < 2.0 else ""
                hint = (
                    f" Did you mean ratio={value / (10 if value < 10 else 100):.4g}?" if 2.0 <= value <= 100.0 else hint
                )
                raise ConfigError(
                    f"{owner}(ratio={value!r}): ratio is the share of tokens kept per layer, must be in (0, 1].{hint}"
                )
    if r is not None:
        pair = isinstance(r, tuple) and len(r) == 2
        r = numbers(owner, "r", r, float)
        if pair and r[1] <= 1:  # as a tuple (8, 1) is a line; as a list [8, 1] it is one number per block
            r = (r[0], float(r[1]))
        if not is_line(r):
            for value in r if isinstance(r, tuple) else (r,):
                if value < 0 or value != int(value):
                    raise ConfigError(f"{owner}(r={value!r}): r counts removed tokens; whole numbers from 0 on")
            r = tuple(int(v) for v in r) if isinstance(r, tuple) else int(r)
        elif r[0] < 0 or r[0] != int(r[0]) or not -1.0 <= r[1] <= 1.0:
            raise ConfigError(f"{owner}(r={r!r}): as (r, slope), r must be a whole number and slope within [-1, 1]")
    return ratio, r


def is_line(r: Any) -> bool:
    """Whether `r`, as `check_amount` leaves it, is (r, slope) and not one number per block: its slope is a float."""
    return isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float)


def amounts(owner: str, ratio: Any, r: Any, depth: int) -> tuple[float | int, ...]:
    """One entry per layer: a float is a ratio, an int is r."""
    if r is None:
        if not isinstance(ratio, tuple):
            return (float(ratio),) * depth
        if len(ratio) != depth:
            raise ConfigError(f"{owner}(ratio=[{len(ratio)} values]): the model has {depth} blocks; give one per block")
        return tuple(float(v) for v in ratio)
    if not isinstance(r, tuple):
        return (int(r),) * depth
    if is_line(r):
        return _line(int(r[0]), float(r[1]), depth)
    if len(r) > depth:
        raise ConfigError(f"{owner}(r=[{len(r)} values]): the model has only {depth} blocks")
    return tuple(int(v) for v in r) + (0,) * (depth - len(r))


def per_layer(owner: str, name: str, value: Any, depth: int) -> tuple[Any, ...]:
    """A setting that may be one value or one per block, as one per block."""
    if not isinstance(value, tuple):
        return (value,) * depth
    if len(value) != depth:
        raise ConfigError(f"{owner}({name}=[{len(value)} values]): the model has {depth} blocks; give one per block")
    return value


def chosen_layers(owner: str, layers: tuple[int, ...] | None, depth: int, *, name: str = "layers") -> frozenset[int]:
    """The blocks that a setting called `name` chooses; negative indices count from the end."""
    if layers is None:
        return frozenset(range(depth))
    for layer in layers:
        if not -depth <= layer < depth:
            raise ConfigError(f"{owner}({name}={list(layers)}): the model has blocks 0..{depth - 1}")
    return frozenset(layer % depth for layer in layers)


def whole_numbers(owner: str, name: str, value: Any) -> tuple[int, ...]:
    """A sequence of ints from a user, hashable."""
    found = numbers(owner, name, value, int)
    return found if isinstance(found, tuple) else (found,)


def number(owner: str, name: str, value: Any, kind: type) -> Any:
    """A single number from a user."""
    found = numbers(owner, name, value, kind)
    if isinstance(found, tuple):
        raise ConfigError(f"{owner}({name}={value!r}): expected one number")
    return found


def numbers(owner: str, name: str, value: Any, kind: type) -> Any:
    """A number or a tuple of numbers; strings and booleans are refused."""
    many = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if many else [value]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, Real):  # numpy's scalars are Real too
            raise ConfigError(f"{owner}({name}={value!r}): expected a number or a sequence of numbers")
        if not math.isfinite(v):
            raise ConfigError(f"{owner}({name}={value!r}): must be finite")
        if kind is int and not float(v).is_integer():
            raise ConfigError(f"{owner}({name}={value!r}): expected whole numbers")
    plain = [int(v) if kind is int or isinstance(v, Integral) else float(v) for v in values]
    return tuple(plain) if many else plain[0]


def _line(r: int, slope: float, depth: int) -> tuple[int, ...]:
    if depth == 1:
        return (r,)
    low = int(r * (1.0 - slope))
    step = (2 * r - low - low) / (depth - 1)
    return tuple(int(low + step * layer) for layer in range(depth))
