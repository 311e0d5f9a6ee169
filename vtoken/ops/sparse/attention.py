"""Attention over kept connections only (arXiv 2303.13755 section 3.3): one function, several ways to run it.

A query with no kept key gives zeros, forward and backward, whatever emptied its row: the connections or a mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.ops.backend import Choice, choice_of, use_triton
from vtoken.ops.largest import branch_free
from vtoken.ops.rows import full_precision, take_rows
from vtoken.ops.sparse import lists
from vtoken.ops.sparse.connections import Connections
from vtoken.ops.sparse.edges import edge_attention
from vtoken.ops.sparse.masking import LogitBias, attention_weights, fused_attention

#: What `backend` may be here: there are several ways without kernels, not one.
WAYS = ("auto", "dense_masked", "masked", "sparse", "grouped", "triton")
#: Numbers gathered at one time by "grouped": 1 MB of keys and 1 MB of values.
_GATHERED = 2**18


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
            connection), "grouped" (keys gathered per group), "triton", or "auto". They agree to rounding.

    Returns: [B, H, N, D] in the dtype of `q`.

    Raises:
        ShapeError: if shapes do not fit each other. InputError: if something is no tensor, or no connections.
        ConfigError: if a number is out of range, if the backend is unknown or cannot serve the call.

    Example:
        >>> import torch, vtoken
        >>> q, k, v = torch.randn(3, 1, 2, 13, 8)
        >>> connections = vtoken.ops.select_topk(torch.rand(1, 2, 12, 4), torch.rand(4, 13), keep_ratio=0.25)
        >>> vtoken.ops.sparse_attention(q, k, v, connections, scale=8**-0.5).shape
        torch.Size([1, 2, 13, 8])

    Source: arXiv 2303.13755 section 3.3; empty rows as docs/methods/sparsifiner.md 4.
    """
    checks.choice("sparse_attention", "backend", backend, WAYS)
    scale = checks.number("sparse_attention", "scale", scale)
    dropout_p = checks.number("sparse_attention", "dropout_p", dropout_p, 0, 1)
    bias = _checked(q, k, v, connections, num_prefix, key_bias, attn_mask)
    if backend == "auto":
        backend = _choose(q, k, v, connections, bias, dropout_p).backend
    if backend == "masked":
        keep = None if connections.keeps_all else connections.mask()
        return fused_attention(q, k, v, keep, bias, scale, dropout_p, guard=connections.index is None)
    if backend == "dense_masked":
        weights = F.dropout(attention_weights(q, k, connections.mask(), bias, scale), dropout_p)
        with full_precision(q):
            return (weights @ v.to(weights.dtype)).to(q.dtype)
    if backend in ("sparse", "grouped"):
        return _by_head(q, k, v, connections, bias, scale, dropout_p, backend)
    use_triton(backend, q, lambda: lists.reason(q, k, v, bias, dropout_p))
    return lists.attend(q, k, v, connections, bias, scale)


def attention_map(
    q: Tensor,
    k: Tensor,
    connections: Connections,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The whole attention matrix of `sparse_attention`, [B, H, N, N], at least float32; for pictures, not for speed."""
    scale = checks.number("attention_map", "scale", scale)
    bias = _checked(q, k, k, connections, None, key_bias, attn_mask)
    return attention_weights(q, k, connections.mask(), bias, scale)


@choice_of("sparse_attention")
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connections: Connections,
    *,
    key_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Choice:
    """`vtoken.ops.explain("sparse_attention", ...)`: arguments and errors of `sparse_attention`."""
    dropout_p = checks.number("explain", "dropout_p", dropout_p, 0, 1)
    bias = _checked(q, k, v, connections, None, key_bias, attn_mask)
    return _choose(q, k, v, connections, bias, dropout_p)


def _choose(
    q: Tensor, k: Tensor, v: Tensor, connections: Connections, bias: LogitBias, dropout_p: float
) -> Choice:  # fmt: skip
    """What "auto" takes.

    Source: docs/methods/sparsifiner.md 8.1.
    """
    dense = connections.index is not None and connections.keeps_all
    if not dense and use_triton("auto", q, lambda: lists.reason(q, k, v, bias, dropout_p)):
        return Choice("triton", "kernels walk along lists of keys")
    if connections.form == "lists":
        return Choice("masked", "only kernels walk along lists of blocks")
    num_tokens, queries = connections.num_tokens, max(1, connections.num_queries)
    batch, heads = connections.batch_and_heads
    kept = (connections.count / max(1, batch * heads) - connections.num_prefix * num_tokens) / queries
    if num_tokens < 150:
        return Choice("masked", f"{num_tokens} tokens are too few for gathering keys to pay (150)")
    # Measured on one CPU thread, 197 and 577 tokens: per-pair work beats a dense mask up to about one half.
    if kept > 0.5 * num_tokens:
        return Choice("masked", f"{kept / num_tokens:.0%} of the keys are kept, gathering pays up to 50 %")
    if connections.form == "grouped":
        return Choice("grouped", "groups of queries share their keys")
    if torch.compiler.is_compiling():
        return Choice("masked", "the compiler does not take sparse tensors into a graph")
    if q.device.type != "cpu":
        return Choice("masked", f"the kernels do not serve this call on {q.device.type}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Choice("masked", "gradients are needed, and the backward pass of sparse kernels is slow")
    if not torch.backends.mkl.is_available():
        return Choice("masked", "this torch is built without MKL, which the sparse product needs")
    return Choice("sparse", f"no gradients, {kept / num_tokens:.0%} of the keys kept per query")


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connections: Connections,
    num_prefix: int | None,
    key_bias: Tensor | None,
    attn_mask: Tensor | None,
) -> LogitBias:
    if not isinstance(connections, Connections):
        raise InputError(f"connections must be what a vtoken.ops.select_ function returns, got {connections!r}")
    expected = (*connections.batch_and_heads, connections.num_tokens)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor("sparse_attention", name, x)
        if x.dim() != 4 or tuple(x.shape[:3]) != expected:
            shape = ", ".join(map(str, expected))
            raise ShapeError(f"{name} must be [{shape}, D] to fit the connections, got {tuple(x.shape)}")
    if q.shape[3] != k.shape[3]:
        raise ShapeError(f"q and k must be equally wide, got {tuple(q.shape)} and {tuple(k.shape)}")
    if num_prefix is not None and checks.whole("sparse_attention", "num_prefix", num_prefix) != connections.num_prefix:
        raise ShapeError(f"num_prefix={num_prefix}, but the connections were selected with {connections.num_prefix}")
    return LogitBias.of(key_bias, attn_mask, (*expected, connections.num_tokens))


def _by_head(
    q: Tensor, k: Tensor, v: Tensor, c: Connections, bias: LogitBias, scale: float, dropout_p: float, backend: str
) -> Tensor:
    """Patch queries by a backend that yields them head by head, prefix queries, which keep all keys, densely."""
    if q.shape[0] == 0:  # no head yields anything
        return v.new_empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    parts = (_sparse if backend == "sparse" else _grouped)(q, k, v, c, bias, scale, dropout_p)
    if c.num_prefix:
        first = slice(c.num_prefix)
        prefix = fused_attention(q[:, :, first], k, v, None, bias.rows(first), scale, dropout_p)
        parts = itertools.chain.from_iterable(zip(prefix.flatten(0, 1).unbind(), parts, strict=True))
    return torch.cat(tuple(parts)).view(*c.batch_and_heads, c.num_tokens, v.shape[3])


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, connections: Connections, bias: LogitBias, scale: float, dropout_p: float
) -> Iterator[Tensor]:
    """Patch queries over lists of pairs: [T, D] for every head."""
    if connections.order is not None:
        raise ConfigError('backend="sparse" takes connections per query; for groups there is backend="grouped"')
    if q.device.type == "meta" or torch.compiler.is_compiling():
        raise ConfigError('backend="sparse" runs neither on the meta device nor in a compiled graph; use "masked"')
    compute = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    added = bias.of_pairs(connections, compute)
    for b, h in itertools.product(*map(range, connections.batch_and_heads)):
        # The rows of a head lie far apart in memory; a copy of them stays in cache.
        rows = (q[b, h, connections.num_prefix :], k[b, h], v[b, h])
        queries, keys, values = (x.to(compute).contiguous() for x in rows)
        pairs, own = _list_of(connections, added, b, h)
        yield edge_attention(queries, keys, values, pairs, own, scale=scale, dropout_p=dropout_p).to(q.dtype)


def _list_of(c: Connections, added: Tensor | None, b: int, h: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """One head's pairs, and what is added to their logits [nnz], as `edge_attention` takes them."""
    if c.index is not None:
        _, _, queries, kept = c.index.shape
        start = torch.arange(0, queries * kept + 1, kept, device=c.index.device)
        return (start, c.index[b, h]), None if added is None else added.expand(c.index.shape)[b, h].reshape(-1)
    assert c.crow is not None
    assert c.col is not None
    first, last = int(c.crow[b, h, 0]), int(c.crow[b, h, -1])
    own = None if added is None else added.expand(c.col.shape)[first:last]
    return (c.crow[b, h] - first, c.col[first:last]), own


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, connections: Connections, bias: LogitBias, scale: float, dropout_p: float
) -> Iterator[Tensor]:
    """Patch queries in groups that share their keys: [T, D] for every head."""
    index, order = connections.index, connections.order
    if index is None or order is None:
        raise ConfigError('backend="grouped" takes connections from select_grouped; use "sparse" or "auto"')
    batch, heads, groups, kept = index.shape
    rows = connections.grouped_order() + connections.num_prefix
    home = order.argsort(1)
    added = bias.of_pairs(connections, q.dtype)
    if added is not None:
        added = added.expand(batch, heads, groups, rows.shape[2], kept)
    if branch_free(q) or (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))):
        keys, values = (take_rows(x.flatten(0, 1), index.flatten(0, 1).flatten(1)) for x in (k, v))
        queries = take_rows(q.flatten(0, 1), _per_head(rows.flatten(1), batch, heads))
        queries, keys, values = (x.unflatten(1, (groups, -1)) for x in (queries, keys, values))
        own = LogitBias(None if added is None else added.flatten(0, 1), None)
        out = fused_attention(queries, keys, values, None, own, scale, dropout_p).flatten(1, 2)
        yield from take_rows(out, _per_head(home, batch, heads)).unbind()
        return
    for b, h in itertools.product(range(batch), range(heads)):
        mine, back = (x[b if x.shape[0] > 1 else 0] for x in (rows, home))
        own = LogitBias(None if added is None else added[b, h : h + 1], None)
        out = _grouped_head(q[b, h], k[b, h], v[b, h], index[b, h], mine, own, scale, dropout_p)
        yield out.index_select(0, back)


def _per_head(x: Tensor, batch: int, heads: int) -> Tensor:
    """[1 or B, R] -> [B * H, R]."""
    return x.unsqueeze(1).expand(batch, heads, -1).flatten(0, 1)


def _grouped_head(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, rows: Tensor, bias: LogitBias, scale: float, dropout_p: float
) -> Tensor:
    """One head, [N, D] each: queries `rows` [groups, size] over keys `index` [groups, kept]; [groups * size, D]."""
    groups, kept = index.shape
    step = max(1, _GATHERED // (kept * k.shape[1]))
    # Gathered rows go into the same place again, so that it stays in cache.
    places = [x.new_empty(min(step, groups) * kept, x.shape[1]) for x in (k, v)]
    outs = []
    for first in range(0, groups, step):
        some = slice(first, first + step)
        which = index[some].flatten()
        keys, values = (
            torch.index_select(x, 0, which, out=place[: which.shape[0]]).view(1, -1, kept, x.shape[1])
            for x, place in zip((k, v), places, strict=True)
        )
        queries = q.index_select(0, rows[some].flatten()).view(1, -1, rows.shape[1], q.shape[1])
        own = LogitBias(None if bias.added is None else bias.added[:, some], None)
        outs.append(fused_attention(queries, keys, values, None, own, scale, dropout_p).flatten(0, 2))
    return torch.cat(outs) if len(outs) > 1 else outs[0]
