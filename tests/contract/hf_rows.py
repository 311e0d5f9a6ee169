"""transformers' rows of the contract table; imported only where transformers is installed."""

from __future__ import annotations

import functools
from typing import Any

import transformers as hf
from torch import nn

from tests.helpers import Host

_SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
_PLAIN = _SIZE | {"image_size": 32, "intermediate_size": 64, "num_labels": 10}
_DINO = _SIZE | {"image_size": 32, "mlp_ratio": 2, "num_labels": 10}


def plain(model: type, config: type, **options: Any) -> nn.Module:
    """A tower or classifier with 64 patches, width 32, 3 layers."""
    return model(config(**_PLAIN, **options))


def dino(model: type, config: type, **options: Any) -> nn.Module:
    """The same of the DINOv2 families, whose configs name other sizes."""
    return model(config(**_DINO, **options))


def two_towers(model: type, config: type) -> nn.Module:
    """A classifier over the image tower of a two-tower config."""
    return model(config(vision_config=_PLAIN, text_config=_TEXT, num_labels=10))


def siglip2() -> nn.Module:
    """SigLIP 2 is given a number of positions, not an image size."""
    return hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**_SIZE, intermediate_size=64, num_patches=64))


_STEADY = {"num_register_tokens": 2, "pos_embed_rescale": None}
_part = functools.partial
_row = _part(Host, library="transformers")
_registers = hf.Dinov2WithRegistersConfig

ROWS: list[Host] = [
    _row("hf_clip", _part(plain, hf.CLIPVisionModel, hf.CLIPVisionConfig), prefix=1),
    _row("hf_clip_mean", _part(two_towers, hf.CLIPForImageClassification, hf.CLIPConfig), prefix=1),
    _row("hf_siglip", _part(plain, hf.SiglipVisionModel, hf.SiglipVisionConfig), prefix=0),
    _row("hf_siglip_mean", _part(two_towers, hf.SiglipForImageClassification, hf.SiglipConfig), prefix=0),
    _row("hf_siglip2", siglip2, prefix=0),
    _row("hf_vit", _part(plain, hf.ViTForImageClassification, hf.ViTConfig), prefix=1),
    _row("hf_vit_eager", _part(plain, hf.ViTModel, hf.ViTConfig, attn_implementation="eager"), prefix=1),
    _row("hf_deit", _part(plain, hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig), prefix=2),
    _row("hf_dino", _part(dino, hf.Dinov2ForImageClassification, hf.Dinov2Config), prefix=1),
    _row("hf_dino_reg", _part(dino, hf.Dinov2WithRegistersForImageClassification, _registers), prefix=5),
    # Without the random scale that positions of a training model have, two forwards agree.
    _row("hf_dinov3", _part(plain, hf.DINOv3ViTModel, hf.DINOv3ViTConfig, **_STEADY), prefix=3),
    _row(
        "hf_dino_maps",
        _part(dino, hf.Dinov2WithRegistersBackbone, _registers, out_features=["stage1", "stage2", "stage3"]),
        prefix=5,
    ),
]
