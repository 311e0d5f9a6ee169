"""Merged groups drawn over the image: every group in its mean colour, with its border."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtoken.core.errors import ShapeError
from vtoken.core.trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

_BORDER = (255, 255, 255)


def draw_groups(image: Tensor, trace: Trace, *, index: int = 0, layer: int | None = None, scale: int = 1) -> Image:
    """The image with every merged group painted in its mean colour and outlined.

    Args:
        image: one image [3, H, W], values in [0, 1], as it entered the model (before normalisation).
        trace: from `vtoken.trace(model, images)`.
        index: which image of that batch it is.
        layer: groups after this block; None means after the last one.
        scale: integer enlargement of the picture.

    Raises:
        ShapeError: if the trace has no group map or no patch grid, or the image is not [3, H, W].
        ImportError: if pillow is missing.
    """
    try:
        from PIL import Image as PILImage
    except ImportError as error:
        raise ImportError('pictures need pillow; install "vtoken[viz]"') from error
    if image.dim() != 3 or image.shape[0] != 3:
        raise ShapeError(f"draw_groups takes one image [3, H, W], got {tuple(image.shape)}")
    if trace.dest is None or trace.grid is None:
        raise ShapeError("the trace has no group map or no patch grid; make it with vtoken.trace(model, images)")
    rows, columns = trace.grid
    dest = (trace.dest if layer is None else trace.layer_dest[layer])[index, trace.num_prefix :].cpu()
    if dest.shape[0] != rows * columns:
        raise ShapeError(f"the trace has {dest.shape[0]} patches, its grid {rows} x {columns}")
    height, width = image.shape[1] * scale, image.shape[2] * scale
    group = _enlarge(dest.view(rows, columns), height, width)
    pixels = torch.nn.functional.interpolate(image.float().cpu()[None], (height, width), mode="nearest")[0]
    painted = _group_means(pixels, group)
    painted[:, _borders(group)] = torch.tensor(_BORDER).view(3, 1) / 255
    array = (painted.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return PILImage.fromarray(array)


def _enlarge(cells: Tensor, height: int, width: int) -> Tensor:
    """A map [rows, columns] at pixel size, nearest neighbour."""
    y = torch.arange(height) * cells.shape[0] // height
    x = torch.arange(width) * cells.shape[1] // width
    return cells[y][:, x]


def _group_means(pixels: Tensor, group: Tensor) -> Tensor:
    flat, names = pixels.reshape(3, -1), group.reshape(-1)
    count = torch.zeros(int(names.max()) + 1).index_add_(0, names, torch.ones(names.shape[0]))
    total = torch.zeros(3, count.shape[0]).index_add_(1, names, flat)
    return (total / count.clamp(min=1))[:, names].reshape(pixels.shape).clone()


def _borders(group: Tensor) -> Tensor:
    """Pixels whose right or lower neighbour belongs to another group."""
    edge = torch.zeros(group.shape, dtype=torch.bool)
    edge[:, :-1] |= group[:, :-1] != group[:, 1:]
    edge[:-1] |= group[:-1] != group[1:]
    return edge
