"""K3b: from ranks and partners to the index tensors of a merge plan, and the sources of every destination."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtoken_kernels import configs
from vtoken_kernels.launch import launch, tiles


@triton.jit(do_not_specialize=["num_rows", "num_prefix", "r", "num_dealt", "num_dest", "num_a", "first_a"])
def layout_kernel(
    rank_ptr, partner_ptr, pair_rank_ptr, keep_ptr, src_ptr, slot_ptr, dest_ptr,
    num_rows, num_prefix, r, num_dealt, num_dest, num_a, first_a,
    HAS_RANK: tl.constexpr, HAS_PAIR_RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program per image: output rows are [prefix | kept rows by index | destinations as dealt]."""
    image = tl.program_id(0).to(tl.int64)
    num_out = num_prefix + num_rows - r
    first_dest = num_out - num_dest
    rank_ptr += image * num_rows
    partner_ptr += image * num_a
    pair_rank_ptr += image * num_a
    keep_ptr += image * num_out
    src_ptr += image * r
    slot_ptr += image * r
    dest_ptr += image * (num_prefix + num_rows)
    for start in range(0, num_prefix, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(keep_ptr + row, row.to(tl.int64), mask=row < num_prefix)
        tl.store(dest_ptr + row, row.to(tl.int64), mask=row < num_prefix)
    num_kept = num_prefix
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        ok = row < num_rows
        position = row
        if HAS_RANK:
            position = tl.load(rank_ptr + row, mask=ok, other=0)
        index = position // 2
        dealt = ok & (position < num_dealt)
        is_a = dealt & (position % 2 == first_a)
        is_dest = dealt & (position % 2 != first_a)
        place = index
        if HAS_PAIR_RANK:
            place = tl.load(pair_rank_ptr + index, mask=is_a, other=0)
        is_src = is_a & (place < r)
        partner = tl.load(partner_ptr + index, mask=is_src, other=0)
        kept = (ok & (is_src == 0) & (is_dest == 0)).to(tl.int32)
        out = tl.where(is_dest, first_dest + index, num_kept + tl.cumsum(kept, 0) - kept)
        out = tl.where(is_src, first_dest + partner, out).to(tl.int64)
        num_kept += tl.sum(kept, 0)
        token = (row + num_prefix).to(tl.int64)
        tl.store(dest_ptr + token, out, mask=ok)
        tl.store(keep_ptr + out, token, mask=ok & (is_src == 0))
        tl.store(src_ptr + place, token, mask=is_src)
        tl.store(slot_ptr + place, out, mask=is_src)


@triton.jit(do_not_specialize=["r", "num_dest", "first_dest"])
def groups_kernel(
    src_ptr, slot_ptr, start_ptr, member_ptr, r, num_dest, first_dest, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Program per (image, BLOCK_I sources and destinations): ranks by counting, as in K2.

    Source i goes behind all sources of earlier destinations and the earlier ones of its own; destination i starts
    behind all sources of earlier destinations.
    """
    num_tiles = tl.cdiv(tl.maximum(r, num_dest + 1), BLOCK_I)
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    src_ptr += image * r
    slot_ptr += image * r
    i = (tl.program_id(0) % num_tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    own = tl.load(slot_ptr + i, mask=i < r, other=0).to(tl.int32) - first_dest
    place = tl.zeros((BLOCK_I,), tl.int32)
    start = tl.zeros((BLOCK_I,), tl.int32)
    for first in range(0, r, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        j_ok = (j < r)[None, :]
        other = (tl.load(slot_ptr + j, mask=j < r, other=0).to(tl.int32) - first_dest)[None, :]
        ahead = (other < own[:, None]) | ((other == own[:, None]) & (j[None, :] < i[:, None]))
        place += tl.sum((ahead & j_ok).to(tl.int32), 1)
        start += tl.sum(((other < i[:, None]) & j_ok).to(tl.int32), 1)
    member = tl.load(src_ptr + i, mask=i < r, other=0).to(tl.int32)
    tl.store(member_ptr + image * r + place, member, mask=i < r)
    tl.store(start_ptr + image * (num_dest + 1) + i, start, mask=i <= num_dest)


def lay_out(
    rank: Tensor | None, partner: Tensor, pair_rank: Tensor | None,
    num_rows: int, num_prefix: int, r: int, num_dealt: int, num_dest: int, first_a: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """keep [B, T'], src [B, r], slot [B, r] and dest [B, T], int64 because torch indexes with that.

    Args:
        rank: position of each of N rows in the order they were dealt in, int32 [B, N]; None: by index.
        partner: destination of every a, int32 [B, num_a].
        pair_rank: rank of every a's similarity, int32 [B, num_a]: the first r are sources; None: all are.
        num_dealt: the first so many positions are dealt to a and b, the rest is kept.
        num_dest: the b.
        first_a: 0 if position 0 is an a, else 1.
    """
    batch, num_a = partner.shape
    keep, src, slot, dest = (
        torch.empty(batch, n, dtype=torch.int64, device=partner.device)
        for n in (num_prefix + num_rows - r, r, r, num_prefix + num_rows)
    )
    launch(
        layout_kernel, batch, partner if rank is None else rank, partner,
        partner if pair_rank is None else pair_rank, keep, src, slot, dest,
        num_rows, num_prefix, r, num_dealt, num_dest, num_a, first_a,
        HAS_RANK=rank is not None, HAS_PAIR_RANK=pair_rank is not None, **configs.LAYOUT,
    )  # fmt: skip
    return keep, src, slot, dest


def group_sources(src: Tensor, slot: Tensor, num_out: int, num_dest: int) -> tuple[Tensor, Tensor]:
    """Sources by destination: destination d (of the trailing num_dest rows) has member[start[d]:start[d + 1]].

    Args:
        src, slot: source rows and the output rows they go to, int64 [B, r].

    Returns:
        start [B, num_dest + 1] and member [B, r] (input rows), int32; members of a destination in the order of src.
    """
    batch, r = src.shape
    start = torch.empty(batch, num_dest + 1, dtype=torch.int32, device=src.device)
    member = torch.empty(batch, r, dtype=torch.int32, device=src.device)
    launch(
        groups_kernel, batch * tiles(max(r, num_dest + 1), configs.GROUPS["BLOCK_I"]), src.contiguous(),
        slot.contiguous(), start, member, r, num_dest, num_out - num_dest, **configs.GROUPS,
    )  # fmt: skip
    return start, member
