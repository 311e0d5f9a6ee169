"""Videos of VideoLLaMA3: one run of placeholders per frame with its time before it (docs/methods/quota.md 9.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vtoken.errors import InputError, ShapeError
from vtoken.hosts.video.adapter import VideoLayout
from vtoken.hosts.video.grid import GridVideo


class Llama3Video(GridVideo):
    """Projected features of frames that the tower has shrunk; the processor may have left out placeholders."""

    name = "transformers VideoLLaMA3"
    models = frozenset({("video_llama_3", "VideoLlama3ForConditionalGeneration")})
    runs = "per_frame"
    per_video = ("video_merge_sizes",)

    def merge_sizes(self, model: Any, given: dict[str, Any]) -> list[int]:
        """As the processor says."""
        sizes = given.get("video_merge_sizes")
        if sizes is None:
            raise InputError("pixel_values_videos came without video_merge_sizes; pass all that the processor returns")
        return [int(size) for size in sizes]

    def frames_per_cell(self, model: Any) -> int:
        """Frames are not merged in time."""
        return 1

    def layouts(self, model: Any, given: dict[str, Any]) -> list[VideoLayout]:
        """The processor's compression mask says how many placeholders every frame has."""
        found, mask = super().layouts(model, given), given.get("video_compression_mask")
        if mask is None:
            return found
        if len(mask) != sum(layout.length for layout in found):
            raise ShapeError(
                f"video_compression_mask has {len(mask)} entries for {sum(layout.length for layout in found)} features"
            )
        frames = iter(mask.split([n for layout in found for n in layout.placeholders]))
        return [
            replace(layout, placeholders=tuple(int(next(frames).sum()) for _ in layout.placeholders))
            for layout in found
        ]
