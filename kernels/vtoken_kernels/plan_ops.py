"""torch.ops.vtoken.plan_pitome, plan_tome, group_sources and sum_heads: the matching as opaque operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtoken_kernels import configs, energy, layout, match, metric, order
from vtoken_kernels.launch import on_device

#: keep [B, T'], src [B, r], slot [B, r], dest [B, T] (int64); start [B, D + 1], member [B, r] (int32).
PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def num_dest(mergeable: int, r: int, first_a: int, all_dealt: bool) -> int:
    """Rows that may receive others: as many as sources, or every second row if all are dealt."""
    return (mergeable + first_a) // 2 if all_dealt else r


@torch.library.custom_op("vtoken::plan_pitome", mutates_args=())
def plan_pitome(
    rows: Tensor, guard: Tensor | None, r: int, num_prefix: int, margin: float, alpha: float, eq4: bool, pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PiToMe's matching.

    Args:
        rows: metric [B, T, d], prefix rows first; any strides.
        guard: true for rows that must not merge, bool [B, N]; None if there are none. Not with `pairs`.
        r: rows to remove, 1 to N // 2; with a guard at most half of the unguarded rows.
        num_prefix, margin, alpha: as in `vtoken.ops.plan_pitome`.
        eq4: the energy that jumps at the margin.
        pairs: the variant "pitome_pairs": all rows are dealt, the r best pairs merge.

    Returns:
        PlanTensors.
    """
    with on_device(rows):
        mode = configs.precision(rows.dtype)
        unit = metric.unit_rows(rows, num_prefix)
        mergeable = unit.shape[1]
        rank, dealt = order.rank_descending(energy.energies(unit, margin, alpha, eq4, mode), guard)
        if pairs:
            return _best_pairs(unit, rank, dealt, r, num_prefix, 0, mode)
        partner, _ = match.best_partners(unit, dealt, r, r, 0, mode)
        keep, src, slot, dest = layout.lay_out(rank, partner, None, mergeable, num_prefix, r, 2 * r, r, 0)
        return keep, src, slot, dest, *layout.group_sources(src, slot, keep.shape[1], r)


@torch.library.custom_op("vtoken::plan_tome", mutates_args=())
def plan_tome(rows: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ToMe's matching of a metric [B, T, d]; r is 1 to the number of mergeable rows with an even index.

    Returns:
        PlanTensors.
    """
    with on_device(rows):
        unit = metric.unit_rows(rows, num_prefix)
        return _best_pairs(unit, None, None, r, num_prefix, num_prefix % 2, configs.precision(rows.dtype))


def _best_pairs(
    unit: Tensor, rank: Tensor | None, dealt: Tensor | None, r: int, num_prefix: int, first_a: int, mode: str
) -> PlanTensors:
    """All rows are dealt (by `dealt`, or by index), every a proposes its best b, the r best proposals merge."""
    mergeable = unit.shape[1]
    num_b = num_dest(mergeable, r, first_a, True)
    partner, value = match.best_partners(unit, dealt, mergeable - num_b, num_b, first_a, mode)
    pair_rank, _ = order.rank_descending(value)
    keep, src, slot, dest = layout.lay_out(
        rank, partner, pair_rank, mergeable, num_prefix, r, mergeable, num_b, first_a
    )
    return keep, src, slot, dest, *layout.group_sources(src, slot, keep.shape[1], num_b)


def _empty_plan(rows: Tensor, r: int, dest: int) -> PlanTensors:
    batch, tokens, _ = rows.shape
    index = [rows.new_empty(batch, n, dtype=torch.int64) for n in (tokens - r, r, r, tokens)]
    groups = [rows.new_empty(batch, n, dtype=torch.int32) for n in (dest + 1, r)]
    return (index[0], index[1], index[2], index[3], groups[0], groups[1])


@plan_pitome.register_fake
def _(
    rows: Tensor, guard: Tensor | None, r: int, num_prefix: int, margin: float, alpha: float, eq4: bool, pairs: bool
) -> PlanTensors:
    return _empty_plan(rows, r, num_dest(rows.shape[1] - num_prefix, r, 0, pairs))


@plan_tome.register_fake
def _(rows: Tensor, r: int, num_prefix: int) -> PlanTensors:
    return _empty_plan(rows, r, num_dest(rows.shape[1] - num_prefix, r, num_prefix % 2, True))


def _pair_flops(batch: int, mergeable: int, first_a: int, width: int) -> int:
    num_b = num_dest(mergeable, 0, first_a, True)
    return 2 * batch * (mergeable - num_b) * num_b * width


@register_flop_formula(torch.ops.vtoken.plan_pitome)
def _(
    shape: torch.Size, guard: torch.Size | None, r: int, num_prefix: int, margin: float, alpha: float, eq4: bool,
    pairs: bool, *, out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    batch, tokens, width = shape
    mergeable = tokens - num_prefix
    matching = _pair_flops(batch, mergeable, 0, width) if pairs else 2 * batch * r * r * width
    return 2 * batch * mergeable * mergeable * width + matching


@register_flop_formula(torch.ops.vtoken.plan_tome)
def _(shape: torch.Size, r: int, num_prefix: int, *, out_shape: object = None, **_: object) -> int:
    batch, tokens, width = shape
    return _pair_flops(batch, tokens - num_prefix, num_prefix % 2, width)


@torch.library.custom_op("vtoken::group_sources", mutates_args=())
def group_sources(src: Tensor, slot: Tensor, num_out: int, num_dest: int) -> tuple[Tensor, Tensor]:
    """`vtoken_kernels.layout.group_sources`, for plans that were made without kernels."""
    with on_device(src):
        return layout.group_sources(src, slot, num_out, num_dest)


@group_sources.register_fake
def _(src: Tensor, slot: Tensor, num_out: int, num_dest: int) -> tuple[Tensor, Tensor]:
    batch, r = src.shape
    return src.new_empty(batch, num_dest + 1, dtype=torch.int32), src.new_empty(batch, r, dtype=torch.int32)


@torch.library.custom_op("vtoken::sum_heads", mutates_args=())
def sum_heads(keys: Tensor) -> Tensor:
    """Keys [B, H, T, D] summed over heads, float32 [B, T, D]; no gradient."""
    with on_device(keys):
        return metric.sum_heads(keys)


@sum_heads.register_fake
def _(keys: Tensor) -> Tensor:
    batch, _, tokens, width = keys.shape
    return keys.new_empty(batch, tokens, width, dtype=torch.float32)


@register_flop_formula([torch.ops.vtoken.group_sources, torch.ops.vtoken.sum_heads])
def _(*args: object, out_shape: object = None, **_: object) -> int:
    # Sums and comparisons; the counter knows matrix products only.
    return 0
