"""Images of InternVL (2, 3, 3.5 as transformers has them): one run of placeholders for the tiles of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.config import MethodConfig
from vtoken.core.patch import base_of, view
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Cell, Encoded, Needs, TowerFacts, Visual
from vtoken.errors import ConfigError, UnsupportedModelError
from vtoken.hosts.llava.features import feature_layer
from vtoken.hosts.transformers.images import pair
from vtoken.hosts.watch import Reader, Watch
from vtoken.prompts.family import Family, linear_macs, named_for

_SIDE = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")


class InternVL(Family):
    """A token is a block of patches, the tower has a class token; the model never hears which tiles are one image."""

    name = "transformers InternVL"
    models = frozenset({("internvl", "InternVLForConditionalGeneration")})
    side = _SIDE

    def spec(self, model: nn.Module) -> HostSpec:
        """The measures of the tower; raises UnsupportedModelError if it is not the family's own."""
        tower: Any = self.tower(model)
        self.check_known(model, (tower, "model.vision_tower"))
        if base_of(type(tower)).__name__ != "InternVLVisionModel":
            raise UnsupportedModelError(
                f"cannot shorten the prompts of transformers {type(model).__name__}: its image tower is a "
                f"{type(tower).__qualname__}. The model was left as it was."
            )
        config = tower.config
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
        return HostSpec(
            name=type(model).__name__,
            depth=len(tower.encoder.layer),
            width=width,
            num_heads=heads,
            head_dim=width // heads,
            num_prefix=1,
            grid=self._patches(model),
            pooling="",
            position="absolute",
            fixed_size=True,
        )

    def tower(self, model: nn.Module) -> Any:
        """The image tower."""
        inner: Any = model.model
        return inner.vision_tower

    def facts(self, model: Any, given: dict[str, Any]) -> TowerFacts:
        """The projector reads the patches of a token side by side, so one row can be projected by itself."""
        depth = len(self.tower(model).encoder.layer)
        return TowerFacts(depth, feature_layer(model, given), class_token=True, per_token=True)

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """A class token has no place in the grid of a tile."""
        name = "vision_feature_select_strategy"
        if (given.get(name) or getattr(model.config, name)) != "default":
            raise ConfigError(
                f"{type(model).__name__} with {name}='full' keeps a class token, which no tile has room for"
            )

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """The tiles of one run of placeholders are one image; where runs do not tell, every tile is one."""
        tile = Cell(self._grid(model), "tile")
        tiles, ids = int(given["pixel_values"].shape[0]), given["input_ids"]
        runs = _runs(ids == self.token_ids(model)["image"])
        fits = sum(runs) == tiles * tile.tokens and all(run % tile.tokens == 0 for run in runs)
        return [Visual("image", (tile,) * n) for n in ([r // tile.tokens for r in runs] if fits else [1] * tiles)]

    def encode(self, model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
        """By the model's own `get_image_features`."""
        inner, tower, seen = model.model, self.tower(model), list[Tensor]()
        keys = (needs.layers[-1] if needs.layers else feature_layer(model, given)) if "keys" in needs.features else None
        watch = Watch(needs.layers, needs.attention, keys)
        parts: dict[str, Any] = {}
        if watch.reads:
            parts["vision_tower"] = watch.over(tower, ("encoder", "layer"), "attention", "k_proj")
        if "before" in needs.features:
            parts["multi_modal_projector"] = Reader(inner.multi_modal_projector, before=seen.append)
        named = named_for(inner.get_image_features, given, _SIDE)
        out = (view(inner, **parts) if parts else inner).get_image_features(**named, return_dict=True)
        lengths = [v.length for v in visuals]

        def split(rows: Tensor) -> list[Tensor]:
            """Rows [tiles, tokens, c] by visual."""
            return list(rows.flatten(0, 1).split(lengths))

        levels = [split(out.pooler_output)]
        found = watch.attention()
        attention = None
        if found is not None:
            per_tile = torch.stack(found, dim=-1)[:, 1:]  # [tiles, patches, layers]
            attention = [rows.T for rows in split(self._blocks(model, per_tile))]
        read = None
        if watch.projected is not None:
            heads = int(tower.config.num_attention_heads)
            means = watch.projected.unflatten(-1, (heads, -1)).float().mean(-2)
            read = split(self._blocks(model, means[:, 1:]))
        return Encoded({"image": out}, levels, attention, split(seen[0]) if seen else None, read)

    def _patches(self, model: Any) -> tuple[int, int]:
        config = self.tower(model).config
        (height, width), (high, wide) = pair_of(config.image_size), pair_of(config.patch_size)
        return height // high, width // wide

    def _group(self, model: Any) -> int:
        """Patches along one side of a token."""
        return round(1 / float(model.config.downsample_ratio))

    def _grid(self, model: Any) -> tuple[int, int]:
        """Tokens of one tile."""
        rows, columns = self._patches(model)
        return rows // self._group(model), columns // self._group(model)

    def _blocks(self, model: Any, rows: Tensor) -> Tensor:
        """Means [tiles, tokens, c] over the patches [tiles, patches, c] of every token."""
        (height, width), side = self._grid(model), self._group(model)
        return rows.unflatten(1, (height, side, width, side)).mean((2, 4)).flatten(1, 2)

    def visual(self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] = ()) -> Visual:
        """One image, cut into as many tiles as `size` has room for, with a thumbnail behind several."""
        height, width = self.image_size(model)
        tiles = max(1, round(size[0] / height)) * max(1, round(size[1] / width))
        return Visual("image", (Cell(self._grid(model), "tile"),) * (tiles + 1 if tiles > 1 else 1))

    def crops(self, model: Any, size: tuple[int, int]) -> int:
        """Tiles."""
        return len(self.visual(model, size).cells)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Of one tile."""
        return pair_of(self.tower(model).config.image_size)

    def tower_macs(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Of one tile."""
        tower, (rows, columns) = self.tower(model), self._patches(model)
        tokens, width = rows * columns + 1, int(tower.config.hidden_size)
        weights = [p.numel() for n, p in tower.embeddings.patch_embeddings.named_parameters() if n.endswith("weight")]
        blocks = sum(tokens * linear_macs(layer) + 2 * width * tokens**2 for layer in tower.encoder.layer)
        return rows * columns * sum(weights) + blocks, rows * columns * sum(weights) + blocks

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """A row a layer for class scores, all for received ones."""
        needs, (rows, columns) = self.method(model, configs).needs(self.facts(model, {})), self._patches(model)
        tokens = rows * columns + 1
        each = {"class": tokens, "received": tokens**2}.get(needs.attention, 0)
        return len(needs.layers) * each * self.spec(model).width


def pair_of(value: Any) -> tuple[int, int]:
    """One side or (height, width), as a list in these settings."""
    return pair(value if isinstance(value, int) else tuple(value))


def _runs(places: Tensor) -> list[int]:
    """Lengths of the runs of True in [B, L], row by row."""
    found = []
    for row in places.tolist():
        length = 0
        for here in [*row, False]:
            if here:
                length += 1
            elif length:
                found.append(length)
                length = 0
    return found
