"""Attention along lists of keys, forward: keys and values are gathered, one softmax pass per block of queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.attention import bias_stride, load_bias, load_heads, must_upcast, store_heads, unit_stride
from vtoken_kernels.launch import launch, tiles
from vtoken_kernels.lists import BLOCK, Lists, is_kept, rows_of

_LOG2_E = tl.constexpr(1.4426950408889634)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def block_of(num_prefix, num_blocks, BLOCK_M: tl.constexpr):
    """Which head and block a program serves, and its rows r [BLOCK_M]; blocks -1, -2, ... hold the prefix tokens."""
    parts = _BLOCK // BLOCK_M
    prefix_blocks = tl.cdiv(num_prefix, _BLOCK)
    item = tl.program_id(0) // parts
    pair = (item // (prefix_blocks + num_blocks)).to(tl.int64)
    block = item % (prefix_blocks + num_blocks) - prefix_blocks
    return pair, block, (tl.program_id(0) % parts) * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def count_of(start_ptr, at, block, num_tokens, num_tiles, capacity, HAS_WORD: tl.constexpr):
    """Entries of the list number `at`; prefix blocks attend to every token."""
    count = capacity
    if HAS_WORD:
        count = tl.load(start_ptr + at * (num_tiles + 1) + num_tiles)
    return tl.where(block < 0, num_tokens, count)


@triton.jit
def load_entries(index_ptr, word_ptr, block, entry, ok, HAS_WORD: tl.constexpr):
    """Keys and words of entries [C]. The list of a prefix block is not stored: entry j is token j, kept by all rows."""
    stored = ok & (entry >= tl.where(block < 0, entry + 1, 0))
    key = tl.where(block < 0, entry, tl.load(index_ptr + entry, mask=stored, other=0))
    word = tl.where(ok, -1, 0).to(tl.int64)
    if HAS_WORD:
        word = tl.where(block < 0, word, tl.load(word_ptr + entry, mask=stored, other=0))
    return key, word


@triton.jit(
    do_not_specialize=["num_tokens", "num_queries", "num_prefix", "num_blocks", "num_tiles", "rows", "capacity"]
)
def sparse_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, order_ptr, index_ptr, word_ptr, start_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    bias_stride_b, order_stride_b, heads, num_tokens, num_queries, num_prefix, num_blocks, num_tiles, rows, capacity,
    scale,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_WORD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, block of queries): along its list with a running maximum, base 2."""
    pair, block, r = block_of(num_prefix, num_blocks, BLOCK_M)
    image, head = pair // heads, pair % heads
    token, token_ok = rows_of(order_ptr + image * order_stride_b, block, r, rows, num_queries, num_prefix, HAS_ORDER)
    at = pair * num_blocks + tl.maximum(block, 0)
    count = count_of(start_ptr, at, block, num_tokens, num_tiles, capacity, HAS_WORD)
    index_ptr += at * capacity
    word_ptr += at * capacity
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    bias_ptr += image * bias_stride_b
    q = load_heads(q_ptr + image * q_stride_b + head * q_stride_h, token, token_ok, q_stride_t, HEAD_DIM, BLOCK_D,
                   UPCAST)  # fmt: skip
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        ok = entry < count
        key, word = load_entries(index_ptr, word_ptr, block, entry, ok, HAS_WORD)
        k = load_heads(k_ptr, key, ok, k_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        scores += load_bias(bias_ptr, key, ok, HAS_BIAS)[None, :]
        if HAS_WORD:
            scores = tl.where(is_kept(word, r), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # No key so far: any finite number keeps the exponents free of NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - finite[:, None])
        fade = tl.exp2(top - finite)
        top = higher
        total = total * fade + tl.sum(p, 1)
        v = load_heads(v_ptr, key, ok, v_stride_t, HEAD_DIM, BLOCK_D, UPCAST)
        out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
    # A query without keys gives zeros; its infinite lse takes it out of the backward pass.
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    out_at = out_ptr + (image * num_tokens * heads + head) * HEAD_DIM
    store_heads(out_at, out / total[:, None], token, token_ok, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    lse = tl.where(some, top + tl.log2(total), float("inf"))
    tl.store(lse_ptr + pair * num_tokens + token, lse, mask=token_ok)


def programs(batch: int, heads: int, num_prefix: int, num_blocks: int, block_m: int) -> int:
    """How many serve all queries."""
    return batch * heads * (tiles(num_prefix, BLOCK) + num_blocks) * (BLOCK // block_m)


def list_arguments(lists: Lists, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index, word and start, with any tensor in the place of what is not there."""
    return lists.index, like if lists.word is None else lists.word, like if lists.start is None else lists.start


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, order: Tensor | None, lists: Lists, num_prefix: int,
    rows: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over kept keys.

    Args:
        q, k, v: [B, H, N, D] of one dtype and any strides; the first `num_prefix` queries keep all keys.
        bias: added to the scaled scores, float32 [B, N] with stride 1 along N.
        order: patch queries (0..T-1) as they are cut into blocks, int32 [B, T] with stride 1 along T; None: ascending.
        lists: kept keys of the patch queries.
        rows: queries per block.
        scale: of the scores.

    Returns:
        The output [B, H, N, D] (in memory [B, N, H, D]), zeros where nothing is kept; base-2 logarithms of the softmax
        sums, float32 [B, H, N], infinite where nothing is kept.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, num_tokens, head_dim = q.shape
    num_blocks, capacity = lists.index.shape[2:]
    out = torch.empty(batch, num_tokens, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, num_tokens, dtype=torch.float32, device=q.device)
    settings = configs.sparse_attention(head_dim, q.dtype)
    launch(
        sparse_attention_fwd_kernel, programs(batch, heads, num_prefix, num_blocks, settings["BLOCK_M"]), q, k, v,
        lse if bias is None else bias, lse if order is None else order, *list_arguments(lists, lse), out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], bias_stride(bias), bias_stride(order), heads, num_tokens,
        num_tokens - num_prefix, num_prefix, num_blocks, tiles(num_tokens, BLOCK), rows, capacity, scale,
        HEAD_DIM=head_dim, HAS_BIAS=bias is not None, HAS_ORDER=order is not None, HAS_WORD=lists.word is not None,
        UPCAST=must_upcast(q.dtype), PRECISION=configs.precision(q.dtype), **settings,
    )  # fmt: skip
    return out, lse
