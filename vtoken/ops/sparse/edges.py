"""Attention of one head over an explicit list of query-key pairs, in plain torch (docs/methods/sparsifiner.md 8.1)."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

#: Numbers gathered at one time where the sparse product is not available: 1 MB.
_GATHERED = 2**18


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: tuple[Tensor, Tensor],
    bias: Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Each query attends to its own list of keys; queries whose list is empty, or all -inf, give zeros.

    Args:
        q: [T, D], float32 or float64, as `k` and `v`, which are [N, D].
        pairs: (crow, col): where each query's keys start in `col`, [T + 1], the last entry is nnz; and their numbers,
            [nnz] for lists of different lengths, or [T, k] (then `crow` is regular).
        bias: added to the logits, [nnz].
        scale: factor on the logits.
        dropout_p: of the attention weights.

    Returns:
        [T, D]. Differentiable in q, k, v and bias.
    """
    crow, col = (_narrow(x, pairs[1].numel()) for x in pairs)
    logits = _edge_logits(q, k, crow, col.view(-1), scale)
    if bias is not None:
        logits = logits + bias
    if col.dim() == 2:
        weights = _softmax(logits.view(col.shape), guard=bias is not None).view(-1)
    else:
        weights = _ragged_softmax(logits, crow)
    weights = F.dropout(weights, dropout_p)
    return F.embedding_bag(col.view(-1), v, crow[:-1], per_sample_weights=weights, mode="sum")


def _narrow(x: Tensor, pairs: int) -> Tensor:
    """As int32 if all places fit: the sparse product and the weighted sum read half as much, and are a fifth faster."""
    return x.int() if pairs < 2**31 else x


def _softmax(logits: Tensor, guard: bool) -> Tensor:
    if not guard:
        return logits.softmax(-1)
    empty = (logits == -float("inf")).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _ragged_softmax(logits: Tensor, crow: Tensor) -> Tensor:
    """Softmax over each row's stretch of `logits` [nnz]."""
    row = torch.arange(crow.shape[0] - 1, device=crow.device).repeat_interleave(
        crow.diff(), output_size=logits.shape[0]
    )
    with torch.no_grad():
        most = torch.segment_reduce(logits, "max", offsets=crow)
        most = most.masked_fill(most == -float("inf"), 0.0)
    share = (logits - most[row]).exp()
    total = torch.zeros_like(most).index_add(0, row, share)
    return share / total.masked_fill(total == 0, 1.0)[row]


def _edge_logits(q: Tensor, k: Tensor, crow: Tensor, col: Tensor, scale: float) -> Tensor:
    """q[row] . k[col] * scale for every pair, [nnz]."""
    if not torch.backends.mkl.is_available():
        return _gathered_logits(q, k, crow, col) * scale
    _silence_beta_warning()
    pairs = torch.sparse_csr_tensor(
        crow, col, q.new_zeros(col.shape[0]), (q.shape[0], k.shape[0]), check_invariants=False
    )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return torch.sparse.sampled_addmm(pairs, q, k.t(), beta=0.0, alpha=scale).values()
    # In place: otherwise the list of pairs is copied, too.
    return torch.sparse.sampled_addmm(pairs, q, k.t(), beta=0.0, alpha=scale, out=pairs).values()


def _gathered_logits(q: Tensor, k: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    row = torch.arange(q.shape[0], device=q.device).repeat_interleave(crow.diff(), output_size=col.shape[0])
    step = max(1, _GATHERED // q.shape[1])
    parts = [(q[r] * k[c]).sum(-1) for r, c in zip(row.split(step), col.split(step), strict=True)]
    return torch.cat(parts)


@functools.cache
def _silence_beta_warning() -> None:
    """torch says once per process that CSR tensors are in beta; let it say so here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        none = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(none, none[:0], torch.zeros(0), (0, 1))
