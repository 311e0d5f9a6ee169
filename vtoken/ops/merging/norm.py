"""Residual addition, merge and LayerNorm together: what stands between attention and MLP of a pre-norm block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import InputError, ShapeError
from vtoken.ops.backend import BACKENDS, limits_of, use_triton, width_reason
from vtoken.ops.merging.plan import MergePlan, check_rows, kernel_arguments, like_size


@limits_of("add_merge_norm")
def norm_reason(x: Tensor, branch: Tensor) -> str:
    """Why the kernels cannot add, merge and norm x and branch [B, T, C]."""
    if torch.promote_types(x.dtype, branch.dtype) != x.dtype:
        return f"the sum of {x.dtype} and {branch.dtype} is not {x.dtype}"
    if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return "autocast norms in float32"
    return width_reason("x", x, 8192)


def add_merge_norm(
    plan: MergePlan,
    x: Tensor,
    branch: Tensor,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge x + branch by size and normalise the result.

    With the kernels this is one pass over the rows; with torch it is `plan.apply(x + branch, size)` and `layer_norm`.

    Args:
        plan: the merge.
        x, branch: rows [B, T, C]; the branch is the attention's output, layer scale and drop path included.
        size: patches per row, [B, T] or [B, T, 1]; None means ones.
        weight, bias: of the LayerNorm, [C].
        eps: of the LayerNorm.
        backend: "auto", "torch" or "triton".

    Returns:
        Merged rows [B, T', C], their norm [B, T', C], and float32 sizes as `MergePlan.apply` returns them.

    Raises:
        ShapeError: if x, branch, size, weight or bias do not fit. InputError: if one is no tensor, or `plan` no plan.
        ConfigError: if `eps` is negative, the backend unknown.

    Example:
        >>> import torch, vtoken
        >>> x, branch = torch.randn(2, 1, 10, 8)
        >>> plan = vtoken.ops.plan_tome(x, 4)
        >>> rows, normed, size = vtoken.ops.add_merge_norm(plan, x, branch)
        >>> normed.shape, size.sum()
        (torch.Size([1, 6, 8]), tensor(10.))
    """
    if not isinstance(plan, MergePlan):
        raise InputError(f"add_merge_norm(plan=...): must be a MergePlan, got {type(plan).__name__}")
    for name, rows in (("x", x), ("branch", branch)):
        checks.tensor("add_merge_norm", name, rows, 3, shape="[B, T, C]")
    for name, of_norm in (("weight", weight), ("bias", bias)):
        if of_norm is not None and checks.tensor("add_merge_norm", name, of_norm).shape != x.shape[2:]:
            raise ShapeError(f"{name} must be [{x.shape[2]}], got {tuple(of_norm.shape)}")
    eps = checks.number("add_merge_norm", "eps", eps, 0)
    checks.choice("add_merge_norm", "backend", backend, BACKENDS)
    if x.shape != branch.shape:
        raise ShapeError(f"x and branch must have one shape, got {tuple(x.shape)} and {tuple(branch.shape)}")
    if plan.removed == 0 or not use_triton(backend, x, lambda: norm_reason(x, branch)):
        rows, new_size = plan.apply(x + branch, size, backend=backend)
        return rows, F.layer_norm(rows, (x.shape[2],), weight, bias, eps), new_size
    check_rows(plan, x, size)
    from vtoken_kernels import library

    arguments = kernel_arguments(plan, size, x, branch, weight, bias)
    merged, normed, new_size = library.add_merge_norm(x, branch, *arguments, weight, bias, eps)[:3]
    return merged, normed, like_size(new_size, size)
