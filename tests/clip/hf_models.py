"""Small CLIPs of transformers for the tests of attentive masking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

import vtoken
from tests.clip.models import batch, wrap
from tests.helpers import randomise_

WIDTH, DEPTH, EMBED = 32, 3, 24
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "patch_size": 4, "image_size": 32,
    "intermediate_size": 48,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
    "bos_token_id": 0, "eos_token_id": 19, "pad_token_id": 1, "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _made(name: str, text: dict[str, Any] | None = None, **options: Any) -> Any:
    config = getattr(hf, f"{name}Config")(vision_config=VISION, text_config=TEXT | (text or {}), **options)
    return getattr(hf, f"{name}Model")(config)


def dual(tower: Any) -> Any:
    """Both towers of whatever kind."""
    text = hf.CLIPTextConfig(**TEXT)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(tower.config, text, projection_dim=EMBED)
    return hf.VisionTextDualEncoderModel(config, vision_model=tower, text_model=hf.CLIPTextModel(text))


MODELS: dict[str, Callable[[], Any]] = {
    "clip": lambda: _made("CLIP", projection_dim=EMBED),
    "siglip": lambda: _made("Siglip", {"projection_size": WIDTH}),
    "metaclip_2": lambda: _made("MetaClip2", projection_dim=EMBED),
    "altclip": lambda: _made("AltCLIP", {"project_dim": 16}, projection_dim=EMBED),
    "chinese_clip": lambda: _made("ChineseCLIP", projection_dim=EMBED),
    "dual": lambda: dual(hf.ViTModel(hf.ViTConfig(**VISION))),
    "dual_dinov2": lambda: dual(hf.Dinov2Model(hf.Dinov2Config(**VISION, num_register_tokens=0))),
}


def hf_clip(name: str = "clip", seed: int = 0) -> Any:
    """64 patches, width 32, 3 layers; all weights random and not small."""
    torch.manual_seed(0)  # some modules are not reached by names
    return randomise_(MODELS[name](), seed)


def hf_wrap(name: str = "clip", **options: Any) -> vtoken.AttentiveMaskCLIP:
    """Wrapped with single patches as units and small heads, in train mode."""
    return wrap(hf_clip(name), **options)


def hf_batch(size: int = 4, seed: int = 0) -> dict[str, Any]:
    """What a collator makes, the loss asked for."""
    images, ids = batch(size, seed=seed)
    ids = ids.clamp(2, 18)
    ids[:, -1] = 19
    return {"input_ids": ids, "pixel_values": images, "attention_mask": torch.ones_like(ids), "return_loss": True}
