"""Videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions along three axes (docs/methods/quota.md 9.3 and 9.4)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vtoken.hosts.qwen.old import encoded
from vtoken.hosts.qwen.positions import places
from vtoken.hosts.video.grid import GridVideo, split_levels


class Qwen2Video(GridVideo):
    """Qwen2-VL: merged features of temporal cells, one run of placeholders."""

    name = "transformers Qwen2-VL"
    models = frozenset({("qwen2_vl", "Qwen2VLForConditionalGeneration")})
    #: Whether the model's forward counts along one axis if it is not told token types; else it refuses.
    one_axis = False

    def positions(self, model: Any, given: dict[str, Any], *, generating: bool) -> tuple[Tensor, Tensor | None]:
        """By the model's own `get_rope_index`; where it is not told token types, as the model does without them."""
        return places(model, given, generating=generating, one_axis=self.one_axis)

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
        return encoded(model, call, {"video": self.placeholder_id(model), "image": self.image_id(model)})

    def outputs(self, model: Any, levels: Sequence[Sequence[Tensor]]) -> Any:
        """In the output class of the model's own tower."""
        from transformers.models.qwen3_vl import modeling_qwen3_vl

        output: Any = modeling_qwen3_vl.BaseModelOutputWithDeepstackFeatures
        return output(pooler_output=tuple(levels[0]), deepstack_features=[tuple(level) for level in levels[1:]])

    def deeper(self, out: Any, lengths: list[int]) -> list[list[Tensor]]:
        """What is added behind the first layers of the language model."""
        return split_levels(out.deepstack_features, lengths)
