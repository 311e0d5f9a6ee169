"""Reading class attention in an open_clip tower that carries no method."""

from __future__ import annotations

import functools
from typing import Any

from open_clip.transformer import CustomResidualAttentionBlock
from torch import Tensor

from vtoken.core.calling import call_with
from vtoken.core.watch import Reader, Row, Watch
from vtoken.hosts.watched import watched
from vtoken.ops import projected_class_row


def run_watched(tower: Any, watch: Watch, image: Tensor) -> None:
    """A tower on [B, C, H, W]."""
    call_with(tower, {"transformer": watched_transformer(tower, watch)}, image)


def watched_transformer(tower: Any, watch: Watch) -> functools.partial[Any]:
    """Stands where a tower's `transformer` stood."""
    blocks = watched(tower.transformer.resblocks, watch, _read)
    return functools.partial(call_with, tower.transformer, {"resblocks": blocks, "grad_checkpointing": False})


def _read(block: Any, row: Row) -> dict[str, Any]:
    """What stands in a block that is read."""
    own = isinstance(block, CustomResidualAttentionBlock)
    return {"attn": functools.partial(_attend if own else _attend_packed, block.attn, row)}


def _attend(attn: Any, row: Row, *args: Any, **kwargs: Any) -> Any:
    """open_clip's own attention: behind its norms."""
    return call_with(attn, Reader(row).parts(attn, "ln_k", "ln_q"), *args, **kwargs)


def _attend_packed(attn: Any, row: Row, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`nn.MultiheadAttention`, which shows neither queries nor keys: by its weights, of what it is given."""
    rows = x if attn.batch_first else x.transpose(0, 1)
    (w_q, w_k, _), bias = attn.in_proj_weight.detach().chunk(3), attn.in_proj_bias
    b_q = None if bias is None else bias.detach().chunk(3)[0]
    row.found(projected_class_row(rows.detach(), (w_q, b_q), w_k, num_heads=attn.num_heads, scale=attn.head_dim**-0.5))
    return attn(x, *args, **kwargs)
