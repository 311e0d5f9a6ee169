"""K5, backward: the scores are computed again, once per tile of queries and once per tile of keys; no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.attention import bias_stride, load_bias, load_heads, must_upcast, store_heads, unit_stride
from vtoken_kernels.launch import launch, tiles

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    out_stride_b, out_stride_h, out_stride_t, grad_stride_b, grad_stride_h, grad_stride_t,
    bias_stride_b, heads, num_queries, num_keys, scale,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, BLOCK_M queries): gradient of the queries; leaves delta = sum(out * grad)."""
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    pair = (tl.program_id(0) // num_tiles).to(tl.int64)
    image, head = pair // heads, pair % heads
    query = (tl.program_id(0) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = query < num_queries
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    q = load_heads(q_ptr + image * q_stride_b + head * q_stride_h, query, query_ok, q_stride_t, HEAD_DIM, BLOCK_D,
                   UPCAST)  # fmt: skip
    grad = load_heads(grad_ptr + image * grad_stride_b + head * grad_stride_h, query, query_ok, grad_stride_t,
                      HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
    out = load_heads(out_ptr + image * out_stride_b + head * out_stride_h, query, query_ok, out_stride_t, HEAD_DIM,
                     BLOCK_D, UPCAST)  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + pair * num_queries + query, delta, mask=query_ok)
    # exp2(score - inf) = 0: queries that do not exist contribute nothing.
    lse = tl.load(lse_ptr + pair * num_queries + query, mask=query_ok, other=float("inf"))
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_ok = key < num_keys
        k = load_heads(k_ptr, key, key_ok, k_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        v = load_heads(v_ptr, key, key_ok, v_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        scores += load_bias(bias_ptr + image * bias_stride_b, key, key_ok, HAS_BIAS)[None, :]
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        dscores = p * (dp - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_at = dq_ptr + (image * num_queries * heads + head) * HEAD_DIM
    store_heads(dq_at, dq * scale, query, query_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    grad_stride_b, grad_stride_h, grad_stride_t, bias_stride_b, heads, num_queries, num_keys, scale,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, BLOCK_N keys): gradients of keys and values, scores transposed [keys, queries]."""
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    pair = (tl.program_id(0) // num_tiles).to(tl.int64)
    image, head = pair // heads, pair % heads
    key = (tl.program_id(0) % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_ok = key < num_keys
    q_ptr += image * q_stride_b + head * q_stride_h
    grad_ptr += image * grad_stride_b + head * grad_stride_h
    k = load_heads(k_ptr + image * k_stride_b + head * k_stride_h, key, key_ok, k_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
    v = load_heads(v_ptr + image * v_stride_b + head * v_stride_h, key, key_ok, v_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
    bias = load_bias(bias_ptr + image * bias_stride_b, key, key_ok, HAS_BIAS)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, num_queries, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        query_ok = query < num_queries
        q = load_heads(q_ptr, query, query_ok, q_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        grad = load_heads(grad_ptr, query, query_ok, grad_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        lse = tl.load(lse_ptr + pair * num_queries + query, mask=query_ok, other=float("inf"))
        delta = tl.load(delta_ptr + pair * num_queries + query, mask=query_ok, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2_E) + bias[:, None]
        p = tl.exp2(scores - lse[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dscores = p * (dp - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    at = (image * num_keys * heads + head) * HEAD_DIM
    store_heads(dk_ptr + at, dk * scale, key, key_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_heads(dv_ptr + at, dv, key, key_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v as `vtoken_kernels.attention.attention` takes them, from that of its output.

    They are [B, H, T, D], in memory [B, T, H, D]. The bias gets none.
    """
    q, k, v, out, grad = (unit_stride(t) for t in (q, k, v, out, grad))
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    dq, dk, dv = (
        torch.empty(batch, n, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
        for n in (num_queries, num_keys, num_keys)
    )
    delta = torch.empty_like(lse)
    settings = configs.attention_bwd(head_dim, q.dtype)
    settings |= {"HEAD_DIM": head_dim, "HAS_BIAS": bias is not None, "UPCAST": must_upcast(q.dtype)}
    settings["PRECISION"] = configs.precision(q.dtype)
    key_bias, pairs = lse if bias is None else bias, batch * heads
    qkv_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    launch(
        attention_bwd_dq_kernel, pairs * tiles(num_queries, settings["BLOCK_M"]), q, k, v, key_bias, out, grad,
        lse, delta, dq, *qkv_strides, *out.stride()[:3], *grad.stride()[:3], bias_stride(bias),
        heads, num_queries, num_keys, scale, **settings,
    )  # fmt: skip
    launch(
        attention_bwd_dkv_kernel, pairs * tiles(num_keys, settings["BLOCK_N"]), q, k, v, key_bias, grad,
        lse, delta, dk, dv, *qkv_strides, *grad.stride()[:3], bias_stride(bias),
        heads, num_queries, num_keys, scale, **settings,
    )  # fmt: skip
    return dq, dk, dv
