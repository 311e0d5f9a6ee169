"""Images and videos of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, the last two also as mixtures of experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.config import MethodConfig
from vtoken.core.patch import base_of, view
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Cell, Needs, TowerFacts, Visual
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.hosts.by_name import watched_by_name
from vtoken.hosts.exchanged import Overheard
from vtoken.hosts.grids import GridFamily
from vtoken.hosts.qwen.positions import places
from vtoken.prompts.calls import refuse_chunks
from vtoken.prompts.family import linear_macs, takes_outputs


class QwenVL(GridFamily):
    """Recognised by class; text keeps its places among three axes, so positions are always the original ones."""

    name = "transformers Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 (dense and MoE)"
    models = frozenset(
        {
            ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
            ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
            ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
            ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
            ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
            ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
        }
    )
    axes = 3
    side = (*GridFamily.side, "second_per_grid_ts")
    numbering = ("video_grid_thw", "second_per_grid_ts")
    apart = frozenset({"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"})

    def spec(self, model: nn.Module) -> HostSpec:
        """The measures of the tower; raises UnsupportedModelError if a part of it is not the family's own."""
        attn = self.blocks_of(model)[0].attn
        return self.measured(model, int(attn.qkv.in_features), int(attn.num_heads))

    def facts(self, model: Any, given: dict[str, Any]) -> TowerFacts:
        """No class token; Qwen2.5-VL looks through windows in all but a few blocks."""
        tower = self.tower(model)
        depth = len(tower.blocks)
        whole = getattr(tower, "fullatt_block_indexes", None)
        windowed = frozenset() if whole is None else frozenset(range(depth)) - frozenset(whole)
        last = max((i for i in range(depth) if i not in windowed), default=-1)
        return TowerFacts(depth=depth, last=last, windowed=windowed)

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """Attention inside a window says nothing of the image."""
        windowed = self.facts(model, {}).windowed
        inside = [layer for layer in needs.layers if layer in windowed]
        if inside:
            whole = [i for i in range(len(self.tower(model).blocks)) if i not in windowed]
            raise ConfigError(
                f"block {inside[0]} of {type(model).__name__}'s tower attends inside windows, where tokens of small "
                f"ones look better; only {whole} see the whole image: start_layer must leave out the others"
            )
        if needs.attention == "class":
            raise ConfigError(f"the tower of {type(model).__name__} has no class token")

    def watched(self, model: Any, watch: Watch, parts: dict[str, Any]) -> Any:
        """The merger is a part of the tower."""
        tower = watched_by_name(watch, self.tower(model), self.path, self.attention, self.keys, **parts)
        return view(model.model, visual=tower)

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """In front of the merger."""
        return {"merger": Overheard(self.tower(model).merger, before=take)}

    def order(self, model: Any, grids: Tensor) -> Tensor | None:
        """Where every token of the prompt is among those of the tower, which Qwen2.5-VL sorts by windows."""
        tower = self.tower(model)
        if not hasattr(tower, "fullatt_block_indexes"):
            return None
        if hasattr(tower, "get_window_index"):
            index = tower.get_window_index(grids)[0]
        else:
            module = sys.modules[base_of(type(tower)).__module__]
            index = module.get_vision_window_index(
                grids,
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )[0]
        return torch.argsort(torch.as_tensor(index))

    def places(
        self, model: Any, given: dict[str, Any], *, generating: bool
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """By the model's own `get_rope_index`."""
        if given.get("inputs_embeds") is not None:
            raise InputError(
                f"{type(model).__name__} numbers tokens by their ids: give input_ids, not inputs_embeds, with images"
            )
        one_axis = type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
        return places(model, given, generating=generating, one_axis=one_axis)

    def go_on(self, model: Any, offset: Tensor) -> None:
        """Where the model itself leaves it in every call with an image."""
        model.model.rope_deltas = offset

    def hand_over(self, model: Any, call: dict[str, Any], *, generating: bool) -> tuple[Any, dict[str, Any]]:
        """Deeper levels of features cannot enter as embeddings; older releases encode in their forward."""
        deep = any(getattr(out, "deepstack_features", None) is not None for out in call["features"].values())
        if deep and not takes_outputs(model):
            from vtoken.hosts.qwen.old import encoded

            features = call.pop("features")
            if generating:
                refuse_chunks(model, call, "needs a transformers whose generate takes mm_encoder_outputs (5.18 does)")
            return encoded(model, call | {"mm_encoder_outputs": features}, self.token_ids(model))
        return super().hand_over(model, call, generating=generating)

    def visual(self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] = ()) -> Visual:
        """One image of `size` pixels, rounded to whole tokens as the processor does within its limits."""
        vision = model.config.vision_config
        side = int(vision.patch_size) * int(vision.spatial_merge_size)
        height, width = (max(1, round(s / side)) for s in size)
        return Visual("image", (Cell((height, width)),))

    def tower_macs(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        """From its measures: patch embedding, linear layers, and attention over the image or inside windows."""
        tower, spec, windowed = self.tower(model), self.spec(model), self.facts(model, {}).windowed
        merge = int(model.config.vision_config.spatial_merge_size)
        rows, columns = (side * merge for side in self.visual(model, size).cells[0].grid)
        patches, pairs = rows * columns, (rows * columns) ** 2
        side = int(getattr(tower, "window_size", 0)) // int(model.config.vision_config.patch_size)
        inside = _squares(rows, side) * _squares(columns, side) if windowed else pairs
        total = patches * sum(p.numel() for n, p in tower.patch_embed.named_parameters() if n.endswith("weight"))
        for i, block in enumerate(tower.blocks):
            total += patches * linear_macs(block) + 2 * spec.width * (inside if i in windowed else pairs)
        return total, total

    def projector_macs(self, model: Any) -> int:
        """Of the merger, and of those for deeper levels."""
        tower = self.tower(model)
        more = getattr(tower, "deepstack_merger_list", None)
        return linear_macs(tower.merger) + (0 if more is None else linear_macs(more))

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """All rows of attention in every layer that is read."""
        needs = self.method(model, configs).needs(self.facts(model, {}))
        merge = int(getattr(model.config, "vision_config").spatial_merge_size)  # noqa: B009
        return len(needs.layers) * (self.visual(model, size).content * merge**2) ** 2 * self.spec(model).width

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """There is no size of its own."""
        raise ShapeError(f"{type(model).__name__} takes images of any size: say which, in pixels")


def _squares(length: int, side: int) -> int:
    """Sum of the squares of the pieces of a line that is cut every `side`."""
    return length // side * side**2 + (length % side) ** 2
