"""An open_clip image tower of whose tokens only some enter the blocks, or whose class attention is read."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from open_clip.timm_model import TimmModel
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from vtoken.core.calling import call_with
from vtoken.core.patch import is_patched
from vtoken.core.spec import PatchSpec
from vtoken.core.watch import Watch
from vtoken.hosts.open_clip.watched import watched_transformer
from vtoken.hosts.timm import masked as trunk
from vtoken.hosts.tower import PATCHED, patched_inside
from vtoken.ops.rows import take_rows


def patch_spec(visual: Any) -> PatchSpec:
    """What is known of its patches; see `HostAdapter.patch_spec`."""
    if isinstance(visual, TimmModel):
        found = trunk.patch_spec(visual.trunk)
        return replace(found, embed=f"trunk.{found.embed}")
    why = patched_inside(visual) or _problem(visual)
    if why:
        raise trunk.refused(visual, why)
    patch, size = ((int(pair[0]), int(pair[1])) for pair in (visual.patch_size, visual.image_size))
    return PatchSpec("conv1", patch, size, int(visual.ln_post.normalized_shape[0]))


def _problem(tower: Any) -> str | None:
    if not isinstance(tower.patch_dropout, nn.Identity):
        raise trunk.own_dropout("model", f"patch_dropout={tower.patch_dropout.prob}")
    if tower.output_tokens:
        return "its image tower hands out tokens (output_tokens)"
    for block in tower.transformer.resblocks:
        if type(block.attn).__name__ not in ("MultiheadAttention", "Attention"):
            return f"an attention was replaced by a {type(block.attn).__qualname__}; wrap the model first"
    return None


def run_masked(visual: Any, images: Tensor, rows: Tensor | None, watch: Watch | None) -> tuple[Tensor, Tensor]:
    """Pooled features before the projection and behind it; see `HostAdapter.masked`."""
    pooled: list[Tensor] = []
    if isinstance(visual, TimmModel):
        run = functools.partial(_trunk, visual.trunk, pooled, rows, watch)
        out = call_with(visual, {"trunk": run}, images)
        return pooled[0], out
    if is_patched(visual):
        raise trunk.refused(visual, PATCHED)
    return _run_own(visual, images, rows, watch)


def _trunk(tower: Any, pooled: list[Tensor], rows: Tensor | None, watch: Watch | None, x: Tensor) -> Tensor:
    features, out = trunk.run_masked(tower, x, rows, watch)
    pooled.append(features)
    return out


def _run_own(tower: Any, images: Tensor, rows: Tensor | None, watch: Watch | None) -> tuple[Tensor, Tensor]:
    pooled: list[Tensor] = []
    parts: dict[str, Any] = {"_pool": functools.partial(_pool, tower, pooled)}
    if rows is not None:
        parts["patch_dropout"] = functools.partial(take_rows, index=rows)  # behind the position embedding
    if watch is not None:
        parts["transformer"] = watched_transformer(tower, watch)
    if (images.shape[2], images.shape[3]) != tuple(tower.image_size):
        grid = [images.shape[2] // tower.patch_size[0], images.shape[3] // tower.patch_size[1]]
        table = resample_abs_pos_embed(tower.positional_embedding.unsqueeze(0), grid, list(tower.grid_size))
        parts["positional_embedding"] = table.squeeze(0)
    out = call_with(tower, parts, images)
    return pooled[0], out


def _pool(tower: Any, pooled: list[Tensor], x: Tensor) -> Any:
    out = tower._pool(x)
    pooled.append(out[0])
    return out
