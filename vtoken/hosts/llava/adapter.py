"""transformers' LLaVA family: models whose prompt has one placeholder per image token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from vtoken.core.config import MethodConfig
from vtoken.core.counts import count_tokens, plan
from vtoken.core.forward import block_method
from vtoken.core.host import keys_of
from vtoken.core.method import Methods
from vtoken.core.patch import base_of
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Cell, Needs, TowerFacts, Visual
from vtoken.errors import ConfigError, UnsupportedModelError
from vtoken.hosts.hidden_states import drops_first
from vtoken.hosts.llava.features import (
    IMAGE_SIDE,
    PIXELS,
    encode,
    feature_layer,
    packed_visual,
    tower_of,
)
from vtoken.hosts.tower import pair
from vtoken.hosts.transformers.adapter import HFAdapter
from vtoken.hosts.transformers.entry import will_remove
from vtoken.hosts.transformers.families import grid_of, num_prefix
from vtoken.prompts.family import Family

_TOWERS = {("clip", "CLIPVisionModel"), ("siglip", "SiglipVisionModel")}


class LlavaAdapter(Family):
    """Recognised by module and class; the tower must be CLIP's or SigLIP's."""

    name = "transformers LLaVA, ViP-LLaVA, LLaVA-NeXT and Video-LLaVA"
    models = frozenset(
        {
            ("llava", "LlavaForConditionalGeneration"),
            ("vipllava", "VipLlavaForConditionalGeneration"),
            ("llava_next", "LlavaNextForConditionalGeneration"),
            ("video_llava", "VideoLlavaForConditionalGeneration"),
        }
    )
    side: ClassVar[tuple[str, ...]] = IMAGE_SIDE
    encode = staticmethod(encode)

    def spec(self, model: nn.Module) -> HostSpec:
        """The measures of the image tower; raises UnsupportedModelError unless all that is needed is understood."""
        name, tower = tower_of(model)
        kind = base_of(type(tower))
        if not any(key in _TOWERS for key in keys_of(kind)):
            raise UnsupportedModelError(
                f"cannot shorten the prompts of transformers {type(model).__name__}: its image tower is a "
                f"{kind.__qualname__}. Supported: {', '.join(sorted(n for _, n in self.models))}, with a CLIP or "
                "SigLIP image tower. The model was left as it was."
            )
        self.check_known(model, (tower, f"model.{name}"))
        return replace(HFAdapter().spec(tower), name=type(model).__name__)

    def facts(self, model: Any, given: dict[str, Any]) -> TowerFacts:
        """CLIP has a class token; projectors work token by token."""
        tower = tower_of(model)[1]
        shrinks = hasattr(model.config, "vision_aspect_ratio")  # by interpolation, behind the projector
        return TowerFacts(
            depth=int(tower.config.num_hidden_layers),
            last=feature_layer(model, given),
            class_token=num_prefix(tower) > 0,
            per_token=not shrinks,
        )

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """Keys of a block are those of its tokens: not where the tower merges them later."""
        tower = tower_of(model)[1]
        merges = "_vtoken" in tower.__dict__ and will_remove(tower, 10**6)
        if merges and "keys" in needs.features:
            raise ConfigError(
                f"the image tower of {type(model).__name__} merges tokens ({type(block_method(tower)).__name__}): "
                "its keys are not those of the rows that leave it; take one of the two methods"
            )

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """From the shape of the pixels, or the sizes of images that are cut into crops."""
        if not hasattr(model.model, "pack_image_features"):
            pixels = next(given[name] for name in PIXELS if given.get(name) is not None)
            size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
            return [self._flat(model, size, None, given)] * int(pixels.shape[0])
        sizes = [[int(side) for side in size] for size in torch.as_tensor(given["image_sizes"]).tolist()]
        numbers = given.get("batch_num_images")
        cut = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers for _ in range(n)]
        rows = self._rows(model, None, (0, 0), given)
        return [
            packed_visual(model, rows, self.crops(model, size) if whole else 1, size, given.get("vision_aspect_ratio"))
            for size, whole in zip(sizes, cut, strict=True)
        ]

    def visual(self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] = ()) -> Visual:
        """One image of `size` pixels."""
        in_tower = tuple(c for c in configs if c.part == "tower")
        if not hasattr(model.model, "pack_image_features"):
            return self._flat(model, size, in_tower, {})
        return packed_visual(model, self._rows(model, in_tower, size, {}), self.crops(model, size), size)

    def _flat(
        self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] | None, given: dict[str, Any]
    ) -> Visual:  # fmt: skip
        fixed = max(num_prefix(tower_of(model)[1]) - int(drops_first(model, given)), 0)
        rows, (height, width) = self._rows(model, configs, size, given) - fixed, self.grid(model, size)
        grid = (height, width) if rows == height * width else (1, rows)
        return Visual("image", (Cell(grid),), (), fixed)

    def _rows(
        self, model: Any, configs: Sequence[MethodConfig] | None, size: tuple[int, int], given: dict[str, Any]
    ) -> int:  # fmt: skip
        """Tokens of one image or crop that go through the projector."""
        return self._tokens(model, configs, size)[feature_layer(model, given) + 1] - int(drops_first(model, given))

    def record_grid(self, model: Any, given: dict[str, Any], visual: Visual) -> tuple[int, int] | None:
        """Patch rows and columns of an image, or of a crop, which is cut to the tower's size."""
        tower: Any = tower_of(model)[1]
        pixels = next(given[name] for name in PIXELS if given.get(name) is not None)
        packs = hasattr(model.model, "pack_image_features")
        return grid_of(tower, pair(tower.config.image_size) if packs else (pixels.shape[-2], pixels.shape[-1]))

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns of one image or crop."""
        return grid_of(tower_of(model)[1], img_size)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width that the tower was built for."""
        return HFAdapter().image_size(tower_of(model)[1])

    def channels(self, model: nn.Module) -> int:
        """Channels of its images."""
        return int(tower_of(model)[1].config.num_channels)

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The tower's layers."""
        name, tower = tower_of(model)
        return [(f"model.{name}.{n}", layer) for n, layer in HFAdapter().blocks(tower)]

    def targets(self, model: nn.Module, methods: Methods) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The model, the one inside for those who run it alone, and its tower so that its attention can be read."""
        return [*super().targets(model, methods), *HFAdapter().targets(tower_of(model)[1], {})]

    def tower(self, model: nn.Module) -> Any:
        """The image tower."""
        return tower_of(model)[1]

    def crops(self, model: Any, size: Sequence[int]) -> int:
        """As the processor cuts, the overview included."""
        if not hasattr(model.model, "pack_image_features"):
            return 1
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = model.config
        return int(image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size))

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """One row per layer for class scores, all rows for received ones."""
        needs, tower = self.method(model, configs).needs(self.facts(model, {})), self.tower(model)
        if needs.attention == "none":
            return 0
        rows = self._tokens(model, [c for c in configs if c.part == "tower"], size)
        spent = [rows[layer] * (1 if needs.attention == "class" else rows[layer]) for layer in needs.layers]
        return sum(spent) * int(tower.config.hidden_size)

    def _tokens(
        self, model: Any, configs: Sequence[MethodConfig] | None, size: tuple[int, int]
    ) -> tuple[int, ...]:  # fmt: skip
        """Tokens before and after every block of the tower, for one image or crop; None: as the tower is patched."""
        tower = self.tower(model)
        img_size = self.image_size(model) if hasattr(model.model, "pack_image_features") else size
        if configs:
            return plan(tower, tuple(configs), img_size=img_size).settled("the number of image tokens in a prompt")
        (height, width), prefix = self.grid(model, img_size), num_prefix(tower)
        embedded, depth = prefix + height * width, int(tower.config.num_hidden_layers)
        if configs is None and "_vtoken" in tower.__dict__:
            counts = count_tokens(block_method(tower), depth, embedded, prefix)
            return counts.settled("the number of image tokens in a prompt")
        return (embedded,) * (depth + 1)
