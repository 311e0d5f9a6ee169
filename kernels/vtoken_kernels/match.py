"""K3: the most similar destination of every source."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.energy import similarity
from vtoken_kernels.launch import launch, tiles


@triton.jit
def _dealt_rows(order_ptr, position, ok, HAS_ORDER: tl.constexpr):
    """Rows at positions [R] of the order; without one, row numbers are positions."""
    if HAS_ORDER:
        return tl.load(order_ptr + position, mask=ok, other=0)
    return position


@triton.jit(do_not_specialize=["num_rows", "num_a", "num_b", "first_a"])
def match_kernel(
    unit_ptr, order_ptr, partner_ptr, value_ptr, num_rows, num_a, num_b, first_a,
    WIDTH: tl.constexpr, HAS_ORDER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, BLOCK_I sources): running maximum over destinations, the first of equals."""
    num_tiles = tl.cdiv(num_a, BLOCK_I)
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    unit_ptr += image * num_rows * WIDTH
    order_ptr += image * num_rows
    i = (tl.program_id(0) % num_tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    i_ok = i < num_a
    a = _dealt_rows(order_ptr, 2 * i + first_a, i_ok, HAS_ORDER)
    # A NaN is never greater, so a source without any number keeps partner 0, which exists.
    best = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    partner = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(0, num_b, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        j_ok = j < num_b
        b = _dealt_rows(order_ptr, 2 * j + 1 - first_a, j_ok, HAS_ORDER)
        s = similarity(unit_ptr, a, i_ok, unit_ptr, b, j_ok, WIDTH, BLOCK_D, PRECISION)
        s = tl.where(j_ok[None, :], s, float("-inf"))
        top = tl.max(s, 1)
        first = tl.min(tl.where(s == top[:, None], j[None, :], num_b), 1)
        better = (top > best) & (first < num_b)
        partner = tl.where(better, first, partner)
        best = tl.where(better, top, best)
    tl.store(partner_ptr + image * num_a + i, partner, mask=i_ok)
    tl.store(value_ptr + image * num_a + i, best, mask=i_ok)


def best_partners(
    unit: Tensor, order: Tensor | None, num_a: int, num_b: int, first_a: int, mode: str
) -> tuple[Tensor, Tensor]:
    """Tokens are dealt alternately, in `order` [B, N] (None: by index): a gets positions first_a, first_a + 2, ...

    Returns:
        For every a its best b (number among the b, int32) and their similarity (float32), [B, num_a] both.
    """
    batch, num_rows, width = unit.shape
    partner = torch.empty(batch, num_a, dtype=torch.int32, device=unit.device)
    value = torch.empty(batch, num_a, dtype=torch.float32, device=unit.device)
    settings = configs.match(width)
    launch(
        match_kernel, batch * tiles(num_a, settings["BLOCK_I"]), unit, unit if order is None else order,
        partner, value, num_rows, num_a, num_b, first_a,
        WIDTH=width, HAS_ORDER=order is not None, PRECISION=mode, **settings,
    )  # fmt: skip
    return partner, value
