"""How many tokens each layer removes: `ratio` or `r`, the same everywhere, per layer, or along a line.

Source: docs/methods/pitome.md 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtoken import checks
from vtoken.errors import ConfigError

DEFAULT_RATIO = 0.925


class PerBlock(tuple[int, ...]):
    """One number per block. It is shown and written as a list, and is never equal to a line: [8, 1] is not (8, 1)."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(list(self))

    def __eq__(self, other: object) -> bool:
        return not is_line(other) and tuple.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


def check_amount(owner: str, ratio: Any, r: Any) -> tuple[Any, Any]:
    """Validate `ratio` and `r` of a config; returns them hashable, with the default ratio if both are None."""
    if ratio is not None and r is not None:
        raise ConfigError(f"{owner}(ratio={ratio!r}, r={r!r}): give ratio or r, not both")
    if ratio is None and r is None:
        ratio = DEFAULT_RATIO
    return None if ratio is None else _checked_ratio(owner, ratio), None if r is None else _checked_r(owner, r)


def _checked_ratio(owner: str, ratio: Any) -> Any:
    what = "expected a number or a sequence of numbers; each "
    ratio = checks.one_or_several(owner, "ratio", ratio, checks.number, what=what)
    for value in ratio if isinstance(ratio, tuple) else (ratio,):
        if not 0.0 < value <= 1.0:
            hint = f" Did you mean ratio={2 - value:.4g}?" if 1.0 < value < 2.0 else ""
            hint = f" Did you mean ratio={value / (10 if value < 10 else 100):.4g}?" if 2.0 <= value <= 100.0 else hint
            raise ConfigError(
                f"{owner}(ratio={value!r}): ratio is the share of tokens kept per layer, must be in (0, 1].{hint}"
            )
    return ratio


def _checked_r(owner: str, r: Any) -> int | PerBlock | tuple[int, float]:
    if isinstance(r, Mapping):  # a line in JSON, which has no tuples
        if set(r) != {"r", "slope"}:
            raise ConfigError(
                f"{owner}(r={r!r}): expected a number or a sequence of numbers; "
                'a line is {"r": number, "slope": number}'
            )
        r = (r["r"], r["slope"])
    if isinstance(r, tuple) and not isinstance(r, PerBlock) and len(r) == 2:
        wrong = f"{owner}(r={r!r}): as (r, slope), r must be a whole number and slope within [-1, 1]"
        wrong += "; write one number per block as a list"
        try:
            return _count(owner, r[0]), checks.number(owner, "r", r[1], -1, 1)
        except ConfigError as error:
            raise ConfigError(f"{wrong} ({error})") from error
    values = checks.several(r)
    return _count(owner, r) if values is None else PerBlock([_count(owner, value) for value in values])


def _count(owner: str, value: Any) -> int:
    """A number of tokens; 8.0 is one, as schedules are often computed."""
    found = checks.number(owner, "r", value, what="expected a number or a sequence of numbers; each ")
    if found < 0 or found != int(found):
        raise ConfigError(f"{owner}(r={value!r}): r counts removed tokens; whole numbers from 0 on")
    return int(found)


def is_line(r: object) -> bool:
    """Whether `r`, as `check_amount` leaves it, is (r, slope)."""
    return isinstance(r, tuple) and not isinstance(r, PerBlock) and len(r) == 2


def as_json(r: Any) -> Any:
    """`r`, as `check_amount` leaves it, in a form that keeps its meaning where tuples become lists."""
    return {"r": r[0], "slope": r[1]} if is_line(r) else list(r) if isinstance(r, tuple) else r


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
        return _line(r[0], r[1], depth)
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


def _line(r: int, slope: float, depth: int) -> tuple[int, ...]:
    if depth == 1:
        return (r,)
    low = int(r * (1.0 - slope))
    step = (2 * r - low - low) / (depth - 1)
    return tuple(int(low + step * layer) for layer in range(depth))
