"""Frames of any form as pillow images, which is what image processors of all libraries take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from vtoken.errors import InputError, ShapeError

if TYPE_CHECKING:
    from PIL.Image import Image


def to_image(frame: Any) -> Image:
    """One frame as an RGB image.

    Args:
        frame: a pillow image; an array [h, w, 3]; a tensor [3, h, w] or [h, w, 3]; whole numbers 0 to 255 (uint8), or
            fractions in [0, 1].

    Raises:
        ShapeError, InputError: if it is none of these. ImportError: if pillow is missing.

    Example:
        >>> import torch, vtoken
        >>> vtoken.video.to_image(torch.zeros(3, 20, 30)).size  # width and height
        (30, 20)
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('scoring frames needs pillow; install "vtoken[viz]"') from error
    if isinstance(frame, Image.Image):
        return frame.convert("RGB")
    pixels = _pixels(frame if isinstance(frame, Tensor) else torch.as_tensor(frame))
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.contiguous().numpy().tobytes())


def _pixels(frame: Tensor) -> Tensor:
    """uint8 [h, w, 3] on the CPU."""
    frame = frame.detach().cpu()
    if frame.dim() != 3 or 3 not in (frame.shape[0], frame.shape[2]):
        raise ShapeError(f"a frame must be [h, w, 3] or [3, h, w], got {tuple(frame.shape)}")
    if frame.shape[2] != 3:
        frame = rearrange(frame, "c h w -> h w c")
    if frame.dtype == torch.uint8:
        return frame
    if not frame.is_floating_point():
        raise InputError(f"a frame holds uint8 or fractions in [0, 1], got {frame.dtype}")
    low, high = float(frame.min()), float(frame.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"a frame of {frame.dtype} must lie in [0, 1], got values from {low:.4g} to {high:.4g}")
    return (frame.float() * 255).round().to(torch.uint8)


def at_most(image: Image, max_pixels: int | None) -> Image:
    """The image itself, or scaled down to at most `max_pixels`, its shape kept."""
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    factor = (max_pixels / (image.width * image.height)) ** 0.5
    return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))
