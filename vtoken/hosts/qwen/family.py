"""Images and videos of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, the last two also as mixtures of experts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.patch import base_of, view
from vtoken.core.spec import HostSpec
from vtoken.core.visual import TowerFacts
from vtoken.core.watch import Watch
from vtoken.errors import InputError
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
        blocks = self.blocks_of(model)
        attn = blocks[0].attn
        return self.measured(model, blocks, int(attn.qkv.in_features), int(attn.num_heads))

    def facts(self, model: Any, given: dict[str, Any]) -> TowerFacts:
        """No class token; Qwen2.5-VL looks through windows in all but a few blocks."""
        tower = self.tower(model)
        depth = len(tower.blocks)
        whole = getattr(tower, "fullatt_block_indexes", None)
        windowed = frozenset() if whole is None else frozenset(range(depth)) - frozenset(whole)
        last = max((i for i in range(depth) if i not in windowed), default=-1)
        return TowerFacts(depth=depth, last=last, windowed=windowed)

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

    def projector_macs(self, model: Any) -> int:
        """Of the merger, and of those for deeper levels."""
        tower = self.tower(model)
        more = getattr(tower, "deepstack_merger_list", None)
        return linear_macs(tower.merger) + (0 if more is None else linear_macs(more))
