"""LLaVA-OneVision and LLaVA-NeXT-Video: images in crops, and frames of one size that the model pools.

Source: docs/methods/quota.md 9.3.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtoken.core.bound import changed
from vtoken.core.forward import block_method
from vtoken.core.method import Methods, PromptMethod
from vtoken.core.patch import is_patched, view
from vtoken.core.trace import current_trace, tracing, unmerge
from vtoken.core.visual import Cell, Encoded, Needs, Visual
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, ShapeError
from vtoken.hosts.exchanged import Overheard
from vtoken.hosts.hidden_states import LAYER_NAMES, STRATEGY, drops_first, states_read
from vtoken.hosts.llava.adapter import LlavaAdapter
from vtoken.hosts.llava.features import feature_layer, tower_of
from vtoken.hosts.transformers.entry import will_remove
from vtoken.hosts.transformers.families import num_prefix
from vtoken.prompts.family import named_for


class LlavaVideo(LlavaAdapter):
    """What the two have in common; a square grid of patches, its side halved by the model."""

    kinds = ("image", "video")
    side: ClassVar[tuple[str, ...]] = (*LlavaAdapter.side, "pixel_values_videos", "image_sizes_videos")
    #: Separators of a video: "none", "video" (one behind the last frame) or "row" (one behind each row of each frame).
    newline: ClassVar[str] = "none"
    #: How frames are pooled, and whether that is in front of the projector.
    pooling: ClassVar[str] = "bilinear"
    pools_first: ClassVar[bool] = False

    def default_side(self, side: int) -> int:
        """Rows of one frame in the model, of so many rows of patches."""
        raise NotImplementedError

    def pooled(self, model: Any, rows: Tensor) -> Tensor:
        """Rows [F, N, c] of frames as the model pools them."""
        raise NotImplementedError

    def record_grid(self, model: Any, given: dict[str, Any], visual: Visual) -> tuple[int, int] | None:
        """Of a frame its own."""
        return visual.cells[0].grid if visual.kind == "video" else super().record_grid(model, given, visual)

    def check(self, model: Any, methods: Methods) -> None:
        """Newlines behind rows need rows."""
        super().check(model, methods)
        method: PromptMethod = methods[PromptMethod]
        if self.newline == "row" and not method.in_lines:
            raise ConfigError(
                f"{type(method).__name__} as it is set has no rows, which the newlines of this model need; use "
                "mode='bilinear' or 'pool'"
            )

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """Of a merging tower frames are spread over their patches again, which only rows in raster order can be."""
        super().refuse(model, given, needs)
        tower = tower_of(model)[1]
        if given.get("pixel_values_videos") is None:
            return
        side, first = _side(model), int(drops_first(model, given))
        rows = side * side + num_prefix(tower) - first
        if rows != side * side:
            raise ShapeError(
                f"the tower gives {rows} features per frame, a grid of {side} x {side} has {side * side}; "
                "vision_feature_select_strategy='full' keeps a class token, which has no place in a frame's grid"
            )
        if "_vtoken" not in tower.__dict__:
            return
        if block_method(tower).order == "internal":
            raise ConfigError(
                f"the vision tower of {type(model).__name__} carries a method with order='internal', whose tokens "
                "cannot be spread over the frame again; use order='raster' (vtoken.configure on the tower)"
            )
        if not will_remove(tower, side**2):
            return
        if needs.attention != "none" or needs.features & {"before", "keys"}:
            raise ConfigError(
                f"the image tower of {type(model).__name__} merges tokens ({type(block_method(tower)).__name__}): "
                "what it says of a frame's tokens is not what leaves it; take one of the two methods, or one that "
                "chooses from final rows"
            )
        if given.get("pixel_values") is not None:
            raise ConfigError(
                f"images of {type(model).__name__} are packed on a grid, which merged tokens no longer have; ask about "
                "its images and its videos in calls of their own, the former with vtoken.remove on its vision tower"
            )

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """Videos from their number of frames alone."""
        found = super().layout(model, given) if given.get("pixel_values") is not None else []
        if given.get("pixel_values_videos") is not None:
            found += [self.frames(model, len(video)) for video in _videos(given["pixel_values_videos"])]
        return found

    def frames(self, model: Any, count: int) -> Visual:
        """A video of so many frames."""
        side, patches = _side(model), _side(model) ** 2 + num_prefix(tower_of(model)[1])
        half = self.default_side(side)
        lines: range | tuple[()] = ()
        if self.newline == "video":
            lines = range(count * half * half, count * half * half + 1)
        elif self.newline == "row":
            lines = range(half, count * half * (half + 1), half + 1)
        cell = Cell((half, half), "frame", (side, side))
        return Visual("video", (cell,) * count, tuple(lines), patches=patches, pooling=self.pooling)

    def encode(self, model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
        """By the model's own functions, all frames of a call one after the other."""
        if visuals[0].kind == "image":
            return super().encode(model, given, visuals, needs)
        videos = _videos(given["pixel_values_videos"])
        frames, lengths = torch.cat(videos), [len(video) for video in videos]
        runs = [self._run(model, given, part, needs) for part in frames.split(needs.chunk or len(frames))]
        taps = {name: torch.cat([run[name] for run in runs]).split(lengths) for name in runs[0]}
        levels = [_with_lines(model, v, own.flatten(0, 1)) for v, own in zip(visuals, taps.pop("rows"), strict=True)]
        side, grids = visuals[0].cells[0].native, taps.pop("native", ())
        assert side is not None
        flat = {name: [own.flatten(0, 1) for own in each] for name, each in taps.items()}
        if "attention" in flat:
            flat["attention"] = [scores.T for scores in flat["attention"]]
        native = [tuple(own.unflatten(1, side)) for own in grids] or None
        out = BaseModelOutputWithPooling(pooler_output=_stacked(levels))
        made = Encoded({"video": out}, [levels], flat.get("attention"), flat.get("before"), flat.get("keys"))
        return replace(made, native=native)

    def _run(self, model: Any, given: dict[str, Any], frames: Tensor, needs: Needs) -> dict[str, Tensor]:
        """Of frames [F, C, H, W] their "rows" [F, n, C], and what else was asked for by its name."""
        (name, tower), inner, first = tower_of(model), model.model, int(drops_first(model, given))
        native, before = list[Tensor](), list[Tensor]()
        last = feature_layer(model, given)
        watch = Watch.of(needs, last)
        reads = needs.attention != "none" or "keys" in needs.features
        if reads and not is_patched(tower):
            raise changed("the image tower", tower)
        run: Any = functools.partial(tower, vtoken_rows=watch) if reads else tower
        pooler = "vision_resampler" if self.pools_first else "apply_pooling"
        parts: dict[str, Any] = {
            name: functools.partial(_dense, tower, run, states_read(model.config, given) or [-1]),
            pooler: Overheard(getattr(inner, pooler), before=native.append),
            "multi_modal_projector": Overheard(inner.multi_modal_projector, before=before.append),
        }
        function = view(inner, **parts).get_video_features
        takes = inspect.signature(function).parameters
        pixels = "pixel_values_videos" if "pixel_values_videos" in takes else "pixel_values"  # in older releases
        named = named_for(function, given, (*LAYER_NAMES, STRATEGY))
        out = function(**{pixels: frames.unsqueeze(0)}, **named, return_dict=True)
        half = self.default_side(_side(model)) ** 2
        found = {"rows": out.pooler_output[0].flatten(0, -2)[: len(frames) * half].unflatten(0, (len(frames), half))}
        if "native" in needs.features:
            found["native"] = native[0]
        if "before" in needs.features:
            found["before"] = before[0] if self.pools_first else self.pooled(model, before[0])
        if needs.attention != "none":
            each = watch.each(last)[0]
            found["attention"] = self.pooled(model, torch.stack(each, dim=-1)[:, first:])
        if watch.keys is not None:
            found["keys"] = self.pooled(model, watch.keys[:, first:])
        return found


class Onevision(LlavaVideo):
    """Projected features, halved by interpolation; one newline behind the last frame."""

    name = "transformers LLaVA-OneVision"
    models = frozenset({("llava_onevision", "LlavaOnevisionForConditionalGeneration")})
    newline = "video"

    def default_side(self, side: int) -> int:
        """Half, rounded up."""
        return (side + 1) // 2

    def pooled(self, model: Any, rows: Tensor) -> Tensor:
        """By the model's own function."""
        found: Tensor = model.model.apply_pooling(rows)
        return found


class NextVideo(LlavaVideo):
    """Tower features, average-pooled with stride 2, then projected; no separators."""

    name = "transformers LLaVA-NeXT-Video"
    models = frozenset({("llava_next_video", "LlavaNextVideoForConditionalGeneration")})
    pooling = "pool"
    pools_first = True

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """Pooling must be the plain one."""
        super().refuse(model, given, needs)
        kind, stride = model.config.spatial_pool_mode, model.config.spatial_pool_stride
        if (kind, stride) != ("average", 2):
            raise ConfigError(
                f"{type(model).__name__} pools frames by {kind!r} with stride {stride}; only 'average' with stride 2 "
                "is supported"
            )

    def default_side(self, side: int) -> int:
        """Half, rounded down."""
        return side // 2

    def pooled(self, model: Any, rows: Tensor) -> Tensor:
        """By the model's own module."""
        found: Tensor = model.model.vision_resampler(rows)
        return found

    def finish(self, model: Any, rows: Tensor, visual: Visual) -> Tensor:
        """The projector comes last, for frames."""
        if visual.kind == "image":
            return rows
        projected: Tensor = model.model.multi_modal_projector(rows)
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


def _with_lines(model: Any, visual: Visual, rows: Tensor) -> Tensor:
    """Rows [n, C] of a video with its newlines between or behind them."""
    if not visual.separators:
        return rows
    found = rows.new_empty(visual.length, rows.shape[-1])
    found[visual.places()] = rows
    found[list(visual.separators)] = model.model.image_newline.to(rows)
    return found


def _stacked(levels: list[Tensor]) -> Tensor:
    """Rows of all videos in one tensor, as the models hand them on."""
    return torch.stack(levels) if len({len(rows) for rows in levels}) == 1 else torch.cat(levels).unsqueeze(0)


def _dense(tower: Any, run: Any, layers: list[int], *args: Any, **kwargs: Any) -> Any:
    """The tower's output, with a row for every patch in some of its hidden states also where it merges them."""
    if "_vtoken" not in tower.__dict__ or not will_remove(tower, 10**6):
        return run(*args, **kwargs)
    with contextlib.ExitStack() as stack:
        record = current_trace(tower) or stack.enter_context(tracing(tower))
        out = run(*args, **kwargs)
    states = list(out.hidden_states)
    for i in {layer % len(states) for layer in layers} - {0}:
        states[i] = unmerge(states[i], record, layer=i - 1)
    out.hidden_states = tuple(states)
    return out
