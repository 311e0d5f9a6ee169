"""K5, forward: softmax(scale * q k^T + bias) v with one bias per key, without storing the scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.cast import round_to
from vtoken_kernels.launch import INTERPRETED, launch, tiles

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_heads(ptr, row, row_ok, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows [R] of one head, [R, BLOCK_D], zeros outside. UPCAST: the interpreter computes bfloat16 wrongly."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride_t + d[None, :]
    if HEAD_DIM == BLOCK_D:
        x = tl.load(at, mask=row_ok[:, None], other=0.0)
    else:
        x = tl.load(at, mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        return x.to(tl.float32)
    return x


@triton.jit
def store_heads(ptr, value, row, row_ok, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `load_heads`, in the dtype of the pointer."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride_t + d[None, :]
    tl.store(at, round_to(value, ptr.dtype.element_ty), mask=row_ok[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def load_bias(bias_ptr, key, key_ok, HAS_BIAS: tl.constexpr):
    """Bias of keys [R] for scores with base 2; keys that do not exist get -inf."""
    bias = tl.where(key_ok, 0.0, float("-inf"))
    if HAS_BIAS:
        bias = tl.load(bias_ptr + key, mask=key_ok, other=float("-inf")).to(tl.float32) * _LOG2_E
    return bias


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    bias_stride_b, heads, num_queries, num_keys, scale,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, BLOCK_M queries): one pass over the keys with a running maximum, base 2."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    pair = (tl.program_id(0) // num_tiles).to(tl.int64)
    image, head = pair // heads, pair % heads
    query = (tl.program_id(0) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = query < num_queries
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    bias_ptr += image * bias_stride_b
    q = load_heads(q_ptr + image * q_stride_b + head * q_stride_h, query, query_ok, q_stride_t, HEAD_DIM, BLOCK_D,
                   UPCAST)  # fmt: skip
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_ok = key < num_keys
        k = load_heads(k_ptr, key, key_ok, k_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        scores += load_bias(bias_ptr, key, key_ok, HAS_BIAS)[None, :]
        higher = tl.maximum(top, tl.max(scores, 1))
        # Only keys with a bias of -inf so far: any finite number keeps the exponents free of NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - finite[:, None])
        fade = tl.exp2(top - finite)
        top = higher
        total = total * fade + tl.sum(p, 1)
        v = load_heads(v_ptr, key, key_ok, v_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
    # A query all of whose keys have a bias of -inf gives zeros; its infinite lse takes it out of the backward pass.
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    # [B, T, H, D] in memory, which is what the output projection reads.
    out_at = out_ptr + (image * num_queries * heads + head) * HEAD_DIM
    store_heads(out_at, out / total[:, None], query, query_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    lse = tl.where(some, top + tl.log2(total), float("inf"))
    tl.store(lse_ptr + pair * num_queries + query, lse, mask=query_ok)


def unit_stride(x: Tensor) -> Tensor:
    """The kernels step over images, heads and tokens, but read channels one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def bias_stride(bias: Tensor | None) -> int:
    """Step from image to image of a bias [B, T]; 0 where one serves all."""
    return 0 if bias is None else bias.stride(0)


def must_upcast(dtype: torch.dtype) -> bool:
    """Whether tiles must be made float32 before they are multiplied."""
    return INTERPRETED and dtype == torch.bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with a bias per key.

    Args:
        q, k, v: [B, H, T, D], [B, H, S, D], [B, H, S, D] with S > 0, of one dtype and any strides.
        bias: added to the scaled scores, float32 [B, S] with stride 1 along S.
        scale: of the scores.

    Returns:
        The output [B, H, T, D] (in memory [B, T, H, D]); base-2 logarithms of the softmax sums, float32 [B, H, T].
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, num_queries, head_dim = q.shape
    out = torch.empty(batch, num_queries, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    settings = configs.attention(head_dim, q.dtype)
    launch(
        attention_fwd_kernel, batch * heads * tiles(num_queries, settings["BLOCK_M"]), q, k, v,
        lse if bias is None else bias, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], bias_stride(bias),
        heads, num_queries, k.shape[2], scale,
        HEAD_DIM=head_dim, HAS_BIAS=bias is not None, UPCAST=must_upcast(q.dtype),
        PRECISION=configs.precision(q.dtype), **settings,
    )  # fmt: skip
    return out, lse
