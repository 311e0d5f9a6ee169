"""Moving whole rows of a [B, T, C] tensor by index, as flat `index_select` (docs/performance.md 3.5); autocast off."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_AS_IT_IS: AbstractContextManager[object] = contextlib.nullcontext()


def _flat_index(index: Tensor, num_rows: int) -> Tensor:
    """Row numbers [B, K] inside each image -> row numbers [B*K] of the [B*num_rows, C] view."""
    batch = index.shape[0]
    if batch == 1:  # at batch 1 the count of small operations is what costs
        return index.reshape(-1)
    offset = torch.arange(batch, device=index.device, dtype=index.dtype).mul_(num_rows)
    return (index + offset.unsqueeze(1)).reshape(-1)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K] of `x` [B, T, C] as [B, K, C]; 4x faster than gather with an expanded index."""
    batch, num_rows, width = x.shape
    rows = x.reshape(batch * num_rows, width).index_select(0, _flat_index(index, num_rows))
    return rows.view(batch, index.shape[1], width)


def add_rows(rows: Tensor, step: Tensor, slot: Tensor) -> Tensor:
    """Add `step` [B, r, C] to `rows` [B, D, C], in place, at `slot` [B, r]; deterministic on CPU only."""
    rows.flatten(0, 1).index_add_(0, _flat_index(slot, rows.shape[1]), step.flatten(0, 1))
    return rows


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `like`: neither similarities nor averages may be rounded.

    Source: docs/methods/pitome.md 8.
    """
    kind = like.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _AS_IT_IS
