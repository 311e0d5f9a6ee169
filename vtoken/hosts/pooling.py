"""Pooling that respects sizes: the pooled feature of a merged model is that of its unmerged map.

Source: docs/methods/pitome.md 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.calling import call
from vtoken.core.patch import base_of, view
from vtoken.core.slots import Slot
from vtoken.errors import ShapeError
from vtoken.ops import size_bias

SIZED_POOLS = ("avg", "avgmax", "map", "prr")
_SIZES = "_vtoken_size"


def pool_kind(model: Any, pool_type: str | None = None) -> str:
    """The model's word for its pooling; an attention pool counts whatever `global_pool` says."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return str(model.global_pool if pool_type is None else pool_type)
    return "prr" if type(pool).__name__ == "AttentionPoolPrr" else "map"


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """Mean over tokens [B, T, C] that counts each as its `size` [B, T] patches; accumulates in at least float32."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    share = size.to(compute) / size.to(compute).sum(1, keepdim=True)
    return (x.to(compute) * share.unsqueeze(-1)).sum(1).to(x.dtype)


def sized_pool(
    model: Any, name: str, slot_of: Callable[[Tensor], Slot], x: Tensor, pool_type: str | None = None, **options: Any
) -> Tensor:
    """The model's pooling method `name` over merged tokens.

    Args:
        model: the patched model.
        slot_of: tells what is known of the rows of `x`.
        x: tokens [B, T, C] after the last block.
        pool_type: as the host's method takes it.
    """
    kind, size = pool_kind(model, pool_type), slot_of(x).size
    stock: Callable[..., Tensor] = getattr(base_of(type(model)), name)
    if size is None or kind not in SIZED_POOLS:
        return stock(model, x, pool_type, **options)
    if kind in ("map", "prr"):
        pool = functools.partial(_map_pool if kind == "map" else _prr_pool, model.attn_pool, size)
        return stock(view(model, attn_pool=pool), x, pool_type, **options)
    first = 0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens
    mean = weighted_mean(x[:, first:], size[:, first:])
    return mean if kind == "avg" else 0.5 * (x[:, first:].amax(1) + mean)


def _map_pool(pool: Any, size: Tensor, x: Tensor, attn_mask: Tensor | None = None) -> Any:
    # The host hands over all rows or only those after the prefix; sizes are taken from the end to fit either.
    return pool(x, attn_mask=size_bias(size[:, -x.shape[1] :], x.dtype))


def _prr_pool(pool: Any, size: Tensor, x: Tensor) -> Any:
    return call(pool, functools.partial(_sized_prr, pool, size), x)


def _sized_prr(pool: Any, size: Tensor, x: Tensor) -> Any:
    """timm's AttentionPoolPrr (self-attention without projections, then token or mean) with token sizes."""
    size = size[:, -x.shape[1] :]
    x = pool.pre_norm(x)
    heads = x.unflatten(2, (pool.num_heads, pool.head_dim)).transpose(1, 2)  # [B, H, T, D]
    bias = size_bias(size, x.dtype)
    x = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).transpose(1, 2).flatten(2)
    x = pool.post_norm(x)
    return x[:, 0] if pool.pool == "token" else weighted_mean(x, size)


def remember_sizes(features: Tensor, size: Tensor | None) -> Tensor:
    """Let `forward_head(forward_features(x))` work: sizes (None: all one) ride on features that leave the model."""
    if not torch.compiler.is_compiling():
        setattr(features, _SIZES, size)
    return features


def sizes_for_head(model: Any, x: Tensor, may_be_merged: bool) -> Tensor | None:
    """Sizes of features that a caller hands to `forward_head`; None if the pooling needs none.

    Raises:
        ShapeError: if the features may be merged and their sizes are gone.
    """
    if hasattr(x, _SIZES) or pool_kind(model) not in SIZED_POOLS or not may_be_merged:
        size: Tensor | None = getattr(x, _SIZES, None)
        return size
    what = f"forward_head got {x.shape[1]} tokens without their sizes, so its {pool_kind(model)!r} pooling would weigh"
    if torch.compiler.is_compiling():
        raise ShapeError(
            f"{what} merged tokens as single patches. A compiled graph cannot carry them: call model(images)"
        )
    raise ShapeError(
        f"{what} merged tokens as single patches. Call model(images), or hand over the very tensor that "
        "forward_features returned"
    )
