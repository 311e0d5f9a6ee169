"""What all towers of blocks share: binding one forward's state to the blocks, the merged block, dense maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from vtoken.core.errors import InputError, ShapeError
from vtoken.core.method import BlockMethod
from vtoken.core.patch import view
from vtoken.core.state import Slot, TokenState
from vtoken.ops import key_metric
from vtoken.ops.rows import take_rows


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
    """Holds the keys [B, H, T, D] of one attention call."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def on(self, attn: Any, norm: str) -> Any:
        """The attention with this tap behind its key norm, the module called `norm`."""
        return view(attn, **{norm: functools.partial(self._keep, getattr(attn, norm))})

    def _keep(self, norm: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        self.keys = norm(keys)
        return self.keys


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
        block: has `_vtoken_index` and its two residual branches as `_vtoken_attn(x, tap, **attention)`, which puts the
            keys into the tap if there is one, and `_vtoken_mlp(x)`.
        state: of this forward.
        x: tokens [B, T, C].
        stock: the block's own forward, used as it is where nothing is removed.
        attention: further arguments of the block's attention.
    """
    layer: int = block._vtoken_index
    state.enter(layer, x)
    removes = state.removes(layer, x.shape[1])
    if removes or state.slots[layer] is not state.first:
        _refuse_mask(attention)
    bias = state.bias(layer, x.dtype)
    if bias is not None:
        attention["attn_mask"] = bias
    if not removes:
        state.skip(layer)
        return stock(x, **attention)
    tap = None if state.method.metric == "hidden" else Tap()
    x = x + block._vtoken_attn(x, tap, **attention)
    # The keys are a view of the whole q, k, v projection: reduce them at once, so that it is freed before the MLP.
    metric = None if tap is None else _metric(state.method, tap)
    del tap
    if state.method.insert == "after":
        x = x + block._vtoken_mlp(x)
        return state.on_block(layer, x, x if metric is None else metric)
    x = state.on_block(layer, x, x if metric is None else metric)
    return x + block._vtoken_mlp(x)


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that differ from their default (None or False); older hosts do not know all of them."""
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


def _metric(method: BlockMethod, tap: Tap) -> Tensor:
    if tap.keys is None:
        raise RuntimeError("the attention never called its key norm, so there are no keys to compare tokens by")
    if method.metric == "key":
        return key_metric(tap.keys)
    return tap.keys.detach().transpose(1, 2).flatten(2)


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
        rows = take_rows(rows, slot.dest[:, num_prefix:] - num_prefix)
    height, width = grid
    if rows.shape[1] != height * width:
        raise ShapeError(
            f"no dense map: {rows.shape[1]} patch tokens entered the blocks, the grid has {height} x {width} (patch "
            "dropout drops them while training); use output_fmt='NLC' or model.eval()"
        )
    # Contiguous as the hosts hand it out: a caller may `view` it, and convolutions add in another order otherwise.
    return rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], height, width).contiguous()
