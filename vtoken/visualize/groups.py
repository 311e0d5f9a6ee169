"""Merged groups drawn over the image: every group in its mean colour, with its border."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtoken.core.trace import Trace
from vtoken.errors import ShapeError
from vtoken.visualize.pixels import cells, checked_image, checked_scale, draw_borders, to_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_groups(image: Tensor, trace: Trace, *, index: int = 0, layer: int | None = None, scale: int = 1) -> Image:
    """The image with every merged group painted in its mean colour and outlined.

    Args:
        image: one image [3, H, W], values in [0, 1], as it entered the model (before normalisation).
        trace: from `vtoken.trace(model, images)`.
        index: which image of that batch it is.
        layer: groups after this block; None means after the last one.
        scale: integer enlargement of the picture.

    Raises:
        ShapeError: if the trace has no group map, patch grid, such image or block, or the image is not [3, H, W].
        InputError: if the image's values lie outside [0, 1].
        ImportError: if pillow is missing.
    """
    rows, columns, dest = _groups(trace, index, layer)
    pixels = checked_image(image, (rows, columns))
    scale = checked_scale("draw_groups", scale)
    height, width = image.shape[1] * scale, image.shape[2] * scale
    group = dest.view(rows, columns)
    colours = _mean_colours(pixels, cells(group, image.shape[1], image.shape[2]))
    group = cells(group, height, width)
    return to_picture(draw_borders(colours[:, group], group))


def _groups(trace: Trace, index: int, layer: int | None) -> tuple[int, int, Tensor]:
    """Patch rows, columns, and the group of every patch [N]."""
    if trace.dest is None or trace.grid is None:
        raise ShapeError("the trace has no group map or no patch grid; make it with vtoken.trace(model, images)")
    batch, depth = trace.dest.shape[0], len(trace.layer_dest)
    if not -batch <= index < batch:
        raise ShapeError(f"index={index}: the trace has {batch} image(s)")
    if layer is not None and not -depth <= layer < depth:
        raise ShapeError(f"layer={layer}: the trace has blocks 0 to {depth - 1}")
    dest = (trace.dest if layer is None else trace.layer_dest[layer])[index, trace.num_prefix :].cpu()
    rows, columns = trace.grid
    if dest.shape[0] != rows * columns:
        raise ShapeError(f"the trace has {dest.shape[0]} patches, its grid {rows} x {columns}")
    return rows, columns, dest


def _mean_colours(pixels: Tensor, group: Tensor) -> Tensor:
    """Mean colour of every group, [3, G]."""
    flat, names = pixels.reshape(3, -1), group.reshape(-1)
    count = torch.zeros(int(names.max()) + 1).index_add_(0, names, torch.ones(names.shape[0]))
    total = torch.zeros(3, count.shape[0]).index_add_(1, names, flat)
    return total / count.clamp(min=1)
