"""Attention over kept connections only (arXiv 2303.13755 section 3.3): one function, several ways to run it.

A query with no kept key gives zeros, forward and backward, whatever emptied its row: the connections or a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken.core.errors import ConfigError, ShapeError
from vtoken.ops.connections import Connections
from vtoken.ops.edges import edge_attention

BACKENDS = ("auto", "dense_masked", "masked", "sparse", "grouped", "triton")
_INF = float("inf")


class Choice(NamedTuple):
    """What `backend="auto"` takes, and why."""

    backend: str
    reason: str


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connections: Connections,
    *,
    scale: float,
    num_prefix: int | None = None,
    key_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale + bias) v over the kept connections.

    Args:
        q, k, v: [B, H, N, D], prefix tokens first; any floating dtype.
        connections: kept keys of the patch queries; prefix queries keep all keys.
        scale: factor on q k^T, usually D ** -0.5.
        num_prefix: P; known from `connections`, checked if given.
        key_bias: added to the logits of each key, [B, 1, 1, N] (log sizes of merged tokens, `size_bias`).
        attn_mask: bool (True: may attend) or float (added), broadcastable to [B, H, N, N].
        dropout_p: of the attention weights.
        backend: "dense_masked" (plain, all N x N logits exist), "masked" (fused attention with a mask), "sparse" (per
            connection), "grouped" (keys gathered per group; "grouped" connections only), "triton", or "auto".

    Returns:
        [B, H, N, D] in the dtype of `q`. All backends agree to rounding.

    Raises:
        ShapeError: if shapes do not fit each other. ConfigError: if the backend is unknown or cannot serve the call.

    Source: arXiv 2303.13755 section 3.3; empty rows as sparsifiner.md section 4.
    """
    bias = _checked_bias(q, k, v, connections, num_prefix, key_bias, attn_mask)
    if backend == "auto":
        backend = explain(q, k, v, connections).backend
    if backend == "masked":
        return _fused(q, k, v, connections.mask(), bias, scale, dropout_p)
    if backend == "dense_masked":
        weights = _weights(q, k, connections.mask(), bias, scale)
        return F.dropout(weights, dropout_p) @ v
    if backend == "sparse":
        patches = _sparse(q, k, v, connections, bias, scale, dropout_p)
    elif backend == "grouped":
        patches = _grouped(q, k, v, connections, bias, scale, dropout_p)
    elif backend == "triton":
        raise ConfigError('backend="triton" does not serve sparse attention yet; use "auto"')
    else:
        raise ConfigError(f"unknown backend {backend!r}; supported: {', '.join(BACKENDS)}")
    return _with_prefix(q, k, v, connections, bias, scale, dropout_p, patches)


def attention_weights(
    q: Tensor,
    k: Tensor,
    connections: Connections,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The whole attention matrix of `sparse_attention`, [B, H, N, N]: for pictures and losses, not for speed."""
    bias = _checked_bias(q, k, k, connections, None, key_bias, attn_mask)
    return _weights(q, k, connections.mask(), bias, scale)


def explain(q: Tensor, k: Tensor, v: Tensor, connections: Connections) -> Choice:
    """Which backend `sparse_attention` takes for these tensors with "auto", and the reason.

    Source: sparsifiner.md section 8.1.
    """
    num_tokens, queries = connections.num_tokens, max(1, connections.num_queries)
    batch, heads = connections.batch_and_heads
    kept = (connections.count / max(1, batch * heads) - connections.num_prefix * num_tokens) / queries
    if num_tokens < 150:
        return Choice("masked", f"{num_tokens} tokens are too few for gathering keys to pay (150)")
    if kept > 0.25 * num_tokens:
        return Choice("masked", f"{kept / num_tokens:.0%} of the keys are kept, gathering pays up to 25 %")
    if connections.form == "grouped":
        return Choice("grouped", "groups of queries share their keys")
    if torch.compiler.is_compiling():
        return Choice("masked", "the compiler does not take sparse tensors into a graph")
    if q.device.type != "cpu":
        return Choice("masked", f"there is no sparse kernel for {q.device.type} yet")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Choice("masked", "gradients are needed, and the backward pass of sparse kernels is slow")
    if not torch.backends.mkl.is_available():
        return Choice("masked", "this torch is built without MKL, which the sparse product needs")
    return Choice("sparse", f"no gradients, {kept / num_tokens:.0%} of the keys kept per query")


@dataclass(frozen=True)
class _Bias:
    """What is added to the logits, and which pairs are allowed; each None or [B | 1, H | 1, N | 1, N | 1]."""

    added: Tensor | None
    allowed: Tensor | None

    def rows(self, rows: slice) -> _Bias:
        """For some of the queries."""
        added, allowed = (x if x is None or x.shape[2] == 1 else x[:, :, rows] for x in (self.added, self.allowed))
        return _Bias(added, allowed)

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


def _checked_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connections: Connections,
    num_prefix: int | None,
    key_bias: Tensor | None,
    attn_mask: Tensor | None,
) -> _Bias:
    expected = (*connections.batch_and_heads, connections.num_tokens)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or tuple(x.shape[:3]) != expected:
            raise ShapeError(f"{name} must be [{', '.join(map(str, expected))}, D] to fit the connections, "
                             f"got {tuple(x.shape)}")  # fmt: skip
    if num_prefix is not None and num_prefix != connections.num_prefix:
        raise ShapeError(f"num_prefix={num_prefix}, but the connections were selected with {connections.num_prefix}")
    full = (*expected, connections.num_tokens)
    key_bias, attn_mask = _four_sided("key_bias", key_bias, full), _four_sided("attn_mask", attn_mask, full)
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return _Bias(key_bias, attn_mask)
    return _Bias(attn_mask if key_bias is None else key_bias + attn_mask, None)


def _four_sided(name: str, x: Tensor | None, full: tuple[int, ...]) -> Tensor | None:
    if x is None:
        return None
    shaped = x[(None,) * max(0, 4 - x.dim())]
    if shaped.dim() > 4 or any(side not in (1, whole) for side, whole in zip(shaped.shape, full, strict=True)):
        raise ShapeError(f"{name} must be broadcastable to {list(full)}, got {tuple(x.shape)}")
    return shaped


def _weights(q: Tensor, k: Tensor, keep: Tensor, bias: _Bias, scale: float) -> Tensor:
    """Attention weights [B, H, N, N], in the order of the definition."""
    logits = q @ k.transpose(-1, -2) * scale
    if bias.added is not None:
        logits = logits + bias.added.to(logits.dtype)
    if bias.allowed is not None:
        keep = keep & bias.allowed
    logits = logits.masked_fill(~keep, -_INF)
    empty = (logits == -_INF).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: _Bias,
    scale: float,
    dropout_p: float,
    guard: bool = True,
) -> Tensor:
    """Fused attention of [B, H, Q, D] queries; `keep` [B, H, Q, N] may be None (all)."""
    mask = keep
    if bias.allowed is not None:
        mask = bias.allowed if mask is None else mask & bias.allowed
    if bias.added is not None:
        added = bias.added.to(q.dtype)
        mask = added if mask is None else torch.where(mask, added, -_INF)
    if mask is None or not guard:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    # Kernels differ in what they make of an empty row, some make NaN: let it attend to all, then take it out.
    empty = ~(mask if mask.dtype == torch.bool else mask > -_INF).any(-1, keepdim=True)
    mask = mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(empty, 0.0)


def _heads(connections: Connections, like: Tensor) -> Iterator[tuple[int, int]]:
    batch, heads = connections.batch_and_heads
    yield from ((b, h) for b in range(batch) for h in range(heads))


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, connections: Connections, bias: _Bias, scale: float, dropout_p: float
) -> list[Tensor]:
    """Patch queries over lists of pairs, one head at a time: [T, D] each."""
    if connections.form == "grouped":
        raise ConfigError('backend="sparse" takes connections per query; grouped ones have backend="grouped"')
    if q.device.type == "meta":
        raise ConfigError('backend="sparse" does not run on the meta device; use "masked"')
    compute = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    added = bias.of_pairs(connections, compute)
    index, crow, col = connections.index, connections.crow, connections.col
    if index is not None:
        regular = torch.arange(0, index.shape[2] * index.shape[3] + 1, index.shape[3], device=index.device)
        added = None if added is None else added.expand(index.shape)
    outs = []
    for b, h in _heads(connections, q):
        mine: Tensor | None
        if index is not None:
            start, keys = regular, index[b, h]
            mine = None if added is None else added[b, h].reshape(-1)
        else:
            assert crow is not None
            assert col is not None
            first, last = int(crow[b, h, 0]), int(crow[b, h, -1])
            start, keys = crow[b, h] - first, col[first:last]
            mine = None if added is None else added.expand(col.shape)[first:last]
        rows = (x.to(compute).contiguous() for x in (q[b, h, connections.num_prefix :], k[b, h], v[b, h]))
        outs.append(edge_attention(*rows, start, keys, mine, scale=scale, dropout_p=dropout_p).to(q.dtype))
    return outs


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, connections: Connections, bias: _Bias, scale: float, dropout_p: float
) -> list[Tensor]:
    """Patch queries in groups that share their keys, one head at a time: [T, D] each."""
    if connections.form != "grouped":
        raise ConfigError('backend="grouped" takes connections from select_grouped; use "sparse" or "auto"')
    index, order = connections.index, connections.order
    assert index is not None
    assert order is not None
    groups, num_kept = index.shape[2:]
    queries = connections.grouped_order() + connections.num_prefix
    back = order.argsort(1)
    added = bias.of_pairs(connections, q.dtype)
    if added is not None:
        added = added.expand(*index.shape[:3], -1, num_kept)
    outs = []
    for b, h in _heads(connections, q):
        which = b if order.shape[0] > 1 else 0
        # The rows of a head lie far apart in memory; gathering is faster from a copy.
        keys, values = (
            x[b, h].contiguous().index_select(0, index[b, h].view(-1)).view(1, groups, num_kept, -1) for x in (k, v)
        )
        rows = q[b, h].index_select(0, queries[which].view(-1)).view(1, groups, queries.shape[2], -1)
        mine = _Bias(None if added is None else added[b : b + 1, h], None)
        out = _fused(rows, keys, values, None, mine, scale, dropout_p)
        outs.append(out.reshape(groups * queries.shape[2], -1).index_select(0, back[which]))
    return outs


def _with_prefix(
    q: Tensor, k: Tensor, v: Tensor, connections: Connections, bias: _Bias, scale: float, dropout_p: float,
    patches: list[Tensor],
) -> Tensor:  # fmt: skip
    """The rows of the prefix queries, which keep all keys, in front of those of the patch queries."""
    num_prefix = connections.num_prefix
    rows = patches
    if num_prefix:
        prefix = _fused(q[:, :, :num_prefix], k, v, None, bias.rows(slice(num_prefix)), scale, dropout_p)
        rows = [x for pair in zip(prefix.flatten(0, 1).unbind(), patches, strict=True) for x in pair]
    return torch.cat(rows).view(*connections.batch_and_heads, connections.num_tokens, v.shape[-1])
