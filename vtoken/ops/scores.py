"""How much attention patches get: from the class token or from everybody; which of them to keep.

Source: docs/methods/vtc_cls.md 2, 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.ops.rows import full_precision

ENSEMBLES = ("mean", "sum", "max", "min")
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_CHUNK = 128  # queries whose whole attention rows exist at once


def class_row(q_cls: Tensor, keys: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention of the class token to every token, averaged over heads.

    Only the class token's row is computed, so memory is O(B*H*T) and fused attention can stay on.

    Args:
        q_cls: class-token queries, [B, H, D].
        keys: keys of all tokens, [B, H, T, D].
        scale: factor on the logits, usually D ** -0.5.
        bias: added to the logits, broadcastable to [B, H, T]; the log-sizes of merged tokens.

    Returns:
        [B, T], float32 (float64 for float64 inputs), detached; each row sums to 1.

    Raises:
        ShapeError: if the shapes do not belong together.

    Example:
        >>> import torch, vtoken
        >>> q, k = torch.randn(2, 1, 4, 10, 16)
        >>> row = vtoken.ops.class_row(q[:, :, 0], k, scale=0.25)
        >>> row.shape, torch.allclose(row.sum(-1), torch.ones(1))
        (torch.Size([1, 10]), True)

    Source: arXiv 2412.05819; softmax over all T keys, the class token's own included.
    """
    if keys.dim() != 4 or q_cls.shape != (*keys.shape[:2], keys.shape[3]):
        raise ShapeError(f"expected queries [B, H, D] and keys [B, H, T, D], got {q_cls.shape} and {keys.shape}")
    return _attention(q_cls.unsqueeze(2), keys, scale, bias)[:, :, 0].mean(1)


def projected_class_row(
    x: Tensor, query: tuple[Tensor, Tensor | None], key: Tensor, *, num_heads: int, scale: float
) -> Tensor:
    """`class_row` from the rows that attention is given, without projecting them to keys.

    The class token's query is multiplied by the key weight instead: 2*C^2 + H*T*C multiply-adds in place of T*C^2. The
    key bias adds the same to every logit and cancels. Not for attention that normalises its keys.

    Args:
        x: input of the attention, class token first, [B, T, C].
        query: weight [H*D, C] and bias [H*D] of the queries.
        key: weight of the keys, [H*D, C].
        num_heads: H.
        scale: factor on the logits, usually D ** -0.5.

    Returns:
        [B, T] as `class_row`.

    Example:
        >>> import torch, vtoken
        >>> x, query, key = torch.randn(1, 10, 8), torch.randn(8, 8), torch.randn(8, 8)
        >>> row = vtoken.ops.projected_class_row(x, (query, None), key, num_heads=2, scale=0.5)
        >>> q, k = ((x @ weight.t()).unflatten(2, (2, 4)).transpose(1, 2) for weight in (query, key))
        >>> torch.allclose(row, vtoken.ops.class_row(q[:, :, 0], k, scale=0.5), atol=1e-5)
        True

    Source: docs/methods/attentive_clip.md 3.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.no_grad(), full_precision(x):
        x, bias = x.to(dtype), None if query[1] is None else query[1].to(dtype)
        q = F.linear(x[:, 0], query[0].to(dtype), bias).unflatten(1, (num_heads, -1))
        absorbed = torch.einsum("bhd,hdc->bhc", q, key.to(dtype).unflatten(0, (num_heads, -1)))
        return (scale * absorbed @ x.transpose(1, 2)).softmax(-1).mean(1)


def cls_scores(q_cls: Tensor, keys: Tensor, *, scale: float, num_prefix: int = 1) -> Tensor:
    """Attention of the class token to every patch, averaged over heads.

    Args:
        q_cls: class-token queries, [B, H, D].
        keys: keys of all tokens, class token first, [B, H, T, D]; T = P + N.
        scale: factor on the logits, usually D ** -0.5.
        num_prefix: tokens P before the patches.

    Returns:
        Scores [B, N], float32, non-negative; with the prefix tokens' share they sum to 1.

    Raises:
        ShapeError: if there is no patch or the shapes do not belong together.

    Example:
        >>> import torch, vtoken
        >>> vtoken.ops.cls_scores(torch.zeros(1, 2, 4), torch.randn(1, 2, 5, 4), scale=0.5)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    if keys.dim() == 4 and keys.shape[2] <= num_prefix:
        raise ShapeError(f"{keys.shape[2]} tokens of which {num_prefix} are prefix tokens: there is no patch to score")
    return class_row(q_cls, keys, scale=scale)[:, num_prefix:]


def received_row(queries: Tensor, keys: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention that every token receives, averaged over heads and queries; for towers without a class token.

    Args:
        queries, keys: of all tokens, [B, H, T, D]; 128 queries are worked on at a time.
        scale: as in `class_row`.
        bias: added to the logits, broadcastable to [B, H, T], or to [B, H, T, T] where it differs from query to query.

    Returns:
        [B, T], float32 (float64 for float64 inputs), detached; each row sums to 1.

    Example:
        >>> import torch, vtoken
        >>> q, k = torch.randn(2, 1, 4, 10, 16)
        >>> vtoken.ops.received_row(q, k, scale=0.25).shape
        torch.Size([1, 10])

    Source: docs/methods/vtc_cls.md 9; not part of the published method.
    """
    if keys.dim() != 4 or queries.shape != keys.shape:
        raise ShapeError(f"expected queries and keys [B, H, T, D], got {queries.shape} and {keys.shape}")
    total = torch.zeros((), device=keys.device)
    for start, chunk in zip(range(0, queries.shape[2], _CHUNK), queries.split(_CHUNK, dim=2), strict=True):
        by_query = bias is not None and bias.dim() == 4 and bias.shape[2] > 1
        here = bias[:, :, start : start + _CHUNK] if bias is not None and by_query else bias
        total = total + _attention(chunk, keys, scale, here).sum(2).mean(1)
    return total / queries.shape[2]


def _attention(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Softmax rows [B, H, Q, T] in at least float32, whatever the model computes in."""
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    with torch.no_grad(), full_precision(keys):
        logits = (queries.detach().to(dtype) * scale) @ keys.detach().to(dtype).transpose(2, 3)
        if bias is not None:
            logits = logits + (bias if bias.dim() == 4 else bias.unsqueeze(2)).to(dtype)
        return logits.softmax(-1)


def scored_layers(depth: int, start: int | None, last: int) -> range:
    """Blocks whose scores are combined: from `start` (None: ceil(2/3 depth), at most `last`) to `last`.

    Raises:
        ConfigError: for blocks that a tower of `depth` does not have, or a start behind the last one.

    Example:
        >>> import vtoken
        >>> vtoken.ops.scored_layers(12, None, -2)
        range(8, 11)

    Source: docs/methods/vtc_cls.md 2; 16 of 24 is the published default.
    """
    if not -depth <= last < depth:
        raise ConfigError(f"block {last} is read last, the tower has blocks {-depth} to {depth - 1}")
    last %= depth
    start = min(math.ceil(2 * depth / 3), last) if start is None else start
    if not -depth <= start < depth or start % depth > last:
        raise ConfigError(
            f"start_layer={start}: with block {last} of {depth} the last one that is read, it must be in 0 to {last} "
            f"or {-depth} to {last - depth}"
        )
    return range(start % depth, last + 1)


def ensemble(rows: Sequence[Tensor], how: str = "mean") -> Tensor:
    """Scores of several layers, each [B, T], as one: their "mean", "sum", "max" or "min".

    Raises:
        ConfigError: for any other word.
        ShapeError: if there is no layer.

    Example:
        >>> import torch, vtoken
        >>> vtoken.ops.ensemble([torch.tensor([[0.25, 0.75]]), torch.tensor([[0.75, 0.25]])])
        tensor([[0.5000, 0.5000]])
    """
    if how not in ENSEMBLES:
        raise ConfigError(f"ensemble={how!r} must be one of {', '.join(ENSEMBLES)}")
    if not rows:
        raise ShapeError("there are no scores to combine")
    stacked = torch.stack(list(rows))
    if how in ("mean", "sum"):
        return stacked.mean(0) if how == "mean" else stacked.sum(0)
    return stacked.amax(0) if how == "max" else stacked.amin(0)


def select_tokens(scores: Tensor, k: int) -> Tensor:
    """The k largest scores, as ascending indices.

    Args:
        scores: [N] or [B, N]; ties go to the lower index, NaN counts as the lowest.
        k: how many; all of them from N on.

    Returns:
        [k] or [B, k] int64.

    Raises:
        ConfigError: if k is no whole number from 1 on.
        ShapeError: if the scores have another number of dimensions. InputError: if they are no tensor of numbers.

    Example:
        >>> import torch, vtoken
        >>> vtoken.select_tokens(torch.tensor([0.1, 0.4, 0.2, 0.4]), 3)
        tensor([1, 2, 3])
    """
    k = checks.whole("select_tokens", "k", k, 1, what="at least one token is kept: ")
    checks.tensor("select_tokens", "scores", scores, 1, 2, shape="[N] or [B, N]")
    if not (scores.is_floating_point() or scores.dtype in _WHOLE):
        raise InputError(f"select_tokens(scores=...): must be real numbers, got {scores.dtype}")
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return best.sort(dim=-1).values
