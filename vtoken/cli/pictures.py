"""Pictures that a command is told by a file, or by the name of one of the demo's photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vtoken.demo.photos import load_photographs, photograph_names
from vtoken.errors import ConfigError


def read_image(file: Path, size: tuple[int, int]) -> Tensor:
    """The largest centred part of a picture that has the shape (height, width), resized to it: [3, H, W] in [0, 1]."""
    height, width = size
    name = str(file)
    if not file.exists() and name in photograph_names() and height == width:
        return load_photographs(height, [name])[1][0]
    from PIL import Image, ImageOps

    return as_tensor(ImageOps.fit(open_image(file), (width, height), Image.Resampling.BICUBIC))


def open_image(file: Path) -> Any:
    """The whole picture, upright and in colour, as PIL has it."""
    name = str(file)
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('pictures need pillow; install "vtoken[viz]"') from error
    if not file.exists() and name in photograph_names():
        pixels = (load_photographs(512, [name])[1][0] * 255).round().to(torch.uint8)
        return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())
    try:
        with Image.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such file, nor one of the photographs {photograph_names()}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name} cannot be read as an image: {error}") from error


def as_tensor(picture: Any) -> Tensor:
    """A PIL picture as [3, H, W] in [0, 1]."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
    return rearrange(pixels, "h w c -> c h w").float() / 255
