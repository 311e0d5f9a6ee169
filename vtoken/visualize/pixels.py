"""What the pictures share: checked images, cells at pixel size, borders, a heat scale, captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from vtoken import checks
from vtoken.errors import InputError, ShapeError

if TYPE_CHECKING:
    from PIL.Image import Image

_LIGHT, _DARK = 1.0, 0.1
# Viridis at 0, 1/4, 1/2, 3/4 and 1: as readable in grey and for the colour-blind, and no need of matplotlib.
_HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_MARGIN = 8
_CAPTION = 16


def draw_image(image: Tensor, *, scale: int = 1) -> Image:
    """The image [3, H, W], values in [0, 1], as a picture enlarged by the integer `scale`."""
    return to_picture(enlarged(checked_image(image), checked_scale("draw_image", scale)))


def draw_heat(values: Tensor, *, low: float | None = None, high: float | None = None, scale: int = 1) -> Image:
    """A map [H, W] in colours from dark blue (`low`, None: its smallest value) to yellow (`high`, None: its largest).

    Raises:
        ShapeError: if the map is not [H, W].
        ImportError: if pillow is missing.
    """
    if values.dim() != 2 or values.numel() == 0:
        raise ShapeError(f"draw_heat takes one map [H, W], got {tuple(values.shape)}")
    scale = checked_scale("draw_heat", scale)
    return to_picture(cells(heat(values, low, high), values.shape[0] * scale, values.shape[1] * scale))


def side_by_side(pictures: Sequence[Image], captions: Sequence[str]) -> Image:
    """Pictures in a row, a caption above each; a caption that is wider than its picture is cut off.

    Raises:
        ShapeError: if there are no pictures or not as many captions.
        ImportError: if pillow is missing.
    """
    if not pictures or len(pictures) != len(captions):
        raise ShapeError(f"side_by_side takes one caption per picture, got {len(pictures)} and {len(captions)}")
    module = pillow()
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=_CAPTION)
    top = _CAPTION + _MARGIN
    size = (sum(p.width + _MARGIN for p in pictures) - _MARGIN, top + max(p.height for p in pictures))
    sheet: Image = module.new("RGB", size, "white")
    left = 0
    for picture, caption in zip(pictures, captions, strict=True):
        label = module.new("RGB", (picture.width, top), "white")
        ImageDraw.Draw(label).text((2, 1), caption, fill="black", font=font)
        sheet.paste(label, (left, 0))
        sheet.paste(picture, (left, top))
        left += picture.width + _MARGIN
    return sheet


def pillow() -> Any:
    """The module PIL.Image; ImportError says what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need pillow; install "vtoken[viz]"') from error
    return Image


def checked_image(image: Tensor, grid: tuple[int, int] = (1, 1)) -> Tensor:
    """The image as float32 [3, H, W] in [0, 1] on the CPU.

    Raises:
        ShapeError: if it is not [3, H, W], or smaller than the patch grid.
        InputError: if its values lie outside [0, 1], as those of a normalised image do.
    """
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ShapeError(f"expected one image [3, H, W], got {tuple(image.shape)}")
    rows, columns = grid
    if rows > image.shape[1] or columns > image.shape[2]:
        raise ShapeError(f"an image of {image.shape[1]} x {image.shape[2]} pixels has no {rows} x {columns} patches")
    pixels = image.detach().cpu().float() / (255 if image.dtype == torch.uint8 else 1)
    low, high = float(pixels.min()), float(pixels.max())
    # Resampling may overshoot a little; a normalised image is far outside.
    if not (low >= -0.1 and high <= 1.1):
        raise InputError(f"image values must lie in [0, 1], got {low:.3g} to {high:.3g}; pass it before normalisation")
    return pixels.clamp(0, 1)


def checked_scale(owner: str, scale: Any) -> int:
    """The scale itself; InputError unless it is a whole number from 1 on."""
    return checks.whole(owner, "scale", scale, 1, error=InputError)


def enlarged(pixels: Tensor, scale: int) -> Tensor:
    """Pixels [3, H, W], smoothly enlarged."""
    if scale == 1:
        return pixels
    return torch.nn.functional.interpolate(pixels[None], scale_factor=scale, mode="bicubic")[0].clamp(0, 1)


def cells(values: Tensor, height: int, width: int) -> Tensor:
    """A map [..., rows, columns] at pixel size, every cell of one value; cells differ by a pixel where they must."""
    y = torch.arange(height) * values.shape[-2] // height
    x = torch.arange(width) * values.shape[-1] // width
    return values[..., y, :][..., x]


def draw_borders(pixels: Tensor, names: Tensor) -> Tensor:
    """Pixels [3, H, W] with a line where neighbours bear different names [H, W]: light, or dark on light ground."""
    edge = torch.zeros(names.shape, dtype=torch.bool)
    edge[:, :-1] |= names[:, :-1] != names[:, 1:]
    edge[:-1] |= names[:-1] != names[1:]
    line = torch.where(pixels.mean(0) < 0.7, _LIGHT, _DARK)
    return torch.where(edge, line, pixels)


def heat(values: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Colours [3, ...] of values [...]; what is not finite counts as lowest, or as highest if it is +inf."""
    values = values.detach().cpu().float()
    finite = values[values.isfinite()]
    bottom = low if low is not None else float(finite.min()) if finite.numel() else 0.0
    top = high if high is not None else float(finite.max()) if finite.numel() else 1.0
    share = ((values - bottom) / max(top - bottom, 1e-12)).nan_to_num(0.0).clamp(0, 1)
    table = torch.tensor(_HEAT).T / 255
    place = share * (table.shape[1] - 1)
    below = place.long().clamp(max=table.shape[1] - 2)
    return torch.lerp(table[:, below], table[:, below + 1], place - below)


def to_picture(pixels: Tensor) -> Image:
    """Pixels [3, H, W] in [0, 1] as a pillow image."""
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    picture: Image = pillow().fromarray(rearrange(values, "c h w -> h w c").contiguous().numpy())
    return picture
