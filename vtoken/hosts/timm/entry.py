"""The entry methods of a patched timm model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vtoken.core.bound import BoundBlocks, bound
from vtoken.core.forward import block_method, forward_of, masks_attention
from vtoken.core.patch import base_of, view
from vtoken.core.slots import Slot
from vtoken.core.state import TokenState
from vtoken.errors import InputError, ShapeError
from vtoken.hosts.pooling import pool_kind, remember_sizes, sized_pool, sizes_for_head
from vtoken.hosts.tower import spread
from vtoken.ops.rows import take_rows

MODELS: tuple[type, ...] = (VisionTransformer, Eva, NaFlexVit)
#: Token features that one forward made, with what is known of their rows, in the order they were made.
Runs = list[tuple[Tensor, Slot]]


class TimmMixin:
    """Each entry method makes one forward's state and runs the host's own code with it."""

    _vtoken: Any

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs: Runs = []
        if _forward_is_stock(self):  # which runs the blocks by forward_features only
            stand_in = view(
                self,
                forward_features=functools.partial(_features, self, runs, not pool_kind(self)),
                **_pool_parts(self, functools.partial(_slot_of, runs, None)),
            )
            return base_of(type(self)).forward(stand_in, *args, **kwargs)  # type: ignore[attr-defined]
        own = _OwnLoop(self, _images(args, kwargs))
        stand_in = view(
            self,
            blocks=own,
            forward_features=functools.partial(_features, self, runs, _leaves_as_tokens(self)),
            forward_intermediates=functools.partial(TimmMixin.forward_intermediates, self),
            **_pool_parts(self, functools.partial(_slot_of, runs, own)),
        )
        out = base_of(type(self)).forward(stand_in, *args, **kwargs)  # type: ignore[attr-defined]
        own.close()
        return out

    def forward_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs: Runs = []
        out = _features(self, runs, True, *args, **kwargs)
        remember_sizes(runs[-1][0], runs[-1][1].size)
        return out

    def forward_intermediates(
        self: Any,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        dense = output_fmt == "NCHW" and isinstance(x, Tensor)
        # Rows are asked for and spread here: the host's own reshape would scramble reduced rows without an error.
        with _forward_of(self, x, raster=True, dense=dense) as state:
            out = base_of(type(self)).forward_intermediates(  # type: ignore[attr-defined]
                _bind(self, state), x, indices, return_prefix_tokens, norm, stop_early,
                "NLC" if dense else output_fmt, intermediates_only, **kwargs,
            )  # fmt: skip
        layers = sorted(set(feature_take_indices(len(self.blocks), indices)[0]))
        grid = grid_of(self, (x.shape[-2], x.shape[-1])) if dense else None
        finish = functools.partial(_intermediate, self, state, grid)
        if isinstance(out, dict):
            found = [finish(layer, y) for layer, y in zip(layers, out["image_intermediates"], strict=True)]
            out = out | {"image_intermediates": found}
            if "image_features" in out:
                out["image_features"] = _last_features(self, state, out["image_features"])
            return out
        rows = out if intermediates_only else out[1]
        found = [finish(layer, y) for layer, y in zip(layers, rows, strict=True)]
        return found if intermediates_only else (_last_features(self, state, out[0]), found)

    def forward_head(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        size = sizes_for_head(self, x, _may_be_merged(self, x.shape[1]))
        stand_in = view(self, **_pool_parts(self, lambda _: Slot(size)))
        return base_of(type(self)).forward_head(stand_in, x, *args, **kwargs)  # type: ignore[attr-defined]


class _OwnLoop(BoundBlocks):
    """The blocks for a forward of the user's own that may run them itself; without that there is no state for them."""

    def __init__(self, model: Any, images: Any) -> None:
        self._model, self._images = model, images
        self._container, self._blocks, self._watched = model.blocks, list(model.blocks), False
        self._forward: forward_of | None = None
        self._state: TokenState | None = None
        self._bound: list[Callable[..., Tensor]] = []

    @property
    def _calls(self) -> list[Callable[..., Tensor]]:  # type: ignore[override]
        if self._forward is None:
            self._forward = _forward_of(self._model, self._images, raster=True)
            self._state = self._forward.__enter__()
            self._bound = bound(self._container, self._state)._calls
        return self._bound

    def __len__(self) -> int:
        return len(self._blocks)

    def slot(self) -> Slot:
        """What is known of the rows that left the last block that ran."""
        return Slot() if self._state is None else self._state.last

    def close(self) -> None:
        """The forward is over."""
        if self._forward is not None:
            self._forward.__exit__(None, None, None)


def _features(model: Any, runs: Runs, raster: bool, *args: Any, **kwargs: Any) -> Any:
    """The host's forward_features with a state of its own; notes in `runs` what it made."""
    with _forward_of(model, _images(args, kwargs), raster=raster) as state:
        out = base_of(type(model)).forward_features(_bind(model, state), *args, **kwargs)  # type: ignore[attr-defined]
    rows, slot = out["patches"] if isinstance(out, dict) else out, state.last
    if raster:  # not whenever anchors are known: a trace must not change the order of a sum
        rows, slot = _in_order(model, slot, rows)
    runs.append((rows, slot))
    return out | {"patches": rows} if isinstance(out, dict) else rows  # a dict: NaFlex


def _slot_of(runs: Runs, own: _OwnLoop | None, x: Tensor) -> Slot:
    """What is known of the rows of `x`: of the features it is, else of the only ones there are."""
    if not runs:
        return Slot() if own is None else own.slot()
    for features, slot in runs:
        if features is x:
            return slot
    slot = runs[-1][1]
    if slot.size is not None and (len(runs) > 1 or slot.size.shape != x.shape[:2]):
        raise ShapeError(
            f"cannot tell which sizes belong to the {tuple(x.shape)} tokens that this forward pools: it made features "
            f"{len(runs)} time(s). Pool the very tensor that forward_features returned, or take sizes from vtoken.trace"
        )
    return slot


def _leaves_as_tokens(model: Any) -> bool:
    """Whether token rows may leave `model(x)`: without pooling they do, and a user's own forward may use them."""
    return not _forward_is_stock(model) or not pool_kind(model)


def _forward_is_stock(model: Any) -> bool:
    own = base_of(type(model)).forward  # type: ignore[attr-defined]
    return any(own is known.forward for known in MODELS)  # type: ignore[attr-defined]


def _forward_of(model: Any, images: Any, *, raster: bool = False, dense: bool = False) -> forward_of:
    """One forward on images [B, C, H, W], or on packed (NaFlex) patches.

    Args:
        raster: whether token rows may leave it.
        dense: whether dense maps will.
    """
    rotary = getattr(model, "rope", None) is not None
    anchor = rotary or (raster and block_method(model).order == "raster")
    if isinstance(images, Tensor):
        size = (images.shape[-2], images.shape[-1])
        return forward_of(model, model.num_prefix_tokens, lambda: grid_of(model, size), anchor=anchor, dest=dense)
    if masks_attention(model, len(model.blocks)):
        raise InputError(
            "connectivity masks belong to places on a patch grid, so the model must be given images [B, C, H, W], not "
            "packed (NaFlex) patches; use vtoken.remove(model)"
        )
    return forward_of(model, model.num_prefix_tokens, lambda: None, anchor=anchor, dest=dense)


def _bind(model: Any, state: TokenState) -> Any:
    """The model with one state bound to its blocks."""
    return view(model, blocks=bound(model.blocks, state))


def _pool_parts(model: Any, slot_of: Callable[[Tensor], Slot]) -> dict[str, Any]:
    name = pool_name(model)
    return {name: functools.partial(sized_pool, model, name, slot_of)}


def pool_name(model: Any) -> str:
    """What the host calls its pooling method."""
    return "_pool" if isinstance(model, NaFlexVit) else "pool"


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((a for a in [*args, *kwargs.values()] if isinstance(a, Tensor) and a.dim() == 4), None)


def _in_order(model: Any, slot: Slot, features: Tensor) -> tuple[Tensor, Slot]:
    """Rows and what is known of them in raster order, unless "internal" was chosen or nothing kept track."""
    return slot.in_raster_order(features) if block_method(model).order == "raster" else (features, slot)


def _last_features(model: Any, state: TokenState, features: Tensor) -> Tensor:
    rows, slot = _in_order(model, state.last, features)
    return remember_sizes(rows, slot.size)


def _intermediate(model: Any, state: TokenState, grid: tuple[int, int] | None, layer: int, y: Any) -> Any:
    """One intermediate, patch rows [B, N, C] or (rows, prefix): spread to a map, or put in raster order."""
    if isinstance(y, tuple):
        return (_intermediate(model, state, grid, layer, y[0]), *y[1:])
    slot, num_prefix = state.slots[layer + 1], state.num_prefix
    if grid is not None:
        return spread(y, slot, num_prefix, grid)
    if slot.anchor is None or block_method(model).order == "internal":
        return y
    return take_rows(y, slot.anchor[:, num_prefix:].argsort(dim=1))


def grid_of(model: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns of an image of `img_size` pixels, padding of dynamic sizes included."""
    embed = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
    height, width = embed.dynamic_feat_size(img_size)
    return int(height), int(width)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width that the model was built for; NaFlexVit takes any, so its checkpoint's or position grid's."""
    pretrained: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, NaFlexVit):
        height, width = model.patch_embed.img_size or pretrained["input_size"][-2:]
    elif pretrained is not None:
        height, width = pretrained["input_size"][-2:]
    else:
        rows, columns = model.embeds.pos_embed_grid_size or (14, 14)
        height, width = rows * model.embeds.patch_size[0], columns * model.embeds.patch_size[1]
    return int(height), int(width)


def fixed_size(model: Any) -> bool:
    """Whether the model takes images of one size only."""
    return not isinstance(model, NaFlexVit) and not model.dynamic_img_size


def _may_be_merged(model: Any, num_tokens: int) -> bool:
    """Whether features of `num_tokens` rows can be what a forward with removals left."""
    method, num_prefix = block_method(model), model.num_prefix_tokens
    height, width = grid_of(model, image_size(model))
    if fixed_size(model) and num_tokens == num_prefix + height * width:
        return False
    return any(method.num_removed(layer, height * width) for layer in range(len(model.blocks)))
