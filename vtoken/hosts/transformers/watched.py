"""Reading class attention in a transformers tower that carries no method: of the query and key projections."""

from __future__ import annotations

import functools
from typing import Any

from vtoken.core.calling import call_with
from vtoken.core.watch import Reader, Row, Watch
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.transformers.blocks import attention_of
from vtoken.hosts.watched import watched


def watched_tower(tower: Any, path: tuple[str, ...], watch: Watch) -> functools.partial[Any]:
    """The tower, to be called, with the layers at the end of `path` read.

    Hidden states are not recorded, whatever the configuration says: transformers would install its hooks for that on
    stand-ins.
    """
    options = {"output_hidden_states": False, "output_attentions": False}
    return functools.partial(call_with, tower, _parts(tower, path, watch), **options)


def _parts(module: Any, path: tuple[str, ...], watch: Watch) -> dict[str, Any]:
    name, *rest = path
    child = getattr(module, name)
    inner = functools.partial(call_with, child, _parts(child, tuple(rest), watch)) if rest else None
    return {name: watched(child, watch, _read) if inner is None else inner}


def _read(layer: Any, row: Row) -> dict[str, Any]:
    """What stands in a layer that is read."""
    attn = attention_of(layer)
    if not hasattr(attn, "q_proj"):
        raise UnsupportedModelError(
            f"cannot read class attention of a {type(layer).__name__} of this transformers release: its attention is "
            "nested; newer releases can be read"
        )
    name = "self_attn" if hasattr(layer, "self_attn") else "attention"
    return {name: functools.partial(call_with, attn, Reader(row=row).parts(attn, "k_proj", "q_proj"))}
