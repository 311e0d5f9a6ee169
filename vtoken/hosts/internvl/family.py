"""Images of InternVL (2, 3, 3.5 as transformers has them): one run of placeholders for the tiles of an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.core.visual import Needs
from vtoken.errors import ConfigError
from vtoken.hosts.hidden_states import STRATEGY, drops_first
from vtoken.hosts.tiles import Run, Tiles


class InternVL(Tiles):
    """A token is a block of patches, the tower has a class token; the model never hears which tiles are one image."""

    name = "transformers InternVL"
    models = frozenset({("internvl", "InternVLForConditionalGeneration")})
    towers = frozenset({("internvl", "InternVLVisionModel")})
    path, attention, prefix = ("encoder", "layer"), "attention", 1
    side = ("pixel_values", "vision_feature_layer", STRATEGY)

    def side_of(self, model: Any) -> int:
        """By the ratio of its settings."""
        return round(1 / float(model.config.downsample_ratio))

    def images(self, ids: Tensor, runs: list[Run], tiles: list[int]) -> list[int]:
        """Those of one run."""
        return tiles

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """A class token has no place in the grid of a tile."""
        super().refuse(model, given, needs)
        if not drops_first(model, given):
            raise ConfigError(
                f"{type(model).__name__} with {STRATEGY}='full' keeps a class token, which no tile has room for"
            )

    def cut(self, model: Any, size: tuple[int, int]) -> int:
        """As many tiles as there is room for."""
        height, width = self.image_size(model)
        return max(1, round(size[0] / height)) * max(1, round(size[1] / width))
