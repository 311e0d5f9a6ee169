"""What all towers of blocks share: binding one forward's state to the blocks, the merged block, dense maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vtoken.core.errors import InputError, ShapeError, UnsupportedModelError
from vtoken.core.host import HostSpec
from vtoken.core.method import AttentionMethod, BlockMethod, KeepAll
from vtoken.core.patch import PREDICTOR, base_of, view
from vtoken.core.state import AttentionCall, Slot, TokenState
from vtoken.core.trace import DROPPED, current_trace
from vtoken.ops import key_metric
from vtoken.ops.rows import take_rows


def begin(model: Any, num_prefix: int, *, anchor: bool, dest: bool) -> TokenState:
    """The state of one forward of a patched model.

    Args:
        anchor, dest: whether the host needs them; a trace does in any case.
    """
    methods, trace = model._vtoken.methods, current_trace(model)
    method: BlockMethod = methods.get("on_block") or KeepAll()
    attention: AttentionMethod | None = methods.get("on_attention")
    # A connectivity mask of fewer tokens must know which they were.
    follows = attention is not None and "on_block" in methods
    return TokenState(
        method,
        num_prefix,
        track_anchor=anchor or follows or trace is not None,
        track_dest=dest or trace is not None,
        attention=attention,
        maps=None if trace is None else trace.maps,
    )


def block_method(model: Any) -> BlockMethod:
    """What removes tokens in a patched model."""
    method: BlockMethod = model._vtoken.methods.get("on_block") or KeepAll()
    return method


class BoundBlocks:
    """Stands where a model's `blocks` stood, for one forward: the same blocks, each called with the state."""

    def __init__(self, container: nn.Module, blocks: list[Callable[..., Tensor]], state: TokenState) -> None:
        self._container = container
        self._blocks = blocks
        self._state = state

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter([functools.partial(block, vtoken_state=self._state) for block in self._blocks])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return BoundBlocks(self._container, self._blocks[index], self._state)
        return functools.partial(self._blocks[index], vtoken_state=self._state)

    def __call__(self, x: Tensor) -> Tensor:
        # Through the container's own call, so that hooks which the user put on it run.
        result: Tensor = view(self._container, forward=self._run)(x)
        return result

    def _run(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Tap:
    """Goes along with one attention call and holds what the blocks' method asks for.

    Args:
        state: of this forward.
        layer: of the block.
        removes: whether the block removes tokens, so that its method will ask for what it chooses by.
    """

    def __init__(self, state: TokenState, layer: int, *, removes: bool) -> None:
        self._state = state
        self._layer = layer
        self._wanted = state.method.metric if removes else "hidden"
        #: Keys [B, H, T, D], once the attention has run.
        self.keys: Tensor | None = None
        self._cls: Tensor | None = None

    def on(self, attn: Any, norm: str) -> Any:
        """The attention with this tap: behind its key norm, the module called `norm`, or inside its own method."""
        if self._state.attention is not None and self.acts_in(attn):
            return functools.partial(attn, vtoken_tap=self)
        if self._wanted in ("key", "key_concat"):
            return view(attn, **{norm: functools.partial(self._keep, getattr(attn, norm))})
        return view(attn) if PREDICTOR in attn._modules else attn

    def acts_in(self, attn: Any) -> bool:
        """Whether the method that `attn` carries must run because plain attention is not, to the bit, what it does."""
        attention, maps = self._state.attention, self._state.maps
        if attention is None or PREDICTOR not in attn._modules:
            return False
        return not attention.is_stock(self._layer) or maps is not None or self._wanted == "cls"

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
        if self._wanted in ("key", "key_concat"):
            self.keys = keys

    def _keep(self, norm: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        self.keys = norm(keys)
        return self.keys

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
            return key_metric(self.keys)
        return self.keys.detach().transpose(1, 2).flatten(2)


def _refuse_mask(attention: dict[str, Any]) -> None:
    """A caller's mask names rows of the full sequence; after a merge those rows are no longer there."""
    if attention.get("attn_mask") is not None or attention.get("is_causal"):
        what = "is_causal=True" if attention.get("is_causal") else "an attention mask"
        raise InputError(
            f"{what} cannot be combined with removed tokens: it names rows of the full sequence. Masked attention and "
            "padded (NaFlex) batches need the full model; use vtoken.remove(model)"
        )


def merged_block(
    block: Any,
    state: TokenState,
    x: Tensor,
    stock: Callable[..., Tensor],
    **attention: Any,
) -> Tensor:
    """One block of a tower that loses tokens.

    Args:
        block: has `_vtoken_index` and its two residual branches as `_vtoken_attn(x, tap, **attention)`, which runs its
            attention with the tap, and `_vtoken_mlp(x)`.
        state: of this forward.
        x: tokens [B, T, C].
        stock: called as stock(x, tap, **attention) where nothing is removed: the block's own forward.
        attention: further arguments of the block's attention.
    """
    layer: int = block._vtoken_index
    state.enter(layer, x)
    removes = state.removes(layer, x.shape[1])
    if attention and (removes or state.slots[layer] is not state.first):
        _refuse_mask(attention)
    bias = state.bias(layer, x.dtype)
    if bias is not None:
        attention["attn_mask"] = bias
    tap = Tap(state, layer, removes=removes)
    if not removes:
        state.skip(layer)
        return stock(x, tap, **attention)
    x = x + block._vtoken_attn(x, tap, **attention)
    if state.method.insert == "after":
        # The keys are a view of the whole q, k, v projection: reduce them at once, so that it is freed before the MLP.
        early = None if state.method.metric == "hidden" else tap.metric(x)
        del tap
        x = x + block._vtoken_mlp(x)
        return state.on_block(layer, x, x if early is None else early)
    metric = tap.metric(x)
    del tap
    x = state.on_block(layer, x, metric)
    return x + block._vtoken_mlp(x)


def stock_with(block: Any, stock: Callable[..., Any], name: str, norm: str, x: Tensor, tap: Tap, **options: Any) -> Any:
    """The block's own forward; where its attention `name` carries a method, with the tap along."""
    attn = getattr(block, name)
    if not tap.acts_in(attn):
        return stock(x, **options)
    return view(block, **{name: tap.on(attn, norm)}).forward(x, **options)


def block_targets(
    methods: Mapping[str, Any],
    spec: HostSpec,
    blocks: Sequence[Any],
    mixins: Mapping[type, type],
    attention_mixins: Mapping[type, type],
) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """What `patch` needs for the blocks of a tower, with their index, and for the attentions of an attention method."""
    found: list[tuple[nn.Module, type, dict[str, Any]]] = []
    for index, block in enumerate(blocks):
        mixin = mixins[next(cls for cls in type(block).__mro__ if cls in mixins)]
        found.append((block, mixin, {"_vtoken_index": index}))
    attention = methods.get("on_attention")
    return found if attention is None else found + _attention_targets(attention, spec, blocks, attention_mixins)


def _attention_targets(
    method: Any, spec: HostSpec, blocks: Sequence[Any], mixins: Mapping[type, type]
) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """What `patch` needs to put an attention method, with its learned part, into the attention of the chosen blocks.

    Raises:
        UnsupportedModelError: if one of them has an attention that is not among `mixins`.
    """
    found: list[tuple[nn.Module, type, dict[str, Any]]] = []
    for index, block in enumerate(blocks):
        if not method.acts_on(index):
            continue
        attn = block.attn
        kind = base_of(type(attn))
        mixin = next((mixins[cls] for cls in kind.__mro__ if cls in mixins and kind.forward is cls.forward), None)  # type: ignore[attr-defined]
        if mixin is None or PREDICTOR in attn._modules:
            known = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in mixins)
            raise UnsupportedModelError(
                f"cannot put connectivity masks into {spec.name}: the attention of block {index} is a "
                f"{kind.__module__}.{kind.__qualname__}; supported: {known}. The model was left as it was."
            )
        like = next(attn.parameters())
        attributes = {"_vtoken_index": index, "_vtoken_method": method, "_vtoken_prefix": spec.num_prefix}
        predictor = method.predictor(index, spec, like).train(attn.training)
        found.append((attn, mixin, attributes | {PREDICTOR: predictor}))
    return found


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
