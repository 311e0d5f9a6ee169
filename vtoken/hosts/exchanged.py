"""What stands where modules stood, for one call of the model around them; nothing is written to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vtoken.core.calling import call_with


class Exchanged:
    """Stands where a module stood; a call is one of the module itself, with some of its attributes exchanged."""

    def __init__(self, module: Any, parts: dict[str, Any]) -> None:
        self._module, self._parts = module, parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_with(self._module, self._parts, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Overheard:
    """Stands where a module stood; calls go to it, and what goes in or comes out is read."""

    def __init__(
        self,
        module: Any,
        before: Callable[[Tensor], None] | None = None,
        behind: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._module, self._before, self._behind = module, before, behind

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            self._before(x)
        out = self._module(x, *args, **kwargs)
        if self._behind is not None:
            self._behind(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def with_layers(module: Any, path: tuple[str, ...], stand_in: Callable[[Any], Any]) -> dict[str, Any]:
    """What stands in a module, for one call, while `stand_in(layers)` is in the place of the layers behind `path`."""
    name, *rest = path
    child = getattr(module, name)
    return {name: Exchanged(child, with_layers(child, tuple(rest), stand_in)) if rest else stand_in(child)}
