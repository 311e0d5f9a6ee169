"""Attention with one bias per key, for tokens that stand for several patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ShapeError
from vtoken.ops.backend import BACKENDS, heads_reason, limits_of, use_triton
from vtoken.ops.merging.plan import size_bias


@limits_of("attention_with_bias")
def bias_reason(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str:
    """Why the kernels cannot attend with q [B, H, T, D], k and v [B, H, S, D] and a bias per key."""
    return heads_reason(q, k, v, bias)


@limits_of("attention_with_sizes")
def sizes_reason(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> str:
    """The same with sizes, which never need a gradient."""
    return heads_reason(q, k, v)


def attention_with_sizes(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Proportional attention: a key of `size` patches counts as that many equal keys.

    Args:
        q: queries [B, H, T, D].
        k, v: keys and values [B, H, S, D].
        size: patches per key, [B, S] or [B, S, 1]; None means ones (plain attention).
        scale: factor on the logits, D ** -0.5 by default.
        backend: "auto", "torch" or "triton".

    Returns:
        [B, H, T, D] in the dtype of q.

    Raises:
        ShapeError: if `size` does not fit the keys. Else as `attention_with_bias`.

    Example:
        >>> import torch, vtoken
        >>> q, k, v = torch.randn(3, 1, 2, 5, 16)
        >>> twice = [torch.cat([x, x[:, :, :1]], dim=2) for x in (k, v)]  # the first key, twice
        >>> size = torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0]])
        >>> found = vtoken.ops.attention_with_sizes(q, k, v, size)
        >>> torch.allclose(found, vtoken.ops.attention_with_sizes(q, *twice, None), atol=1e-5)
        True

    Source: arXiv 2405.16148 section 3 and arXiv 2210.09461 equation 1; docs/methods/pitome.md 5.
    """
    scale = _check("attention_with_sizes", q, k, v, scale, backend)
    if size is None:
        return attention_with_bias(q, k, v, None, scale=scale, backend=backend)
    expected = (k.shape[0], k.shape[2])
    if tuple(checks.tensor("attention_with_sizes", "size", size).shape) not in (expected, (*expected, 1)):
        raise ShapeError(f"size must be {list(expected)} or {[*expected, 1]}, got {tuple(size.shape)}")
    kernels = use_triton(backend, q, lambda: sizes_reason(q, k, v))
    # The kernels add the logarithm in float32 whatever the dtype of q.
    bias = size_bias(size.detach().reshape(expected), torch.float32 if kernels else q.dtype)
    return attention_with_bias(q, k, v, bias, scale=scale, backend="triton" if kernels else "torch")


def attention_with_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(scale * q k^T + bias) v with one bias per key.

    Args:
        q: queries [B, H, T, D].
        k, v: keys and values [B, H, S, D].
        bias: [B, 1, 1, S] or [1, 1, 1, S] as `vtoken.ops.size_bias` makes it; None for plain attention. It gets no
            gradient from the kernels, so "auto" takes torch if it needs one.
        scale: factor on the logits, D ** -0.5 by default.
        backend: "auto", "torch" or "triton".

    Returns:
        [B, H, T, D] in the dtype of q (under autocast: of autocast).

    Raises:
        ShapeError: if q, k and v do not fit each other, or the bias is not one per key.
        InputError: if one is no tensor.
        ConfigError: if the scale is no finite number, the backend unknown or unable to serve the call.

    Example:
        >>> import torch, vtoken
        >>> q, k, v = torch.randn(3, 1, 2, 5, 16)
        >>> vtoken.ops.attention_with_bias(q, k, v, torch.zeros(1, 1, 1, 5)).shape
        torch.Size([1, 2, 5, 16])
    """
    scale = _check("attention_with_bias", q, k, v, scale, backend)
    if bias is not None:
        checks.tensor("attention_with_bias", "bias", bias)
    if bias is not None and (bias.dim() != 4 or bias.shape[0] not in (1, k.shape[0])
                             or tuple(bias.shape[1:]) != (1, 1, k.shape[2])):  # fmt: skip
        raise ShapeError(f"bias must be [{k.shape[0]}, 1, 1, {k.shape[2]}], one per key, got {tuple(bias.shape)}")
    if not use_triton(backend, q, lambda: bias_reason(q, k, v, bias)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    from vtoken_kernels.library import attention

    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
    per_key = None if bias is None else bias.detach()[:, 0, 0].float()
    out: Tensor = attention(q, k, v, per_key, q.shape[-1] ** -0.5 if scale is None else scale)[0]
    return out


def _check(owner: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> float | None:
    """The scale as a float; raises what the callers say."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(owner, name, x, 4, shape="[B, H, T, D]")
    if q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ShapeError(f"{owner}: q must be [B, H, T, D], k and v [B, H, S, D], got {shapes}")
    checks.choice(owner, "backend", backend, BACKENDS)
    return None if scale is None else checks.number(owner, "scale", scale)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float = 0.0) -> Tensor:
    """`scaled_dot_product_attention`, through `attention_with_bias` where the mask is a number per key (token sizes).

    Args:
        q, k, v: [B, H, T, D], [B, H, S, D], [B, H, S, D].
        mask: what it takes as `attn_mask`.
        dropout_p: of the attention weights.
    """
    if mask is None or dropout_p or not is_bias_per_key(mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return attention_with_bias(q, k, v, mask)


def is_bias_per_key(mask: Tensor) -> bool:
    """Whether a mask is [B or 1, 1, 1, S] numbers to add."""
    return mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype != torch.bool
