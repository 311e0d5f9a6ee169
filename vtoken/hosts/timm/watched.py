"""Reading class attention in a timm tower that carries no method: behind the norms of queries and keys, and rotated."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from vtoken.core.calling import call_with
from vtoken.core.patch import base_of, view
from vtoken.core.watch import Reader, Rotation, Row, Watch
from vtoken.hosts.watched import watched


def run_watched(model: Any, watch: Watch, image: Any) -> None:
    """The blocks of a model on [B, C, H, W]; no head."""
    cls: Any = base_of(type(model))
    cls.forward_features(view(model, blocks=watched(model.blocks, watch, read)), image)


def read(block: Any, row: Row) -> dict[str, Any]:
    """What stands in a block that is read."""
    return {"attn": functools.partial(attend, block.attn, row)}


def attend(attn: Any, row: Row, *args: Any, **kwargs: Any) -> Any:
    """An attention, or an attention pool with a query of its own, that is read."""
    signature = inspect.signature(type(attn).forward)
    if "rope" in signature.parameters:
        row.rotate = _rotation(attn, signature.bind(attn, *args, **kwargs).arguments.get("rope"))
    return call_with(attn, Reader(row=row).parts(attn, "k_norm", "q_norm"), *args, **kwargs)


def _rotation(attn: Any, rope: Tensor | None) -> Rotation | None:
    """How an attention rotates queries and keys by a table, in timm's own way: prefix tokens have no place."""
    if rope is None:
        return None
    prefix, half = int(attn.num_prefix_tokens), bool(getattr(attn, "rotate_half", False))

    def turned(x: Tensor) -> Tensor:
        patches = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
        return torch.cat([x[:, :, :prefix], patches], dim=2).type_as(x)

    return lambda q, k: (turned(q), turned(k))
