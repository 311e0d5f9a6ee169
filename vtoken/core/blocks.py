"""One block of a tower that loses tokens: eager, or by the graph that serves all blocks (`vtoken.compile`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.core.bound import alone
from vtoken.core.calling import is_heard_within
from vtoken.core.compiled import CompiledBlocks
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.core.state import TokenState
from vtoken.core.tap import Tap
from vtoken.errors import InputError, VTokenError


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
    state: TokenState | None,
    x: Tensor,
    stock: Callable[..., Tensor],
    **attention: Any,
) -> Tensor:
    """One block of a tower that loses tokens.

    Args:
        block: has `_vtoken_index` and its two residual branches as `_vtoken_attn(x, tap, **attention)`, which runs its
            attention with the tap, and `_vtoken_mlp(x)`.
        state: of this forward; None where somebody calls the block past the model, who is told once.
        x: tokens [B, T, C].
        stock: called as stock(x, tap, **attention) where nothing is removed: the block's own forward. Without a state
            there is no tap.
        attention: further arguments of the block's attention.
    """
    if state is None:
        alone(block)
        return stock(x, None, **attention)
    layer: int = block._vtoken_index
    method = state.method
    state.enter(layer, x)
    # Inside somebody's larger graph a block is part of that. Hooks cannot be in a graph that serves other blocks, too.
    compiled = state.compiled
    if compiled is not None and (torch.compiler.is_compiling() or state.reads(layer) or is_heard_within(block)):
        compiled = None
    bias = state.bias(layer, x.dtype) if compiled is None else None
    r = method.num_removed(layer, x.shape[1] - state.num_prefix, state.first.embedded - state.num_prefix)
    settings = method.layer_settings(layer) if r else {}
    if attention and (r or state.slots[layer] is not state.first):
        _refuse_mask(attention)
    if compiled is not None:
        return compiled_block(compiled, block, state, layer, r, x, settings, attention)
    if bias is not None:
        attention["attn_mask"] = bias
    if r == 0:
        state.skip(layer)
        return stock(x, Tap(state, layer, removes=False), **attention)
    step = functools.partial(method.reduce, layer, r, **settings)
    remove: Removal = step if method.reduces else functools.partial(method.on_block, layer)
    x, state.slots[layer + 1] = reduced(block, state, layer, x, remove, attention)
    return x


#: Takes tokens [B, T, C], what is chosen by [B, T, d], their slot and the number of prefix tokens; leaves fewer.
Removal = Callable[[Tensor, Tensor, Slot, int], tuple[Tensor, Slot]]


def reduced(
    block: Any, state: TokenState, layer: int, x: Tensor, remove: Removal, attention: dict[str, Any]
) -> tuple[Tensor, Slot]:
    """The two branches of a block with tokens taken out between or after them, and what is known of those left."""
    tap, slot = Tap(state, layer, removes=True), state.slots[layer]
    x = x + block._vtoken_attn(x, tap, **attention)
    if state.method.insert == "after":
        # The keys are a view of the whole q, k, v projection: reduce them at once, so that it is freed before the MLP.
        early = None if state.method.metric == "hidden" else tap.metric(x)
        del tap
        x = x + block._vtoken_mlp(x)
        return remove(x, x if early is None else early, slot, state.num_prefix)
    metric = tap.metric(x)
    del tap
    x, after = remove(x, metric, slot, state.num_prefix)
    return x + block._vtoken_mlp(x), after


def compiled_block(
    compiled: CompiledBlocks,
    block: Any,
    state: TokenState,
    layer: int,
    r: int,
    x: Tensor,
    settings: dict[str, Any],
    attention: dict[str, Any],
) -> Tensor:
    """`merged_block` by the graph that serves all layers; what is particular to this one goes in as arguments."""
    method, slot = state.method, state.slots[layer]
    tensors = (slot.size, slot.anchor, slot.dest, slot.protect)
    # torch makes a symbol of a number in its shapes, with a guard for each of them, but a constant of a word.
    fixed = (method, str(state.num_prefix), slot.track_anchor, slot.track_dest)
    case = (x.shape[0] == 1, min(r, 2), block.training, torch.is_grad_enabled(), x.dtype, x.device, fixed[2:])
    if r == 0:
        state.skip(layer)
        result: Tensor = compiled(_kept, case, block, fixed, x, tensors, attention)
        return result
    # torch makes constants of the numbers 0 and 1, but not of an argument that is never one of them.
    settings = {k: compiled.argument(v) if isinstance(v, float) else v for k, v in settings.items()}
    left = x.shape[1] - r
    x, *after = compiled(_reduced, case, block, fixed, x, tensors, attention, layer + 2, r + 2, settings)
    if x.shape[1] != left:  # nobody could look at the plan inside the graph
        raise VTokenError(
            f"{type(method).__name__} left {x.shape[1]} tokens in block {layer}, where {left} were to be left: "
            "vtoken.plan would be wrong"
        )
    size, anchor, dest, protect = after
    state.slots[layer + 1] = Slot(
        size, anchor, dest, protect, slot.embedded, slot.dropped, slot.track_anchor, slot.track_dest
    )
    return x


def _local(
    fixed: tuple[BlockMethod, str, bool, bool], tensors: Sequence[Tensor | None], x: Tensor, attention: dict[str, Any]
) -> tuple[TokenState, dict[str, Any]]:
    """One block's own state, whose slot is at 0, and the arguments of its attention."""
    method, num_prefix, track_anchor, track_dest = fixed
    state = TokenState(method, int(num_prefix), track_anchor=track_anchor, track_dest=track_dest)
    size, anchor, dest, protect = tensors
    state.slots[0] = Slot(size, anchor, dest, protect, track_anchor=track_anchor, track_dest=track_dest)
    bias = state.bias(0, x.dtype)
    return state, attention if bias is None else attention | {"attn_mask": bias}


def _kept(block: Any, fixed: Any, x: Tensor, tensors: Sequence[Tensor | None], attention: dict[str, Any]) -> Tensor:
    state, attention = _local(fixed, tensors, x, attention)
    x = x + block._vtoken_attn(x, Tap(state, 0, removes=False), **attention)
    result: Tensor = x + block._vtoken_mlp(x)
    return result


def _reduced(
    block: Any,
    fixed: Any,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    attention: dict[str, Any],
    layer: int,
    r: int,
    settings: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    state, attention = _local(fixed, tensors, x, attention)
    remove = functools.partial(state.method.reduce, layer - 2, r - 2, **settings)
    x, after = reduced(block, state, 0, x, remove, attention)
    return x, after.size, after.anchor, after.dest, after.protect
