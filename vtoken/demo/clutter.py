"""A classification task on which dropping the wrong tokens hurts: cluttered Fashion-MNIST, and a small ViT for it.

Plain Fashion-MNIST fills the picture with the garment, and a ViT barely notices when half of its tokens go. Here the
whole garment covers a sixteenth of a grey canvas, at a random place, among pieces cut out of other garments.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vtoken.errors import ConfigError, VTokenError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

DATA = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts it
WEIGHTS = Path(__file__).parents[2] / "examples" / "weights" / "cluttered_vit.safetensors"
SIDE = 112
GARMENT = 28
PIECE = 16
PATCH = 8

_DENSITY = 16 / SIDE**2  # pieces per pixel: sixteen on a whole canvas
_NAMES = {"train": "train", "test": "t10k"}
_GET = (
    "get the files with `apt-get install dataset-fashion-mnist` (Debian, Ubuntu) or "
    "`torchvision.datasets.FashionMNIST(root, download=True)`, and name their folder (root/FashionMNIST/raw there)"
)


def read_fashion_mnist(split: Literal["train", "test"], folder: Path = DATA) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] and labels int64 [N] of one split, from its IDX files, gzipped or plain.

    Raises:
        ConfigError: if the folder does not hold the files; the message says where they come from.
        VTokenError: if a file is damaged.
    """
    images = _read_idx(folder, f"{_NAMES[split]}-images-idx3-ubyte")
    labels = _read_idx(folder, f"{_NAMES[split]}-labels-idx1-ubyte").long()
    if images.shape != (len(labels), GARMENT, GARMENT):
        raise VTokenError(f"{folder}: images {tuple(images.shape)} and {len(labels)} labels do not fit together")
    return images, labels


def _read_idx(folder: Path, name: str) -> Tensor:
    found = [path for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
    if not found:
        raise ConfigError(f"no Fashion-MNIST in {folder} ({name}.gz is missing); {_GET}")
    try:
        content = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
        # The format: two zero bytes, the type (8 is uint8), the number of dimensions, each of them as 4 bytes, values.
        dims = content[3]
        shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1)]
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("not an IDX file of bytes")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dims).view(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError, RuntimeError) as error:
        raise VTokenError(f"{found[0]} is damaged: {error}") from error


@dataclass(frozen=True)
class Layout:
    """What lies where on N canvases; places and crops are (row, column) of the upper left corner, int64.

    Args:
        garments: which image is the whole garment, [N].
        places: where it lies, [N, 2].
        sources: which images the pieces are cut from, [N, K].
        crops: where in those images, [N, K, 2].
        piece_places: where the pieces lie, [N, K, 2].
        side: of the canvas in pixels.
    """

    garments: Tensor
    places: Tensor
    sources: Tensor
    crops: Tensor
    piece_places: Tensor
    side: int


def draw_layout(
    garments: Tensor, total: int, generator: torch.Generator, side: int = SIDE, pieces: int | None = None
) -> Layout:
    """A random layout for the chosen images; pieces come from any of the `total` images but the garment's own.

    Args:
        pieces: how many; None means as many for the canvas's area as on a whole one, which has sixteen.

    Raises:
        ConfigError: if the garment does not fit the canvas, or there is no second image to cut pieces from.
    """
    if side < GARMENT or total < 2:
        raise ConfigError(f"side={side}, {total} images: a canvas needs {GARMENT} pixels and two images")
    count, pieces = len(garments), round(_DENSITY * side**2) if pieces is None else pieces

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    sources = draw(total - 1, count, pieces)
    return Layout(
        garments=garments,
        places=draw(side - GARMENT + 1, count, 2),
        sources=sources + (sources >= garments[:, None]),  # steps over the garment's own image
        crops=draw(GARMENT - PIECE + 1, count, pieces, 2),
        piece_places=draw(side - PIECE + 1, count, pieces, 2),
        side=side,
    )


def paint(images: Tensor, layout: Layout) -> Tensor:
    """Canvases [N, 1, side, side], float32 in [-1, 1] with 0 for grey: pieces in order, the garment over them.

    Args:
        images: uint8 [total, 28, 28].
    """
    flat, side = images.flatten(1), layout.side
    canvas = torch.full((len(layout.garments), side * side), 127.5)
    for k in range(layout.sources.shape[1]):
        piece = flat[layout.sources[:, k]].gather(1, _square(layout.crops[:, k], PIECE, GARMENT))
        canvas.scatter_(1, _square(layout.piece_places[:, k], PIECE, side), piece.float())
    canvas.scatter_(1, _square(layout.places, GARMENT, side), flat[layout.garments].float())
    return canvas.view(-1, 1, side, side) / 127.5 - 1


def _square(corners: Tensor, size: int, side: int) -> Tensor:
    """Flat positions [N, size * size] in pictures `side` wide of the squares at `corners` [N, 2]."""
    rows, columns = (corners[:, :, None] + torch.arange(size)).unbind(1)
    return (rows[:, :, None] * side + columns[:, None, :]).flatten(1)


def load_test_canvases(count: int, seed: int = 0, folder: Path = DATA) -> tuple[Tensor, Tensor]:
    """Canvases [count, 1, 112, 112] of different test garments, and labels [count]; the seed decides all.

    Raises:
        ConfigError: if there are not that many test images, or no files (see `read_fashion_mnist`).
    """
    images, labels = read_fashion_mnist("test", folder)
    if not 0 < count <= len(images):
        raise ConfigError(f"count={count} is not between 1 and the {len(images)} test images")
    generator = torch.Generator().manual_seed(seed)
    garments = torch.randperm(len(images), generator=generator)[:count]
    return paint(images, draw_layout(garments, len(images), generator)), labels[garments]


def clutter_vit() -> VisionTransformer:
    """An untrained timm ViT for the canvases: 14 x 14 patches and a class token, 96 wide, 8 deep, 1 M parameters."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIDE, patch_size=PATCH, in_chans=1, num_classes=10, embed_dim=96, depth=8, num_heads=3,
        embed_layer=_conv_stem,
    )  # fmt: skip


def _conv_stem(**options: Any) -> nn.Module:
    """timm's patch embedding with three strided convolutions instead of one: it learns far faster on few images."""
    from timm.layers.patch_embed import PatchEmbed

    embed: nn.Module = PatchEmbed(**options)
    widths = (options["in_chans"], 24, 48, 96)
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    embed.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], options["embed_dim"], 1))
    return embed


def load_clutter_vit(path: Path | None = None) -> VisionTransformer:
    """The trained ViT in eval mode, float32, on the CPU; `examples/train_cluttered.py` made its weights.

    Args:
        path: a safetensors file; None means the one in the repository.

    Raises:
        ConfigError: if there is no such file.
    """
    path = WEIGHTS if path is None else path
    if not path.is_file():
        raise ConfigError(f"no weights {path}; they lie in the repository and come from examples/train_cluttered.py")
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is not a mapping
    # On meta nothing is initialised only to be overwritten, and the global random state stays as it was.
    with torch.device("meta"):
        model = clutter_vit()
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
