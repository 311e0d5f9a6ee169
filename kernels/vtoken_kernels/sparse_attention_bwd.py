"""Attention along lists of keys, backward: queries along the same lists, keys along transposed ones; no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.attention import bias_stride, load_bias, load_heads, must_upcast, store_heads, unit_stride
from vtoken_kernels.launch import launch, tiles
from vtoken_kernels.lists import BLOCK, Lists, is_kept, rows_of, transpose
from vtoken_kernels.sparse_attention import block_of, count_of, list_arguments, load_entries, programs

_LOG2_E = tl.constexpr(1.4426950408889634)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit(
    do_not_specialize=["num_tokens", "num_queries", "num_prefix", "num_blocks", "num_tiles", "rows", "capacity"]
)
def sparse_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, order_ptr, index_ptr, word_ptr, start_ptr,
    out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    out_stride_b, out_stride_h, out_stride_t, grad_stride_b, grad_stride_h, grad_stride_t,
    bias_stride_b, order_stride_b, heads, num_tokens, num_queries, num_prefix, num_blocks, num_tiles, rows, capacity,
    scale,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_WORD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, block of queries): gradient of the queries; leaves delta = sum(out * grad)."""
    pair, block, r = block_of(num_prefix, num_blocks, BLOCK_M)
    image, head = pair // heads, pair % heads
    token, token_ok = rows_of(order_ptr + image * order_stride_b, block, r, rows, num_queries, num_prefix, HAS_ORDER)
    at = pair * num_blocks + tl.maximum(block, 0)
    count = count_of(start_ptr, at, block, num_tokens, num_tiles, capacity, HAS_WORD)
    index_ptr += at * capacity
    word_ptr += at * capacity
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    q = load_heads(q_ptr + image * q_stride_b + head * q_stride_h, token, token_ok, q_stride_t, HEAD_DIM, BLOCK_D,
                   UPCAST)  # fmt: skip
    grad = load_heads(grad_ptr + image * grad_stride_b + head * grad_stride_h, token, token_ok, grad_stride_t,
                      HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
    out = load_heads(out_ptr + image * out_stride_b + head * out_stride_h, token, token_ok, out_stride_t, HEAD_DIM,
                     BLOCK_D, UPCAST)  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + pair * num_tokens + token, delta, mask=token_ok)
    lse = tl.load(lse_ptr + pair * num_tokens + token, mask=token_ok, other=float("inf"))
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        ok = entry < count
        key, word = load_entries(index_ptr, word_ptr, block, entry, ok, HAS_WORD)
        k = load_heads(k_ptr, key, ok, k_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        v = load_heads(v_ptr, key, ok, v_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        scores += load_bias(bias_ptr + image * bias_stride_b, key, ok, HAS_BIAS)[None, :]
        if HAS_WORD:
            scores = tl.where(is_kept(word, r), scores, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        dscores = p * (dp - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_at = dq_ptr + (image * num_tokens * heads + head) * HEAD_DIM
    store_heads(dq_at, dq * scale, token, token_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "num_queries", "num_prefix", "num_tiles"])
def sparse_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, word_ptr, count_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    grad_stride_b, grad_stride_h, grad_stride_t, bias_stride_b, heads, num_tokens, num_queries, num_prefix, num_tiles,
    scale,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, BLOCK_N of 64 keys): along the prefix queries, then those of the transposed list."""
    parts = _BLOCK // BLOCK_N
    item = (tl.program_id(0) // parts).to(tl.int64)
    pair = item // num_tiles
    image, head = pair // heads, pair % heads
    c = (tl.program_id(0) % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    key = (item % num_tiles).to(tl.int32) * _BLOCK + c
    key_ok = key < num_tokens
    index_ptr += item * num_queries
    word_ptr += item * num_queries
    q_ptr += image * q_stride_b + head * q_stride_h
    grad_ptr += image * grad_stride_b + head * grad_stride_h
    k = load_heads(k_ptr + image * k_stride_b + head * k_stride_h, key, key_ok, k_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
    v = load_heads(v_ptr + image * v_stride_b + head * v_stride_h, key, key_ok, v_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
    bias = load_bias(bias_ptr + image * bias_stride_b, key, key_ok, HAS_BIAS)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    count = num_prefix + tl.load(count_ptr + item)
    for first in range(0, count, BLOCK_M):
        entry = first + tl.arange(0, BLOCK_M)
        ok = entry < count
        listed = ok & (entry >= num_prefix)
        query = tl.load(index_ptr + entry - num_prefix, mask=listed, other=0)
        query = tl.where(listed, query, entry)
        word = tl.load(word_ptr + entry - num_prefix, mask=listed, other=-1)
        q = load_heads(q_ptr, query, ok, q_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        grad = load_heads(grad_ptr, query, ok, grad_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        lse = tl.load(lse_ptr + pair * num_tokens + query, mask=ok, other=float("inf"))
        delta = tl.load(delta_ptr + pair * num_tokens + query, mask=ok, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2_E) + bias[:, None]
        p = tl.exp2(tl.where(is_kept(word, c), scores, float("-inf")) - lse[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dscores = p * (dp - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    at = (image * num_tokens * heads + head) * HEAD_DIM
    store_heads(dk_ptr + at, dk * scale, key, key_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_heads(dv_ptr + at, dv, key, key_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)


def sparse_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, order: Tensor | None, lists: Lists, out: Tensor,
    lse: Tensor, num_prefix: int, rows: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v of `vtoken_kernels.sparse_attention.sparse_attention` from that of its output.

    They are [B, H, N, D], in memory [B, N, H, D]. The bias gets none.
    """
    q, k, v, out, grad = (unit_stride(t) for t in (q, k, v, out, grad))
    batch, heads, num_tokens, head_dim = q.shape
    num_blocks, capacity = lists.index.shape[2:]
    num_queries, num_tiles = num_tokens - num_prefix, tiles(num_tokens, BLOCK)
    dq, dk, dv = (
        torch.empty(batch, num_tokens, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
        for _ in range(3)
    )
    delta = torch.empty_like(lse)
    settings = configs.sparse_attention_bwd(head_dim, q.dtype)
    settings |= {"HEAD_DIM": head_dim, "HAS_BIAS": bias is not None, "UPCAST": must_upcast(q.dtype)}
    settings["PRECISION"] = configs.precision(q.dtype)
    key_bias = lse if bias is None else bias
    qkv_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    launch(
        sparse_attention_bwd_dq_kernel, programs(batch, heads, num_prefix, num_blocks, settings["BLOCK_M"]), q, k, v,
        key_bias, lse if order is None else order, *list_arguments(lists, lse), out, grad, lse, delta, dq,
        *qkv_strides, *out.stride()[:3], *grad.stride()[:3], bias_stride(bias), bias_stride(order), heads, num_tokens,
        num_queries, num_prefix, num_blocks, num_tiles, rows, capacity, scale,
        HAS_ORDER=order is not None, HAS_WORD=lists.word is not None, **settings,
    )  # fmt: skip
    index, word, count = transpose(lists, order, num_queries, num_tokens, num_prefix, rows)
    launch(
        sparse_attention_bwd_dkv_kernel, batch * heads * num_tiles * (BLOCK // settings["BLOCK_N"]), q, k, v, key_bias,
        index, word, count, grad, lse, delta, dk, dv, *qkv_strides, *grad.stride()[:3], bias_stride(bias), heads,
        num_tokens, num_queries, num_prefix, num_tiles, scale, **settings,
    )  # fmt: skip
    return dq, dk, dv
