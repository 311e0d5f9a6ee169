"""K2: ranks by counting, with the ties of a stable sort; any length, no atomics, no powers of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.launch import launch, tiles


@triton.jit
def _load_values(value_ptr, guard_ptr, index, ok, HAS_GUARD: tl.constexpr):
    """Values [R]; guarded ones come last, NaN first (as in torch; every comparison with it would be false)."""
    value = tl.load(value_ptr + index, mask=ok, other=float("-inf"))
    value = tl.where(value != value, float("inf"), value)
    if HAS_GUARD:
        guard = tl.load(guard_ptr + index, mask=ok, other=0)
        value = tl.where(guard != 0, float("-inf"), value)
    return value


@triton.jit(do_not_specialize=["num_rows"])
def rank_kernel(
    value_ptr, guard_ptr, rank_ptr, order_ptr, num_rows,
    HAS_GUARD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Program per (image, BLOCK_I values): how many values are greater, or equal and earlier."""
    num_tiles = tl.cdiv(num_rows, BLOCK_I)
    base = (tl.program_id(0) // num_tiles).to(tl.int64) * num_rows
    i = (tl.program_id(0) % num_tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    i_ok = i < num_rows
    own = _load_values(value_ptr + base, guard_ptr + base, i, i_ok, HAS_GUARD)[:, None]
    rank = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(0, num_rows, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        j_ok = j < num_rows
        other = _load_values(value_ptr + base, guard_ptr + base, j, j_ok, HAS_GUARD)[None, :]
        ahead = (other > own) | ((other == own) & (j[None, :] < i[:, None]))
        rank += tl.sum((ahead & j_ok[None, :]).to(tl.int32), 1)
    tl.store(rank_ptr + base + i, rank, mask=i_ok)
    tl.store(order_ptr + base + rank, i, mask=i_ok)


def rank_descending(value: Tensor, guard: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rank of every value and the index at every rank, int32 [B, N], of float32 values [B, N], the largest first.

    Equal values keep index order; values with a true guard [B, N] come last, NaN first.
    """
    batch, num_rows = value.shape
    rank = torch.empty(batch, num_rows, dtype=torch.int32, device=value.device)
    order = torch.empty_like(rank)
    flags = value if guard is None else guard.contiguous().view(torch.uint8)
    launch(
        rank_kernel, batch * tiles(num_rows, configs.RANK["BLOCK_I"]), value, flags, rank, order, num_rows,
        HAS_GUARD=guard is not None, **configs.RANK,
    )  # fmt: skip
    return rank, order
