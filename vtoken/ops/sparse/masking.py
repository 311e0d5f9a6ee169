"""What is added to attention logits and what is taken out of them, and dense attention under it.

A query left without any key gives zeros, forward and backward, whatever took its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ShapeError
from vtoken.ops.rows import full_precision
from vtoken.ops.sparse.connections import Connections

_INF = float("inf")


@dataclass(frozen=True)
class LogitBias:
    """What is added to the logits, and which pairs are allowed; each None or [B | 1, H | 1, N | 1, N | 1]."""

    added: Tensor | None
    allowed: Tensor | None

    @classmethod
    def of(cls, key_bias: Tensor | None, attn_mask: Tensor | None, full: tuple[int, ...]) -> LogitBias:
        """From what a caller passes, each None or broadcastable to `full` = (B, H, N, N).

        Raises:
            ShapeError, InputError: if one is not, or is no tensor.
        """
        for name, x in (("key_bias", key_bias), ("attn_mask", attn_mask)):
            if x is not None:
                checks.tensor("sparse_attention", name, x)
            if x is not None and (x.dim() > 4 or any(s not in (1, f) for s, f in zip(x.shape[::-1], full[::-1]))):  # noqa: B905
                raise ShapeError(f"{name} must be broadcastable to {list(full)}, got {tuple(x.shape)}")
        key_bias, attn_mask = (None if x is None else x[(None,) * (4 - x.dim())] for x in (key_bias, attn_mask))
        if attn_mask is None or attn_mask.dtype == torch.bool:
            return cls(key_bias, attn_mask)
        return cls(attn_mask if key_bias is None else key_bias + attn_mask, None)

    def rows(self, rows: slice) -> LogitBias:
        """For some of the queries."""
        added, allowed = (x if x is None or x.shape[2] == 1 else x[:, :, rows] for x in (self.added, self.allowed))
        return LogitBias(added, allowed)

    def of_pairs(self, connections: Connections, dtype: torch.dtype) -> Tensor | None:
        """One number per kept pair, -inf where not allowed; shaped as `Connections.pairs` (1 where alike)."""
        if self.added is None and self.allowed is None:
            return None
        added = None if self.added is None else _pick(self.added, connections).to(dtype)
        if self.allowed is None:
            return added
        allowed = _pick(self.allowed, connections)
        none = torch.zeros((), dtype=dtype, device=allowed.device) if added is None else added
        return torch.where(allowed, none, -_INF)


def _pick(x: Tensor, connections: Connections) -> Tensor:
    """The entries of `x` [B | 1, H | 1, N | 1, N | 1] that belong to the kept pairs."""
    # Sides of length 1 are indexed by a single 0, so that what is alike for all heads or queries stays small.
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    return x[tuple(i if size > 1 else zero for i, size in zip(connections.pairs(), x.shape, strict=True))]


def attention_weights(q: Tensor, k: Tensor, keep: Tensor, bias: LogitBias, scale: float) -> Tensor:
    """Softmax of the logits over the pairs that `keep` [B, H, N, N] allows, in the order of the definition.

    At least in float32 and outside autocast: logits of half types overflow or lose what tells keys apart.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with full_precision(q):
        logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    if bias.added is not None:
        logits = logits + bias.added.to(dtype)
    if bias.allowed is not None:
        keep = keep & bias.allowed
    logits = logits.masked_fill(~keep, -_INF)
    empty = (logits == -_INF).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: LogitBias,
    scale: float,
    dropout_p: float,
    guard: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of [B, H, Q, D] queries.

    Args:
        q, k, v: [B, H, Q, D] and [B, H, N, D].
        keep: [B, H, Q, N]; None: all pairs.
        bias: of the same queries.
        scale, dropout_p: as usual.
        guard: whether `keep` may leave a query without keys (`bias` may in any case).
    """
    mask = keep
    if bias.allowed is not None:
        mask = bias.allowed if mask is None else mask & bias.allowed
    if bias.added is not None:
        added = bias.added.to(q.dtype)
        mask = added if mask is None else torch.where(mask, added, -_INF)
    if mask is None or (bias.allowed is None and bias.added is None and not guard):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    # Kernels differ in what they make of an empty row, some make NaN: let it attend to all, then take it out.
    empty = ~(mask if mask.dtype == torch.bool else mask > -_INF).any(-1, keepdim=True)
    mask = mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(empty, 0.0)
