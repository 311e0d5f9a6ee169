"""Which keys every query keeps: Connections, and their selection from low-rank scores (arXiv 2303.13755 section 3).

The scores of the patch queries are `coefficients @ basis`; selection computes them a few queries at a time, so that
all N x N of them never exist together, and nothing here carries a gradient. Patch queries are the last T of N tokens;
the P = N - T prefix tokens before them keep all keys as queries and are ordinary candidates as keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ShapeError
from vtoken.ops.backend import BACKENDS, limits_of, use_triton, width_reason
from vtoken.ops.largest import branch_free, largest_index
from vtoken.ops.sparse.hilbert import hilbert_order

#: Scores alive at one time: 2 MB, which stay near the core; on an accelerator 256 MB, which keeps it busy.
_SCORES = {"cpu": 2**19}
_SCORES_ELSEWHERE = 2**26


@dataclass(frozen=True, eq=False)
class Connections:
    """The keys that each patch query keeps, in one of three forms. Made by the `select_` functions.

    Args:
        num_tokens: N, prefix tokens included.
        index: kept keys in ascending order, int64; [B, H, T, k] per query ("topk"), or [B, H, groups, k] per group of
            queries ("grouped").
        order: "grouped" only: patch queries (0..T-1) in the order in which they are cut into groups, [1 or B, T].
            All groups have ceil(T / groups) queries but the last, which may have fewer.
        crow: "threshold" only: where the keys of each query start in `col`, [B, H, T + 1] int64.
        col: "threshold" only: kept keys, ascending within a query, [nnz] int64.
    """

    num_tokens: int
    index: Tensor | None = None
    order: Tensor | None = None
    crow: Tensor | None = None
    col: Tensor | None = None

    def __post_init__(self) -> None:
        checks.whole("Connections", "num_tokens", self.num_tokens, 1)
        for name in ("index", "order", "crow", "col"):
            if getattr(self, name) is not None:
                checks.tensor("Connections", name, getattr(self, name))

    @property
    def form(self) -> str:
        """ "topk", "grouped" or "threshold"."""
        if self.index is None:
            return "threshold"
        return "topk" if self.order is None else "grouped"

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        """B and H."""
        batch, heads = self._keys.shape[:2]
        return batch, heads

    @property
    def num_queries(self) -> int:
        """Patch queries, T."""
        if self.order is not None:
            return self.order.shape[1]
        return self._keys.shape[2] - (self.index is None)

    @property
    def num_prefix(self) -> int:
        """Prefix tokens, P."""
        return self.num_tokens - self.num_queries

    @property
    def count(self) -> int:
        """Kept query-key pairs over batch and heads, those of the prefix queries included."""
        batch, heads = self.batch_and_heads
        prefix = batch * heads * self.num_prefix * self.num_tokens
        if self.col is not None:
            return prefix + self.col.shape[0]
        assert self.index is not None
        return prefix + batch * heads * self.num_queries * self.index.shape[-1]

    @property
    def density(self) -> float:
        """Share of all B * H * N * N pairs that is kept."""
        batch, heads = self.batch_and_heads
        return self.count / max(1, batch * heads * self.num_tokens**2)

    @property
    def keeps_all(self) -> bool:
        """Whether every pair is kept."""
        batch, heads = self.batch_and_heads
        return self.count == batch * heads * self.num_tokens**2

    def mask(self) -> Tensor:
        """Every pair: bool [B, H, N, N], rows are queries."""
        batch, heads = self.batch_and_heads
        mask = torch.zeros(batch, heads, self.num_tokens, self.num_tokens, dtype=torch.bool, device=self._keys.device)
        mask[:, :, : self.num_prefix] = True
        if self.form == "topk":
            assert self.index is not None
            mask[:, :, self.num_prefix :].scatter_(3, self.index, True)
        else:
            mask[self.pairs()] = True
        return mask

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices (b, h, query, key) that pick the kept pairs of the patch queries out of a [B, H, N, N] tensor.

        They broadcast to [B, H, T, k] ("topk"), [B, H, groups, ceil(T / groups), k] ("grouped"; the last query fills
        up the last group), or [nnz] ("threshold").
        """
        (batch, heads), device = self.batch_and_heads, self._keys.device
        if self.index is None:
            assert self.crow is not None
            assert self.col is not None
            rows = torch.arange(batch * heads * self.num_queries, device=device)
            rows = rows.repeat_interleave(self.crow.diff().flatten(), output_size=self.col.shape[0])
            head, query = rows // self.num_queries, rows % self.num_queries
            return head // heads, head % heads, query + self.num_prefix, self.col
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(-1, 1, 1)
        if self.order is None:
            return b, h, torch.arange(self.num_prefix, self.num_tokens, device=device).view(-1, 1), self.index
        queries = self.grouped_order() + self.num_prefix
        return b.unsqueeze(-1), h.unsqueeze(-1), queries[:, None, :, :, None], self.index.unsqueeze(3)

    def grouped_order(self) -> Tensor:
        """`order` cut into groups, the last one filled up by its last query: [1 or B, groups, ceil(T / groups)]."""
        assert self.index is not None
        assert self.order is not None
        groups = self.index.shape[2]
        size = -(-self.num_queries // groups)
        missing = groups * size - self.num_queries
        filled = torch.cat([self.order, self.order[:, -1:].expand(-1, missing)], dim=1)
        return filled.view(-1, groups, size)

    @property
    def _keys(self) -> Tensor:
        keys = self.crow if self.index is None else self.index
        assert keys is not None
        return keys


def num_kept(keep_ratio: float, num_tokens: int, num_original: int | None = None) -> int:
    """Keys per query: `keep_ratio` of the original number of tokens (None: of `num_tokens`), at most `num_tokens`.

    Raises:
        ConfigError: if `keep_ratio` is not in (0, 1], or `num_original` no whole number from 1 on.
    """
    what = "the share of keys that a query keeps, "
    keep_ratio = checks.share("num_kept", "keep_ratio", keep_ratio, what=what)
    if num_original is None:
        num_original = num_tokens
    return min(checks.share_of(keep_ratio, checks.whole("num_kept", "num_original", num_original, 1)), num_tokens)


@limits_of("select_topk", "select_grouped")
def select_reason(coefficients: Tensor, basis: Tensor) -> str:
    """Why the kernels cannot select keys by coefficients [B, H, T, K] times a basis [K, N] or [B, K, N]."""
    for name, x in (("coefficients", coefficients), ("basis", basis)):
        if x.dtype != torch.float32:
            return f"{name} are {x.dtype}; kernels select by float32 scores"
    return width_reason("coefficients", coefficients, 1024)


@torch.no_grad()
def select_topk(
    coefficients: Tensor,
    basis: Tensor,
    keep_ratio: float,
    *,
    num_original: int | None = None,
    backend: str = "auto",
) -> Connections:
    """The k keys with the largest scores for every patch query, equal scores by the lowest key index.

    Args:
        coefficients: of the patch queries, [B, H, T, K].
        basis: [K, N], or [B, K, N] where the images of a batch have lost different tokens.
        keep_ratio: k = min(ceil(keep_ratio * num_original), N).
        num_original: tokens before any were removed; None: N.
        backend: "auto", "torch" or "triton".

    Raises:
        ShapeError: if the tensors do not fit each other. InputError: if one is none.
        ConfigError: if `keep_ratio` is not in (0, 1], `num_original` no whole number, the backend unknown or unable.

    Example:
        >>> import torch, vtoken
        >>> coefficients, basis = torch.rand(1, 2, 12, 4), torch.rand(4, 13)  # 12 patches, one prefix token
        >>> vtoken.ops.select_topk(coefficients, basis, keep_ratio=0.25).index.shape
        torch.Size([1, 2, 12, 4])

    Source: arXiv 2303.13755 section 3.2; ties as docs/methods/sparsifiner.md 3.
    """
    num_tokens = _check("select_topk", coefficients, basis)
    checks.choice("select_topk", "backend", backend, BACKENDS)
    k = num_kept(keep_ratio, num_tokens, num_original)
    if use_triton(backend, coefficients, lambda: select_reason(coefficients, basis)):
        from vtoken_kernels.library import select_rows

        return Connections(num_tokens, index=select_rows(coefficients, basis, k).to(torch.int64))
    chunks: list[Tensor] = []
    room = None
    for scores in _score_chunks(coefficients, basis):
        if room is None and not branch_free(scores):  # no later piece is larger
            room = torch.empty_like(scores)
        chunks.append(largest_index(scores, k, room))
    return Connections(num_tokens, index=torch.cat(chunks, dim=1).view(*coefficients.shape[:3], k))


@torch.no_grad()
def select_threshold(coefficients: Tensor, basis: Tensor, threshold: float | Tensor) -> Connections:
    """The keys whose score is greater than `threshold`, one number or one per head [H]; there may be none.

    Tensors and errors as `select_topk`; a threshold is a finite number or a tensor [H] or []. The number of kept keys
    depends on the values, so this neither compiles into one graph nor runs on the meta device.

    Example:
        >>> import torch, vtoken
        >>> coefficients, basis = torch.ones(1, 2, 12, 1), torch.arange(13.0).unsqueeze(0)
        >>> vtoken.ops.select_threshold(coefficients, basis, 10.5).mask()[0, 0, 1].nonzero().flatten()
        tensor([11, 12])

    Source: arXiv 2303.13755 section 3.2.
    """
    num_tokens = _check("select_threshold", coefficients, basis)
    batch, heads, queries, _ = coefficients.shape
    if not isinstance(threshold, Tensor):
        threshold = checks.number("select_threshold", "threshold", threshold)
    elif tuple(threshold.shape) not in ((), (1,), (heads,)):
        raise ShapeError(f"threshold must be one number or [{heads}], one per head, got {tuple(threshold.shape)}")
    if batch == 0:  # there is nothing to concatenate
        none = torch.zeros(0, dtype=torch.int64, device=coefficients.device)
        return Connections(num_tokens, crow=none.new_zeros(0, heads, queries + 1), col=none)
    step = _rows_at_a_time(coefficients.device, num_tokens, queries)
    limits = torch.as_tensor(threshold, dtype=coefficients.dtype, device=coefficients.device).expand(heads)
    counts, cols = [], []
    for b in range(batch):
        for h in range(heads):
            for rows in coefficients[b, h].split(step):
                kept = (rows @ (basis if basis.dim() == 2 else basis[b])) > limits[h]
                counts.append(kept.sum(-1))
                cols.append(kept.view(-1).nonzero().view(-1) % num_tokens)
    ends = torch.cat(counts).cumsum(0).view(batch, heads, queries)
    first = F.pad(ends[:, :, -1].flatten()[:-1], (1, 0)).view(batch, heads, 1)
    return Connections(num_tokens, crow=torch.cat([first, ends], dim=2), col=torch.cat(cols))


@torch.no_grad()
def select_grouped(
    coefficients: Tensor,
    basis: Tensor,
    keep_ratio: float,
    *,
    grid: tuple[int, int],
    group_size: int = 64,
    live: Tensor | None = None,
    num_original: int | None = None,
    backend: str = "auto",
) -> Connections:
    """The k best keys for every group of neighbouring patch queries, by the mean of the group's coefficients.

    Patches are ordered along a Hilbert curve and cut into ceil(T / group_size) groups of equal size (the last may be
    smaller). group_size=1 gives the keys of `select_topk`. A departure from the paper, for speed.

    Args:
        coefficients, basis, keep_ratio, num_original, backend: as `select_topk`.
        grid: rows and columns of the patch grid.
        group_size: queries that share their keys, at most.
        live: the tokens of the grid that are still there, [B, N], prefix tokens first; None: all of them.

    Raises:
        ShapeError, InputError, ConfigError: as `select_topk`; if grid or `live` do not fit; if `group_size` is no whole
            number from 1 on.

    Example:
        >>> import torch, vtoken
        >>> coefficients, basis = torch.rand(1, 2, 12, 4), torch.rand(4, 13)
        >>> vtoken.ops.select_grouped(coefficients, basis, 0.25, grid=(3, 4), group_size=4).index.shape
        torch.Size([1, 2, 3, 4])

    Source: docs/methods/sparsifiner.md 8.
    """
    num_tokens = _check("select_grouped", coefficients, basis)
    group_size = checks.whole("select_grouped", "group_size", group_size, 1)
    grid = checks.grid("select_grouped", "grid", grid)
    checks.choice("select_grouped", "backend", backend, BACKENDS)
    queries = coefficients.shape[2]
    order = query_order(grid, live, num_tokens, queries, coefficients)
    size = -(-queries // -(-queries // group_size))
    if size == 1:
        order, pooled = torch.arange(queries, device=order.device).unsqueeze(0), coefficients
    else:
        # A product with the [groups, T] membership is faster than moving the rows together; and sums order the keys
        # as means do. Heads share it, so they are rows of one product: K * H of them, as the predictor lays them out.
        group_of = (order.argsort(1) // size).unsqueeze(1)
        member = coefficients.new_zeros(order.shape[0], -(-queries // size), queries).scatter(1, group_of, 1.0)
        rows = coefficients.transpose(-1, -2).flatten(1, 2)
        pooled = (rows @ member.transpose(-1, -2)).unflatten(1, (coefficients.shape[1], -1)).transpose(-1, -2)
    index = select_topk(pooled, basis, keep_ratio, num_original=num_original, backend=backend).index
    return Connections(num_tokens, index=index, order=order)


def query_order(
    grid: tuple[int, int], live: Tensor | None, num_tokens: int, queries: int, like: Tensor
) -> Tensor:  # fmt: skip
    """Patch queries along the Hilbert curve: [1, T], or [B, T] if images have lost different tokens."""
    order = hilbert_order(*grid, like.device)
    if live is None:
        if order.shape[0] != queries:
            raise ShapeError(
                f"a grid of {grid[0]} x {grid[1]} has {order.shape[0]} patches, but there are {queries} patch queries; "
                "pass live= if tokens have been removed"
            )
        return order.unsqueeze(0)
    if tuple(checks.tensor("select_grouped", "live", live).shape) != (like.shape[0], num_tokens):
        raise ShapeError(f"live must be [{like.shape[0]}, {num_tokens}] (one row per token), got {tuple(live.shape)}")
    prefix = num_tokens - queries
    return order.argsort()[live[:, prefix:] - prefix].argsort(1)


def _check(owner: str, coefficients: Tensor, basis: Tensor) -> int:
    """N, if the tensors fit each other."""
    checks.tensor(owner, "coefficients", coefficients)
    checks.tensor(owner, "basis", basis)
    fits = coefficients.dim() == 4 and basis.dim() in (2, 3) and basis.shape[-2] == coefficients.shape[3]
    if not fits or (basis.dim() == 3 and basis.shape[0] != coefficients.shape[0]):
        raise ShapeError(
            f"coefficients must be [B, H, T, K] and basis [K, N] or [B, K, N], got {tuple(coefficients.shape)} and "
            f"{tuple(basis.shape)}"
        )
    if not 0 < coefficients.shape[2] <= basis.shape[-1]:
        raise ShapeError(f"{coefficients.shape[2]} patch queries do not fit {basis.shape[-1]} tokens")
    return basis.shape[-1]


def _score_chunks(coefficients: Tensor, basis: Tensor) -> Iterator[Tensor]:
    """Scores of some of the rows (b, h, t) at a time: [1, rows, N], or [B, rows, N] if each image has its basis."""
    rows = coefficients.flatten(0, 2).unsqueeze(0) if basis.dim() == 2 else coefficients.flatten(1, 2)
    if torch.compiler.is_compiling():  # how many passes a graph holds cannot depend on the batch
        yield rows @ basis
        return
    step = _rows_at_a_time(rows.device, rows.shape[0] * basis.shape[-1], rows.shape[1])
    if basis.dim() == 2 and _has_onednn(rows):
        # Twice as fast on AMD as MKL, whose product torch would take; where measured, equal to the last bit.
        weight = basis.t().contiguous().to_mkldnn()
        for some in rows[0].split(step):
            yield F.linear(some.to_mkldnn(), weight).to_dense().unsqueeze(0)
        return
    for some in rows.split(step, dim=1):
        yield some @ basis


def _has_onednn(x: Tensor) -> bool:
    if branch_free(x) or x.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _rows_at_a_time(device: torch.device, row_size: int, queries: int) -> int:
    if (
        device.type == "meta" or torch.compiler.is_compiling()
    ):  # how many passes a graph holds may not hang on the batch
        return max(1, queries)
    return max(1, min(_SCORES.get(device.type, _SCORES_ELSEWHERE) // max(1, row_size), queries // 2))
