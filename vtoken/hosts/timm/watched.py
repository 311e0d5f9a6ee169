"""Reading class attention in a timm tower that carries no method: behind the norms of queries and keys, and rotated."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from vtoken.core.calling import call_with
from vtoken.core.patch import base_of, view
from vtoken.core.watch import Reader, Row, Watch
from vtoken.hosts.timm.blocks import rotation
from vtoken.hosts.watched import watched


def run_watched(model: Any, watch: Watch, image: Any) -> None:
    """The blocks of a model on [B, C, H, W], read behind the norms of queries and keys; no head."""
    cls: Any = base_of(type(model))
    cls.forward_features(view(model, blocks=watched(model.blocks, watch, read)), image)


def read(block: Any, row: Row) -> dict[str, Any]:
    """What stands in a block that is read."""
    return {"attn": functools.partial(attend, block.attn, row)}


def attend(attn: Any, row: Row, *args: Any, **kwargs: Any) -> Any:
    """An attention, or an attention pool with a query of its own, that is read."""
    signature = inspect.signature(type(attn).forward)
    if "rope" in signature.parameters:
        rope = signature.bind(attn, *args, **kwargs).arguments.get("rope")
        row.rotate = None if rope is None else rotation(attn, rope)
    return call_with(attn, Reader(row).parts(attn, "k_norm", "q_norm"), *args, **kwargs)
