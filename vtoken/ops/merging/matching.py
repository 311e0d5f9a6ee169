"""Which tokens merge with which: PiToMe's energy matching and its baselines, as MergePlans.

Source: docs/methods/pitome.md 2 and docs/methods/baselines.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, ShapeError
from vtoken.ops import backend as _backend
from vtoken.ops.backend import BACKENDS, limits_of, use_triton, width_reason
from vtoken.ops.merging import native
from vtoken.ops.merging.plan import HALF, MergePlan
from vtoken.ops.rows import full_precision, take_rows

VARIANTS = ("pitome", "pitome_pairs", "tome", "text")
ENERGIES = ("elu", "eq4")
_LOG2E = math.log2(math.e)
#: Most similarities that are computed at once: on a CPU what fits a core's cache (half a MiB of float32), elsewhere,
#: where passes over memory are cheap and launches are not, what may be held (1 GiB); and the fewest rows, which keep
#: the product fast.
_CACHED, _HELD, _LEAST_ROWS = 1 << 17, 1 << 28, 32


def _in_c(
    metric: Tensor, *, variant: str = "pitome", energy: str = "elu", protect: object = None
) -> str:  # fmt: skip
    """Why C cannot match by this metric [B, T, d]."""
    if variant == "text" or (energy != "elu" and variant != "tome") or protect is not None:
        return 'C functions have no variant "text", no energy "eq4" and no protect'
    return native.matching_lacks(metric)


@limits_of("plan_pitome", "plan_tome", native=_in_c)
def metric_reason(
    metric: Tensor, *, variant: str = "pitome", energy: str = "elu", protect: object = None
) -> str:  # fmt: skip
    """Why the kernels cannot match by this metric [B, T, d]."""
    if variant == "text":
        return 'the variant "text"'
    if variant == "pitome_pairs" and protect is not None:
        return 'protect with the variant "pitome_pairs"'
    return width_reason("metric", metric, 8192)


@limits_of("key_metric", native=native.lacks)
def keys_reason(keys: Tensor) -> str:
    """Why the kernels cannot add up the heads of keys [B, H, T, D]."""
    return width_reason("keys", keys, 8192)


def key_metric(keys: Tensor, *, backend: str = "auto") -> Tensor:
    """Attention keys [B, H, T, D] as one vector per token: their sum over heads, [B, T, D], at least float32.

    Cosine similarity does not see the missing factor 1/H, and the sum is twice as fast as the mean here.

    Raises:
        ShapeError: if the keys are not 4-D. ConfigError: if the backend is unknown or cannot serve them.

    Example:
        >>> import torch, vtoken
        >>> vtoken.ops.key_metric(torch.randn(2, 6, 197, 64)).shape
        torch.Size([2, 197, 64])
    """
    checks.tensor("key_metric", "keys", keys, 4, shape="[B, H, T, D]")
    checks.choice("key_metric", "backend", backend, BACKENDS)
    return summed_keys(keys, backend)


def summed_keys(keys: Tensor, backend: str = "auto") -> Tensor:
    """`key_metric` of checked arguments."""
    if backend == "auto" and keys.is_cpu and not native.lacks(keys):
        return native.sum_heads(keys)
    # The kernels are asked for only where they may be: a block at batch 1 feels every call.
    if (backend != "auto" or keys.is_cuda or _backend.FORCED) and use_triton(backend, keys, lambda: keys_reason(keys)):
        from vtoken_kernels.library import sum_heads

        summed: Tensor = sum_heads(keys.detach())
        return summed
    if keys.requires_grad:
        keys = keys.detach()
    return keys.sum(1, dtype=torch.float32) if keys.dtype in HALF else keys.sum(1)


def plan_pitome(
    metric: Tensor,
    r: int,
    *,
    margin: float | Tensor,
    alpha: float = 1.0,
    num_prefix: int = 0,
    variant: str = "pitome",
    energy: str = "elu",
    protect: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> MergePlan:
    """Energy-based matching: the 2r tokens with the most near neighbours pair up, isolated tokens are left alone.

    Args:
        metric: one vector per token, [B, T, d]; compared by cosine in float32 (float64 stays float64), without
            gradient. Prefix rows come first and take no part.
        r: tokens to remove, at least 0; capped at half of the tokens that may merge.
        margin: similarity above which two tokens count as close, in [-1, 1]; in a compiled graph it may be a tensor [],
            which is not made a constant.
        alpha: weight of the similarities below the margin.
        num_prefix: prefix tokens P (class, registers, distillation); they keep rows 0..P-1.
        variant: "pitome"; "pitome_pairs" (all tokens dealt by energy, the r best pairs merge, nothing protected);
            "tome" (`plan_tome`, energies unused); "text" (the published form for text encoders: energies are sums of
            exp(-((1 - cos) / (1 - margin)) ** 2 / 2), the r highest are sources, the next r destinations; all texts
            of a batch must have one length, as padding would count as tokens. The published margin is
            0.9 - 0.25 * layer / L, in the first 3 layers, with 20 % of the tokens removed in each; an attention mask is
            merged by `plan.apply(mask, reduction="amax")`).
        energy: "elu" (continuous at the margin) or "eq4" (the paper's equation 4, which jumps there); unused by "text".
        protect: more tokens that must not merge: a mask [B, N], or row numbers [B, p] or [p] among the N = T - P
            (in a tensor they must be distinct and in range: checking would synchronise a GPU).
        backend: "auto" (kernels on a GPU and C on a CPU where they can, else torch), "torch" or "triton".

    Raises:
        ShapeError: if `metric` is not 3-D or `protect` does not fit it.
        InputError: if `metric` is no tensor.
        ConfigError: if a number is out of range, a name is unknown, or kernels are asked for that cannot serve the
            metric.

    Example:
        >>> import torch, vtoken
        >>> x = torch.randn(2, 197, 64)
        >>> plan = vtoken.ops.plan_pitome(x, 20, margin=0.5, num_prefix=1)
        >>> rows, size = plan.apply(x)
        >>> rows.shape, int(size[0].sum())
        (torch.Size([2, 177, 64]), 197)

    Source: arXiv 2405.16148 section 3; order and ties as docs/methods/pitome.md 2.
    """
    checks.choice("plan_pitome", "variant", variant, VARIANTS)
    checks.choice("plan_pitome", "energy", energy, ENERGIES)
    checks.choice("plan_pitome", "backend", backend, BACKENDS)
    if not (isinstance(margin, Tensor) and margin.dim() == 0):
        margin = checks.number("plan_pitome", "margin", margin, -1, 1, what="a cosine similarity, ")
    if variant == "text":
        checks.number("plan_pitome", "margin", margin, -1, below=1, what='of the variant "text", ')
    alpha = checks.number("plan_pitome", "alpha", alpha, 0)
    if variant == "tome" and protect is not None:
        raise ConfigError('protect works with the other variants, not with "tome", which protects nothing')
    r, num_prefix = _check("plan_pitome", metric, r, num_prefix)
    r = min(r, (metric.shape[1] - num_prefix) // 2)
    return energy_matching(
        metric, r, num_prefix, margin=margin, alpha=alpha, variant=variant, energy=energy, protect=protect,
        backend=backend,
    )  # fmt: skip


def energy_matching(
    metric: Tensor,
    r: int,
    num_prefix: int,
    *,
    margin: float | Tensor,
    alpha: float | Tensor,
    variant: str,
    energy: str,
    protect: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> MergePlan:
    """`plan_pitome` of checked arguments, r at most half of the tokens that may merge."""
    if variant == "tome":
        return bipartite_matching(metric, r, num_prefix, backend)
    mergeable = metric.shape[1] - num_prefix
    guard, most, fewest = (None, 0, 0) if protect is None else _protected(metric, num_prefix, protect)
    if guard is not None:
        r = min(r, (mergeable - most) // 2)
    if r <= 0:
        return MergePlan.identity(metric.shape[0], metric.shape[1], metric.device)
    if not (isinstance(margin, Tensor) or isinstance(alpha, Tensor)):  # C and kernels take them as numbers
        pairs = variant == "pitome_pairs"
        num_dest = mergeable // 2 if pairs else r
        if (
            backend == "auto"
            and metric.is_cpu
            and not _in_c(metric, variant=variant, energy=energy, protect=protect)
            and 2 * r <= mergeable  # a method may have asked for more, and is told so by what comes out
        ):
            rows, slot = native.pitome(metric, r, num_prefix, margin, alpha, pairs)
            return MergePlan.laid_out(rows, slot, num_dest)
        if (backend != "auto" or metric.is_cuda or _backend.FORCED) and use_triton(
            backend, metric, lambda: metric_reason(metric, variant=variant, protect=protect)
        ):
            from vtoken_kernels import library

            parts = library.plan_pitome(metric.detach(), guard, r, num_prefix, margin, alpha, energy == "eq4", pairs)
            return _from_kernels(parts, metric.shape[1], num_dest)
    with full_precision(metric):
        unit = _unit_rows(metric)
        energies = _energies(unit[:, num_prefix:], margin, alpha, "text" if variant == "text" else energy)
        if guard is not None:
            energies = energies.masked_fill(guard, float("-inf"))
        if variant in ("pitome", "text"):
            # Prefix rows take part with the lowest energy of all, so that they come out among the kept rows.
            full = F.pad(energies, (num_prefix, 0), value=float("-inf")) if num_prefix else energies
            order = torch.sort(full, dim=1, descending=True, stable=True)[1]
            if variant == "text":  # not dealt in turn: the first r are the sources
                dealt = torch.stack([order[:, :r], order[:, r : 2 * r]], dim=2).flatten(1)
                order = torch.cat([dealt, order[:, 2 * r :]], dim=1)
            return _plan_from_order(unit, order, r)
        order = torch.sort(energies, dim=1, descending=True, stable=True)[1] + num_prefix
        plan = _plan_best_pairs(unit, order[:, 0::2], order[:, 1::2], r, num_prefix, guard)
        return plan if guard is None else _guarded_among_kept(plan, guard, num_prefix, (mergeable - fewest) // 2)


def plan_tome(metric: Tensor, r: int, *, num_prefix: int = 0, backend: str = "auto") -> MergePlan:
    """Bipartite soft matching: rows with an even absolute index each propose their best odd row; the r best merge.

    Args:
        metric: one vector per token, [B, T, d], prefix rows first.
        r: tokens to remove, at least 0; capped at floor((T - P) / 2).
        num_prefix: prefix tokens P, in neither set.
        backend: as `plan_pitome`.

    Returns:
        A plan whose output rows are [prefix | unmerged even rows | odd rows], both in index order.

    Raises:
        ShapeError, ConfigError: as `plan_pitome`.

    Example:
        >>> import torch, vtoken
        >>> vtoken.ops.plan_tome(torch.randn(2, 197, 64), 20, num_prefix=1).num_tokens
        177

    Source: arXiv 2210.09461 section 3 and appendix D.
    """
    r, num_prefix = _check("plan_tome", metric, r, num_prefix)
    checks.choice("plan_tome", "backend", backend, BACKENDS)
    return bipartite_matching(metric, min(r, (metric.shape[1] - num_prefix) // 2), num_prefix, backend)


def bipartite_matching(metric: Tensor, r: int, num_prefix: int, backend: str = "auto") -> MergePlan:
    """`plan_tome` of checked arguments, r at most half of the tokens that may merge.

    Not capped here, where a graph would carry the smaller of two numbers through the conditions of all its shapes.
    """
    batch, num_tokens, _ = metric.shape
    if r <= 0:
        return MergePlan.identity(batch, num_tokens, metric.device)
    if (
        backend == "auto"
        and metric.is_cpu
        and not _in_c(metric, variant="tome")
        and 2 * r <= num_tokens - num_prefix  # see energy_matching
    ):
        rows, slot = native.tome(metric, r, num_prefix)
        return MergePlan.laid_out(rows, slot, (num_tokens - num_prefix + num_prefix % 2) // 2)
    if (backend != "auto" or metric.is_cuda or _backend.FORCED) and use_triton(
        backend, metric, lambda: metric_reason(metric)
    ):
        from vtoken_kernels import library

        parts = library.plan_tome(metric.detach(), r, num_prefix)
        return _from_kernels(parts, num_tokens, (num_tokens - num_prefix + num_prefix % 2) // 2)
    first, second = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
    with full_precision(metric):
        unit = _unit_rows(metric)
        value, best = _over_similarities(_nearest, unit[:, first::2], unit[:, second::2])
    rank = torch.sort(value, dim=1, descending=True, stable=True)[1]
    rows = torch.arange(num_tokens, device=metric.device).expand(batch, num_tokens)
    even = torch.add(rows[:, first : first + 1], rank, alpha=2)  # `rank` counts even rows
    kept, src = torch.sort(even[:, r:], dim=1)[0], even[:, :r]
    return MergePlan.of([rows[:, :num_prefix], kept, rows[:, second::2]], src, best.gather(1, rank[:, :r]))


def plan_threshold(metric: Tensor, r: int, *, threshold: float, num_prefix: int = 0) -> MergePlan:
    """`plan_tome` with as many of the r pairs as are alike enough in every image of the batch.

    Rows with an even absolute index each propose their best odd row. An image allows as many merges as it has proposals
    with a cosine above `threshold`; the plan takes the least of these numbers over the batch, at most r, and in each
    image so many of the best proposals. So all images keep equally many rows, and no pair at or below the threshold
    merges. The number is read from the device, once per call, which waits for it.

    Args:
        metric: one vector per token, [B, T, d], prefix rows first; compared as in `plan_pitome`.
        r: tokens to remove at most, at least 0; capped as in `plan_tome`.
        threshold: cosine above which two tokens may merge, in [-1, 1]. At 1 nothing does.
        num_prefix: prefix tokens P, in neither set.

    Returns:
        The plan that `plan_tome` makes of so many tokens.

    Raises:
        ShapeError, InputError: if `metric` is not 3-D or lacks prefix rows, or is no tensor.
        ConfigError: if a number is out of range.

    Example:
        >>> import torch
        >>> from vtoken.ops import plan_threshold
        >>> metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
        >>> plan_threshold(metric, 2, threshold=0.9).num_tokens
        3

    Source: docs/methods/threshold.md 2.
    """
    r, num_prefix = _check("plan_threshold", metric, r, num_prefix)
    threshold = checks.number("plan_threshold", "threshold", threshold, -1, 1, what="a cosine similarity, ")
    batch, num_tokens, _ = metric.shape
    rows = torch.arange(num_tokens, device=metric.device).expand(batch, num_tokens)
    even, odd = rows[:, num_prefix + num_prefix % 2 :: 2], rows[:, num_prefix + 1 - num_prefix % 2 :: 2]
    r = min(r, (num_tokens - num_prefix) // 2, even.shape[1])
    if r <= 0 or batch == 0:
        return MergePlan.identity(batch, num_tokens, metric.device)
    with full_precision(metric):
        unit = _unit_rows(metric)
        value, best = _over_similarities(_nearest, take_rows(unit, even), take_rows(unit, odd))
    if torch.compiler.is_dynamo_compiling():  # which would speak of symbols where a whole graph was asked for
        torch._dynamo.graph_break(
            "the rows decide how many tokens merge, which no single graph can hold: leave it eager, or take "
            "torch.compile without fullgraph"
        )
    # Equal rows may come out above 1 by rounding.
    r = min(r, int((value.clamp_max(1.0) > threshold).sum(1).amin()))
    if r == 0:
        return MergePlan.identity(batch, num_tokens, metric.device)
    rank = torch.sort(value, dim=1, descending=True, stable=True)[1]
    kept = torch.sort(even.gather(1, rank[:, r:]), dim=1)[0]
    return _assemble(even.gather(1, rank[:, :r]), best.gather(1, rank[:, :r]), kept, odd, num_prefix)


def plan_random(metric: Tensor, r: int, *, num_prefix: int = 0, seed: int = 0) -> MergePlan:
    """Control: r sources and r destinations drawn uniformly, then every source joins its most similar destination.

    The draw is a hash of (seed, row), the same for every image of a batch and on every device; no random number
    generator is touched. Arguments and errors as `plan_tome`; r is capped at half of the mergeable tokens.

    Example:
        >>> import torch, vtoken
        >>> vtoken.ops.plan_random(torch.randn(2, 197, 64), 20, num_prefix=1, seed=3).num_tokens
        177
    """
    r, num_prefix = _check("plan_random", metric, r, num_prefix)
    seed = checks.whole("plan_random", "seed", seed)
    batch, num_tokens, _ = metric.shape
    r = min(r, (num_tokens - num_prefix) // 2)
    if r <= 0:
        return MergePlan.identity(batch, num_tokens, metric.device)
    order = _hashed_order(num_tokens - num_prefix, seed, metric.device) + num_prefix
    order = torch.cat([order, torch.arange(num_prefix, device=metric.device)]).expand(batch, -1)
    with full_precision(metric):
        return _plan_from_order(_unit_rows(metric), order, r)


def plan_stride(metric: Tensor, stride: int, *, num_prefix: int = 0) -> MergePlan:
    """Control: mergeable rows 0, k, 2k, ... are destinations; all others join the most similar one.

    Raises:
        ShapeError, InputError: if `metric` is not 3-D, or no tensor. ConfigError: if `stride` is no whole number from
            1 on.

    Example:
        >>> import torch, vtoken
        >>> vtoken.ops.plan_stride(torch.randn(2, 197, 64), 2, num_prefix=1).keep[0, :4].tolist()
        [0, 1, 3, 5]
    """
    stride = checks.whole("plan_stride", "stride", stride, 1, what="every stride-th token is kept, so it ")
    _, num_prefix = _check("plan_stride", metric, 0, num_prefix)
    batch, num_tokens, _ = metric.shape
    kept = torch.arange(num_prefix, num_tokens, stride, device=metric.device)
    count = num_tokens - num_prefix - kept.shape[0]
    if count == 0:
        return MergePlan.identity(batch, num_tokens, metric.device)
    # The other row numbers, without a boolean index (it would synchronise on a GPU).
    others = torch.arange(count, device=metric.device)
    others = others + others // (stride - 1) + 1 + num_prefix
    with full_precision(metric):
        unit = _unit_rows(metric)
        return _plan_best_pairs(unit, others.expand(batch, -1), kept.expand(batch, -1), count, num_prefix)


def _from_kernels(parts: tuple[Tensor, ...], num_tokens: int, num_dest: int) -> MergePlan:
    keep, src, slot, dest, start, member = parts
    return MergePlan(keep, src, slot, num_tokens, num_dest, (dest, start, member))


def _check(owner: str, metric: Tensor, r: int, num_prefix: int) -> tuple[int, int]:
    checks.tensor(owner, "metric", metric, 3, shape="[B, T, d] (one vector per token)")
    num_prefix = checks.whole(owner, "num_prefix", num_prefix)
    if not 0 <= num_prefix <= metric.shape[1]:
        raise ShapeError(f"num_prefix={num_prefix} does not fit {metric.shape[1]} tokens")
    return checks.whole(owner, "r", r, 0, what="the tokens to remove "), num_prefix


def _protected(metric: Tensor, num_prefix: int, protect: Tensor | Sequence[int]) -> tuple[Tensor, int, int]:
    """The mask [B, N] of protected tokens, and the largest and the smallest number of them in an image."""
    batch, mergeable = metric.shape[0], metric.shape[1] - num_prefix
    if not isinstance(protect, Tensor):
        rows = sorted(set(checks.wholes("plan_pitome", "protect", protect)))
        if rows and not 0 <= rows[0] <= rows[-1] < mergeable:
            raise ShapeError(f"protect={rows} does not fit {mergeable} mergeable tokens")
        protect = torch.tensor(rows, dtype=torch.int64, device=metric.device)
    if protect.dtype == torch.bool:
        if tuple(protect.shape) != (batch, mergeable):
            raise ShapeError(f"a protect mask must be [{batch}, {mergeable}], got {tuple(protect.shape)}")
        counts = protect.sum(1).tolist() or [0]
        return protect, max(counts), min(counts)
    if protect.dim() not in (1, 2) or (protect.dim() == 2 and protect.shape[0] != batch):
        raise ShapeError(f"protect indices must be [p] or [{batch}, p], got {tuple(protect.shape)}")
    if protect.is_floating_point() or protect.is_complex():
        raise ConfigError(f"protect must be a mask (bool) or row numbers (whole numbers), got {protect.dtype}")
    if protect.device.type == "cpu" and protect.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in protect.aminmax())
        if low < 0 or high >= mergeable:
            raise ShapeError(f"protect names rows {low} to {high}, which do not fit {mergeable} mergeable tokens")
    mask = torch.zeros(batch, mergeable, dtype=torch.bool, device=metric.device)
    return mask.scatter(1, protect.to(torch.int64).expand(batch, -1), True), protect.shape[-1], protect.shape[-1]


def _unit_rows(metric: Tensor) -> Tensor:
    rows = metric.detach() if metric.requires_grad else metric
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12)


def _over_similarities(
    reduce: Callable[[Tensor], Sequence[Tensor]],
    rows: Tensor,
    others: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = torch.bmm,
) -> Sequence[Tensor]:
    """What `reduce` makes of the similarities [B, n, m] of unit rows [B, n, d] and others [B, m, d]: tensors [B, n].

    Row by row nothing depends on the other rows, so they come in blocks: that is several times as fast where a block
    stays in a core's cache, and long sequences never hold n * m similarities.

    Args:
        product: [B, n, d] and [B, d, m] -> [B, n, m], which `reduce` may overwrite.
    """
    batch, num, _ = rows.shape
    across = others.transpose(1, 2)
    if torch.compiler.is_compiling():  # a graph must not ask how large a batch is
        return reduce(product(rows, across))
    most = _CACHED if rows.device.type == "cpu" else _HELD
    step = max(_LEAST_ROWS, most // max(1, batch * others.shape[1]))
    if step >= num:
        return reduce(product(rows, across))
    found: list[Tensor] = []
    for i in range(0, num, step):
        parts = reduce(product(rows[:, i : i + step], across))
        # Kept apart, the parts would lie in the memory that each block gives back, so that no later block fits there.
        found = found or [part.new_empty(batch, num) for part in parts]
        for whole, part in zip(found, parts, strict=True):
            whole[:, i : i + step] = part
    return found


def _nearest(similarity: Tensor) -> Sequence[Tensor]:
    """Every row's largest similarity and where it is, the first of equals."""
    found: Sequence[Tensor] = similarity.max(-1)
    return found


def _exp2_(x: Tensor) -> Tensor:
    """2 ** x in place; equal rows [..., n] stay equal, bit by bit.

    What a CPU's vectors leave over at the end of a tensor, less than 64 numbers, torch computes by another function,
    rounded differently: that must happen in the same columns of all rows, not in the last row alone.
    """
    full = x.shape[-1] // 64 * 64
    if torch.compiler.is_compiling() or x.device.type != "cpu" or full == x.shape[-1]:
        return x.exp2_()
    x[..., :full].exp2_()
    x[..., full:].exp2_()
    return x


def _energies(unit: Tensor, margin: float | Tensor, alpha: float | Tensor, energy: str) -> Tensor:
    """Energies [B, N]: the sum of f(cos_ij - margin) over all tokens j; high where many tokens are close.

    The paper's mean differs by the factor 1/N, and for "elu" by another factor and a constant; no order sees them.
    """
    # Rounding must not decide between equal energies: a token's similarity to itself and to its equals, 1 but for
    # rounding, is the same number for all.
    top = 1.0 - 8 * torch.finfo(unit.dtype).eps

    if isinstance(margin, Tensor):  # an argument of a graph, which fuses this whichever way it is written
        close = torch.bmm(unit, unit.transpose(1, 2)).clamp_max(top)
        log2e = 1.4426950408889634  # written out: a graph would make an argument of a global number
        beyond = (close - margin) * log2e
        below = alpha * log2e * beyond.clamp_max(0.0).exp2()
        if energy == "elu":
            return (beyond.clamp_min(0.0) + below).sum(-1)
        return torch.where(close >= margin.clamp_max(top), close, below / log2e - alpha).sum(-1)

    def eq4(similarity: Tensor) -> tuple[Tensor]:
        close = similarity.clamp_max_(top)
        below = _exp2_(close.sub(margin).mul_(_LOG2E)).sub_(1.0).mul_(alpha)
        return (torch.where(close >= min(margin, top), close, below).sum(-1),)

    def text(similarity: Tensor) -> tuple[Tensor]:
        beside = similarity.clamp_max_(top).sub_(1.0).square_()
        return (beside.mul_(-0.5 / (1.0 - margin) ** 2).exp_().sum(-1),)

    # elu(z) + alpha = max(z, 0) + alpha * 2^(min(z, 0) log2 e): of expm1, exp and exp2 only the last is fast on every
    # CPU. The product itself makes z log2 e of the similarities.
    highest, weight = (top - margin) * _LOG2E, float(alpha) * _LOG2E  # a number, as the margin is

    def elu(scaled: Tensor) -> tuple[Tensor]:
        above = scaled.clamp(0.0, max(highest, 0.0)).sum(-1)  # exactly 0 where nobody is close: ties for alpha=0
        below = _exp2_(scaled.clamp_max_(min(highest, 0.0))).sum(-1)
        return (above.add_(below, alpha=weight),)

    if energy in ("eq4", "text"):
        return _over_similarities(eq4 if energy == "eq4" else text, unit, unit)[0]
    product = functools.partial(torch.baddbmm, unit.new_full((), -margin * _LOG2E), alpha=_LOG2E)
    return _over_similarities(elu, unit, unit, product)[0]


def _plan_from_order(unit: Tensor, order: Tensor, r: int) -> MergePlan:
    """The first 2r of `order` are dealt into sources and destinations; each source takes its best destination.

    Args:
        unit: all rows [B, T, d], the prefix included.
        order: their numbers [B, T], those of the prefix last.
    """
    src, dest = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2]
    pairs = take_rows(unit, order[:, : 2 * r])
    best = _over_similarities(_nearest, pairs[:, 0::2], pairs[:, 1::2])[1]
    return MergePlan.of([torch.sort(order[:, 2 * r :], dim=1)[0], dest], src, best)


def _plan_best_pairs(
    unit: Tensor, a: Tensor, b: Tensor, r: int, num_prefix: int, guard: Tensor | None = None
) -> MergePlan:
    """Every row of `a` proposes its most similar row of `b`; the r best proposals merge, none with a guarded row."""
    proposing, proposed = take_rows(unit, a), take_rows(unit, b)
    if guard is None:
        value, best = _over_similarities(_nearest, proposing, proposed)
    else:
        barred, never = guard.gather(1, b - num_prefix).unsqueeze(1), float("-inf")
        value, best = _over_similarities(lambda s: _nearest(s.masked_fill_(barred, never)), proposing, proposed)
        value = value.masked_fill(guard.gather(1, a - num_prefix), never)
    rank = torch.sort(value, dim=1, descending=True, stable=True)[1]
    kept = torch.sort(a.gather(1, rank[:, r:]), dim=1)[0]
    return _assemble(a.gather(1, rank[:, :r]), best.gather(1, rank[:, :r]), kept, b, num_prefix)


def _guarded_among_kept(plan: MergePlan, guard: Tensor, num_prefix: int, num_dest: int) -> MergePlan:
    """Guarded rows that were dealt as destinations move to their place among the kept rows; `num_dest` are left."""
    rows = plan.keep[:, num_prefix:]
    position = torch.arange(rows.shape[1], device=rows.device)
    is_dest = (position >= rows.shape[1] - plan.num_dest) & ~guard.gather(1, rows - num_prefix)
    order = torch.where(is_dest, plan.num_tokens_in + position, rows).argsort(dim=1)
    keep = torch.cat([plan.keep[:, :num_prefix], rows.gather(1, order)], dim=1)
    slot = order.argsort(dim=1).gather(1, plan.slot - num_prefix) + num_prefix
    return MergePlan(keep, plan.src, slot, plan.num_tokens_in, num_dest)


def _assemble(src: Tensor, partner: Tensor, kept: Tensor, dest: Tensor, num_prefix: int) -> MergePlan:
    """Lay the rows out as [prefix | kept | destinations]; `partner` counts among the destinations."""
    parts = [kept, dest]
    if num_prefix:
        parts.insert(0, torch.arange(num_prefix, device=kept.device).expand(kept.shape[0], num_prefix))
    return MergePlan.of(parts, src, partner)


def _hashed_order(n: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of 0..n-1 from the 32-bit finaliser of MurmurHash3 on (seed, row); stable for equal hashes."""
    mask = 0xFFFFFFFF
    h = torch.arange(n, device=device) * 0x9E3779B1 + (seed * 0x85EBCA77 + 0x165667B1) % (mask + 1)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        h = h & mask
        h = (h ^ (h >> 16)) * multiplier
    h = h & mask
    return (h ^ (h >> 15)).argsort(stable=True)
