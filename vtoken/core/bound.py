"""The blocks of a patched model with one forward's state, in the place of its own list of blocks."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.calling import call, is_heard
from vtoken.core.patch import additions
from vtoken.core.state import TokenState
from vtoken.errors import UnsupportedModelError, VTokenWarning


@dataclass(eq=False)
class Patched:
    """What the blocks of one tower that loses tokens share.

    Args:
        told: whether somebody who ran them past the tower has been told.
    """

    told: bool = False


def alone(block: Any) -> None:
    """A block is called without the state of a forward: say once per tower that nothing is removed there."""
    shared: Patched | None = block.__dict__.get("_vtoken_shared")
    if shared is not None and not shared.told:
        _tell(shared, type(block).__name__)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tell(shared: Patched, name: str) -> None:
    shared.told = True
    message = (
        f"a {name} of a patched model was called past the model's own entry methods: it removes no tokens there. Call "
        "the model (model(...), forward_features, forward_intermediates), or vtoken.remove(model) first"
    )
    warnings.warn(message, VTokenWarning, stacklevel=_caller())


def _caller() -> int:
    """Frames up to the user's own line, for a warning that names it."""
    frame, level = inspect.currentframe(), 0
    libraries = ("torch", "vtoken", "timm", "open_clip", "transformers")
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in libraries:
        frame, level = frame.f_back, level + 1
    return level


def bound(container: Any, state: TokenState, layers: list[Callable[..., Tensor]] | None = None) -> BoundBlocks:
    """The blocks of a patched model with one forward's state, numbered by their place.

    Args:
        container: holds the blocks, in order.
        layers: what is called in their place; None means the blocks.

    Raises:
        UnsupportedModelError: if they are not those that the method was applied to.
    """
    blocks = list(container)
    for place, block in enumerate(blocks):
        if getattr(block, "_vtoken_index", None) != place:
            _renumber(blocks)
            break
    called = blocks if layers is None else layers
    calls: list[Callable[..., Tensor]] = [functools.partial(layer, vtoken_state=state) for layer in called]
    return BoundBlocks(container, blocks, calls)


def _renumber(blocks: list[Any]) -> None:
    """Blocks were taken away since `apply`: number the others by their place."""
    for place, block in enumerate(blocks):
        if getattr(block, "_vtoken_index", None) is None:
            raise changed(f"block {place}", block)
    depth = min(block._vtoken_depth for block in blocks)
    if len({id(block) for block in blocks}) < len(blocks) or len(blocks) > depth:
        raise UnsupportedModelError(
            f"the model has {len(blocks)} blocks, some of them twice or from elsewhere; it had {depth} at "
            "vtoken.apply. Call vtoken.remove(model), then vtoken.apply again"
        )
    for place, block in enumerate(blocks):
        for module in block.modules():
            if "_vtoken_index" in module.__dict__:
                module.__dict__["_vtoken_index"] = place


def changed(what: str, module: Any) -> UnsupportedModelError:
    """The error for a part that was replaced since `apply`."""
    return UnsupportedModelError(
        f"{what} was replaced by a {type(module).__module__}.{type(module).__qualname__} after vtoken.apply; merging "
        "would bypass it. Call vtoken.remove(model), change it, then vtoken.apply again"
    )


class BoundBlock:
    """A block as a loop is handed it: a call is the one bound to what belongs to the loop, attributes are its own."""

    def __init__(self, block: Any, call: Callable[..., Tensor]) -> None:
        self._block, self._call = block, call

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)


class BoundBlocks:
    """Stands where a model's `blocks` stood, for one call of the model: they can be called, iterated over or sliced.

    Args:
        container: what stood there; its attributes can be read.
        blocks: those in it that are called.
        calls: these, each bound to what belongs to this call.
        watched: whether the tower is unpatched and its blocks are read; its container then has any class.
    """

    def __init__(
        self, container: nn.Module, blocks: list[Any], calls: list[Callable[..., Tensor]], *, watched: bool = False
    ) -> None:
        self._container = container
        self._blocks = blocks
        self._calls = calls
        self._watched = watched

    def __len__(self) -> int:
        return len(self._calls)

    def __bool__(self) -> bool:
        return bool(self.__dict__.get("_calls", True))  # torch 2.11's compiler asks one that it has not filled yet

    def __iter__(self) -> Iterator[BoundBlock]:
        return iter([BoundBlock(*each) for each in zip(self._blocks, self._calls, strict=True)])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return BoundBlocks(self._container, self._blocks[index], self._calls[index], watched=self._watched)
        return BoundBlock(self._blocks[index], self._calls[index])

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_container"), name)

    def __call__(self, x: Tensor) -> Tensor:
        # Through the container's own call, so that hooks which the user put on it run.
        container: Any = self._container
        if hasattr(type(container), "_vtoken_base"):
            result: Tensor = container(x, vtoken_blocks=self)
            return result
        if is_heard(container) and not self._watched:
            raise changed("the container of the blocks", container)
        result = call(container, self.run, x)
        return result

    def run(self, x: Tensor) -> Tensor:
        """The blocks one after the other."""
        for block in self._calls:
            x = block(x)
        return x


class ContainerMixin:
    """`nn.Sequential` that holds the blocks."""

    def forward(self, input: Any, vtoken_blocks: BoundBlocks | None = None) -> Any:
        if vtoken_blocks is None:
            return super().forward(input)  # type: ignore[misc]
        return vtoken_blocks.run(input)

    def __getitem__(self: Any, idx: Any) -> Any:
        found = super().__getitem__(idx)  # type: ignore[misc]
        if isinstance(idx, slice):  # of the class of the whole, which may take its place: `remove` must find it
            found.__dict__.update(additions(self))
        return found
