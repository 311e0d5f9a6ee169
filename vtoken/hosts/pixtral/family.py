"""Images behind Pixtral's tower: rows of any length, with the ids of row breaks between them, which are text and stay.

The tower reads all images of a call as one row, under a mask that keeps them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtoken.core.calling import call_with
from vtoken.core.config import MethodConfig
from vtoken.core.host import keys_of
from vtoken.core.patch import base_of
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Cell, Encoded, Needs, Visual
from vtoken.errors import ConfigError, ShapeError
from vtoken.hosts.exchanged import Exchanged, Overheard
from vtoken.hosts.hidden_states import STRATEGY, drops_first
from vtoken.hosts.tiles import Tiles
from vtoken.prompts.family import linear_macs, need


class Mistral3(Tiles):
    """A token is a block of patches."""

    name = "transformers Mistral 3"
    models = frozenset({("mistral3", "Mistral3ForConditionalGeneration")})
    towers = frozenset({("pixtral", "PixtralVisionModel")})
    path, attention = ("transformer", "layers"), "attention"
    side: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "vision_feature_layer")

    def side_of(self, model: Any) -> int:
        """By its settings."""
        return int(model.config.spatial_merge_size)

    def spec(self, model: nn.Module) -> HostSpec:
        """There is no size of its own."""
        return replace(super().spec(model), position="rotary", fixed_size=False)

    def patches(self, model: Any) -> tuple[int, int]:
        """Not known before an image comes."""
        return 1, 1

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """From the sizes of the images; they are filled up to one size."""
        sizes = torch.as_tensor(need(model, given, "image_sizes")).tolist()
        pixels, side = given["pixel_values"], self._pixels(model)
        if len(sizes) != len(pixels) or any(h > pixels.shape[-2] or w > pixels.shape[-1] for h, w in sizes):
            raise ShapeError(
                f"image_sizes {sizes} do not fit pixel_values {tuple(pixels.shape)}: they name height and width of "
                "every image in it"
            )
        return [Visual("image", (Cell((height // side, width // side)),)) for height, width in sizes]

    def _pixels(self, model: Any) -> int:
        """Pixels along one side of a token."""
        return int(self.tower(model).config.patch_size) * self.side_of(model)

    def encode(self, model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
        """Attention is a mean over the patches of the token's own image, not over those of all."""
        encoded = super().encode(model, given, visuals, needs)
        if encoded.attention is None:
            return encoded
        rows = self._rows(model, given)
        own = [row * (sum(rows) / n) for row, n in zip(encoded.attention, rows, strict=True)]
        return replace(encoded, attention=own)

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Sizes always: some releases take them for the tower without naming them."""
        return super().arguments(model, given) | {"image_sizes": given["image_sizes"]}

    def _grids(self, model: Any, given: dict[str, Any]) -> list[tuple[int, int]]:
        """Patch rows and columns of every image."""
        patch = int(self.tower(model).config.patch_size)
        return [(h // patch, w // patch) for h, w in torch.as_tensor(given["image_sizes"]).tolist()]

    def _rows(self, model: Any, given: dict[str, Any]) -> list[int]:
        return [h * w for h, w in self._grids(model, given)]

    def means(self, model: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
        """Tokens [n, c] of all images, from patches [1, N, c]; what is left at an edge belongs to no token."""
        side, found = self.side_of(model), []
        for part, (height, width) in zip(
            rows[0].split(self._rows(model, given)), self._grids(model, given), strict=True
        ):
            high, wide = height // side, width // side
            grid = part.unflatten(0, (height, width))[: high * side, : wide * side]
            found.append(grid.unflatten(0, (high, side)).unflatten(2, (wide, side)).mean((1, 3)).flatten(0, 1))
        return torch.cat(found)

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """Where the patches of a token lie side by side."""
        projector = model.model.multi_modal_projector
        merger = projector.patch_merger
        read = Exchanged(merger, {"merging_layer": Overheard(merger.merging_layer, before=take)})
        return {"multi_modal_projector": Exchanged(projector, {"patch_merger": read})}

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """As the projector does from there on."""
        projector = model.model.multi_modal_projector
        parts = {"norm": nn.Identity(), "patch_merger": lambda x, _: projector.patch_merger.merging_layer(x)}
        projected: Tensor = call_with(projector, parts, rows, None)
        return projected

    def visual(self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] = ()) -> Visual:
        """One image of `size` pixels, filled up to whole tokens as the processor does within its limits."""
        side = self._pixels(model)
        return Visual("image", (Cell((math.ceil(size[0] / side), math.ceil(size[1] / side))),))

    def tower_macs(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Of one image: patch embedding, linear layers, attention."""
        tower, patches = self.tower(model), self._patches_of(model, size)
        blocks = sum(linear_macs(block) + 2 * self.spec(model).width * patches for block in self._blocks(model))
        total = patches * (tower.patch_conv.weight.numel() + blocks)
        return total, total

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """All rows of attention in every layer that is read."""
        needs = self.method(model, configs).needs(self.facts(model, {}))
        return len(needs.layers) * self._patches_of(model, size) ** 2 * self.spec(model).width

    def _patches_of(self, model: Any, size: tuple[int, int]) -> int:
        return self.visual(model, size).content * self.side_of(model) ** 2

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """There is no size of its own."""
        raise ShapeError(f"{type(model).__name__} takes images of any size: say which, in pixels")


class LlavaPixtral(Mistral3):
    """A token is a patch. Recognised by its tower; LLaVA over CLIP or SigLIP is another family."""

    name = "transformers LLaVA over Pixtral"
    models = frozenset({("llava", "LlavaForConditionalGeneration")})
    side = ("pixel_values", "image_sizes", "vision_feature_layer", STRATEGY)

    def matches(self, model: nn.Module) -> bool:
        """Whether it is a LLaVA with such a tower."""
        tower = getattr(getattr(model, "model", None), "vision_tower", None)
        return super().matches(model) and any(key in self.towers for key in keys_of(base_of(type(tower))))

    def supported(self) -> str:
        """The class is named by the other family."""
        return ""

    def side_of(self, model: Any) -> int:
        """Patches are not joined."""
        return 1

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """There is no class token that could be dropped."""
        super().refuse(model, given, needs)
        if drops_first(model, given):
            raise ConfigError(
                f"{type(model).__name__} with {STRATEGY}='default' drops the first patch; set it to 'full'"
            )

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """What goes into the projector."""
        return {"multi_modal_projector": Overheard(model.model.multi_modal_projector, before=take)}

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """By the projector."""
        projected: Tensor = model.model.multi_modal_projector(rows)
        return projected
