"""Multimodal models of transformers whose prompts cannot be shortened, and why."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from vtoken.core.host import HostAdapter, keys_of
from vtoken.core.spec import HostSpec
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.internvl.family import InternVL
from vtoken.hosts.llava.adapter import LlavaAdapter
from vtoken.hosts.llava.video import NextVideo, Onevision
from vtoken.hosts.qwen.family import QwenVL
from vtoken.hosts.video_llama.family import VideoLlama3

#: The families that are served.
FAMILIES = (LlavaAdapter, Onevision, NextVideo, QwenVL, InternVL, VideoLlama3)
#: Why well-known relatives are refused, by the module of transformers.models.
REASONS = {
    "mllama": "its language model reads images by cross-attention, not from the prompt",
    "idefics": "its language model reads images by cross-attention, not from the prompt",
    "idefics2": "its resampler mixes image tokens, which then belong to no patch",
    "idefics3": "it shuffles patches into channels before the projector, which is not supported yet",
    "smolvlm": "it shuffles patches into channels before the projector, which is not supported yet",
    "gemma3": "it pools patches before the projector, which is not supported yet",
    "paligemma": "its attention mask tells image tokens from text, which a shortened prompt does not keep",
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
