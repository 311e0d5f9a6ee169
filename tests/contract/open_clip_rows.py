"""open_clip's rows of the contract table; imported only where open_clip is installed."""

from __future__ import annotations

import functools
from typing import Any

import open_clip
from open_clip.transformer import VisionTransformer
from torch import nn

from tests.helpers import Host


def tower(**options: Any) -> nn.Module:
    """A built-in image tower: 64 patches, width 32, 3 blocks."""
    return VisionTransformer(
        image_size=32, patch_size=4, width=32, layers=3, heads=4, mlp_ratio=2.0, output_dim=24, **options
    )


def clip() -> nn.Module:
    """A whole CLIP; its image tower has 64 patches, width 64, 3 blocks."""
    vision = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 4, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


_part = functools.partial
_pool = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "output_dim": 32}
_row = _part(Host, library="open_clip", prefix=1)

ROWS: list[Host] = [
    _row("oc_token", tower),
    _row("oc_avg", _part(tower, pool_type="avg", ls_init_value=1e-5)),
    _row("oc_map", lambda: VisionTransformer(32, 4, 32, 3, 4, 2.0, **_pool, pool_type="avg")),
    _row("oc_qk_norm", _part(tower, qk_norm=True, pool_type="avg", final_ln_after_pool=True, no_ln_pre=True)),
    _row("oc_clip", clip),
]
