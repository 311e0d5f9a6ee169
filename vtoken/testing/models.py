"""Small towers of every library that is installed, with weights that make every part count, and images for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.host import find_adapter

_SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}


def small_models() -> dict[str, nn.Module]:
    """One model of each structure that matters to a method, by name, in eval mode; 64 patches, width 32, 3 blocks.

    They differ in prefix tokens (none, one, five), pooling, and positions (learned, rotary).
    """
    makers: dict[str, Callable[[], nn.Module]] = dict(_timm())
    if importlib.util.find_spec("open_clip") is not None:
        makers |= _open_clip()
    if importlib.util.find_spec("transformers") is not None:
        makers |= _transformers()
    with torch.random.fork_rng(devices=[]):
        return {name: lively_(make(), seed).eval() for seed, (name, make) in enumerate(makers.items())}


def _timm() -> dict[str, Callable[[], nn.Module]]:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return {
        "timm VisionTransformer, class token": lambda: VisionTransformer(**_SMALL, num_classes=10, init_values=1.0),
        "timm VisionTransformer, average over patches, five prefix tokens": lambda: VisionTransformer(
            **_SMALL, num_classes=10, global_pool="avg", class_token=True, reg_tokens=4
        ),
        "timm Eva, rotary positions": lambda: Eva(
            **_SMALL, num_classes=10, use_rot_pos_emb=True, ref_feat_shape=(8, 8), head_init_scale=1.0
        ),
    }


def _open_clip() -> dict[str, Callable[[], nn.Module]]:
    from open_clip.transformer import VisionTransformer

    return {"open_clip VisionTransformer": lambda: VisionTransformer(32, 4, 32, 3, 4, 2.0, output_dim=24)}


def _transformers() -> dict[str, Callable[[], nn.Module]]:
    import transformers

    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32}
    size |= {"patch_size": 4, "intermediate_size": 64}

    def clip() -> nn.Module:
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size))

    def siglip() -> nn.Module:
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**size))

    return {"transformers CLIPVisionModel": clip, "transformers SiglipVisionModel, no prefix token": siglip}


def lively_(model: nn.Module, seed: int) -> nn.Module:
    """Random weights in place, none of them near zero: wrong code must not pass because a scale or a head is tiny."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            scales = p.dim() == 1 and name.endswith(("weight", "gamma", "gamma_1", "gamma_2"))
            looked_up = any(word in name for word in ("pos", "token", "class_embedding", "probe"))
            p.copy_(1 + 0.2 * noise if scales else 0.5 * noise if looked_up else noise / max(1, p[0].numel()) ** 0.5)
    return model


def images_for(model: nn.Module, batch: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images [B, C, H, W] of the model's own size: smooth content and noise, so that some patches are alike."""
    adapter, rng = find_adapter(model), torch.Generator().manual_seed(seed)
    size = adapter.image_size(model)
    coarse = torch.randn(batch, adapter.channels(model), 4, 4, generator=rng)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (smooth + 0.3 * torch.randn(smooth.shape, generator=rng)).to(dtype)
