"""torch.ops.vtoken.merge and add_merge_norm: merged rows as opaque, differentiable operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtoken_kernels import merge as rows
from vtoken_kernels import norm
from vtoken_kernels.launch import on_device


@torch.library.custom_op("vtoken::merge", mutates_args=())
def merge(
    x: Tensor, size: Tensor | None, keep: Tensor, dest: Tensor | None, start: Tensor, member: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Merge rows x [B, T, C] with float32 sizes [B, T] (None: ones).

    Args:
        keep, dest, start, member: of a plan (`vtoken_kernels.plan_ops.PlanTensors`); dest may be None if there will be
            no backward pass.
        reduction: "wavg", "mean", "amax" or "prune".

    Returns:
        Rows [B, T', C] in the dtype of x, new sizes [B, T'] in float32 (which get no gradient).
    """
    with on_device(x):
        return rows.merge(x, size, keep, start, member, reduction)


@merge.register_fake
def _(
    x: Tensor, size: Tensor | None, keep: Tensor, dest: Tensor | None, start: Tensor, member: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    shape = (keep.shape[0], keep.shape[1])
    return x.new_empty(*shape, x.shape[2]), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("vtoken::merge_bwd", mutates_args=())
def merge_bwd(
    grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, dest: Tensor, start: Tensor, member: Tensor,
    reduction: str,
) -> Tensor:  # fmt: skip
    """Gradient [B, T, C] of the rows for "wavg", "mean" and "prune", from that of the merged rows [B, T', C]."""
    with on_device(grad):
        return rows.merge_backward(grad, size, new_size, keep, dest, start, reduction)


@merge_bwd.register_fake
def _(
    grad: Tensor, size: Tensor | None, new_size: Tensor, keep: Tensor, dest: Tensor, start: Tensor, member: Tensor,
    reduction: str,
) -> Tensor:  # fmt: skip
    return grad.new_empty(dest.shape[0], dest.shape[1], grad.shape[2])


@torch.library.custom_op("vtoken::merge_amax_bwd", mutates_args=())
def merge_amax_bwd(grad: Tensor, x: Tensor, keep: Tensor, start: Tensor, member: Tensor) -> Tensor:
    """Gradient [B, T, C] of the rows x for "amax"; equal rows share it."""
    with on_device(grad):
        return rows.merge_amax_backward(grad, x, keep, start, member)


@merge_amax_bwd.register_fake
def _(grad: Tensor, x: Tensor, keep: Tensor, start: Tensor, member: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _merge_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, size, keep, dest, start, member, reduction = inputs
    ctx.reduction = reduction
    ctx.save_for_backward(x if reduction == "amax" else None, size, output[1], keep, dest, start, member)


def _merge_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, size, new_size, keep, dest, start, member = ctx.saved_tensors
    if ctx.reduction == "amax":
        found = merge_amax_bwd(grad, x, keep, start, member)
    else:
        found = merge_bwd(grad, size, new_size, keep, dest, start, member, ctx.reduction)
    return found, None, None, None, None, None, None


def _merge_bwd_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, size, _, keep, dest, start, member, reduction = inputs
    ctx.reduction = reduction
    ctx.save_for_backward(size, keep, dest, start, member)


def _merge_bwd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Merging is linear, so the derivative of its transpose is merging.
    size, keep, dest, start, member = ctx.saved_tensors
    return merge(grad, size, keep, dest, start, member, ctx.reduction)[0], *(None,) * 7


merge.register_autograd(_merge_backward, setup_context=_merge_context)
merge_bwd.register_autograd(_merge_bwd_backward, setup_context=_merge_bwd_context)


@torch.library.custom_op("vtoken::add_merge_norm", mutates_args=())
def add_merge_norm(
    x: Tensor, y: Tensor, size: Tensor | None, keep: Tensor, dest: Tensor | None, start: Tensor, member: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`merge` (reduction "wavg") of x + y, and LayerNorm (weight, bias [C]) of the result.

    Returns:
        Rows and normed rows [B, T', C]; float32 [B, T']: new sizes, means, reciprocal standard deviations.
    """
    with on_device(x):
        return norm.add_merge_norm(x, y, size, keep, start, member, weight, bias, eps)


@add_merge_norm.register_fake
def _(
    x: Tensor, y: Tensor, size: Tensor | None, keep: Tensor, dest: Tensor | None, start: Tensor, member: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (keep.shape[0], keep.shape[1])
    out, normed = (x.new_empty(*shape, x.shape[2]) for _ in range(2))
    new_size, mean, rstd = (x.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return out, normed, new_size, mean, rstd


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, size, keep, dest, start, member, weight, bias, _ = inputs
    out, _, new_size, mean, rstd = output
    ctx.branch_dtype, ctx.bias_dtype = y.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(out, mean, rstd, weight, size, new_size, keep, dest, start, member)


def _norm_backward(ctx: Any, grad_out: Tensor, grad_normed: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The norm's gradient in plain torch (two sums over rows), then one gather serves both x and y."""
    out, mean, rstd, weight, size, new_size, keep, dest, start, member = ctx.saved_tensors
    grad = grad_normed.float()
    unit = (out.float() - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    grad_weight = None if weight is None else (grad * unit).sum((0, 1)).to(weight.dtype)
    grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 1)).to(ctx.bias_dtype)
    if weight is not None:
        grad = grad * weight.float()
    grad = grad - grad.mean(-1, keepdim=True) - unit * (grad * unit).mean(-1, keepdim=True)
    total = (grad_out.float() + grad * rstd.unsqueeze(-1)).to(out.dtype)
    found = merge_bwd(total, size, new_size, keep, dest, start, member, "wavg")
    # A copy for y: an operator's gradients may be written to later, each on its own.
    return found, found.to(ctx.branch_dtype, copy=True), None, None, None, None, None, grad_weight, grad_bias, None


add_merge_norm.register_autograd(_norm_backward, setup_context=_norm_context)


@register_flop_formula([torch.ops.vtoken.merge, torch.ops.vtoken.merge_bwd, torch.ops.vtoken.merge_amax_bwd,
                        torch.ops.vtoken.add_merge_norm])  # fmt: skip
def _(*args: object, out_shape: object = None, **_: object) -> int:
    # Sums and products per row; the counter knows matrix products only.
    return 0
