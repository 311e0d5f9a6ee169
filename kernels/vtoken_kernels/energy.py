"""K1: PiToMe's energies, without storing the similarities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.launch import launch, tiles


@triton.jit
def load_rows(ptr, row, ok, first, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels first.. of rows [R]: [R, BLOCK_D], zeros outside."""
    d = first + tl.arange(0, BLOCK_D)
    return tl.load(ptr + row.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=ok[:, None] & (d < WIDTH)[None, :],
                   other=0.0)  # fmt: skip


@triton.jit
def similarity(a_ptr, a, a_ok, b_ptr, b, b_ok, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Products of rows a [R] with rows b [S] of two float32 tables: [R, S]."""
    products = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    for first in range(0, WIDTH, BLOCK_D):
        left = load_rows(a_ptr, a, a_ok, first, WIDTH, BLOCK_D)
        right = load_rows(b_ptr, b, b_ok, first, WIDTH, BLOCK_D)
        products = tl.dot(left, tl.trans(right), products, input_precision=PRECISION)
    return products


@triton.jit(do_not_specialize=["num_rows"])
def energy_kernel(
    unit_ptr, energy_ptr, num_rows, margin, alpha,
    WIDTH: tl.constexpr, EQ4: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, BLOCK_I tokens): sum over all tokens j of f(cos_ij - margin)."""
    num_tiles = tl.cdiv(num_rows, BLOCK_I)
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    unit_ptr += image * num_rows * WIDTH
    i = (tl.program_id(0) % num_tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    i_ok = i < num_rows
    if WIDTH <= BLOCK_D:
        own = load_rows(unit_ptr, i, i_ok, 0, WIDTH, BLOCK_D)
    total = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, num_rows, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        j_ok = j < num_rows
        if WIDTH <= BLOCK_D:
            other = load_rows(unit_ptr, j, j_ok, 0, WIDTH, BLOCK_D)
            s = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        else:
            s = similarity(unit_ptr, i, i_ok, unit_ptr, j, j_ok, WIDTH, BLOCK_D, PRECISION)
        # Every token is exactly 1 to itself (0 if a zero vector): rounding must not decide between equal energies.
        s = tl.where(i[:, None] == j[None, :], tl.where(s > 0.5, 1.0, 0.0), s)
        z = s - margin
        below = alpha * (tl.exp(tl.minimum(z, 0.0)) - 1.0)
        f = tl.where(s >= margin, s, below) if EQ4 else tl.where(z > 0.0, z, below)
        total += tl.sum(tl.where(j_ok[None, :], f, 0.0), 1)
    tl.store(energy_ptr + image * num_rows + i, total, mask=i_ok)


def energies(unit: Tensor, margin: float, alpha: float, eq4: bool, mode: str) -> Tensor:
    """Energies [B, N] (sums, not means) of unit rows [B, N, d]; `mode` is how float32 tiles are multiplied."""
    batch, num_rows, width = unit.shape
    out = torch.empty(batch, num_rows, dtype=torch.float32, device=unit.device)
    settings = configs.energy(width, mode)
    launch(
        energy_kernel, batch * tiles(num_rows, settings["BLOCK_I"]), unit, out, num_rows, margin, alpha,
        WIDTH=width, EQ4=eq4, PRECISION=mode, **settings,
    )  # fmt: skip
    return out
