"""torch.ops.vtoken.attention: attention with a bias per key as an opaque, differentiable operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtoken_kernels import attention as forward
from vtoken_kernels import attention_bwd as backward
from vtoken_kernels.launch import on_device


@torch.library.custom_op("vtoken::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v for q [B, H, T, D], k and v [B, H, S, D], bias float32 [B, S] or [1, S] (no
    gradient).

    Returns:
        The output [B, H, T, D] (in memory [B, T, H, D]); base-2 logarithms of the softmax sums, float32 [B, H, T].
    """
    with on_device(q):
        return forward.attention(q, k, v, _rows(bias, q), scale)


def _rows(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias with a row per image (which may be the same memory) and neighbouring keys."""
    return None if bias is None else forward.unit_stride(bias).expand(q.shape[0], -1)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    out = q.new_empty(batch, tokens, heads, width).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("vtoken::attention_bwd", mutates_args=())
def attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in memory [B, T, H, D]."""
    with on_device(q):
        return backward.attention_backward(grad, q, k, v, _rows(bias, q), out, lse.contiguous(), scale)


@attention_bwd.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
    return dq, dk, dv


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, lse = ctx.saved_tensors
    return *attention_bwd(grad, q, k, v, bias, out, lse, ctx.scale), None, None


attention.register_autograd(_backward, setup_context=_context)


@register_flop_formula(torch.ops.vtoken.attention)
def _(q: torch.Size, k: torch.Size, v: torch.Size, *args: object, out_shape: object = None, **_: object) -> int:
    batch, heads, tokens, width = q
    return 4 * batch * heads * tokens * k[2] * width


@register_flop_formula(torch.ops.vtoken.attention_bwd)
def _(
    grad: torch.Size, q: torch.Size, k: torch.Size, *args: object, out_shape: object = None, **_: object
) -> int:  # fmt: skip
    # Five products, as PyTorch counts its own flash attention; ours makes two of them twice.
    batch, heads, tokens, width = q
    return 10 * batch * heads * tokens * k[2] * width
