"""K0: the vectors that tokens are compared by, from keys or from any metric."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.launch import launch, tiles


@triton.jit(do_not_specialize=["num_rows", "num_prefix"])
def metric_kernel(
    x_ptr, out_ptr, x_stride_b, x_stride_h, x_stride_t, x_stride_d, heads, num_rows, num_prefix,
    WIDTH: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, BLOCK_T tokens): sum over heads in float32, divided by its length if NORMALISE."""
    num_tiles = tl.cdiv(num_rows, BLOCK_T)
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    row = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    ok = (row < num_rows)[:, None] & (d < WIDTH)[None, :]
    at = (row + num_prefix).to(tl.int64)[:, None] * x_stride_t + d.to(tl.int64)[None, :] * x_stride_d
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    x_ptr += image * x_stride_b
    for _ in range(0, heads):
        total += tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
        x_ptr += x_stride_h
    if NORMALISE:
        length = tl.sqrt_rn(tl.sum(total * total, 1))
        total = tl.div_rn(total, tl.maximum(length, 1e-12)[:, None] + tl.zeros_like(total))
    to = (image * num_rows + row)[:, None] * WIDTH + d[None, :]
    tl.store(out_ptr + to, total, mask=ok)


def _run(x: Tensor, num_prefix: int, normalise: bool) -> Tensor:
    batch, heads, tokens, width = x.shape
    num_rows = tokens - num_prefix
    out = torch.empty(batch, num_rows, width, dtype=torch.float32, device=x.device)
    settings = configs.metric(width)
    launch(
        metric_kernel, batch * tiles(num_rows, settings["BLOCK_T"]), x, out, *x.stride(), heads, num_rows,
        num_prefix, WIDTH=width, NORMALISE=normalise, **settings,
    )  # fmt: skip
    return out


def sum_heads(keys: Tensor) -> Tensor:
    """Keys [B, H, T, D] of any strides, summed over heads in float32: [B, T, D]."""
    return _run(keys, 0, False)


def unit_rows(metric: Tensor, num_prefix: int) -> Tensor:
    """Metric [B, T, d] without its prefix rows, each row of length 1 (zero rows stay zero): float32 [B, N, d]."""
    return _run(metric.unsqueeze(1), num_prefix, True)
