"""The entry methods of a patched open_clip image tower."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.bound import bound, changed
from vtoken.core.forward import block_method, forward_of
from vtoken.core.patch import base_of, forward_with, is_patched, view
from vtoken.core.slots import Slot
from vtoken.core.state import TokenState
from vtoken.hosts.pooling import weighted_mean

NUM_PREFIX = 1  # every built-in tower has exactly one class token


class OpenClipTowerMixin:
    """The entry methods of a patched image tower."""

    _vtoken: Any

    def forward(self: Any, x: Tensor) -> Any:
        # Token rows leave the tower with output_tokens or without pooling; then in raster order.
        raster = self.output_tokens or self.pool_type == "none"
        whole = isinstance(self.patch_dropout, nn.Identity) or not self.training
        num_tokens = self.positional_embedding.shape[0] if whole else None
        with _forward_of(self, x, raster=raster) as state:
            transformer = BoundTransformer(self.transformer, state, raster=raster, num_tokens=num_tokens)
            return base_of(type(self)).forward(_stand_in(self, transformer), x)  # type: ignore[attr-defined]

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> Any:
        dense = output_fmt == "NCHW"
        with _forward_of(self, x, raster=True, dense=dense) as state:
            transformer = BoundTransformer(self.transformer, state, raster=True, dense=dense)
            return base_of(type(self)).forward_intermediates(  # type: ignore[attr-defined]
                _stand_in(self, transformer), x, indices, stop_early, normalize_intermediates, intermediates_only,
                output_fmt, output_extra_tokens,
            )  # fmt: skip


class BoundTransformer:
    """Stands where a tower's `transformer` stood, for one forward.

    Args:
        transformer: the tower's.
        state: of this forward.
        raster: hand tokens out in raster order. Not whenever anchors are known: a trace must not reorder a sum.
        dense: hand intermediates out spread over all patches.
        num_tokens: how many there always are; None if patch dropout changes it.
    """

    def __init__(
        self, transformer: Any, state: TokenState, *, raster: bool, dense: bool = False, num_tokens: int | None = None
    ) -> None:
        if not is_patched(transformer):
            raise changed("the transformer", transformer)
        self._transformer = transformer
        self._state = state
        self._raster = raster and state.method.order == "raster"
        self._dense = dense
        self._num_tokens = num_tokens
        #: What is known of the rows that were handed out.
        self.slot = Slot()

    def __call__(self, x: Tensor) -> Tensor:
        if self._num_tokens is not None and torch.compiler.is_compiling():
            # compile(dynamic=True) makes symbols of the image's sides; token counts as terms of those take minutes.
            x = x.narrow(1, 0, self._num_tokens)
        return self._finish(self._transformer(x, vtoken_state=self._state))

    def forward_intermediates(self, x: Tensor, indices: Any = None, stop_early: bool = False) -> Any:
        from timm.models._features import feature_take_indices

        inner = view(self._transformer, **_with_state(self._transformer, self._state))
        layers = sorted(set(feature_take_indices(len(inner.resblocks), indices)[0]))
        x, found = inner.forward_intermediates(x, indices=indices, stop_early=stop_early)
        slots = [self._state.slots[layer + 1] for layer in layers]
        # The host reshapes what it gets to its patch grid, so it must get every patch.
        hand_out = Slot.spread if self._dense else self._ordered
        return self._finish(x), [hand_out(slot, rows) for rows, slot in zip(found, slots, strict=True)]

    def _finish(self, x: Tensor) -> Tensor:
        self.slot = self._state.last
        if self._raster:
            x, self.slot = self.slot.in_raster_order(x)
        return x

    def _ordered(self, slot: Slot, rows: Tensor) -> Tensor:
        return slot.in_raster_order(rows)[0] if self._raster else rows


class TransformerMixin:
    """`Transformer`: the list of blocks."""

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, vtoken_state: TokenState | None = None
    ) -> Tensor:
        if vtoken_state is None:
            return super().forward(x, attn_mask)  # type: ignore[misc]
        return forward_with(self, _with_state(self, vtoken_state), x, attn_mask)


def _with_state(transformer: Any, state: TokenState) -> dict[str, Any]:
    return {"resblocks": bound(transformer.resblocks, state)}


def _forward_of(tower: Any, x: Tensor, *, raster: bool, dense: bool = False) -> forward_of:
    anchor = raster and block_method(tower).order == "raster"
    size = (x.shape[2], x.shape[3])
    return forward_of(tower, NUM_PREFIX, lambda: grid_of(tower, size), anchor=anchor, dest=dense)


def _stand_in(tower: Any, transformer: BoundTransformer) -> Any:
    """The tower with one forward's transformer, and with poolings that know its sizes."""
    parts: dict[str, Any] = {"transformer": transformer}
    if tower.attn_pool is not None:
        parts["attn_pool"] = functools.partial(_attention_pool, tower.attn_pool, transformer)
        if tower.attn_pool_contrastive is not None and tower.attn_pool_type == "parallel":
            parts["attn_pool_contrastive"] = functools.partial(
                _attention_pool, tower.attn_pool_contrastive, transformer
            )
    elif tower.pool_type == "avg":
        parts["_global_pool"] = functools.partial(_average_pool, transformer)
    return view(tower, **parts)


def _average_pool(transformer: BoundTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    size, rows = transformer.slot.size, x[:, NUM_PREFIX:]
    return rows.mean(dim=1) if size is None else weighted_mean(rows, size[:, NUM_PREFIX:]), rows


def _attention_pool(pool: Any, transformer: BoundTransformer, x: Tensor) -> Any:
    size = transformer.slot.size
    return pool(x) if size is None else pool(x, vtoken_size=size)


def grid_of(tower: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns of an image of `img_size` pixels."""
    return img_size[0] // int(tower.patch_size[0]), img_size[1] // int(tower.patch_size[1])
