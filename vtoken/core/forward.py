"""One forward of a patched model: its state, and what a trace that was asked for takes over from it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from vtoken.core.method import AttentionMethod, BlockMethod, KeepAll, Methods
from vtoken.core.state import TokenState
from vtoken.core.trace import Trace, current_trace

Grid = tuple[int, int]


class forward_of:
    """Makes the state of one forward of a patched model; at the end a trace, if one was asked for, takes it over.

    Args:
        model: what `vtoken.apply` gave the method to: the module whose entry method runs.
        num_prefix: class, register and distillation tokens P, in front.
        grid: patch rows and columns of this call's images, None where they are not known; called where they are needed.
        anchor, dest: whether the host needs to know which rows tokens keep, and where every row went. A trace and
            connectivity masks do in any case.

    Example:
        with forward_of(self, 1, lambda: (14, 14)) as state:
            return forward_with(self, {"blocks": bound(self.blocks, state)}, x)
    """

    def __init__(
        self, model: Any, num_prefix: int, grid: Callable[[], Grid | None], *, anchor: bool = False, dest: bool = False
    ) -> None:
        carried, methods = model.__dict__.get("_vtoken"), applied_methods(model)
        attention: AttentionMethod | None = methods.get(AttentionMethod)
        method = block_method(model)
        self._trace: Trace | None = current_trace(model)
        traced = self._trace is not None
        self._state = TokenState(
            method,
            num_prefix,
            # A connectivity mask of fewer tokens must know which they were.
            track_anchor=anchor or traced or (attention is not None and BlockMethod in methods),
            track_dest=dest or traced,
            attention=attention,
            maps=None if self._trace is None else self._trace.maps,
            compiled=None if carried is None else carried.compiled,
        )
        if traced or attention is not None:
            self._state.grid = grid()

    def __enter__(self) -> TokenState:
        return self._state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:  # fmt: skip
        self._state.watch = None  # which may hold the state: the two would wait for the garbage collector
        if kind is None and self._trace is not None and self._state.embedded is not None:
            self._trace.record(self._state)


def applied_methods(model: Any) -> Methods:
    """What is applied to a patched model itself, by kind; nothing if it is only watched."""
    carried = model.__dict__.get("_vtoken")
    return {} if carried is None else carried.methods


def masks_attention(model: Any, depth: int) -> bool:
    """Whether connectivity masks thin out the attention of any of the `depth` blocks of a patched model."""
    attention: AttentionMethod | None = applied_methods(model).get(AttentionMethod)
    return attention is not None and any(attention.acts_on(i) and not attention.is_stock(i) for i in range(depth))


def block_method(model: Any) -> BlockMethod:
    """What removes tokens in a patched model."""
    method: BlockMethod = applied_methods(model).get(BlockMethod) or KeepAll()
    return method
