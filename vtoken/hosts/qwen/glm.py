"""Images of GLM-4V, GLM-4.5V and GLM-4.6V: as those of Qwen-VL, joined by a convolution in front of the merger.

Their videos have the placeholders of images, so that a prompt cannot tell the two; only images are shortened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vtoken.hosts.exchanged import Overheard
from vtoken.hosts.qwen.family import QwenVL
from vtoken.prompts.family import linear_macs


class Glm4V(QwenVL):
    """The tower of GLM-4.6V is that of GLM-4V."""

    name = "transformers GLM-4V, GLM-4.5V and GLM-4.6V"
    models = frozenset(
        {
            ("glm4v", "Glm4vForConditionalGeneration"),
            ("glm4v_moe", "Glm4vMoeForConditionalGeneration"),
            ("glm46v", "Glm46VForConditionalGeneration"),
        }
    )
    kinds = ("image",)

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """Behind the norm, in front of the convolution."""
        return {"post_layernorm": Overheard(self.tower(model).post_layernorm, behind=take)}

    def projector_macs(self, model: Any) -> int:
        """Of the convolution and the merger."""
        tower: Any = self.tower(model)
        convolution: nn.Conv2d = tower.downsample
        return int(convolution.weight.numel()) + linear_macs(tower.merger)
