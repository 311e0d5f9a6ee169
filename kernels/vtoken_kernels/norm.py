"""K4f: residual addition, merge and LayerNorm in one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.cast import round_to
from vtoken_kernels.launch import launch
from vtoken_kernels.merge import size_of, sources_of, total_size


@triton.jit
def _sum_row(x_ptr, y_ptr, x_at, y_at, ok):
    """x + y of one row in float32, rounded as the addition alone would have rounded it."""
    x = tl.load(x_ptr + x_at, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + y_at, mask=ok, other=0.0).to(tl.float32)
    return round_to(x + y, x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["num_in", "num_out", "num_dest", "r"])
def add_merge_norm_fwd_kernel(
    x_ptr, y_ptr, size_ptr, keep_ptr, start_ptr, member_ptr, weight_ptr, bias_ptr,
    out_ptr, normed_ptr, new_size_ptr, mean_ptr, rstd_ptr,
    x_stride_b, x_stride_t, x_stride_c, y_stride_b, y_stride_t, y_stride_c, num_in, num_out, num_dest, r, eps,
    WIDTH: tl.constexpr, HAS_SIZE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program per (image, output row): the weighted mean of x + y over its group, and its norm."""
    pid = tl.program_id(0).to(tl.int64)
    image = pid // num_out
    c = tl.arange(0, BLOCK_C)
    ok = c < WIDTH
    x_at = image * x_stride_b + c.to(tl.int64) * x_stride_c
    y_at = image * y_stride_b + c.to(tl.int64) * y_stride_c
    size_ptr += image * num_in
    member_ptr += image * r
    row = tl.load(keep_ptr + pid)
    begin, end = sources_of(start_ptr, image, pid % num_out, num_out, num_dest)
    own = _sum_row(x_ptr, y_ptr, x_at + row * x_stride_t, y_at + row * y_stride_t, ok)
    total = total_size(size_ptr, member_ptr, row, begin, end, HAS_SIZE)
    merged = own
    for at in range(begin, end):
        source = tl.load(member_ptr + at).to(tl.int64)
        x = _sum_row(x_ptr, y_ptr, x_at + source * x_stride_t, y_at + source * y_stride_t, ok)
        merged += (x - own) * tl.div_rn(size_of(size_ptr, source, HAS_SIZE), total)
    rounded = round_to(merged, out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid * WIDTH + c, rounded, mask=ok)
    tl.store(new_size_ptr + pid, total)
    # The norm sees the rounded row, as it would in a pass of its own; so does the backward pass.
    row_value = rounded.to(tl.float32)
    mean = tl.sum(row_value, 0) / WIDTH
    centred = tl.where(ok, row_value - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / WIDTH + eps)
    normed = centred * rstd
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + c, mask=ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(normed_ptr + pid * WIDTH + c, round_to(normed, normed_ptr.dtype.element_ty), mask=ok)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, rstd)


def add_merge_norm(
    x: Tensor, y: Tensor, size: Tensor | None, keep: Tensor, start: Tensor, member: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The size-weighted merge of x + y (both [B, T, C]) and its LayerNorm over C.

    Args:
        weight, bias: of the norm, [C].

    Returns:
        Rows and normed rows [B, T', C] in the dtype of x; float32 new sizes, means and reciprocal deviations [B, T'].
    """
    batch, num_in, width = x.shape
    num_out = keep.shape[1]
    out = torch.empty(batch, num_out, width, dtype=x.dtype, device=x.device)
    normed = torch.empty_like(out)
    new_size, mean, rstd = (torch.empty(batch, num_out, dtype=torch.float32, device=x.device) for _ in range(3))
    launch(
        add_merge_norm_fwd_kernel, batch * num_out, x, y, new_size if size is None else size.contiguous(),
        keep.contiguous(), start, member, x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(), out, normed, new_size, mean, rstd, *x.stride(), *y.stride(),
        num_in, num_out, start.shape[1] - 1, member.shape[1], eps,
        WIDTH=width, HAS_SIZE=size is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        **configs.norm(width),
    )  # fmt: skip
    return out, normed, new_size, mean, rstd
