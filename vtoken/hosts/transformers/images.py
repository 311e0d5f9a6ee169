"""How a tower of transformers takes its images: their size, its patches, and the arguments of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vtoken.hosts.tower import pair

Grid = tuple[int, int]


@dataclass(frozen=True)
class Pixels:
    """Images [B, C, H, W], one token a patch.

    Args:
        resize: the argument that asks a tower for positions of another image size; "" if it always fits them, None if
            it takes its own size alone.
        padded: whether a call may name rows that are padding.
        packed: whether the patches of all images of a call are one row.
        unserved: arguments of a call that cannot be had while tokens are removed, and why.
    """

    resize: str | None = "interpolate_pos_encoding"
    padded: bool = False
    packed: bool = False
    unserved: Mapping[str, str] = field(default_factory=dict)

    def fixed(self, config: Any) -> bool:
        """Whether the tower takes images of one size only."""
        return self.resize is None

    def size(self, config: Any) -> Grid:
        """Height and width in pixels that the tower was built for."""
        return pair(config.image_size)

    def grid(self, config: Any, arguments: dict[str, Any]) -> Grid | None:
        """Patch rows and columns of the images of a call; None if they differ."""
        pixels = arguments["pixel_values"]
        return self.patches(config, (pixels.shape[-2], pixels.shape[-1]))

    def patches(self, config: Any, img_size: tuple[int, int]) -> Grid:
        """Patch rows and columns of an image of `img_size` (height, width) pixels."""
        return patches(config, img_size)

    def arguments(self, config: Any, image: Tensor) -> dict[str, Any]:
        """A tower's arguments for images [B, C, H, W]."""
        fits = (image.shape[2], image.shape[3]) == self.size(config)
        return {"pixel_values": image} | ({self.resize: True} if self.resize and not fits else {})


@dataclass(frozen=True)
class NativePixels(Pixels):
    """AIMv2: learned positions fit one size, computed ones ("native" towers) any."""

    resize: str | None = ""

    def fixed(self, config: Any) -> bool:
        """Whether positions are learned."""
        return not config.is_native


@dataclass(frozen=True)
class KeptPixels(Pixels):
    """ViT-MAE: a random part of the patches, shuffled. They have no grid: one row of those that are kept."""

    def patches(self, config: Any, img_size: tuple[int, int]) -> Grid:
        """One row."""
        height, width = patches(config, img_size)
        return 1, int(height * width * (1 - config.mask_ratio))


@dataclass(frozen=True)
class PackedPixels(Pixels):
    """Pixtral: images in a frame of one size, `image_sizes` of which are theirs."""

    resize: str | None = ""
    packed: bool = True

    def grid(self, config: Any, arguments: dict[str, Any]) -> Grid | None:
        """Patch rows and columns of a call's only image."""
        sizes = arguments.get("image_sizes")
        if sizes is None:
            return super().grid(config, arguments)
        return self.patches(config, (int(sizes[0][0]), int(sizes[0][1]))) if len(sizes) == 1 else None


@dataclass(frozen=True)
class Tubes(Pixels):
    """Videos [B, F, C, H, W], one token for a patch of `tubelet_size` frames; the grids of all stand below each other.

    What is called an image here (in a plan, a report) is a video of as many frames as the configuration says.
    """

    resize: str | None = None

    def patches(self, config: Any, img_size: tuple[int, int]) -> Grid:
        """Rows of all frames and columns; the number of frames is the configuration's."""
        size = config.tubelet_size
        frames, *patch = (size, *pair(config.patch_size)) if isinstance(size, int) else size
        return config.num_frames // frames * (img_size[0] // patch[0]), img_size[1] // patch[1]

    def arguments(self, config: Any, image: Tensor) -> dict[str, Any]:
        """Videos that stand still, of images [B, C, H, W]."""
        return {"pixel_values": image.unsqueeze(1).expand(-1, config.num_frames, -1, -1, -1)}


@dataclass(frozen=True)
class PatchRows(Pixels):
    """Rows of patches [B, N, P * P * C] with the shape of every image and a mask of the padding, as in SigLIP 2."""

    resize: str | None = ""
    padded: bool = True

    def size(self, config: Any) -> Grid:
        """Any size will do: the one of its position table."""
        side = round(int(config.num_patches) ** 0.5) * int(config.patch_size)
        return side, side

    def grid(self, config: Any, arguments: dict[str, Any]) -> Grid | None:
        """Patch rows and columns, if all images of the call have the same."""
        shapes = arguments["spatial_shapes"]
        first = shapes[0].tolist()
        return (first[0], first[1]) if bool((shapes == shapes[0]).all()) else None

    def arguments(self, config: Any, image: Tensor) -> dict[str, Any]:
        """Rows of whole patches; what is left over at the edges is cut off."""
        patch, (height, width) = int(config.patch_size), patches(config, (image.shape[2], image.shape[3]))
        whole = image[:, :, : height * patch, : width * patch]
        rows = rearrange(whole, "b c (h y) (w x) -> b (h w) (y x c)", y=patch, x=patch)
        shapes = torch.tensor([[height, width]] * image.shape[0])
        return {"pixel_values": rows, "pixel_attention_mask": None, "spatial_shapes": shapes}


def patches(config: Any, img_size: tuple[int, int]) -> Grid:
    """Patch rows and columns of an image of `img_size` (height, width) pixels."""
    patch = pair(config.patch_size)
    return img_size[0] // patch[0], img_size[1] // patch[1]
