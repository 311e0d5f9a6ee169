"""Small CLIPs and batches for the tests of attentive masking."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import Tensor, nn

import vtoken
from tests.helpers import images, randomise_

SIZE, GRID, WIDTH, DEPTH, LENGTH, VOCABULARY, EMBED = 32, 8, 48, 3, 8, 20, 16
TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": SIZE, "layers": DEPTH, "width": WIDTH, "patch_size": 4, "head_width": 16}
TIMM_SIZE = 160


def clip(*, custom: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **vision: Any) -> Any:
    """An open_clip CLIP (or CustomTextCLIP): 64 patches, width 48, 3 blocks; all weights random and not small."""
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(embed_dim=EMBED, vision_cfg=VISION | vision, text_cfg=TEXT, output_dict=True)
    return randomise_(model, seed).to(dtype)


def timm_clip(name: str = "test_vit", **options: Any) -> Any:
    """One whose image tower is a timm trunk: 100 patches, 160 pixels."""
    vision = {"timm_model_name": name, "image_size": TIMM_SIZE, "timm_pool": "token", "timm_proj": "linear"}
    return clip(**(vision | options))


def trunk_clip(trunk: nn.Module, seed: int = 1) -> Any:
    """One around a timm trunk of your own, without a classifier."""
    model = timm_clip()
    model.visual.trunk = randomise_(trunk, seed)
    model.visual.head = nn.Sequential(nn.Linear(model.visual.trunk.num_features, EMBED, bias=False))
    return model


def wrap(model: Any = None, **options: Any) -> vtoken.AttentiveMaskCLIP:
    """Wrapped with single patches as units and small heads, in train mode."""
    small = {"block": 1, "hidden_dim": 24, "out_dim": 8}
    torch.manual_seed(1)  # for the heads
    return vtoken.AttentiveMaskCLIP(clip() if model is None else model, **(small | options)).train()


def batch(size: int = 4, pixels: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and token ids."""
    rng = torch.Generator().manual_seed(seed + 100)
    return images((3, pixels, pixels), size, seed), torch.randint(1, VOCABULARY, (size, LENGTH), generator=rng)


def gradients(model: Any) -> dict[str, Tensor]:
    """By name, of what has one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
