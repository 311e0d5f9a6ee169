"""Multimodal models of transformers whose prompts cannot be shortened, and why."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from vtoken.core.host import HostAdapter, keys_of
from vtoken.core.spec import HostSpec
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.cohere.family import AyaVision, Cohere2Vision
from vtoken.hosts.gemma.gemma3 import Gemma3
from vtoken.hosts.gemma.paligemma import PaliGemma
from vtoken.hosts.idefics.family import Idefics
from vtoken.hosts.internvl.family import InternVL
from vtoken.hosts.llava.adapter import LlavaAdapter
from vtoken.hosts.llava.video import NextVideo, Onevision
from vtoken.hosts.pixtral.family import Mistral3
from vtoken.hosts.qwen.family import QwenVL
from vtoken.hosts.qwen.glm import Glm4V
from vtoken.hosts.video_llama.family import VideoLlama3
from vtoken.prompts.family import Family

#: The families that are served.
FAMILIES: tuple[type[Family], ...] = (
    LlavaAdapter, Onevision, NextVideo, QwenVL, Glm4V, InternVL, Idefics, Gemma3, PaliGemma, AyaVision, Cohere2Vision,
    Mistral3, VideoLlama3,
)  # fmt: skip
#: Why well-known relatives are refused, by the module of transformers.models.
REASONS = {
    "mllama": "its language model reads images by cross-attention, not from the prompt",
    "idefics": "its language model reads images by cross-attention, not from the prompt",
    "idefics2": "its resampler mixes image tokens, which then belong to no patch",
}


class UnservedPrompts(HostAdapter):
    """Asked last, matches every model of transformers and says no."""

    name = "other models of transformers"
    package = "transformers"
    part = "prompt"

    def supported(self) -> str:
        """Nothing."""
        return ""

    def spec(self, model: nn.Module) -> HostSpec:
        """Raise UnsupportedModelError: with the reason, what is supported, and a supported model inside."""
        self._refuse(model)

    def _refuse(self, model: Any) -> NoReturn:
        known = {key for family in FAMILIES for key in family.models}
        reason = next((REASONS[key[0]] for key in keys_of(type(model)) if key[0] in REASONS), "")
        inner = next((n for n, m in model.named_modules() if n and any(k in known for k in keys_of(type(m)))), None)
        names = ", ".join(sorted(name for _, name in known))
        hint = f" Use model.{inner}." if inner else ""
        raise UnsupportedModelError(
            f"cannot shorten the prompts of transformers {type(model).__name__}: "
            f"{reason or 'vtoken does not know its prompts'}. Supported: {names}.{hint}"
            " The model was left as it was."
        )
