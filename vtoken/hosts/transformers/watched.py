"""Reading class attention in a transformers tower that carries no method: of the query and key projections."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vtoken.core.calling import call_with
from vtoken.core.watch import Reader, Rotation, Row, Watch
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.exchanged import with_layers
from vtoken.hosts.transformers.blocks import attention_of
from vtoken.hosts.watched import watched


def watched_tower(tower: Any, path: tuple[str, ...], watch: Watch) -> functools.partial[Any]:
    """The tower, to be called, with the layers at the end of `path` read.

    Hidden states are not recorded, whatever the configuration says: transformers would install its hooks for that on
    stand-ins.
    """
    options = {"output_hidden_states": False, "output_attentions": False}
    parts = with_layers(tower, path, lambda layers: watched(layers, watch, read))
    return functools.partial(call_with, tower, parts, **options)


def read(layer: Any, row: Row) -> dict[str, Any]:
    """What stands in a layer that is read."""
    attn = attention_of(layer)
    if not hasattr(attn, "q_proj"):
        raise UnsupportedModelError(
            f"cannot read class attention of a {type(layer).__name__} of this transformers release: its attention is "
            "nested; newer releases can be read"
        )
    name = "self_attn" if hasattr(layer, "self_attn") else "attention"
    return {name: functools.partial(_attend, attn, row)}


def _attend(attn: Any, row: Row, *args: Any, **kwargs: Any) -> Any:
    row.rotate = _rotation(kwargs.get("position_embeddings"))
    return call_with(attn, Reader(row).parts(attn, "k_proj", "q_proj"), *args, **kwargs)


def _rotation(table: tuple[Tensor, Tensor] | None) -> Rotation | None:
    """How DINOv3 turns queries and keys [B, H, T, D] by cosines and sines [N, D]: patches alone, half by half."""
    if table is None:
        return None
    cos, sin = table

    def turned(x: Tensor) -> Tensor:
        patches = x[:, :, -cos.shape[-2] :]
        first, second = patches.chunk(2, dim=-1)
        patches = patches * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([x[:, :, : -cos.shape[-2]], patches], dim=2)

    return lambda q, k: (turned(q), turned(k))
