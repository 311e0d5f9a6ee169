"""MergePlan: the small index tensors that describe one merge, and their application to rows (docs/performance.md 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.ops import backend as _backend
from vtoken.ops.backend import BACKENDS, dtype_reason, limits_of, use_triton
from vtoken.ops.merging import native
from vtoken.ops.rows import add_rows, full_precision, take_rows

REDUCTIONS = ("wavg", "mean", "amax", "prune")
HALF = (torch.float16, torch.bfloat16)


def _in_c(x: Tensor, *, reduction: str = "wavg") -> str:
    """Why C cannot merge rows x [B, T, C]."""
    if reduction != "wavg":
        return f"C functions merge by 'wavg', not {reduction!r}"
    return native.merging_lacks(x)


@limits_of("apply", native=_in_c)
def rows_reason(x: Tensor, *, reduction: str = "wavg") -> str:
    """Why the kernels cannot merge rows x [B, T, C]."""
    return dtype_reason("x", x)


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Logit bias of proportional attention: a token of `size` patches counts as that many equal keys.

    Args:
        size: patches per token, [B, T].
        dtype: dtype of the queries; the logarithm is taken in at least float32.

    Returns:
        log(size) as an additive attention mask [B, 1, 1, T]; it broadcasts over heads and queries, which keeps
        `scaled_dot_product_attention` on its fused kernels.

    Raises:
        ShapeError, InputError: if the sizes are not 2-D, or no tensor. ConfigError: if the dtype is none.

    Example:
        >>> import torch, vtoken
        >>> vtoken.ops.size_bias(torch.tensor([[1.0, 4.0]]), torch.float32).exp()
        tensor([[[[1., 4.]]]])

    Source: arXiv 2405.16148 section 3 and arXiv 2210.09461 equation 1.
    """
    checks.tensor("size_bias", "size", size, 2, shape="[B, T]")
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"size_bias(dtype={dtype!r}): must be a torch.dtype")
    return log_sizes(size, dtype)


def log_sizes(size: Tensor, dtype: torch.dtype) -> Tensor:
    """`size_bias` of checked arguments."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    bias = (size if size.dtype == compute else size.to(compute)).log()
    return (bias if compute == dtype else bias.to(dtype)).unsqueeze(1).unsqueeze(1)


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
        groups: what kernels made along the way: `dest`, and the sources of every destination (start, member; see
            `vtoken_kernels.layout.group_sources`). None from torch.
        rows: no argument: `keep` and `src` side by side, [B, T], of plans that `of` or `laid_out` has made.

    Example:
        >>> import torch, vtoken
        >>> x = torch.tensor([[[1.0], [2.0], [4.0]]])
        >>> keep, src, slot = (torch.tensor([rows]) for rows in ([0, 1], [2], [1]))
        >>> plan = vtoken.ops.MergePlan(keep, src, slot, num_tokens_in=3, num_dest=1)  # row 2 goes into row 1
        >>> plan.apply(x)
        (tensor([[[1.],
                 [3.]]]), tensor([[1., 2.]]))
        >>> plan.unmerge(plan.apply(x)[0]).flatten()
        tensor([1., 3., 3.])
    """

    keep: Tensor
    src: Tensor
    slot: Tensor
    num_tokens_in: int
    num_dest: int
    groups: tuple[Tensor, Tensor, Tensor] | None = None
    rows: Tensor | None = field(default=None, init=False)

    @classmethod
    def of(cls, parts: list[Tensor], src: Tensor, partner: Tensor) -> MergePlan:
        """From the parts of `keep`, the last of which are the destinations that `partner` counts among."""
        rows, num_dest = torch.cat([*parts, src], dim=1), parts[-1].shape[1]
        return cls.laid_out(rows, partner + (rows.shape[1] - src.shape[1] - num_dest), num_dest)

    @classmethod
    def laid_out(cls, rows: Tensor, slot: Tensor, num_dest: int) -> MergePlan:
        """From `keep` and `src` side by side, [B, T] int64, and `slot` [B, r]."""
        num_in, num_out = rows.shape[1], rows.shape[1] - slot.shape[1]
        plan = cls(rows[:, :num_out], rows[:, num_out:], slot, num_in, num_dest)
        object.__setattr__(plan, "rows", rows)
        return plan

    @classmethod
    def identity(cls, batch: int, num_tokens: int, device: torch.device) -> MergePlan:
        """The plan that changes nothing.

        Raises:
            ConfigError: if a count is no whole number from 0 on.
        """
        batch = checks.whole("MergePlan.identity", "batch", batch, 0)
        num_tokens = checks.whole("MergePlan.identity", "num_tokens", num_tokens, 0)
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
        if self.groups is not None:
            return self.groups[0]
        out = torch.arange(self.num_tokens, device=self.keep.device).expand_as(self.keep)
        dest = self.keep.new_empty(self.keep.shape[0], self.num_tokens_in)
        return dest.scatter(1, self.keep, out).scatter(1, self.src, self.slot)

    def apply(
        self, x: Tensor, size: Tensor | None = None, reduction: str = "wavg", *, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Merge the rows of `x`.

        Args:
            x: rows [B, T, C], any floating dtype; never modified.
            size: patches per row, [B, T] or [B, T, 1]; None means ones.
            reduction: "wavg" (mean weighted by size), "mean" (plain mean of a destination and its sources),
                "amax", or "prune" (sources are dropped, destinations and sizes stay as they are).
            backend: "auto" (kernels on a GPU and C on a CPU where they can, else torch), "torch" or "triton".

        Returns:
            Rows [B, T', C] in the dtype of `x` (half precision accumulates in float32) and float32 sizes in the shape
            of `size`, [B, T'] if it was None. Rows that received nothing are bit-equal to their input.

        Raises:
            ShapeError: if `x` or `size` does not fit the plan. InputError: if one is no tensor.
            ConfigError: if the reduction or the backend is unknown, or kernels are asked for that cannot serve x.
        """
        checks.choice("MergePlan.apply", "backend", backend, BACKENDS)
        _check_apply(self, x, size, reduction)
        return self.merged(x, size, reduction, backend)

    def merged(
        self, x: Tensor, size: Tensor | None, reduction: str, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`apply` to checked arguments."""
        if self.src.shape[1] == 0:
            return x, torch.ones(x.shape[:2], dtype=torch.float32, device=x.device) if size is None else size
        if (backend != "auto" or x.is_cuda or _backend.FORCED) and use_triton(backend, x, lambda: rows_reason(x)):
            from vtoken_kernels.library import merge

            merged, new_size = merge(x, *kernel_arguments(self, size, x), reduction)
            return merged, like_size(new_size, size)
        flat = size
        if flat is not None and (flat.dim() == 3 or flat.dtype != torch.float32):
            flat = flat.reshape(x.shape[:2]).to(torch.float32)
        src_share = None
        in_c = self._rows_for_c(x, flat) if backend == "auto" and reduction == "wavg" and x.is_cpu else None
        if in_c is not None:
            rows, new_size = native.merge(x, in_c, self.slot, flat)
            return rows, new_size if size is None else new_size.reshape(*new_size.shape, *size.shape[2:])
        if reduction == "prune":
            new_size = _ones(self.keep) if flat is None else flat.gather(1, self.keep)
        else:
            new_size, src_share = self._sizes_and_shares(flat, _compute_dtype(x))
            if reduction == "mean" and flat is not None:
                src_share = self._sizes_and_shares(None, _compute_dtype(x))[1]
        if reduction == "amax":
            index = self.slot.unsqueeze(-1).expand(-1, -1, x.shape[2])
            rows = take_rows(x, self.keep).scatter_reduce(1, index, take_rows(x, self.src), "amax", include_self=True)
        else:
            rows = _merge_rows(self, x, src_share)
        if size is not None and size.dim() == 3:
            new_size = new_size.unsqueeze(2)
        return rows, new_size

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread output rows [B, T', C] back to all input rows [B, T, C]: every row gets its group's value.

        Raises:
            ShapeError, InputError: if `y` does not fit the plan, or is no tensor.
        """
        checks.tensor("MergePlan.unmerge", "y", y)
        if y.dim() != 3 or y.shape[:2] != self.keep.shape:
            batch = self.keep.shape[0]
            raise ShapeError(f"unmerge takes [{batch}, {self.num_tokens}, C] (the merged rows), got {tuple(y.shape)}")
        return take_rows(y, self.dest)

    def then(self, next_plan: MergePlan) -> MergePlan:
        """This merge followed by `next_plan` as one plan ("wavg" and "amax" give the same rows either way).

        Raises:
            ShapeError, InputError: if `next_plan` does not start where this one ends, or is no plan.
        """
        if not isinstance(next_plan, MergePlan):
            raise InputError(f"MergePlan.then(next_plan=...): must be a MergePlan, got {type(next_plan).__name__}")
        if next_plan.keep.shape[0] != self.keep.shape[0]:
            raise ShapeError(
                f"the next plan is for {next_plan.keep.shape[0]} images, this one for {self.keep.shape[0]}"
            )
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

    def _rows_for_c(self, x: Tensor, size: Tensor | None) -> Tensor | None:
        """`rows` if C can apply this plan: what it reads must lie there as it expects."""
        rows = self.rows
        if rows is None or native.merging_lacks(x) or rows.shape != x.shape[:2] or len(self.slot) != len(rows):
            return None
        if not (native.reads(rows, torch.int64) and native.reads(self.slot, torch.int64)):
            return None
        fits = size is None or (
            size.shape == rows.shape and native.reads(size, torch.float32) and not size.requires_grad
        )
        return rows if fits else None

    def _sizes_and_shares(self, size: Tensor | None, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        """New sizes [B, T'] (float32) and the share [B, r] that each source has in the row it goes to."""
        # Sizes are whole numbers, exact in float32, so the order of these additions does not matter on any device.
        if size is None:
            added, kept = _ones(self.src), _ones(self.keep)
        else:
            added, kept = size.gather(1, self.src), size.gather(1, self.keep)
        new_size = kept.scatter_add(1, self.slot, added)
        return new_size, added.to(compute) / new_size.gather(1, self.slot)


def _ones(index: Tensor) -> Tensor:
    """Sizes of rows that nothing has merged into: float32, whatever torch's default is."""
    return torch.ones(index.shape, dtype=torch.float32, device=index.device)


def kernel_arguments(
    plan: MergePlan, size: Tensor | None, *inputs: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor]:
    """What the kernels take of a plan: sizes [B, T] float32, keep, dest, start and member.

    `dest` is what the backward pass gathers by: None if none of the inputs needs a gradient and it is not there anyway.
    """
    flat = None if size is None else size.detach().reshape(plan.keep.shape[0], -1).to(torch.float32)
    if plan.groups is not None:
        dest, start, member = plan.groups
        return flat, plan.keep, dest, start, member
    from vtoken_kernels.library import group_sources

    start, member = group_sources(plan.src, plan.slot, plan.num_tokens, plan.num_dest)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return flat, plan.keep, plan.dest if needed else None, start, member


def like_size(new_size: Tensor, size: Tensor | None) -> Tensor:
    """Sizes are constants (docs/methods/pitome.md 8), in the shape they came in."""
    flat = new_size.detach()
    return flat if size is None else flat.reshape(*flat.shape, *size.shape[2:])


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in HALF else x.dtype


def _check_apply(plan: MergePlan, x: Tensor, size: Tensor | None, reduction: str) -> None:
    checks.choice("MergePlan.apply", "reduction", reduction, REDUCTIONS)
    check_rows(plan, x, size)
    if reduction in ("wavg", "mean") and not x.is_floating_point():
        raise ConfigError(f"{reduction!r} averages, which {x.dtype} cannot hold; use 'amax' or 'prune', or convert x")


def check_rows(plan: MergePlan, x: Tensor, size: Tensor | None) -> None:
    """Raise ShapeError if rows [B, T, C] or sizes do not fit the plan, InputError if they are no tensors."""
    checks.tensor("MergePlan.apply", "x", x)
    if size is not None:
        checks.tensor("MergePlan.apply", "size", size)
    expected = (plan.keep.shape[0], plan.num_tokens_in)
    if x.dim() != 3 or tuple(x.shape[:2]) != expected:
        raise ShapeError(f"the plan takes x of shape [{expected[0]}, {expected[1]}, C], got {tuple(x.shape)}")
    if size is not None and tuple(size.shape) not in (expected, (*expected, 1)):
        raise ShapeError(f"size must be {list(expected)} or {[*expected, 1]}, got {tuple(size.shape)}")


def _merge_rows(plan: MergePlan, x: Tensor, src_share: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        merged: Tensor = _MergeRows.apply(x, plan.keep, plan.src, plan.slot, src_share, plan.num_dest)
        return merged
    return _merge_rows_forward(x, plan.keep, plan.src, plan.slot, src_share, plan.num_dest)


def _merge_rows_forward(
    x: Tensor, keep: Tensor, src: Tensor, slot: Tensor, src_share: Tensor | None, num_dest: int
) -> Tensor:
    """Gather the kept rows, then move every destination by share * (source - destination).

    This form of the weighted mean leaves rows that receive nothing, and groups of equal rows, exactly as they were;
    only destinations and sources enter arithmetic. src_share=None drops the sources.
    """
    compute, out = _compute_dtype(x), take_rows(x, keep)
    if src_share is None:
        return out
    step = (take_rows(x, src).to(compute) - take_rows(out, slot).to(compute)) * src_share.unsqueeze(-1)
    first = out.shape[1] - num_dest
    if x.device.type not in ("cpu", "meta"):  # meta counts what a CPU would do
        out[:, first:] = _add_by_product(out[:, first:].to(compute), step, slot - first)
    elif out.dtype != compute:
        # A new tensor, as `to` changes the dtype: adding in place is safe.
        out[:, first:] = add_rows(out[:, first:].to(compute), step, slot - first)
    else:
        add_rows(out, step, slot)
    return out


def _add_by_product(rows: Tensor, step: Tensor, slot: Tensor) -> Tensor:
    """`add_rows` to a new tensor, as a product with the one-hot [D, r] matrix; deterministic on every device.

    Source: docs/methods/pitome.md 8.
    """
    onehot = slot.unsqueeze(1) == torch.arange(rows.shape[1], device=rows.device).view(1, -1, 1)
    with full_precision(rows):
        return torch.baddbmm(rows, onehot.to(rows.dtype), step)


class _MergeRows(torch.autograd.Function):
    """Merging is linear in x, so its gradient is one gather by group, scaled by each row's share."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, keep: Tensor, src: Tensor, slot: Tensor, src_share: Tensor | None, num_dest: int
    ) -> Tensor:  # fmt: skip
        return _merge_rows_forward(x, keep, src, slot, src_share, num_dest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, keep, src, slot, src_share, num_dest = inputs
        dest = MergePlan(keep, src, slot, x.shape[1], num_dest).dest
        own = torch.ones(keep.shape, dtype=_compute_dtype(x), device=x.device)
        if src_share is None:
            src_share = torch.zeros(src.shape, dtype=own.dtype, device=x.device)
        own = own.scatter_add(1, slot, -src_share)
        share = torch.empty(x.shape[:2], dtype=own.dtype, device=x.device)
        ctx.save_for_backward(dest, share.scatter(1, keep, own).scatter(1, src, src_share))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dest, share = ctx.saved_tensors
        rows = take_rows(grad, dest).to(_compute_dtype(grad)) * share.unsqueeze(-1)
        return rows.to(grad.dtype), None, None, None, None, None
