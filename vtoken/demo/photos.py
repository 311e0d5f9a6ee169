"""Real photographs without a download: those that lie inside the scikit-image wheel.

scikit-image is not imported: its own loader downloads a file that is missing, and this library never does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from vtoken.errors import ConfigError, VTokenError

# Everyday scenes first, then rarer subjects; the saliency maps of the last two are nearly flat (deviation 0.04 and
# 0.02), so correlations on them say little. Left out: drawings, test charts, scanned text, microscopy, bare textures.
_FILES = {
    "astronaut": "astronaut.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
    "coins": "coins.png",
    "clock": "clock_motion.png",
    "retina": "retina.jpg",
    "moon": "moon.png",
    "hubble": "hubble_deep_field.jpg",
}
_INSTALL = 'install it with pip install "vtoken[demo]"'


def photograph_names() -> list[str]:
    """Names that `load_photographs` knows, everyday scenes first."""
    return list(_FILES)


def load_photographs(size: int, names: Sequence[str] | None = None) -> tuple[list[str], Tensor]:
    """Photographs as a batch: the largest centred square of each, resized with antialiasing; grey ones as RGB.

    Args:
        size: side of the result in pixels.
        names: which ones, from `photograph_names()`; None means all.

    Returns:
        The names in the order of the batch, and the images [N, 3, size, size], float32 in [0, 1].

    Raises:
        ConfigError: if size is not positive, names is empty or a single string, or a name is unknown.
        ImportError: if scikit-image or pillow is missing.
        VTokenError: if this build of scikit-image comes without one of the files.
    """
    if size < 1:
        raise ConfigError(f"size={size} is not a positive number of pixels")
    if isinstance(names, str):
        raise ConfigError(f"names={names!r} is one string; pass a list of names, [{names!r}]")
    chosen = photograph_names() if names is None else list(names)
    unknown = [name for name in chosen if name not in _FILES]
    if unknown or not chosen:
        raise ConfigError(f"names={chosen} has unknown names {unknown} or none; choose from {photograph_names()}")
    folder = _data_folder()
    return chosen, torch.stack([_load(folder / _FILES[name], size) for name in chosen])


def _data_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the photographs come with the package scikit-image; {_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data"


def _load(path: Path, size: int) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"reading photographs needs the package pillow; {_INSTALL}") from error
    if not path.is_file():
        raise VTokenError(f"this build of scikit-image has no {path}; the wheels on PyPI have it")
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Pillow widens the filter when it shrinks, which is the antialiasing.
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return rearrange(pixels, "h w c -> c h w").float() / 255
