"""Options of a wrapper module as its attributes: those that may change are checked when set, the others say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vtoken.errors import ConfigError


def held(holder: str, name: str, check: Callable[[Any, Any], None] | None = None) -> Any:
    """A property that is a field of the frozen, self-validating dataclass in attribute `holder`.

    Args:
        check: further test of the changed dataclass, called with the wrapper and it.
    """

    def get(self: Any) -> Any:
        return getattr(getattr(self, holder), name)

    def set_(self: Any, value: Any) -> None:
        changed = replace(getattr(self, holder), **{name: value})
        if check is not None:
            check(self, changed)
        setattr(self, holder, changed)

    return property(get, set_)


def checked(name: str, check: Callable[[Any, Any], Any]) -> Any:
    """A property that keeps its value in `_name`, once `check`, called with the wrapper and it, has not raised."""
    place = f"_{name}"

    def get(self: Any) -> Any:
        return getattr(self, place)

    def set_(self: Any, value: Any) -> None:
        check(self, value)
        setattr(self, place, value)

    return property(get, set_)


def fixed(name: str) -> Any:
    """A property in the wrapper's dict `_fixed`, which was used up when the wrapper was built."""

    def get(self: Any) -> Any:
        return self._fixed[name]

    def set_(self: Any, value: Any) -> None:
        raise ConfigError(
            f"{name} is used when {type(self).__name__} is built and cannot be changed later: wrap the model again "
            f"with {name}={value!r}"
        )

    return property(get, set_)
