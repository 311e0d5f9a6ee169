"""What a trace keeps of attentions, prompts and videos; made only while a caller asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtoken.core.visual import Visual
from vtoken.errors import ShapeError


@dataclass(eq=False)
class AttentionRecord:
    """What one attention did in a traced forward; the maps only where the caller asked for them by name.

    Args:
        layer: the block.
        density: share of the query-key pairs of patch queries that were kept, over batch and heads.
        kept: number of kept pairs, prefix queries included, over batch and heads.
        mask: kept pairs, [B, H, T, T] bool.
        scores: what the connectivity predictor says of patch queries, [B, H, T - P, T] float32.
        attention: softmax over the kept keys, [B, H, T, T].
    """

    layer: int
    density: float = 1.0
    kept: int = 0
    mask: Tensor | None = None
    scores: Tensor | None = None
    attention: Tensor | None = None
    wants: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class PromptRecord:
    """Which image tokens reached the language model. Images are counted over the whole batch, in prompt order.

    Args:
        kept: of every image, ascending indices [k] int64 among its features (its placeholders in the full prompt).
        full_lengths, lengths: features of every image before and after.
        scores: of every image, what the choice was made by, [n] float32; -1 marks a newline, and a class token that is
            kept in any case has the score of its own attention to itself.
        index: for every position of the short prompt, its position in the prompt that the caller passed, [B, L'] int64;
            -1 where it is padding.
        input_ids: the short prompt [B, L'] int64, to go on from a cache.
        scorer: "cls" or "received".
        layers: blocks of the tower whose attention was read.
        grid: patch rows and columns of an image or of its overview crop, if it is known.
        first_patch: patch that feature 0 is; -1 if it is the class token.
        anchors: of every image or overview crop the patch whose place each feature keeps, [n] int64, if the tower
            merges tokens; else None.
        visuals: the grids of every image and video; see `vtoken.core.visual.Visual`.
    """

    kept: tuple[Tensor, ...]
    full_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    scores: tuple[Tensor, ...]
    index: Tensor
    input_ids: Tensor
    scorer: str
    layers: tuple[int, ...]
    grid: tuple[int, int] | None
    first_patch: int
    anchors: tuple[Tensor, ...] | None
    visuals: tuple[Visual, ...] = ()

    def patches(self, image: int = 0) -> Tensor:
        """Kept patches of one image, [k] int64 in raster order from 0; of the overview crop, if it has several.

        Raises:
            ShapeError: if there is no such image.
        """
        if not 0 <= image < len(self.kept):
            raise ShapeError(f"image {image} of a prompt with {len(self.kept)} image(s)")
        if self.anchors is not None:
            found = self.anchors[image][self.kept[image]]
        else:
            found = self.kept[image] + self.first_patch
        num_patches = self.grid[0] * self.grid[1] if self.grid else self.full_lengths[image]
        if self.visuals:
            cells = self.visuals[image].cells
            shown = next((i for i, cell in enumerate(cells) if cell.role == "overview"), 0)
            found = found - sum(cell.tokens for cell in cells[:shown])
            if cells[shown].grid != self.visuals[0].cells[0].grid:  # of another size
                num_patches = cells[shown].tokens
        return found[(found >= 0) & (found < num_patches)]


@dataclass(frozen=True, eq=False)
class VideoRecord:
    """What became of the videos in one call of a `vtoken.QuotaVideoModel`.

    Args:
        reports: a `vtoken.video.QuotaReport` of every video, in prompt order.
        index: for every position of the prompt that the language model saw, the position in the caller's prompt that it
            stands for, [B, L'] int64; -1 where it is padding. Frames with more tokens than placeholders repeat some.
        input_ids: the ids of that prompt [B, L'] int64, to go on from a cache.
    """

    reports: tuple[Any, ...]
    index: Tensor
    input_ids: Tensor
