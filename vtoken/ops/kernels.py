"""The bridge to vtoken_kernels: arguments of `vtoken.ops` as those of torch.ops.vtoken.*, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtoken.ops.merging.plan import MergePlan


def merge(plan: MergePlan, x: Tensor, size: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """`MergePlan.apply` for checked arguments."""
    from vtoken_kernels.library import merge as run

    start, member = _groups(plan)
    rows, new_size = run(x, _flat_size(x, size), plan.keep, _dest(plan, x), start, member, reduction)
    return rows, _like_size(new_size, size)


def add_merge_norm(
    plan: MergePlan,
    x: Tensor,
    branch: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`vtoken.ops.add_merge_norm` for checked arguments."""
    from vtoken_kernels.library import add_merge_norm as run

    start, member = _groups(plan)
    dest = _dest(plan, x, branch, weight, bias)
    out = run(x, branch, _flat_size(x, size), plan.keep, dest, start, member, weight, bias, eps)
    return out[0], out[1], _like_size(out[2], size)


def select_rows(coefficients: Tensor, basis: Tensor, kept: int) -> Tensor:
    """Index of `vtoken.ops.select_topk` for checked arguments, int64 [B, H, T, kept]."""
    from vtoken_kernels.library import select_rows as run

    index: Tensor = run(coefficients, basis, kept)
    return index.to(torch.int64)


def _groups(plan: MergePlan) -> tuple[Tensor, Tensor]:
    if plan.groups is not None:
        return plan.groups[1], plan.groups[2]
    from vtoken_kernels.library import group_sources

    start, member = group_sources(plan.src, plan.slot, plan.num_tokens, plan.num_dest)
    return start, member


def _dest(plan: MergePlan, *inputs: Tensor | None) -> Tensor | None:
    """What the backward pass gathers by, if there will be one; plans made by kernels have it anyway."""
    if plan.groups is not None:
        return plan.groups[0]
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return plan.dest if needed else None


def _flat_size(x: Tensor, size: Tensor | None) -> Tensor | None:
    return None if size is None else size.detach().reshape(x.shape[:2]).to(torch.float32)


def _like_size(new_size: Tensor, size: Tensor | None) -> Tensor:
    """Sizes are constants (docs/methods/pitome.md 8), in the shape they came in."""
    flat = new_size.detach()
    return flat if size is None else flat.reshape(*flat.shape, *size.shape[2:])
