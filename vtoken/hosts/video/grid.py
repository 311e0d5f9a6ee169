"""Videos that come as rows of patches with a grid (t, h, w) each: what Qwen's models and VideoLLaMA3 share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.errors import InputError, ShapeError
from vtoken.hosts.video.adapter import VideoAdapter, VideoFeatures, VideoLayout, chunks


class GridVideo(VideoAdapter):
    """A model whose `get_video_features` takes patches [sum(t * h * w), C] and `video_grid_thw` [V, 3]."""

    #: Further arguments of `get_video_features` with one row per video.
    per_video: tuple[str, ...] = ()
    #: What the numbering of positions takes beside the grid, one row per video.
    numbering: tuple[str, ...] = ()

    def merge_sizes(self, model: Any, given: dict[str, Any]) -> list[int]:
        """Of every video, how many patches along one side become one token."""
        return [int(model.config.vision_config.spatial_merge_size)] * len(given["video_grid_thw"])

    def frames_per_cell(self, model: Any) -> int:
        """Frames that the tower makes one cell of."""
        return int(getattr(model.config.vision_config, "temporal_patch_size", 1))

    def layouts(self, model: Any, given: dict[str, Any]) -> list[VideoLayout]:
        """From the grids alone."""
        grids = given.get("video_grid_thw")
        if grids is None:
            raise InputError("pixel_values_videos came without video_grid_thw; pass all that the processor returns")
        merges, found = self.merge_sizes(model, given), []
        for (cells, height, width), merge in zip(grids.tolist(), merges, strict=True):
            grid = (height // merge, width // merge)
            placeholders, patches = (grid[0] * grid[1],) * cells, height * width
            found.append(VideoLayout(grid, grid, placeholders, patches, 0, self.frames_per_cell(model)))
        pixels, patches = given.get("pixel_values_videos"), int(grids.prod(1).sum())
        if pixels is not None and len(pixels) != patches:
            raise ShapeError(f"pixel_values_videos has {len(pixels)} patches, video_grid_thw speaks of {patches}")
        return found

    def encode(self, model: Any, given: dict[str, Any], chunk: int | None) -> list[VideoFeatures]:
        """Through the model's own `get_video_features`; long videos in pieces, as no token looks beyond its cell."""
        layouts = self.layouts(model, given)
        thw, pixels = given["video_grid_thw"], given["pixel_values_videos"]
        cells = None if chunk is None else max(1, chunk // self.frames_per_cell(model))
        if cells is None or int(thw[:, 0].sum()) <= cells:
            levels = self._run(model, given, pixels, thw, slice(None))
            pieces = [[level[v] for level in levels] for v in range(len(layouts))]
        else:
            videos = pixels.split(thw.prod(1).tolist())
            pieces = [self._in_pieces(model, given, videos[v], v, cells) for v in range(len(layouts))]
        found = []
        for v, (layout, rows) in enumerate(zip(layouts, pieces, strict=True)):
            grids = [level.unflatten(0, (layout.cells, *layout.grid)) for level in rows]
            kept = {n: given[n][v : v + 1] for n in ("video_grid_thw", *self.numbering) if given.get(n) is not None}
            kept = {name: torch.as_tensor(value) for name, value in kept.items()}
            found.append(VideoFeatures(layout, grids[0], tuple(grids[1:]), None, kept))
        return found

    def _in_pieces(self, model: Any, given: dict[str, Any], pixels: Tensor, v: int, cells: int) -> list[Tensor]:
        """All levels of video `v`, `cells` cells at a time."""
        total, height, width = given["video_grid_thw"][v].tolist()
        parts = []
        for a, b in chunks(total, cells):
            thw = given["video_grid_thw"].new_tensor([[b - a, height, width]])
            levels = self._run(model, given, pixels[a * height * width : b * height * width], thw, slice(v, v + 1))
            parts.append([level[0] for level in levels])
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def _run(self, model: Any, given: dict[str, Any], pixels: Tensor, thw: Tensor, videos: slice) -> list[list[Tensor]]:
        """Of every level of features the rows of every video."""
        more = {name: given[name][videos] for name in self.per_video}
        out = model.model.get_video_features(pixels, video_grid_thw=thw, **more, return_dict=True)
        return [list(out.pooler_output), *self.deeper(out, [len(rows) for rows in out.pooler_output])]

    def deeper(self, out: Any, lengths: list[int]) -> list[list[Tensor]]:
        """More levels of features of every video."""
        return []


def split_levels(levels: Any, lengths: list[int]) -> list[list[Tensor]]:
    """Levels of features by video; they come as rows of all videos or split already, over the versions."""
    return [list(level.split(lengths) if isinstance(level, Tensor) else level) for level in levels]
