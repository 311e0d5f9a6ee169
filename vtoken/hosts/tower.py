"""What all towers of blocks share: binding one forward's state to the blocks, reading their attention, dense maps."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtoken.core.calling import call, is_heard
from vtoken.core.method import KeepAll
from vtoken.core.patch import PREDICTOR, base_of, forward_with
from vtoken.core.slots import AttentionCall, Slot
from vtoken.core.state import TokenState
from vtoken.core.trace import DROPPED
from vtoken.core.watch import Reader
from vtoken.errors import ShapeError, UnsupportedModelError, VTokenWarning
from vtoken.ops.merging.matching import summed_keys
from vtoken.ops.rows import take_rows


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
    return BoundBlocks(container, calls)


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


class BoundBlocks:
    """Stands where a model's `blocks` stood, for one call of the model: they can be called, iterated over or sliced.

    Args:
        container: what stood there.
        calls: the blocks, each bound to what belongs to this call.
        watched: whether the tower is unpatched and its blocks are read; its container then has any class.
    """

    def __init__(self, container: nn.Module, calls: list[Callable[..., Tensor]], *, watched: bool = False) -> None:
        self._container = container
        self._calls = calls
        self._watched = watched

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter(self._calls)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return BoundBlocks(self._container, self._calls[index], watched=self._watched)
        return self._calls[index]

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


def is_heard_within(block: nn.Module) -> bool:
    """Whether `is_heard` holds for a module inside `block`."""
    left = [block]
    for module in left:  # which grows: asked at every call of a compiled block, so without recursion
        for child in module._modules.values():
            if child is not None:
                if is_heard(child):
                    return True
                if child._modules:
                    left.append(child)
    return False


def through(module: Any, x: Tensor) -> Tensor:
    """`module(x)`, without the call where it is an identity, or dropout at rest, that nobody listens to."""
    kind = type(module)
    if (kind is nn.Identity or (kind is nn.Dropout and not module.training)) and not is_heard(module):
        return x
    result: Tensor = module(x)
    return result


class Tap(Reader):
    """Goes along with one attention call of a patched tower and holds what the blocks' method asks for.

    Args:
        state: of this forward.
        layer: of the block.
        removes: whether the block removes tokens, so that its method will ask for what it chooses by.
    """

    def __init__(self, state: TokenState, layer: int, *, removes: bool) -> None:
        self._state = state
        self._layer = layer
        self._wanted = state.method.metric if removes else "hidden"
        super().__init__(
            wants_keys=self._wanted == "key" or self._wanted == "key_concat",
            row=None if state.watch is None else state.watch.row(layer, state),
        )
        self._cls: Tensor | None = None

    def attend(self, attn: Any, x: Tensor, **options: Any) -> Any:
        """Call the attention `attn` of the block on normed tokens [B, T, C], with this tap if it has anything to do."""
        if self.wants_keys or self.row is not None or self.acts_in(attn):
            if not getattr(attn, "_vtoken_takes_tap", False):
                raise changed(f"the attention of block {self._layer}", attn)
            return attn(x, vtoken_tap=self, **options)
        if options and getattr(attn, "_vtoken_adds_sizes", False) and self.has_sizes:
            return attn(x, vtoken_tap=self, **options)
        return attn(x, **options)

    def acts_in(self, attn: Any) -> bool:
        """Whether the method that `attn` carries must run because plain attention is not, to the bit, what it does."""
        attention, maps = self._state.attention, self._state.maps
        if attention is None or PREDICTOR not in attn._modules:
            return False
        return not attention.is_stock(self._layer) or maps is not None or self._wanted == "cls"

    @property
    def may_keep_all(self) -> bool:
        """Whether the block may turn out to remove nothing, so that its attention must be stock, to the bit."""
        return not self._state.method.exact

    @property
    def has_sizes(self) -> bool:
        """Whether tokens have merged before, so that a mask of the attention is the term of their sizes."""
        return self._state.slots[self._layer].size is not None

    @classmethod
    def alone(cls, attn: Any, tokens: int) -> Tap:
        """For an attention that is called by itself, outside a forward of its model."""
        state = TokenState(KeepAll(), attn._vtoken_prefix, track_anchor=False, track_dest=False,
                           attention=attn._vtoken_method)  # fmt: skip
        state.first = replace(state.first, embedded=tokens)
        state.slots = {attn._vtoken_index: state.first}
        return cls(state, attn._vtoken_index, removes=False)

    def call(self, scale: float, mask: Tensor | None, dropout: float) -> AttentionCall:
        """What the attention method is told."""
        return self._state.call(self._layer, scale=scale, mask=mask, dropout=dropout, wants_cls=self._wanted == "cls")

    def done(self, call: AttentionCall, keys: Tensor) -> None:
        """Take over what the attention method left."""
        self._cls = call.cls
        if self.wants_keys:
            self.keys = keys

    def metric(self, x: Tensor) -> Tensor:
        """What the method chooses by, [B, T, d]; `x` are the tokens that it will choose among."""
        if self._wanted == "hidden":
            return x
        if self._wanted == "cls":
            if self._cls is None:
                raise RuntimeError("the attention left no class row, so there is nothing to rank tokens by")
            return self._cls.detach().mean(1).unsqueeze(-1)
        if self.keys is None:
            raise RuntimeError("the attention never called its key norm, so there are no keys to compare tokens by")
        if self._wanted == "key":
            return summed_keys(self.keys)
        return self.keys.detach().transpose(1, 2).flatten(2)


class TappedMixin:
    """An attention that shows its keys: its own forward runs with a tap behind the modules that make them."""

    _vtoken_takes_tap: ClassVar[bool] = True
    #: The norms or projections of keys and queries.
    _vtoken_keys: ClassVar[str] = "k_norm"
    _vtoken_queries: ClassVar[str] = "q_norm"

    def forward(self: Any, *args: Any, vtoken_tap: Tap | None = None, **options: Any) -> Any:
        if vtoken_tap is None:
            return super().forward(*args, **options)  # type: ignore[misc]
        return forward_with(self, vtoken_tap.parts(self, self._vtoken_keys, self._vtoken_queries), *args, **options)


def stock_with(block: Any, stock: Callable[..., Any], name: str, x: Tensor, tap: Tap, **options: Any) -> Any:
    """The block's own forward; where its attention `name` carries a method, with the tap along."""
    attn = getattr(block, name)
    if not tap.acts_in(attn):
        return stock(x, **options)
    return tapped_forward(block, name, tap, x, **options)


def tapped_forward(block: Any, name: str, tap: Tap, *args: Any, **options: Any) -> Any:
    """The block's own forward, whose attention `name` is called with the tap."""
    attn = functools.partial(getattr(block, name), vtoken_tap=tap)
    return forward_with(block, {name: attn}, *args, **options)


def block_targets(
    methods: Mapping[str, Any],
    container: Any,
    parts: Callable[[Any], tuple[type, Any, type]],
    *,
    num_prefix: int,
    sparse: Collection[type] = (),
) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """What `patch` needs for the blocks of a tower, their container and their attentions.

    Args:
        container: holds the blocks.
        parts: of a block its mixin, its attention and the mixin of that.
        num_prefix: class, register and distillation tokens.
        sparse: the classes of attention whose core an attention method may replace.

    Raises:
        UnsupportedModelError: if an attention that an attention method chose is not among `sparse`.
    """
    found: list[tuple[nn.Module, type, dict[str, Any]]] = []
    if isinstance(container, nn.Sequential):  # a list is never called
        found.append((container, ContainerMixin, {}))
    blocks, method = list(container), methods.get("on_attention")
    shared = {"_vtoken_shared": Patched()} if "on_block" in methods else {}
    for index, block in enumerate(blocks):
        mixin, attn, attention_mixin = parts(block)
        found.append((block, mixin, {"_vtoken_index": index, "_vtoken_depth": len(blocks), **shared}))
        chosen = method is not None and method.acts_on(index)
        attributes: dict[str, Any] = {}
        if chosen:
            _check_attention(index, block.attn, sparse)
            attributes = {"_vtoken_index": index, "_vtoken_method": method, "_vtoken_prefix": num_prefix}
        found.append((attn, attention_mixin, attributes))
    return found


def mixin_for(module: Any, mixins: Mapping[type, type]) -> type:
    """The mixin of the first known class among those of a module, patched or not."""
    return mixins[next(base for base in base_of(type(module)).__mro__ if base in mixins)]


def _check_attention(index: int, attn: Any, sparse: Collection[type]) -> None:
    """Whether an attention method can serve the attention of block `index`."""
    kind: Any = base_of(type(attn))
    if not any(cls in sparse and kind.forward is cls.forward for cls in kind.__mro__) or PREDICTOR in attn._modules:
        known = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in sparse)
        raise UnsupportedModelError(
            f"cannot put connectivity masks into this model: the attention of block {index} is a "
            f"{kind.__module__}.{kind.__qualname__}; supported: {known}. The model was left as it was."
        )


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that differ from their default (None or False); older hosts do not know all of them."""
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


def gather_rope(rope: Tensor, slot: Slot, num_prefix: int) -> Tensor:
    """Rows of a rotary table for the tokens that are left: each keeps the rotation of its anchor.

    Args:
        rope: (N0, 2D) shared, (H, N0, 2D) per head, or with a batch, (B, 1 or H, N0, 2D).

    Returns:
        The table itself before the first merge, else (B, 1 or H, N, 2D).
    """
    if slot.anchor is None:
        return rope
    rows = slot.anchor[:, num_prefix:] - num_prefix  # [B, N]
    if rope.dim() == 2:
        return rope[rows].unsqueeze(1)
    if rope.dim() == 3:
        return rope[:, rows].transpose(0, 1)
    return rope.gather(2, rows[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))


def spread(rows: Tensor, slot: Slot, num_prefix: int, grid: tuple[int, int]) -> Tensor:
    """Patch rows [B, N, C] of one layer as the dense map [B, C, H, W]: every patch shows its group's value.

    Raises:
        ShapeError: if patches were dropped before the first block, so that no dense map exists.
    """
    if slot.dest is not None:
        if slot.dropped:
            raise ShapeError(DROPPED)
        rows = take_rows(rows, slot.dest[:, num_prefix:] - num_prefix)
    height, width = grid
    if rows.shape[1] != height * width:
        raise ShapeError(
            f"no dense map: {rows.shape[1]} patch tokens entered the blocks, the grid has {height} x {width} (patch "
            "dropout drops them while training); use output_fmt='NLC' or model.eval()"
        )
    # Contiguous as the hosts hand it out: a caller may `view` it, and convolutions add in another order otherwise.
    return rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], height, width).contiguous()
