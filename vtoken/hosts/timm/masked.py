"""A timm `VisionTransformer` of whose tokens only some enter the blocks, or whose class attention is read."""

from __future__ import annotations

import functools
from typing import Any

from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtoken.core.calling import call_with
from vtoken.core.patch import is_patched
from vtoken.core.spec import PatchSpec
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, UnsupportedModelError
from vtoken.hosts.timm.watched import attend, read
from vtoken.hosts.tower import PATCHED, patched_inside
from vtoken.hosts.watched import watched
from vtoken.ops.rows import take_rows


def patch_spec(model: Any) -> PatchSpec:
    """What is known of the patches of a `VisionTransformer`, which do not overlap; see `HostAdapter.patch_spec`."""
    why = patched_inside(model) or _problem(model)
    if why:
        raise refused(model, why)
    height, width = model.patch_embed.patch_size
    own = model.patch_embed.img_size
    size = None if model.dynamic_img_size else (int(own[0]), int(own[1]))
    query = model.cls_token is None and type(model.attn_pool) is AttentionPoolLatent and model.attn_pool.latent_len == 1
    features = int(model.num_features)
    return PatchSpec("patch_embed", (int(height), int(width)), size, features, pool_query=query)


def _problem(tower: Any) -> str | None:
    if not isinstance(tower, VisionTransformer) or type(tower).forward_head is not VisionTransformer.forward_head:
        return f"its timm trunk is a {type(tower).__qualname__}"
    if not isinstance(tower.patch_embed, PatchEmbed):
        return f"its patches come from a {type(tower.patch_embed).__qualname__}, in which they overlap"
    if getattr(tower.attn_pool, "pos_embed", None) is not None:
        return "its attention pool adds positions of all patches"
    if not isinstance(tower.patch_drop, nn.Identity):
        raise own_dropout("trunk", f"patch_drop_rate={tower.patch_drop.prob}")
    for block in tower.blocks:
        if not isinstance(block.attn, Attention) or type(block.attn.qkv) is not nn.Linear:
            return f"one of its attentions is a {type(block.attn).__qualname__} that is not plain"
    return None


def refused(tower: nn.Module, why: str) -> UnsupportedModelError:
    """The error for a tower whose patches must all stay."""
    return UnsupportedModelError(
        f"cannot leave patches out of a {type(tower).__qualname__}: {why}. Supported: open_clip's VisionTransformer "
        "and timm VisionTransformer (also behind open_clip's TimmModel), each patch a token of its own. The model was "
        "left as it was."
    )


def own_dropout(where: str, setting: str) -> ConfigError:
    """The error for a tower that drops patches itself."""
    return ConfigError(
        f"the image tower drops patches itself ({setting} in the {where}); masking would drop them twice: build it "
        "without, keep_ratio says how many patches go on"
    )


def run_masked(
    model: Any, images: Tensor, rows: Tensor | None, watch: Watch | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pooled features and what the head makes of them; see `HostAdapter.masked`.

    Patches are left out in the slot of the tower's patch dropout.
    """
    if is_patched(model):
        raise refused(model, PATCHED)
    pooled: list[Tensor] = []
    parts: dict[str, Any] = {"head": functools.partial(_head, model.head, pooled)}
    if rows is not None:
        parts["patch_drop"] = functools.partial(take_rows, index=rows)  # behind the position embedding
    if watch is not None:
        parts |= {"blocks": watched(model.blocks, watch, read), "grad_checkpointing": False}
        row = watch.row(len(model.blocks))
        if row is not None:
            parts["attn_pool"] = functools.partial(attend, model.attn_pool, row)
    out = call_with(model, parts | _fitted(model, images), images)
    return pooled[0], out


def _fitted(tower: Any, images: Tensor) -> dict[str, Any]:
    """What stands in the tower for images of another size than its own: positions are resampled for the call."""
    embed, size = tower.patch_embed, (images.shape[2], images.shape[3])
    if tower.dynamic_img_size or size == tuple(embed.img_size):  # one that takes any size resamples them itself
        return {}
    parts: dict[str, Any] = {"patch_embed": functools.partial(call_with, embed, {"img_size": None})}
    if tower.pos_embed is not None:
        grid = [size[0] // embed.patch_size[0], size[1] // embed.patch_size[1]]
        prefix = 0 if tower.no_embed_class else tower.num_prefix_tokens
        parts["pos_embed"] = resample_abs_pos_embed(tower.pos_embed, grid, list(embed.grid_size), prefix)
    return parts


def _head(head: Any, pooled: list[Tensor], x: Tensor) -> Tensor:
    pooled.append(x)
    result: Tensor = head(x)
    return result
