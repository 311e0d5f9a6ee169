"""Kept and pruned patches over the image, for every method that keeps some patches and drops the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtoken.errors import InputError, ShapeError
from vtoken.visualize.pixels import cells, checked_image, checked_scale, draw_borders, enlarged, heat, to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

_DIM = 0.4  # brightness of a pruned patch
_HATCH = 0.35  # share of white in its lines
_TINT = 0.6  # share of the score's colour in a patch


def draw_kept(
    image: Tensor, kept: Tensor, grid: tuple[int, int], *, scores: Tensor | None = None, scale: int = 1
) -> Image:
    """The image with kept patches as they are and pruned ones darkened and hatched.

    Args:
        image: one image [3, H, W], values in [0, 1] (before normalisation).
        kept: true for kept patches, bool [N], or their indices in raster order, integers [K]; of a recorded forward
            `trace.kept()`.
        grid: patch rows and columns, N = rows * columns; of a recorded forward `trace.grid`.
        scores: what the choice was made by, [N]; tints every patch from dark blue (lowest) to yellow (highest).
        scale: integer enlargement of the picture.

    Raises:
        ShapeError: if the image, `kept` or `scores` do not fit the grid, or the image is not [3, H, W].
        InputError: if the image's values lie outside [0, 1], or `kept` is neither bool nor integer.
        ImportError: if pillow is missing.

    Example:
        >>> import torch, vtoken
        >>> vtoken.visualize.draw_kept(torch.rand(3, 32, 48), torch.tensor([0, 1, 5]), (2, 3)).size
        (48, 32)
    """
    rows, columns = grid
    mask = _mask(kept, rows * columns).view(rows, columns)
    pixels = enlarged(checked_image(image, (rows, columns)), checked_scale("draw_kept", scale))
    height, width = pixels.shape[1:]
    if scores is not None:
        if scores.shape != (rows * columns,):
            raise ShapeError(f"scores must be [{rows * columns}], one per patch, got {tuple(scores.shape)}")
        colours = cells(heat(scores).view(3, rows, columns), height, width)
        pixels = torch.lerp(pixels.mean(0, keepdim=True).expand_as(pixels), colours, _TINT)
    shown = cells(mask, height, width)
    hatch = _hatch(height, width, step=min(10, max(3, min(height // rows, width // columns) // 3)))
    pruned = torch.where(hatch, torch.lerp(pixels * _DIM, torch.ones(()), _HATCH), pixels * _DIM)
    return to_picture(draw_borders(torch.where(shown, pixels, pruned), shown))


def _mask(kept: Tensor, num_patches: int) -> Tensor:
    """Boolean [N] on the CPU, from either form."""
    if kept.dim() != 1:
        raise ShapeError(f"kept describes one image, bool [N] or indices [K], got {tuple(kept.shape)}")
    kept = kept.detach().cpu()
    if kept.dtype == torch.bool:
        if kept.shape[0] != num_patches:
            raise ShapeError(f"kept has {kept.shape[0]} patches, the grid {num_patches}")
        return kept
    if kept.is_floating_point() or kept.is_complex():
        raise InputError(f"kept must be bool [N] or indices [K], got {kept.dtype}; did you mean scores > threshold?")
    outside = kept[(kept < 0) | (kept >= num_patches)]
    if outside.numel():
        raise ShapeError(f"kept names patch {int(outside[0])}, the grid has patches 0 to {num_patches - 1}")
    return torch.zeros(num_patches, dtype=torch.bool).index_fill(0, kept.long(), True)


def _hatch(height: int, width: int, step: int) -> Tensor:
    """Diagonal lines, one pixel in `step`."""
    return (torch.arange(height)[:, None] + torch.arange(width)) % step == 0
