"""Lists of columns for every block of 64 rows: what the sparse attention kernels walk along.

Rows are patch queries in the order of a curve over the picture, columns are keys; in transposed lists rows are keys and
columns queries. An entry is a column that at least one row of the block keeps, and a word whose bit r says that row r
keeps it. Entries ascend; `start` says where those of every tile of 64 columns begin, its last number is their count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.launch import launch, tiles

#: Rows of a block: bits of a word.
BLOCK = 64
_BLOCK = tl.constexpr(BLOCK)


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists of B * H heads.

    Args:
        index: columns, int32 [B, H, blocks, capacity].
        word: which rows keep them, int64 of the same shape; None: every row keeps every entry.
        start: first entry of every tile of 64 columns, and their count, int32 [B, H, blocks, tiles + 1]; may be None
            without words, where all entries count.
    """

    index: Tensor
    word: Tensor | None
    start: Tensor | None


@triton.jit
def rows_of(order_ptr, block, r, rows, num_queries, num_prefix, HAS_ORDER: tl.constexpr):
    """Tokens of the rows r [R] of a block, and which of them exist. Blocks -1, -2, ... hold the prefix tokens."""
    position = block * rows + r
    is_patch = (r < rows) & (position >= 0) & (position < num_queries)
    patch = position
    if HAS_ORDER:
        patch = tl.load(order_ptr + position, mask=is_patch, other=0)
    prefix = (-1 - block) * _BLOCK + r
    token = tl.where(block < 0, prefix, num_prefix + patch)
    return token, tl.where(block < 0, prefix < num_prefix, is_patch)


@triton.jit
def spread_bits(word, shift):
    """Words [S] to words [64]: bit c of word s becomes bit shift[s] of word c. No two words may share a shift."""
    c = tl.arange(0, _BLOCK).to(tl.int64)
    return tl.sum(((word[:, None] >> c[None, :]) & 1) << shift.to(tl.int64)[:, None], 0)


@triton.jit
def is_kept(word, r):
    """Whether bits r [R] of words [S] are set: [R, S]. By halves, as 32 bits take half the registers."""
    half = tl.where((r < 32)[:, None], word.to(tl.int32)[None, :], (word >> 32).to(tl.int32)[None, :])
    return ((half >> (r & 31)[:, None]) & 1) != 0


@triton.jit
def append(index_ptr, word_ptr, column, word, count, capacity):
    """Write the columns [C] whose word is not 0 behind `count` entries, in their order; returns the new count."""
    used = (word != 0).to(tl.int32)
    at = count + tl.cumsum(used, 0) - used
    fits = (word != 0) & (at < capacity)
    tl.store(index_ptr + at, column, mask=fits)
    tl.store(word_ptr + at, word, mask=fits)
    return count + tl.sum(used, 0)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_rows", "group", "kept", "capacity"])
def connect_kernel(
    col_ptr, crow_ptr, index_ptr, word_ptr, start_ptr, num_queries, num_keys, num_rows, group, kept, capacity,
    HAS_CROW: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, 64 queries): from ascending keys per query. A cursor per query walks along its keys."""
    num_blocks, num_tiles = tl.cdiv(num_queries, _BLOCK), tl.cdiv(num_keys, _BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // num_blocks
    r = tl.arange(0, _BLOCK)
    query = (tl.program_id(0) % num_blocks) * _BLOCK + r
    query_ok = query < num_queries
    if HAS_CROW:
        crow_ptr += pair * (num_rows + 1)
        cursor = tl.load(crow_ptr + query, mask=query_ok, other=0)
        end = tl.load(crow_ptr + query + 1, mask=query_ok, other=0)
    else:
        cursor = (pair * num_rows + query // group) * kept
        end = tl.where(query_ok, cursor + kept, cursor)
    index_ptr += pid * capacity
    word_ptr += pid * capacity
    start_ptr += pid * (num_tiles + 1)
    count = 0
    for tile in range(0, num_tiles):
        tl.store(start_ptr + tile, count)
        first = tile * _BLOCK
        at = cursor[:, None] + r[None, :]
        shift = tl.load(col_ptr + at, mask=at < end[:, None], other=num_keys + _BLOCK) - first
        inside = shift < _BLOCK
        own = tl.sum(inside.to(tl.int64) << tl.where(inside, shift, 0), 1)
        cursor += tl.sum(inside.to(tl.int32), 1)
        count = append(index_ptr, word_ptr, first + r, spread_bits(own, r), count, capacity)
    tl.store(start_ptr + num_tiles, count)


@triton.jit(do_not_specialize=["num_queries", "num_prefix", "num_blocks", "num_tiles", "rows", "capacity"])
def transpose_kernel(
    order_ptr, index_ptr, word_ptr, start_ptr, out_index_ptr, out_word_ptr, out_count_ptr,
    order_stride_b, heads, num_queries, num_prefix, num_blocks, num_tiles, rows, capacity,
    HAS_ORDER: tl.constexpr, HAS_WORD: tl.constexpr,
):  # fmt: skip
    """Program per (image, head, 64 keys): the entries of every block that lie in this tile, turned round."""
    pid = tl.program_id(0).to(tl.int64)
    pair, tile = pid // num_tiles, pid % num_tiles
    order_ptr += (pair // heads) * order_stride_b
    r = tl.arange(0, _BLOCK)
    out_index_ptr += pid * num_queries
    out_word_ptr += pid * num_queries
    count = 0
    for block in range(0, num_blocks):
        at = pair * num_blocks + block
        begin = tl.load(start_ptr + at * (num_tiles + 1) + tile)
        end = tl.load(start_ptr + at * (num_tiles + 1) + tile + 1)
        entry = begin + r
        ok = entry < end
        key = tl.load(index_ptr + at * capacity + entry, mask=ok, other=0)
        if HAS_WORD:
            word = tl.load(word_ptr + at * capacity + entry, mask=ok, other=0)
        else:
            word = tl.where(ok, -1, 0).to(tl.int64)
        token, exists = rows_of(order_ptr, block, r, rows, num_queries, num_prefix, HAS_ORDER)
        turned = spread_bits(word, tl.where(ok, key - tile * _BLOCK, 0))
        turned = tl.where(exists, turned, 0)
        count = append(out_index_ptr, out_word_ptr, token, turned, count, num_queries)
    tl.store(out_count_ptr + pid, count)


def empty_lists(like: Tensor, num_queries: int, num_keys: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for index, word and start of all heads of a tensor [B, H, ...]."""
    shape = (like.shape[0], like.shape[1], tiles(num_queries, BLOCK))
    index = torch.empty(*shape, capacity, dtype=torch.int32, device=like.device)
    start = torch.empty(*shape, tiles(num_keys, BLOCK) + 1, dtype=torch.int32, device=like.device)
    return index, torch.empty_like(index, dtype=torch.int64), start


def connect(
    col: Tensor, crow: Tensor | None, num_queries: int, num_keys: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Lists from the ascending keys of every query.

    Args:
        col: int64, [B, H, R, k], row p // group for query p; or, with `crow`, [nnz].
        crow: where the keys of every query begin in `col`, int64 [B, H, T + 1]; None: see `col`.
        num_queries: T, in the order in which they are cut into blocks.
        num_keys: N.
        group: neighbouring queries with the same keys; 1 with `crow`.
    """
    like, kept = (col, col.shape[3]) if crow is None else (crow, num_keys)
    index, word, start = empty_lists(like, num_queries, num_keys, min(num_keys, BLOCK * kept))
    launch(
        connect_kernel, like.shape[0] * like.shape[1] * index.shape[2], col.contiguous(), like.contiguous(),
        index, word, start, num_queries, num_keys, like.shape[2] - (crow is not None), group, kept, index.shape[3],
        HAS_CROW=crow is not None, **configs.LISTS,
    )  # fmt: skip
    return index, word, start


def transpose(
    lists: Lists, order: Tensor | None, num_queries: int, num_keys: int, num_prefix: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """For every 64 keys the patch queries that keep one of them.

    Args:
        lists: of the patch queries.
        order: of the patch queries, int32 [B, T], rows may be the same memory; None: as they are numbered.
        rows: queries per block, at most 64.

    Returns:
        index: tokens, int32 [B, H, tiles, T].
        word: bit c says that key c of the tile is kept, int64 of the same shape.
        count: entries, int32 [B, H, tiles].
    """
    batch, heads, num_blocks, capacity = lists.index.shape
    num_tiles = tiles(num_keys, BLOCK)
    start = lists.start
    if start is None:
        edges = torch.arange(0, num_tiles * BLOCK + 1, BLOCK, dtype=torch.int32, device=lists.index.device)
        edges = edges.expand(batch, heads, num_blocks, -1).contiguous()
        start = torch.searchsorted(lists.index, edges, out_int32=True)
    index = torch.empty(batch, heads, num_tiles, num_queries, dtype=torch.int32, device=lists.index.device)
    word = torch.empty_like(index, dtype=torch.int64)
    count = torch.empty(batch, heads, num_tiles, dtype=torch.int32, device=index.device)
    launch(
        transpose_kernel, batch * heads * num_tiles, index if order is None else order, lists.index,
        index if lists.word is None else lists.word, start, index, word, count,
        0 if order is None else order.stride(0), heads, num_queries, num_prefix, num_blocks, num_tiles, rows, capacity,
        HAS_ORDER=order is not None, HAS_WORD=lists.word is not None, **configs.LISTS,
    )  # fmt: skip
    return index, word, count
