"""Scores of the teacher's patches brought to the patches of the student's views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from vtoken.errors import ConfigError, ShapeError
from vtoken.ops.rows import full_precision

OUTSIDE = ("border", "zeros")


def check_boxes(view_boxes: Tensor | None, teacher_boxes: Tensor | None, batch: int, views: int) -> None:
    """Raise unless both boxes are there in their shapes, or neither is."""
    if (view_boxes is None) != (teacher_boxes is None):
        given, missing = ("view_boxes", "teacher_boxes") if teacher_boxes is None else ("teacher_boxes", "view_boxes")
        raise ConfigError(f"{given} without {missing}: give both, or neither if teacher and views show the same region")
    if view_boxes is None or teacher_boxes is None:
        return
    if view_boxes.shape != (batch, views, 4) or teacher_boxes.shape != (batch, 4):
        raise ShapeError(
            f"expected view_boxes [{batch}, {views}, 4] and teacher_boxes [{batch}, 4], one (top, left, height, width) "
            f"in source pixels for each sample, got {tuple(view_boxes.shape)} and {tuple(teacher_boxes.shape)}"
        )


def map_scores(
    scores: Tensor,
    grid: tuple[int, int],
    view_boxes: Tensor | None = None,
    teacher_boxes: Tensor | None = None,
    outside: str = "border",
) -> Tensor:
    """Scores on the patch grid of each view, bilinear.

    Args:
        scores: of the teacher's patches, [B, ht, wt].
        grid: rows h and columns w of a view.
        view_boxes: (top, left, height, width) of the views in source pixels, [B, V, 4].
        teacher_boxes: of the teacher's image, [B, 4]. Without the two, views show what the teacher's image shows.
        outside: of patches whose centre lies outside of the teacher's image: "border" gives them the nearest score,
            "zeros" 0.

    Returns:
        [B, V, h, w] float32; V = 1 without boxes.

    Source: docs/methods/attentive_clip.md 4.
    """
    if view_boxes is None or teacher_boxes is None:
        same = scores.shape[1:] == grid
        return scores.unsqueeze(1) if same else F.interpolate(scores.unsqueeze(1), size=grid, mode="bilinear")
    with full_precision(scores):
        rows, columns = (_places(view_boxes, teacher_boxes, axis, grid[axis]) for axis in (0, 1))
        x = repeat(columns, "b v w -> b v h w", h=grid[0])
        y = repeat(rows, "b v h -> b v h w", w=grid[1])
        points = torch.stack([x, y], -1)
        places = rearrange(points, "b v h w xy -> b (v h) w xy")  # all views of an image as one tall picture
        found = F.grid_sample(
            scores.unsqueeze(1), places, mode="bilinear", padding_mode="border", align_corners=False
        )  # fmt: skip
        found = rearrange(found, "b 1 (v h) w -> b v h w", h=grid[0])
    return found if outside == "border" else found.masked_fill((points.abs() > 1).any(-1), 0.0)


def _places(view_boxes: Tensor, teacher_boxes: Tensor, axis: int, count: int) -> Tensor:
    """Centres of a view's patches along one axis, -1 to 1 in the teacher's image, [B, V, count]."""
    view, teacher = view_boxes.float(), teacher_boxes.float().unsqueeze(1)
    share = (torch.arange(count, device=view.device) + 0.5) / count
    inside = view[..., axis, None] - teacher[..., axis, None] + share * view[..., axis + 2, None]
    # A box of no height or width would give 0 / 0, and NaN is no place; now views see its edges.
    return 2 * inside / teacher[..., axis + 2, None].clamp_min(1e-6) - 1
