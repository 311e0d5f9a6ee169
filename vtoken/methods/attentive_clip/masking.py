"""From the teacher's relevance maps to the rows of the student's tokens that enter its blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtoken.errors import ShapeError
from vtoken.methods.attentive_clip.mapping import map_scores
from vtoken.methods.attentive_clip.select import patches_of, unit_scores


def shrunk(image: Tensor, scale: float, patch_size: tuple[int, int], own: tuple[int, int] | None) -> Tensor:
    """The image as the teacher sees it, [B, 3, Ht, Wt].

    Args:
        own: the size that the tower was made for, which need not be a whole number of patches.

    Raises:
        ShapeError: if that is no whole number of patches.
    """
    size = [round(side * scale) for side in image.shape[2:]]
    if tuple(size) != own and any(side % patch for side, patch in zip(size, patch_size, strict=True)):
        raise ShapeError(
            f"the teacher's image is {tuple(size)} pixels with teacher_scale={scale}; both sides must be multiples of "
            f"the patch size {patch_size}"
        )
    if size == list(image.shape[2:]):
        return image
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)


def scores_of_units(
    scores: Tensor,
    grid: tuple[int, int],
    block: int,
    views: int = 1,
    view_boxes: Tensor | None = None,
    teacher_boxes: Tensor | None = None,
    outside: str = "border",
) -> Tensor:
    """Scores of the units of all views.

    Args:
        scores: of the teacher's patches, [B, ht, wt].
        grid: rows and columns of a view's patches.
        block: side of a unit.
        views: V.
        view_boxes, teacher_boxes, outside: see `map_scores`.

    Returns:
        [V*B, n], all of the first view first.
    """
    if view_boxes is None and scores.shape[1:] == (grid[0] // block, grid[1] // block):
        return scores.flatten(1).repeat(views, 1)  # a small teacher's patches are the units
    mapped = map_scores(scores, grid, view_boxes, teacher_boxes, outside).expand(-1, views, -1, -1)
    return unit_scores(rearrange(mapped, "b v h w -> (v b) h w"), block)


def token_rows(units: Tensor, grid: tuple[int, int], block: int, num_prefix: int) -> Tensor:
    """Kept units [B, k] -> rows of the prefix tokens and of their patches, ascending, [B, P + k * block^2] int64."""
    kept = patches_of(units, grid, block)
    prefix = torch.arange(num_prefix, device=kept.device).expand(len(kept), -1)
    return torch.cat([prefix, kept + num_prefix], 1)


def by_view(rows: Tensor, views: int) -> Tensor:
    """[V*B, D], all of the first view first -> [B, V, D]."""
    return rearrange(rows, "(v b) d -> b v d", v=views)
