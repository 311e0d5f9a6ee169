"""Images of Aya Vision and Cohere2 Vision: a run of placeholders for every tile, the last of several shows them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vtoken.core.calling import call_with
from vtoken.core.visual import Needs
from vtoken.errors import ConfigError
from vtoken.hosts.exchanged import Exchanged
from vtoken.hosts.hidden_states import STRATEGY, drops_first
from vtoken.hosts.tiles import Run, Tiles, named_in_front


class Cohere2Vision(Tiles):
    """The token behind which an image begins stands in front of its first tile alone."""

    name = "transformers Cohere2 Vision"
    models = frozenset({("cohere2_vision", "Cohere2VisionForConditionalGeneration")})

    def side_of(self, model: Any) -> int:
        """The factor of its settings."""
        return int(model.config.downsample_factor)

    def images(self, ids: Tensor, runs: list[Run], tiles: list[int]) -> list[int]:
        """An image begins where the token in front is that of the row's first one."""
        return named_in_front(ids, runs, tiles, closing=False)

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """Behind the shuffle, which gives [tiles, rows, columns, C0]."""
        projector = model.model.multi_modal_projector

        def shuffled(rows: Tensor) -> Tensor:
            out: Tensor = projector.pixel_shuffle(rows)
            take(out)
            return out

        return {"multi_modal_projector": Exchanged(projector, {"pixel_shuffle": shuffled})}

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """By the projector, whose shuffle has been done."""
        projected: Tensor = call_with(model.model.multi_modal_projector, {"pixel_shuffle": nn.Identity()}, rows)
        return projected

    def cut(self, model: Any, size: tuple[int, int]) -> int:
        """As many tiles as there is room for."""
        height, width = self.image_size(model)
        return max(1, round(size[0] / height)) * max(1, round(size[1] / width))


class AyaVision(Cohere2Vision):
    """The tile that shows the whole image has a name, which stands in front of it."""

    name = "transformers Aya Vision"
    models = frozenset({("aya_vision", "AyaVisionForConditionalGeneration")})
    side = ("pixel_values", "vision_feature_layer", STRATEGY)

    def images(self, ids: Tensor, runs: list[Run], tiles: list[int]) -> list[int]:
        """It is the last one of its image."""
        return named_in_front(ids, runs, tiles, closing=True)

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """SigLIP has no class token that could be dropped."""
        super().refuse(model, given, needs)
        if drops_first(model, given):
            raise ConfigError(
                f"{type(model).__name__} with {STRATEGY}='default' drops a patch for a class token that its tower lacks"
            )
