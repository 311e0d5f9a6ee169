"""torch.ops.vtoken.select_rows, select_lists, connect_lists and sparse_attention: learned sparse attention, opaque."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtoken_kernels import lists, select
from vtoken_kernels import sparse_attention as forward
from vtoken_kernels import sparse_attention_bwd as backward
from vtoken_kernels.attention import unit_stride
from vtoken_kernels.launch import on_device


@torch.library.custom_op("vtoken::select_rows", mutates_args=())
def select_rows(coefficients: Tensor, basis: Tensor, kept: int) -> Tensor:
    """The `kept` keys with the largest scores `coefficients @ basis`, ascending, int32 [B, H, T, kept].

    Args:
        coefficients: float32 [B, H, T, K].
        basis: float32 [K, N] or [B, K, N].
        kept: 1 to N; of equal scores the lowest keys are kept.
    """
    with on_device(coefficients):
        return select.best_rows(coefficients, basis, kept)


@select_rows.register_fake
def _(coefficients: Tensor, basis: Tensor, kept: int) -> Tensor:
    return coefficients.new_empty(*coefficients.shape[:3], kept, dtype=torch.int32)


@torch.library.custom_op("vtoken::select_lists", mutates_args=())
def select_lists(
    coefficients: Tensor, basis: Tensor, order: Tensor | None, limit: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_rows` as lists of blocks of 64 queries, or all keys whose score exceeds `limit`.

    Args:
        order: queries as they are cut into blocks, int32 [1 or B, T]; None: ascending.
        limit: float32 [H]; None: the `kept` best.
        kept: ignored with `limit`.

    Returns:
        index, word, start of `vtoken_kernels.lists.Lists`.
    """
    with on_device(coefficients):
        return select.block_lists(coefficients, basis, _per_image(order, coefficients), limit, kept)


@select_lists.register_fake
def _(
    coefficients: Tensor, basis: Tensor, order: Tensor | None, limit: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_keys = basis.shape[-1]
    capacity = num_keys if limit is not None else min(num_keys, lists.BLOCK * kept)
    return lists.empty_lists(coefficients, coefficients.shape[2], num_keys, capacity)


@torch.library.custom_op("vtoken::connect_lists", mutates_args=())
def connect_lists(
    col: Tensor, crow: Tensor | None, num_queries: int, num_keys: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`vtoken_kernels.lists.connect`: lists from the ascending keys of every query (or group of queries)."""
    with on_device(col):
        return lists.connect(col, crow, num_queries, num_keys, group)


@connect_lists.register_fake
def _(
    col: Tensor, crow: Tensor | None, num_queries: int, num_keys: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    like, kept = (col, col.shape[3]) if crow is None else (crow, num_keys)
    return lists.empty_lists(like, num_queries, num_keys, min(num_keys, lists.BLOCK * kept))


@torch.library.custom_op("vtoken::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, order: Tensor | None, index: Tensor, word: Tensor | None,
    start: Tensor | None, num_prefix: int, rows: int, kept: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * q k^T + bias) v over the keys of lists; prefix queries keep all keys.

    Args:
        q, k, v: [B, H, N, D].
        bias: float32 [1 or B, N], no gradient.
        order: patch queries as they are cut into blocks, int32 [1 or B, T]; None: ascending.
        index, word, start: `vtoken_kernels.lists.Lists` of the T = N - num_prefix patch queries.
        rows: queries per block.
        kept: keys per patch query, for counting operations only.

    Returns:
        The output [B, H, N, D] (in memory [B, N, H, D]), zeros where no key is kept; base-2 logarithms of the softmax
        sums, float32 [B, H, N].
    """
    with on_device(q):
        given = lists.Lists(index, word, start)
        return forward.sparse_attention(
            q, k, v, _per_image(bias, q), _per_image(order, q), given, num_prefix, rows, scale
        )


@sparse_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, order: Tensor | None, index: Tensor, word: Tensor | None,
    start: Tensor | None, num_prefix: int, rows: int, kept: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like_attention(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("vtoken::sparse_attention_bwd", mutates_args=())
def sparse_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, order: Tensor | None, index: Tensor,
    word: Tensor | None, start: Tensor | None, out: Tensor, lse: Tensor, num_prefix: int, rows: int, kept: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in memory [B, N, H, D]."""
    with on_device(q):
        given = lists.Lists(index, word, start)
        return backward.sparse_attention_backward(
            grad, q, k, v, _per_image(bias, q), _per_image(order, q), given, out, lse.contiguous(), num_prefix, rows,
            scale,
        )  # fmt: skip


@sparse_attention_bwd.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, order: Tensor | None, index: Tensor,
    word: Tensor | None, start: Tensor | None, out: Tensor, lse: Tensor, num_prefix: int, rows: int, kept: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_attention(q), _like_attention(k), _like_attention(v)


def _like_attention(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _per_image(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Rows [1 or B, n] with one per image (which may be the same memory) and neighbouring entries."""
    return None if x is None else unit_stride(x).expand(like.shape[0], -1)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_prefix, ctx.rows, ctx.kept, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = sparse_attention_bwd(grad, *ctx.saved_tensors, ctx.num_prefix, ctx.rows, ctx.kept, ctx.scale)
    return *found, *(None,) * 9


sparse_attention.register_autograd(_backward, setup_context=_context)


def _pairs(q: torch.Size, num_prefix: int, kept: int) -> int:
    """Kept pairs times the head width."""
    batch, heads, tokens, width = q
    return batch * heads * ((tokens - num_prefix) * kept + num_prefix * tokens) * width


@register_flop_formula(torch.ops.vtoken.sparse_attention)
def _(
    q: torch.Size, k: torch.Size, v: torch.Size, bias: object, order: object, index: object, word: object,
    start: object, num_prefix: int, rows: int, kept: int, scale: float, *, out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    return 4 * _pairs(q, num_prefix, kept)


@register_flop_formula(torch.ops.vtoken.sparse_attention_bwd)
def _(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, bias: object, order: object, index: object,
    word: object, start: object, out: object, lse: object, num_prefix: int, rows: int, kept: int, scale: float,
    *, out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    # Five products, as for dense attention; ours makes two of them twice.
    return 10 * _pairs(q, num_prefix, kept)


@register_flop_formula([torch.ops.vtoken.select_rows, torch.ops.vtoken.select_lists])
def _(coefficients: torch.Size, basis: torch.Size, *args: object, out_shape: object = None, **_: object) -> int:
    # The scores once, as torch makes them; the kernel makes them again for every step of its search.
    batch, heads, queries, width = coefficients
    return 2 * batch * heads * queries * width * basis[-1]


@register_flop_formula(torch.ops.vtoken.connect_lists)
def _(*args: object, out_shape: object = None, **_: object) -> int:
    return 0
