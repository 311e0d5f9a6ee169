"""Videos of LLaVA-OneVision and LLaVA-NeXT-Video: frames of one size behind a CLIP or SigLIP tower.

Source: docs/methods/quota.md 9.3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.core.forward import block_method
from vtoken.core.trace import current_trace, tracing, unmerge
from vtoken.errors import ConfigError, ShapeError
from vtoken.hosts.llava.features import drops_first, tower_of
from vtoken.hosts.transformers.entry import will_remove
from vtoken.hosts.transformers.families import num_prefix
from vtoken.hosts.video.adapter import VideoAdapter, VideoFeatures, VideoLayout, chunks


class _LlavaVideo(VideoAdapter):
    """What the two have in common; a square grid, its side halved by the model."""

    def ready(self, model: Any, given: dict[str, Any]) -> None:
        """Rows of a merging tower must come in raster order, to be spread; images of the same call need them all."""
        tower = tower_of(model)[1]
        if "_vtoken" not in tower.__dict__:
            return
        if block_method(tower).order == "internal":
            raise ConfigError(
                f"the vision tower of {type(model).__name__} carries a method with order='internal', whose tokens "
                "cannot be spread over the frame again; use order='raster' (vtoken.configure on the tower)"
            )
        if given.get("pixel_values") is not None and will_remove(tower, _side(model) ** 2):
            raise ConfigError(
                f"images of {type(model).__name__} are packed on a grid, which merged tokens no longer have; ask about "
                "its images and its videos in calls of their own, the former with vtoken.remove on its vision tower"
            )

    def layouts(self, model: Any, given: dict[str, Any]) -> list[VideoLayout]:
        """From the number of frames alone."""
        side, half = _side(model), self.default_side(_side(model))
        each = half * half + (half if self.newline == "row" else 0)
        trailing, patches = int(self.newline == "video"), side * side + num_prefix(tower_of(model)[1])
        return [
            VideoLayout((side, side), (half, half), (each,) * frames.shape[0], patches, trailing)
            for frames in _videos(given["pixel_values_videos"])
        ]

    def default_side(self, side: int) -> int:
        """Rows of one frame in the unmodified model."""
        raise NotImplementedError

    def encode(self, model: Any, given: dict[str, Any], chunk: int | None) -> list[VideoFeatures]:
        """All frames of the batch one after the other, as the model does."""
        videos = _videos(given["pixel_values_videos"])
        frames = torch.cat(videos)
        bounds = chunks(len(frames), chunk)
        rows = torch.cat([self.project(model, _frame_rows(model, frames[a:b], given)) for a, b in bounds])
        layouts = self.layouts(model, given)
        side = layouts[0].grid[0]
        if rows.shape[1] != side * side:
            raise ShapeError(
                f"the tower gives {rows.shape[1]} features per frame, a grid of {side} x {side} has {side * side}; "
                "vision_feature_select_strategy='full' keeps a class token, which has no place in a frame's grid"
            )
        grids = rows.unflatten(1, (side, side)).split([len(v) for v in videos])
        newline = getattr(model.model, "image_newline", None) if self.newline != "none" else None
        return [VideoFeatures(layout, grid, (), newline) for layout, grid in zip(layouts, grids, strict=True)]

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """What is done to features [F, N, C] before they are resampled."""
        return rows


class OnevisionVideo(_LlavaVideo):
    """Projected features, halved by interpolation; one newline after the last frame."""

    name = "transformers LLaVA-OneVision"
    models = frozenset({("llava_onevision", "LlavaOnevisionForConditionalGeneration")})
    newline = "video"

    def default_side(self, side: int) -> int:
        """Half, rounded up."""
        return (side + 1) // 2

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """The projector comes first."""
        projected: Tensor = model.model.multi_modal_projector(rows)
        return projected


class NextVideo(_LlavaVideo):
    """Tower features, average-pooled with stride 2, then projected; no separators."""

    name = "transformers LLaVA-NeXT-Video"
    models = frozenset({("llava_next_video", "LlavaNextVideoForConditionalGeneration")})
    pooling = "pool"

    def ready(self, model: Any, given: dict[str, Any]) -> None:
        """The resampling that QuoTA stands for must be the plain one."""
        super().ready(model, given)
        kind, stride = model.config.spatial_pool_mode, model.config.spatial_pool_stride
        if (kind, stride) != ("average", 2):
            raise ConfigError(
                f"{type(model).__name__} pools frames by {kind!r} with stride {stride}; only 'average' with stride 2 "
                "is supported"
            )

    def default_side(self, side: int) -> int:
        """Half, rounded down."""
        return side // 2

    def finish(self, model: Any, tokens: Tensor) -> Tensor:
        """The projector comes last."""
        projected: Tensor = model.model.multi_modal_projector(tokens)
        return projected


def _side(model: Any) -> int:
    vision = model.config.vision_config
    return int(vision.image_size) // int(vision.patch_size)


def _videos(pixels: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Frames [T, C, H, W] of every video."""
    videos = list(pixels)
    if not videos or any(frames.dim() != 4 for frames in videos):
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else [tuple(frames.shape) for frames in videos]
        raise ShapeError(f"pixel_values_videos must be [videos, frames, C, H, W], got {shape}")
    return videos


def _frame_rows(model: Any, frames: Tensor, given: dict[str, Any]) -> Tensor:
    """What the projector of the model would be given for frames [F, C, H, W]: [F, N, C]."""
    layers = given.get("vision_feature_layer")
    layers = model.config.vision_feature_layer if layers is None else layers
    states = _dense_states(tower_of(model)[1], frames, [layers] if isinstance(layers, int) else list(layers))
    rows = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
    return rows[:, 1:] if drops_first(model, given) else rows


def _dense_states(tower: Any, frames: Tensor, layers: list[int]) -> list[Tensor]:
    """Hidden states [F, N, C] of some layers, with a row for every patch also where the tower merges them."""
    if "_vtoken" not in tower.__dict__:
        states = tower(frames, output_hidden_states=True, return_dict=True).hidden_states
        return [states[layer] for layer in layers]
    with contextlib.ExitStack() as stack:
        record = current_trace(tower) or stack.enter_context(tracing(tower))
        states = tower(frames, output_hidden_states=True, return_dict=True).hidden_states
        places = [layer % len(states) for layer in layers]
        return [states[i] if i == 0 else unmerge(states[i], record, layer=i - 1) for i in places]
