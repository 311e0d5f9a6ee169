"""K4: merged rows and sizes from a plan, and their gradients; every row is written by one program, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.cast import round_to
from vtoken_kernels.launch import launch, tiles

#: Numbers of the reductions in the kernels.
REDUCTIONS = {"wavg": 0, "mean": 1, "amax": 2, "prune": 3}
_WAVG = tl.constexpr(0)
_MEAN = tl.constexpr(1)
_AMAX = tl.constexpr(2)
_PRUNE = tl.constexpr(3)


@triton.jit
def sources_of(start_ptr, image, out, num_out, num_dest):
    """Where the sources of output row `out` begin and end among the members; rows before the destinations have none."""
    dest = out - (num_out - num_dest)
    at = start_ptr + image * (num_dest + 1) + dest
    return tl.load(at, mask=dest >= 0, other=0), tl.load(at + 1, mask=dest >= 0, other=0)


@triton.jit
def size_of(size_ptr, row, HAS_SIZE: tl.constexpr):
    """Patches of one row."""
    if HAS_SIZE:
        return tl.load(size_ptr + row)
    return 1.0


@triton.jit
def total_size(size_ptr, member_ptr, row, begin, end, HAS_SIZE: tl.constexpr):
    """Patches of a row and its sources. Whole numbers: exact in any order."""
    total = size_of(size_ptr, row, HAS_SIZE)
    for at in range(begin, end):
        total += size_of(size_ptr, tl.load(member_ptr + at).to(tl.int64), HAS_SIZE)
    return total


@triton.jit(do_not_specialize=["num_in", "num_out", "num_dest", "r"])
def merge_fwd_kernel(
    x_ptr, size_ptr, keep_ptr, start_ptr, member_ptr, out_ptr, new_size_ptr, x_stride_b, x_stride_t, x_stride_c,
    num_in, num_out, num_dest, r,
    WIDTH: tl.constexpr, HAS_SIZE: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program per (image, output row, BLOCK_C channels)."""
    blocks: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    pid = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks
    image = pid // num_out
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < WIDTH
    x_ptr += image * x_stride_b + c.to(tl.int64) * x_stride_c
    size_ptr += image * num_in
    member_ptr += image * r
    row = tl.load(keep_ptr + pid)
    begin, end = sources_of(start_ptr, image, pid % num_out, num_out, num_dest)
    own = tl.load(x_ptr + row * x_stride_t, mask=ok, other=0.0).to(tl.float32)
    merged = own
    if REDUCTION == _PRUNE:
        total = size_of(size_ptr, row, HAS_SIZE)
    else:
        total = total_size(size_ptr, member_ptr, row, begin, end, HAS_SIZE)
        for at in range(begin, end):
            source = tl.load(member_ptr + at).to(tl.int64)
            x = tl.load(x_ptr + source * x_stride_t, mask=ok, other=0.0).to(tl.float32)
            if REDUCTION == _AMAX:
                merged = tl.maximum(merged, x, propagate_nan=tl.PropagateNan.ALL)
            elif REDUCTION == _MEAN:
                merged += (x - own) * tl.div_rn(1.0, (end - begin + 1).to(tl.float32))
            else:
                # share * (source - destination) leaves groups of equal rows exactly as they were.
                merged += (x - own) * tl.div_rn(size_of(size_ptr, source, HAS_SIZE), total)
    tl.store(out_ptr + pid * WIDTH + c, round_to(merged, out_ptr.dtype.element_ty), mask=ok)
    if column == 0:
        tl.store(new_size_ptr + pid, total)


@triton.jit(do_not_specialize=["num_in", "num_out", "num_dest"])
def merge_bwd_kernel(
    grad_ptr, size_ptr, new_size_ptr, keep_ptr, dest_ptr, start_ptr, out_ptr,
    grad_stride_b, grad_stride_t, grad_stride_c, num_in, num_out, num_dest,
    WIDTH: tl.constexpr, HAS_SIZE: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program per (image, input row, BLOCK_C channels): the gradient of the row it went to, times its share."""
    blocks: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    pid = (tl.program_id(0) // blocks).to(tl.int64)
    image = pid // num_in
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < WIDTH
    out = tl.load(dest_ptr + pid)
    if REDUCTION == _PRUNE:
        share = tl.where(tl.load(keep_ptr + image * num_out + out) == pid % num_in, 1.0, 0.0)
    elif REDUCTION == _MEAN:
        begin, end = sources_of(start_ptr, image, out, num_out, num_dest)
        share = tl.div_rn(1.0, (end - begin + 1).to(tl.float32))
    else:
        share = tl.div_rn(size_of(size_ptr, pid, HAS_SIZE), tl.load(new_size_ptr + image * num_out + out))
    at = grad_ptr + image * grad_stride_b + out * grad_stride_t + c.to(tl.int64) * grad_stride_c
    grad = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    # Not grad * 0 for dropped rows: that is NaN where the gradient is not finite.
    grad = tl.where(share == 0.0, 0.0, grad * share)
    tl.store(out_ptr + pid * WIDTH + c, round_to(grad, out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_in", "num_out", "num_dest", "r"])
def merge_amax_bwd_kernel(
    grad_ptr, x_ptr, keep_ptr, start_ptr, member_ptr, out_ptr, grad_stride_b, grad_stride_t, grad_stride_c,
    x_stride_b, x_stride_t, x_stride_c, num_in, num_out, num_dest, r, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program per (image, output row, BLOCK_C channels): its gradient goes to the largest rows of its group.

    Equal ones share it, as in torch. Every input row is in one group, so every row is written once.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    pid = (tl.program_id(0) // blocks).to(tl.int64)
    image = pid // num_out
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < WIDTH
    x_ptr += image * x_stride_b + c.to(tl.int64) * x_stride_c
    out_ptr += image * num_in * WIDTH + c
    member_ptr += image * r
    row = tl.load(keep_ptr + pid)
    begin, end = sources_of(start_ptr, image, pid % num_out, num_out, num_dest)
    own = tl.load(x_ptr + row * x_stride_t, mask=ok, other=0.0).to(tl.float32)
    top = own
    for at in range(begin, end):
        source = tl.load(member_ptr + at).to(tl.int64)
        x = tl.load(x_ptr + source * x_stride_t, mask=ok, other=0.0).to(tl.float32)
        top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
    count = tl.where(own == top, 1.0, 0.0)
    for at in range(begin, end):
        source = tl.load(member_ptr + at).to(tl.int64)
        x = tl.load(x_ptr + source * x_stride_t, mask=ok, other=0.0).to(tl.float32)
        count += tl.where(x == top, 1.0, 0.0)
    at_grad = grad_ptr + image * grad_stride_b + (pid % num_out) * grad_stride_t + c.to(tl.int64) * grad_stride_c
    grad = tl.div_rn(tl.load(at_grad, mask=ok, other=0.0).to(tl.float32), tl.maximum(count, 1.0))
    tl.store(out_ptr + row * WIDTH, round_to(tl.where(own == top, grad, 0.0), out_ptr.dtype.element_ty), mask=ok)
    for at in range(begin, end):
        source = tl.load(member_ptr + at).to(tl.int64)
        x = tl.load(x_ptr + source * x_stride_t, mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + source * WIDTH, round_to(tl.where(x == top, grad, 0.0), out_ptr.dtype.element_ty), mask=ok)


def merge(
    x: Tensor, size: Tensor | None, keep: Tensor, start: Tensor, member: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Merged rows [B, T', C] in the dtype of x [B, T, C], and float32 sizes [B, T'].

    Args:
        size: float32 [B, T], None for ones.
        keep, start, member: of a plan, as `vtoken_kernels.layout` makes them.
    """
    batch, num_in, width = x.shape
    num_out, num_dest = keep.shape[1], start.shape[1] - 1
    out = torch.empty(batch, num_out, width, dtype=x.dtype, device=x.device)
    new_size = torch.empty(batch, num_out, dtype=torch.float32, device=x.device)
    settings = configs.rows(width)
    launch(
        merge_fwd_kernel, batch * num_out * tiles(width, settings["BLOCK_C"]), x,
        new_size if size is None else size.contiguous(), keep.contiguous(), start, member, out, new_size, *x.stride(),
        num_in, num_out, num_dest, member.shape[1],
        WIDTH=width, HAS_SIZE=size is not None, REDUCTION=REDUCTIONS[reduction], **settings,
    )  # fmt: skip
    return out, new_size


def merge_backward(
    grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, dest: Tensor, start: Tensor, reduction: str
) -> Tensor:
    """Gradient [B, T, C] of the rows, from that of the merged rows [B, T', C]; not for "amax"."""
    batch, num_out, width = grad.shape
    num_in = dest.shape[1]
    out = torch.empty(batch, num_in, width, dtype=grad.dtype, device=grad.device)
    settings = configs.rows(width)
    launch(
        merge_bwd_kernel, batch * num_in * tiles(width, settings["BLOCK_C"]), grad,
        new_size if size is None else size.contiguous(), new_size.contiguous(), keep.contiguous(), dest.contiguous(),
        start, out, *grad.stride(), num_in, num_out, start.shape[1] - 1,
        WIDTH=width, HAS_SIZE=size is not None, REDUCTION=REDUCTIONS[reduction], **settings,
    )  # fmt: skip
    return out


def merge_amax_backward(grad: Tensor, x: Tensor, keep: Tensor, start: Tensor, member: Tensor) -> Tensor:
    """Gradient [B, T, C] of the rows x [B, T, C] for the reduction "amax", from that of the merged rows."""
    batch, num_in, width = x.shape
    num_out = keep.shape[1]
    out = torch.empty(batch, num_in, width, dtype=x.dtype, device=x.device)
    settings = configs.rows(width)
    launch(
        merge_amax_bwd_kernel, batch * num_out * tiles(width, settings["BLOCK_C"]), grad, x, keep.contiguous(),
        start, member, out, *grad.stride(), *x.stride(), num_in, num_out, start.shape[1] - 1, member.shape[1],
        WIDTH=width, **settings,
    )  # fmt: skip
    return out
