"""Videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions along three axes (docs/methods/quota.md 9.3 and 9.4)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import InputError
from vtoken.hosts.video.grid import GridVideo, split_levels
from vtoken.hosts.video.qwen_old import encoded
from vtoken.prompts.shrink import default_positions


class Qwen2Video(GridVideo):
    """Qwen2-VL: merged features of temporal cells, one run of placeholders."""

    name = "transformers Qwen2-VL"
    models = frozenset({("qwen2_vl", "Qwen2VLForConditionalGeneration")})
    #: Whether the model's forward counts along one axis if it is not told token types; else it refuses.
    one_axis = False

    def positions(self, model: Any, given: dict[str, Any], *, generating: bool) -> tuple[Tensor, Tensor | None]:
        """By the model's own `get_rope_index`; where it is not told token types, as the model does without them."""
        ids, mask, own = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
        if own is not None:
            return (own[-3:] if own.dim() == 3 else own.expand(3, *ids.shape)), None
        if given.get("mm_token_type_ids") is None:
            if not generating and not self.one_axis:
                raise InputError(f"{type(model).__name__} needs mm_token_type_ids; pass all that the processor returns")
            line = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            if mask is not None and generating:
                line = default_positions(mask)
            return line.expand(3, -1, -1), None
        takes = inspect.signature(model.model.get_rope_index).parameters
        named = {name: given[name] for name in takes if given.get(name) is not None}
        positions, deltas = model.model.get_rope_index(**named)
        return positions, deltas

    def go_on(self, model: Any, deltas: Tensor) -> None:
        """Where the model itself leaves it in every call with a video."""
        model.model.rope_deltas = deltas


class Qwen25Video(Qwen2Video):
    """Qwen2.5-VL: the same, and steps in time by the clock."""

    name = "transformers Qwen2.5-VL"
    models = frozenset({("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")})
    numbering = ("second_per_grid_ts",)
    one_axis = True


class Qwen3Video(Qwen2Video):
    """Qwen3-VL: one run of placeholders per cell with its time before it; features enter several layers."""

    name = "transformers Qwen3-VL"
    models = frozenset({("qwen3_vl", "Qwen3VLForConditionalGeneration")})
    runs = "per_frame"
    inject = "encoder_outputs"

    def handed_over(self, model: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Older releases encode in their forward; there a stand-in is called whose encoding is done already."""
        if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
            return model, call
        return encoded(model, call, self.placeholder_id(model), self.image_id(model))

    def outputs(self, model: Any, levels: Sequence[Sequence[Tensor]]) -> Any:
        """In the output class of the model's own tower."""
        from transformers.models.qwen3_vl import modeling_qwen3_vl

        output: Any = modeling_qwen3_vl.BaseModelOutputWithDeepstackFeatures
        return output(pooler_output=tuple(levels[0]), deepstack_features=[tuple(level) for level in levels[1:]])

    def deeper(self, out: Any, lengths: list[int]) -> list[list[Tensor]]:
        """What is added behind the first layers of the language model."""
        return split_levels(out.deepstack_features, lengths)
