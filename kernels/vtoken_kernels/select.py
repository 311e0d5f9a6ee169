"""Which keys every query keeps: scores are made tile by tile, looked at and dropped, as often as it takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.launch import launch, tiles
from vtoken_kernels.lists import BLOCK, append, empty_lists

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _load_rows(ptr, row_at, ok, first, stride_k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Entries first.. of rows [R]: [R, BLOCK_K], zeros outside."""
    k = first + tl.arange(0, BLOCK_K)
    return tl.load(ptr + row_at[:, None] + (k * stride_k)[None, :], mask=ok[:, None] & (k < WIDTH)[None, :], other=0.0)


@triton.jit
def _scores(
    a_ptr, a_at, a_ok, own, basis_ptr, basis_stride_k, basis_stride_n, a_stride_k, start, num_keys,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores of 64 queries and keys start.. [64, 64]; NaN counts as -inf, keys that do not exist are NaN."""
    key = start + tl.arange(0, _BLOCK)
    key_ok = key < num_keys
    key_at = key.to(tl.int64) * basis_stride_n
    if WIDTH <= BLOCK_K:
        keys = _load_rows(basis_ptr, key_at, key_ok, 0, basis_stride_k, WIDTH, BLOCK_K)
        s = tl.dot(own, tl.trans(keys), input_precision=PRECISION)
    else:
        s = tl.zeros((_BLOCK, _BLOCK), tl.float32)
        for first in range(0, WIDTH, BLOCK_K):
            queries = _load_rows(a_ptr, a_at, a_ok, first, a_stride_k, WIDTH, BLOCK_K)
            keys = _load_rows(basis_ptr, key_at, key_ok, first, basis_stride_k, WIDTH, BLOCK_K)
            s = tl.dot(queries, tl.trans(keys), s, input_precision=PRECISION)
    s = tl.where(s == s, s, float("-inf"))
    # No comparison with NaN is true: such keys are never counted nor kept.
    return tl.where(key_ok[None, :], s, float("nan"))


@triton.jit
def _ordered(x):
    """float32 to int32 that compare alike, 0 for 0 (and its own inverse on the bits of a float)."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float_of(n):
    """The inverse of `_ordered`."""
    return tl.where(n < 0, n ^ 0x7FFFFFFF, n).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "kept", "capacity"])
def select_kernel(
    a_ptr, basis_ptr, order_ptr, limit_ptr, index_ptr, word_ptr, start_ptr,
    a_stride_b, a_stride_h, a_stride_t, a_stride_k, basis_stride_b, basis_stride_k, basis_stride_n, order_stride_b,
    heads, num_queries, num_keys, kept, capacity,
    WIDTH: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_ORDER: tl.constexpr, PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, 64 queries): the best keys of each, or those above a limit per head.

    Leaves one list of entries with words per block, or (PER_ROW) a row of keys per query.
    """
    num_blocks, num_tiles = tl.cdiv(num_queries, _BLOCK), tl.cdiv(num_keys, _BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // num_blocks
    image, head = pair // heads, pair % heads
    r = tl.arange(0, _BLOCK)
    position = (tl.program_id(0) % num_blocks) * _BLOCK + r
    ok = position < num_queries
    query = position
    if HAS_ORDER:
        query = tl.load(order_ptr + image * order_stride_b + position, mask=ok, other=0)
    a_ptr += image * a_stride_b + head * a_stride_h
    basis_ptr += image * basis_stride_b
    a_at = query.to(tl.int64) * a_stride_t
    own = _load_rows(a_ptr, a_at, ok, 0, a_stride_k, WIDTH, BLOCK_K)  # unused if WIDTH needs several steps
    if HAS_LIMIT:
        limit = tl.zeros((_BLOCK,), tl.float32) + tl.load(limit_ptr + head)
        room = tl.zeros((_BLOCK,), tl.int32)
    else:
        # Bounds of every row, then bisection over all floats between them: `low` is reached by at least `kept` scores,
        # `high` by fewer. What is between them halves in every step, and ends at the k-th score to the bit.
        least = tl.full((_BLOCK,), float("inf"), tl.float32)
        most = tl.full((_BLOCK,), float("-inf"), tl.float32)
        for start in range(0, num_keys, _BLOCK):
            s = _scores(a_ptr, a_at, ok, own, basis_ptr, basis_stride_k, basis_stride_n, a_stride_k, start, num_keys,
                        WIDTH, PRECISION, BLOCK_K)  # fmt: skip
            least = tl.minimum(least, tl.min(tl.where(s == s, s, float("inf")), 1))
            most = tl.maximum(most, tl.max(tl.where(s == s, s, float("-inf")), 1))
        low, high = _ordered(least), _ordered(most) + 1
        above = tl.zeros((_BLOCK,), tl.int32)
        open_ = ok & (low < high - 1)
        while tl.max(open_.to(tl.int32), 0) > 0:
            middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
            limit = _float_of(middle)
            reached = tl.zeros((_BLOCK,), tl.int32)
            for start in range(0, num_keys, _BLOCK):
                s = _scores(a_ptr, a_at, ok, own, basis_ptr, basis_stride_k, basis_stride_n, a_stride_k, start,
                            num_keys, WIDTH, PRECISION, BLOCK_K)  # fmt: skip
                reached += tl.sum((s >= limit[:, None]).to(tl.int32), 1)
            low = tl.where(open_ & (reached >= kept), middle, low)
            high = tl.where(open_ & (reached < kept), middle, high)
            above = tl.where(open_ & (reached < kept), reached, above)
            # With exactly as many as wanted above it, the k-th score itself is of no interest.
            open_ = open_ & (low < high - 1) & (reached != kept)
        limit = _float_of(low)
        room = kept - above
    if PER_ROW:
        index_ptr += (pair * num_queries + position) * kept
    else:
        index_ptr += pid * capacity
    word_ptr += pid * capacity
    start_ptr += pid * (num_tiles + 1)
    count = 0
    row_count = tl.zeros((_BLOCK,), tl.int32)
    equal_before = tl.zeros((_BLOCK,), tl.int32)
    for tile in range(0, num_tiles):
        s = _scores(a_ptr, a_at, ok, own, basis_ptr, basis_stride_k, basis_stride_n, a_stride_k, tile * _BLOCK,
                    num_keys, WIDTH, PRECISION, BLOCK_K)  # fmt: skip
        keep = s > limit[:, None]
        if not HAS_LIMIT:
            equal = (s == limit[:, None]).to(tl.int32)
            place = equal_before[:, None] + tl.cumsum(equal, 1)
            keep = keep | ((equal != 0) & (place <= room[:, None]))
            equal_before += tl.sum(equal, 1)
        keep = keep & ok[:, None]
        key = tile * _BLOCK + tl.arange(0, _BLOCK)
        if PER_ROW:
            kept_here = keep.to(tl.int32)
            place = row_count[:, None] + tl.cumsum(kept_here, 1) - kept_here
            tl.store(index_ptr[:, None] + place, tl.zeros_like(place) + key[None, :], mask=keep & (place < kept))
            row_count += tl.sum(kept_here, 1)
        else:
            tl.store(start_ptr + tile, count)
            word = tl.sum(keep.to(tl.int64) << r.to(tl.int64)[:, None], 0)
            count = append(index_ptr, word_ptr, key, word, count, capacity)
    if not PER_ROW:
        tl.store(start_ptr + num_tiles, count)


def _run(
    a: Tensor, basis: Tensor, order: Tensor | None, limit: Tensor | None, kept: int, out: tuple[Tensor, ...]
) -> None:
    batch, heads, num_queries, width = a.shape
    index, word, start = (*out, out[0], out[0])[:3]
    strides = basis.stride() if basis.dim() == 3 else (0, *basis.stride())
    launch(
        select_kernel, batch * heads * tiles(num_queries, BLOCK), a, basis, index if order is None else order,
        a if limit is None else limit, index, word, start, *a.stride(), *strides,
        0 if order is None else order.stride(0), heads, num_queries, basis.shape[-1], kept, index.shape[3],
        WIDTH=width, HAS_LIMIT=limit is not None, HAS_ORDER=order is not None, PER_ROW=len(out) == 1,
        PRECISION=configs.precision(a.dtype), **configs.select(width),
    )  # fmt: skip


def best_rows(a: Tensor, basis: Tensor, kept: int) -> Tensor:
    """The `kept` best keys of every query, ascending, int32 [B, H, T, kept]; of equal scores the lowest keys.

    Args:
        a, basis: float32 [B, H, T, K] and [K, N] or [B, K, N]: scores are their product.
        kept: 1 to N.
    """
    index = torch.empty(*a.shape[:3], kept, dtype=torch.int32, device=a.device)
    _run(a, basis, None, None, kept, (index,))
    return index


def block_lists(
    a: Tensor, basis: Tensor, order: Tensor | None, limit: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same as lists of 64 queries in `order`; with `limit` (float32 [H]) all keys whose score exceeds it."""
    num_keys = basis.shape[-1]
    capacity = num_keys if limit is not None else min(num_keys, BLOCK * kept)
    out = empty_lists(a, a.shape[2], num_keys, capacity)
    _run(a, basis, order, limit, kept, out)
    return out
