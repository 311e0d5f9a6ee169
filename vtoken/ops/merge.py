"""MergePlan: the small index tensors that describe one merge, and their application to rows (performance.md 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtoken.core.errors import ConfigError, ShapeError
from vtoken.ops.rows import flat_index, take_rows

REDUCTIONS = ("wavg", "mean", "amax", "prune")
_HALF = (torch.float16, torch.bfloat16)


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Logit bias of proportional attention: a token of `size` patches counts as that many equal keys.

    Args:
        size: patches per token, [B, T].
        dtype: dtype of the queries; the logarithm is taken in at least float32.

    Returns:
        log(size) as an additive attention mask [B, 1, 1, T]; it broadcasts over heads and queries, which keeps
        `scaled_dot_product_attention` on its fused kernels.

    Source: arXiv 2405.16148 section 3 and arXiv 2210.09461 equation 1.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return size.to(compute).log().to(dtype)[:, None, None, :]


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which rows of [B, T, C] survive a merge and which row each of the others goes into.

    Output rows are [prefix | kept rows in index order | destinations]. A plan holds no values, so one plan serves
    any number of tensors: features, positions, masks.

    Args:
        keep: input row of every output row, [B, T'] int64.
        src: input rows that disappear, [B, r] int64.
        slot: output row that each of them goes to, [B, r] int64.
        num_tokens_in: T.
        num_dest: how many trailing output rows may receive others; the rows before them are copied untouched.
    """

    keep: Tensor
    src: Tensor
    slot: Tensor
    num_tokens_in: int
    num_dest: int

    @classmethod
    def identity(cls, batch: int, num_tokens: int, device: torch.device) -> MergePlan:
        """The plan that changes nothing."""
        keep = torch.arange(num_tokens, device=device).expand(batch, num_tokens)
        none = keep[:, :0]
        return cls(keep, none, none, num_tokens, 0)

    @property
    def num_tokens(self) -> int:
        """Rows after the merge, T'."""
        return self.keep.shape[1]

    @property
    def removed(self) -> int:
        """Rows that the merge takes away, r."""
        return self.src.shape[1]

    @property
    def dest(self) -> Tensor:
        """Output row of every input row, [B, T] int64: the group map of this merge."""
        if self.removed == 0:
            return self.keep
        out = torch.arange(self.num_tokens, device=self.keep.device).expand_as(self.keep)
        dest = self.keep.new_empty(self.keep.shape[0], self.num_tokens_in)
        return dest.scatter(1, self.keep, out).scatter(1, self.src, self.slot)

    def apply(self, x: Tensor, size: Tensor | None = None, reduction: str = "wavg") -> tuple[Tensor, Tensor]:
        """Merge the rows of `x`.

        Args:
            x: rows [B, T, C], any floating dtype; never modified.
            size: patches per row, [B, T] or [B, T, 1]; None means ones.
            reduction: "wavg" (mean weighted by size), "mean" (plain mean of a destination and its sources),
                "amax", or "prune" (sources are dropped, destinations and sizes stay as they are).

        Returns:
            Rows [B, T', C] in the dtype of `x` (half precision accumulates in float32) and float32 sizes in the shape
            of `size`, [B, T'] if it was None. Rows that received nothing are bit-equal to their input.

        Raises:
            ShapeError: if `x` or `size` does not fit the plan.
            ConfigError: if the reduction is unknown.
        """
        _check_apply(self, x, size, reduction)
        if self.removed == 0:
            return x, _ones(x) if size is None else size
        flat = _ones(x) if size is None else size.reshape(x.shape[:2]).to(torch.float32)
        if reduction == "prune":
            return _merge_rows(self, x, *self._weights(flat, zero_sources=True)), self._like(size, flat)
        new_size = self._sum(flat)
        if reduction == "amax":
            rows = take_rows(x, self.keep)
            index = self.slot.unsqueeze(-1).expand(-1, -1, x.shape[2])
            merged = rows.scatter_reduce(1, index, take_rows(x, self.src), "amax", include_self=True)
        else:
            merged = _merge_rows(self, x, *self._weights(_ones(x) if reduction == "mean" else flat))
        return merged, new_size if size is None else new_size.reshape(*new_size.shape, *size.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread output rows [B, T', C] back to all input rows [B, T, C]: every row gets its group's value."""
        if y.dim() != 3 or y.shape[1] != self.num_tokens:
            raise ShapeError(f"unmerge takes [B, {self.num_tokens}, C] (the merged rows), got {tuple(y.shape)}")
        return take_rows(y, self.dest)

    def then(self, next_plan: MergePlan) -> MergePlan:
        """This merge followed by `next_plan` as one plan ("wavg" and "amax" give the same rows either way)."""
        if next_plan.num_tokens_in != self.num_tokens:
            raise ShapeError(f"the next plan starts from {next_plan.num_tokens_in} rows, this one ends with "
                             f"{self.num_tokens}")  # fmt: skip
        return MergePlan(
            keep=self.keep.gather(1, next_plan.keep),
            src=torch.cat([self.src, self.keep.gather(1, next_plan.src)], dim=1),
            slot=torch.cat([next_plan.dest.gather(1, self.slot), next_plan.slot], dim=1),
            num_tokens_in=self.num_tokens_in,
            num_dest=next_plan.num_tokens,
        )

    def _sum(self, size: Tensor) -> Tensor:
        # Sizes are whole numbers, exact in float32, so the order of this addition does not matter on any device.
        return size.gather(1, self.keep).scatter_add(1, self.slot, size.gather(1, self.src))

    def _weights(self, size: Tensor, zero_sources: bool = False) -> tuple[Tensor, Tensor]:
        """Shares of the destination rows [B, D] and of the sources [B, r] in the rows that they end in."""
        own = size.gather(1, self.keep[:, self.num_tokens - self.num_dest :])
        if zero_sources:
            return torch.ones_like(own), torch.zeros_like(self.src, dtype=size.dtype)
        total = self._sum(size)
        return own / total[:, self.num_tokens - self.num_dest :], size.gather(1, self.src) / total.gather(1, self.slot)

    def _like(self, size: Tensor | None, flat: Tensor) -> Tensor:
        kept = flat.gather(1, self.keep)
        return kept if size is None else kept.reshape(*kept.shape, *size.shape[2:])


def _ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)


def _check_apply(plan: MergePlan, x: Tensor, size: Tensor | None, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ConfigError(f"unknown reduction {reduction!r}; supported: {', '.join(REDUCTIONS)}")
    expected = (plan.keep.shape[0], plan.num_tokens_in)
    if x.dim() != 3 or tuple(x.shape[:2]) != expected:
        raise ShapeError(f"the plan takes x of shape [{expected[0]}, {expected[1]}, C], got {tuple(x.shape)}")
    if size is not None and tuple(size.shape) not in (expected, (*expected, 1)):
        raise ShapeError(f"size must be {list(expected)} or {[*expected, 1]}, got {tuple(size.shape)}")


def _merge_rows(plan: MergePlan, x: Tensor, dest_share: Tensor, src_share: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        merged: Tensor = _MergeRows.apply(x, plan.keep, plan.src, plan.slot, dest_share, src_share)
        return merged
    return _merge_rows_forward(x, plan.keep, plan.src, plan.slot, dest_share, src_share)


def _merge_rows_forward(
    x: Tensor, keep: Tensor, src: Tensor, slot: Tensor, dest_share: Tensor, src_share: Tensor
) -> Tensor:
    """Gather the kept rows; only destinations and sources enter arithmetic."""
    accumulate = torch.float32 if x.dtype in _HALF else x.dtype
    out = take_rows(x, keep)
    first = out.shape[1] - dest_share.shape[1]
    rows = out[:, first:].to(accumulate) * dest_share.to(accumulate).unsqueeze(-1)
    sources = take_rows(x, src).to(accumulate) * src_share.to(accumulate).unsqueeze(-1)
    local = slot - first
    if x.device.type == "cpu":
        flat = rows.view(-1, x.shape[2])
        flat.index_add_(0, flat_index(local, rows.shape[1]), sources.view(-1, x.shape[2]))
    else:
        # index_add is not deterministic on CUDA; a product with the one-hot [D, r] matrix is (pitome.md 9).
        onehot = local.unsqueeze(1) == torch.arange(rows.shape[1], device=x.device).view(1, -1, 1)
        rows = torch.baddbmm(rows, onehot.to(accumulate), sources)
    out[:, first:] = rows
    return out


class _MergeRows(torch.autograd.Function):
    """Merging is linear in x, so its gradient is one gather by group, scaled by each row's share."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, keep: Tensor, src: Tensor, slot: Tensor, dest_share: Tensor, src_share: Tensor
    ) -> Tensor:  # fmt: skip
        return _merge_rows_forward(x, keep, src, slot, dest_share, src_share)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, keep, src, slot, dest_share, src_share = inputs
        dest = MergePlan(keep, src, slot, x.shape[1], dest_share.shape[1]).dest
        share = torch.ones(x.shape[:2], dtype=dest_share.dtype, device=x.device)
        share = share.scatter(1, keep[:, keep.shape[1] - dest_share.shape[1] :], dest_share)
        ctx.save_for_backward(dest, share.scatter(1, src, src_share))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dest, share = ctx.saved_tensors
        accumulate = torch.float32 if grad.dtype in _HALF else grad.dtype
        rows = take_rows(grad, dest).to(accumulate) * share.to(accumulate).unsqueeze(-1)
        return rows.to(grad.dtype), None, None, None, None, None
