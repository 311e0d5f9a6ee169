"""What users give, checked when it is given: one message for each kind of number, choice, flag and tensor.

`owner` and `name` say where a value was given: owner(name=value). What comes back is plain Python, so that settings can
be compared, hashed and written as JSON whatever kind of number came in; numpy's numbers are numbers, booleans are not.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError, InputError, ShapeError, VTokenError

if TYPE_CHECKING:  # so that settings can be read without torch
    from torch import Tensor


def whole(
    owner: str,
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    what: str = "",
    error: type[VTokenError] = ConfigError,
) -> int:
    """A whole number from `least` to `most`, both included; raises `error` for anything else.

    Sizes that are symbols while a graph is captured stay symbols.
    """
    number = value
    if type(value) is not int and type(value).__name__ != "SymInt":
        number = None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if number is not None and (least is None or number >= least) and (most is None or number <= most):
        return number
    bounds = "" if least is None else f" from {least} on" if most is None else f" from {least} to {most}"
    raise error(f"{owner}({name}={value!r}): {what}must be a whole number{bounds}")


def number(
    owner: str,
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    what: str = "",
    error: type[VTokenError] = ConfigError,
) -> float:
    """A finite number as a float, within bounds that belong to it (`least`, `most`) or not (`above`, `below`)."""
    found = type(value) is float or type(value).__name__ == "SymFloat"
    if not found and isinstance(value, Real) and not isinstance(value, bool):
        found = True
    if found:
        try:
            x: Any = value if type(value).__name__ == "SymFloat" else float(value)
        except OverflowError:  # an int beyond every float
            x = math.inf
        if (
            -math.inf < x < math.inf
            and (least is None or x >= least)
            and (most is None or x <= most)
            and (above is None or x > above)
            and (below is None or x < below)
        ):
            return x  # type: ignore[no-any-return]
    raise error(f"{owner}({name}={value!r}): {what}must be {_range(found, least, most, above, below)}")


def share(owner: str, name: str, value: Any, *, what: str = "", error: type[VTokenError] = ConfigError) -> float:
    """A number in (0, 1]: what is kept of something."""
    return number(owner, name, value, most=1, above=0, what=what, error=error)


def flag(owner: str, name: str, value: Any, *, error: type[VTokenError] = ConfigError) -> bool:
    """True or False, and nothing that merely counts as one of them ("no" is true)."""
    if value is True or value is False:
        return bool(value)
    raise error(f"{owner}({name}={value!r}): must be True or False")


def choice(
    owner: str, name: str, value: Any, allowed: Sequence[str], *, error: type[VTokenError] = ConfigError
) -> str:  # fmt: skip
    """One of the allowed words."""
    if isinstance(value, str) and value in allowed:
        return value
    raise error(f"{owner}({name}={value!r}): {name} must be one of {', '.join(allowed)}{hint(value, allowed)}")


def hint(value: object, known: Sequence[str]) -> str:
    """ " (did you mean 'x'?)" for the known word nearest to a mistyped one, or nothing."""
    near = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def several(value: Any) -> tuple[Any, ...] | None:
    """The entries of a list, a tuple, a range or an array; None for what is one value (a string is)."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else None


def one_or_several(owner: str, name: str, value: Any, check: Callable[..., Any], *bounds: Any, **options: Any) -> Any:
    """`check(owner, name, value, ...)` of one value, or the tuple of it for every entry."""
    values = several(value)
    if values is None:
        return check(owner, name, value, *bounds, **options)
    return tuple([check(owner, name, entry, *bounds, **options) for entry in values])


def wholes(owner: str, name: str, value: Any, least: int | None = None, *, what: str = "") -> tuple[int, ...]:
    """Several whole numbers, each at least `least`; a single one counts as a list of it."""
    found = one_or_several(owner, name, value, whole, least, what=what)
    return found if isinstance(found, tuple) else (found,)


def whole_numbers(values: Sequence[Any]) -> tuple[int, ...] | None:
    """The values as ints if all are whole numbers, also numpy's; None if not. A bool is no number."""
    if not all(isinstance(v, Integral) and not isinstance(v, bool) for v in values):
        return None
    return tuple(int(v) for v in values)


def grid(owner: str, name: str, value: Any, *, error: type[VTokenError] = ConfigError) -> tuple[int, int]:
    """(rows, columns) of a patch grid, each at least 1."""
    entries = several(value)
    sides = None if entries is None else whole_numbers(entries)
    if sides is None or len(sides) != 2 or min(sides) < 1:
        raise error(f"{owner}({name}={value!r}): must be (rows, columns), whole numbers from 1 on")
    return sides[0], sides[1]


def tensor(owner: str, name: str, value: Any, *dims: int, shape: str = "") -> Tensor:
    """A torch tensor, of one of the given numbers of dimensions if any are given; `shape` says what they are."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        wanted = f" {shape}" if shape else ""
        raise InputError(f"{owner}({name}=...): must be a torch.Tensor{wanted}, got {type(value).__name__}")
    if dims and value.dim() not in dims:
        raise ShapeError(f"{owner}: {name} must be {shape}, got {tuple(value.shape)}")
    return value


def share_of(share: float, count: int) -> int:
    """ceil(share * count), at least 1: how many of `count` things a share in (0, 1] keeps.

    The 1e-6 is more than float products miss by (0.1 * 30 is a little over 3), and written out, because a graph whose
    sizes are symbols would make an argument of a global number.
    """
    return max(1, math.ceil(share * count - 1e-6))


def _range(is_number: bool, least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    low, high = above if least is None else least, below if most is None else most
    if low is None and high is None:
        return "finite" if is_number else "a finite number"
    if high is None:
        return f"a finite number from {low:g} on" if above is None else f"a finite number above {low:g}"
    if low is None:
        return f"a finite number up to {high:g}" if below is None else f"a finite number below {high:g}"
    ends = "[" if above is None else "(", "]" if below is None else ")"
    return f"{'' if is_number else 'a number '}in {ends[0]}{low:g}, {high:g}{ends[1]}"
