"""Sparse attention by kernels: connections as lists per block of 64 queries (docs/methods/sparsifiner.md 8.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.ops.backend import heads_reason, use_triton
from vtoken.ops.sparse.connections import Connections, select_reason
from vtoken.ops.sparse.masking import LogitBias

#: Queries per block: bits of a word.
BLOCK = 64
#: Groups of fewer queries share a block: most rows of its tiles would be empty.
_LEAST_ROWS = 16


@dataclass(frozen=True, eq=False)
class ListedConnections(Connections):
    """Connections that a kernel selected: no index per query exists, and the host waited for nothing.

    Args:
        order: patch queries (0..T-1) in the order in which they are cut into blocks of 64, [1 or B, T] int32.
        lists: for every block the keys that at least one of its queries keeps, ascending, int32 [B, H, blocks, room];
            words whose bit r says that query r of the block keeps it, int64 of the same shape; first entry of every 64
            keys and at last the number of entries, int32 [B, H, blocks, ceil(N / 64) + 1].
        kept: keys per query; None: it differs.
    """

    lists: tuple[Tensor, Tensor, Tensor] | None = None
    kept: int | None = None

    @property
    def form(self) -> str:
        """ "lists"."""
        return "lists"

    @property
    def count(self) -> int:
        """Kept query-key pairs over batch and heads; waits for the device where `kept` is None."""
        if self.kept is None:
            return int(self.mask().sum())
        batch, heads = self.batch_and_heads
        return batch * heads * (self.num_prefix * self.num_tokens + self.num_queries * self.kept)

    def mask(self) -> Tensor:
        """Every pair: bool [B, H, N, N], rows are queries."""
        assert self.lists is not None
        assert self.order is not None
        index, word, start = self.lists
        (batch, heads, blocks, room), device = index.shape, index.device
        listed = torch.arange(room, device=device) < start[..., -1:]
        # What is not listed goes into a column of its own.
        column = torch.where(listed, index, self.num_tokens).to(torch.int64)
        rows = torch.zeros(batch, heads, blocks, BLOCK, self.num_tokens + 1, dtype=torch.bool, device=device)
        for r in range(BLOCK):  # not at once: words of all rows would take as much as 64 masks
            rows[:, :, :, r].scatter_(3, column, ((word >> r) & 1) != 0)
        rows = rows.flatten(2, 3)[:, :, : self.num_queries, : self.num_tokens]
        mask = torch.ones(batch, heads, self.num_tokens, self.num_tokens, dtype=torch.bool, device=device)
        home = self.order.argsort(1)[:, None, :, None].expand(batch, heads, -1, self.num_tokens)
        mask[:, :, self.num_prefix :] = rows.gather(2, home)
        return mask

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices (b, h, query, key) of the kept pairs of the patch queries, [nnz] each; waits for the device."""
        b, h, query, key = self.mask()[:, :, self.num_prefix :].nonzero(as_tuple=True)
        return b, h, query + self.num_prefix, key

    @property
    def _keys(self) -> Tensor:
        assert self.lists is not None
        return self.lists[0]


def reason(q: Tensor, k: Tensor, v: Tensor, bias: LogitBias, dropout_p: float) -> str:
    """Why the kernels cannot attend with q, k, v [B, H, N, D] along any connections."""
    if dropout_p:
        return "dropout of attention weights"
    for x in (bias.added, bias.allowed):
        if x is not None and (x.shape[1] > 1 or x.shape[2] > 1):
            return "the mask is not one per key"
    return heads_reason(q, k, v, bias.added)


def select(
    coefficients: Tensor,
    basis: Tensor,
    *,
    kept: int | None = None,
    threshold: Tensor | None = None,
    order: Tensor | None = None,
) -> ListedConnections:
    """`select_topk` or `select_threshold` by a kernel that leaves the lists which attention walks along.

    Args:
        coefficients: of the patch queries, float32 [B, H, T, K].
        basis: float32 [K, N] or [B, K, N].
        kept: keys per query.
        threshold: instead, the score that kept keys exceed, [H].
        order: patch queries in an order that makes neighbours of those which keep the same keys, [1 or B, T]: lists get
            shorter, results stay the same. None: as they are numbered.
    """
    use_triton("triton", coefficients, lambda: select_reason(coefficients, basis))
    from vtoken_kernels.library import select_lists

    if order is None:
        order = torch.arange(coefficients.shape[2], device=coefficients.device).unsqueeze(0)
    order = order.to(torch.int32)
    limit = None if threshold is None else threshold.detach().float().contiguous()
    lists = select_lists(coefficients.detach(), basis.detach(), order, limit, 0 if kept is None else kept)
    return ListedConnections(basis.shape[-1], order=order, lists=lists, kept=kept)


def attend(q: Tensor, k: Tensor, v: Tensor, connections: Connections, bias: LogitBias, scale: float) -> Tensor:
    """`sparse_attention` of arguments for which `reason` says nothing."""
    from vtoken_kernels.library import sparse_attention

    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
    order, lists, rows, kept = _lists_of(connections)
    out: Tensor = sparse_attention(
        q, k, v, _per_key(bias), order, *lists, connections.num_prefix, rows, kept, float(scale)
    )[0]  # fmt: skip
    return out


def _per_key(bias: LogitBias) -> Tensor | None:
    """Float32 [1 or B, N]."""
    added = None if bias.added is None else bias.added.detach()[:, 0, 0].float()
    if bias.allowed is None:
        return added
    allowed = bias.allowed[:, 0, 0]
    none = torch.zeros((), dtype=torch.float32, device=allowed.device) if added is None else added
    return torch.where(allowed, none, -float("inf"))


def _lists_of(c: Connections) -> tuple[Tensor | None, tuple[Tensor, Tensor | None, Tensor | None], int, int]:
    """The order of the patch queries, their lists, queries per block, and keys per query (N where that differs)."""
    if isinstance(c, ListedConnections):
        assert c.lists is not None
        return c.order, c.lists, BLOCK, c.num_tokens if c.kept is None else c.kept
    from vtoken_kernels.library import connect_lists

    if c.index is None:
        assert c.col is not None
        return None, connect_lists(c.col, c.crow, c.num_queries, c.num_tokens, 1), BLOCK, c.num_tokens
    kept = c.index.shape[3]
    if c.order is None:
        return None, connect_lists(c.index, None, c.num_queries, c.num_tokens, 1), BLOCK, kept
    size, order = -(-c.num_queries // c.index.shape[2]), c.order.to(torch.int32)
    if _LEAST_ROWS <= size <= BLOCK:  # a group is a block all of whose queries keep all entries
        return order, (c.index.to(torch.int32), None, None), size, kept
    return order, connect_lists(c.index, None, c.num_queries, c.num_tokens, size), BLOCK, kept
