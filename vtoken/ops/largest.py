"""The k largest entries of a row, ties to the lowest index: torch.topk leaves open which of equal entries it takes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtoken.ops.sparse.packed import MAX_WIDTH, largest_packed

#: Beyond so many passes over the data, topk is faster.
_MAX_PASSES = 24
#: With more threads than these, topk, which shares its rows among them, is faster than numpy.
_NUMPY_THREADS = 2
#: The same for `largest_packed`, which is 14 times as fast as topk on one thread (rows of 2305, k = 231).
_PACKED_THREADS = 8
#: Fewer entries are chosen faster by `_by_threshold`, which calls fewer operators.
_PACKED_ENTRIES = 2**14


def branch_free(x: Tensor) -> bool:
    """Whether values must not decide what runs next: graphs, meta tensors; on a GPU it would synchronise."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def largest_mask(x: Tensor, k: int) -> Tensor:
    """Where the k largest entries of every row of `x` [..., N] are; bool, exactly k per row, the first of equals.

    NaN counts as the smallest value.
    """
    x = x.nan_to_num(nan=-float("inf"))
    least = x.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = x > least, x == least
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def largest_index(x: Tensor, k: int, room: Tensor | None = None) -> Tensor:
    """Indices of `largest_mask`, ascending: [..., k] int64; `room` as `largest_packed` takes it."""
    shape, num = (*x.shape[:-1], k), x.shape[-1]
    if k == num:
        return torch.arange(num, device=x.device).expand(shape)
    if branch_free(x):
        # The kept entries numbered from the end are distinct positive numbers, the others 0.
        countdown = torch.arange(num, 0, -1, device=x.device)
        return num - torch.where(largest_mask(x, k), countdown, 0).topk(k).values
    x = x.detach().reshape(-1, num)
    slower = x.numel() < _PACKED_ENTRIES or torch.get_num_threads() > _PACKED_THREADS
    if slower or num > MAX_WIDTH or x.dtype != torch.float32:
        return _by_threshold(x, k).view(shape)
    index, unsure = largest_packed(x, k, room)
    if unsure.shape[0]:
        index[unsure] = _by_threshold(x[unsure], k)
    return index.view(shape)


def _by_threshold(x: Tensor, k: int) -> Tensor:
    """`largest_index` of rows [R, N] on the CPU."""
    num = x.shape[1]
    mask = x >= _kth_largest(x, k)
    flat = mask.view(-1).nonzero()
    # The number of entries found tells that no row has a tie at its k-th place, nor NaN: the usual case is done.
    if flat.shape[0] != x.shape[0] * k:
        tied = (mask.sum(-1) != k).nonzero().view(-1)
        mask[tied] = largest_mask(x[tied], k)
        flat = mask.view(-1).nonzero()
    starts = torch.arange(0, x.shape[0] * num, num).unsqueeze(1)
    return flat.view(-1, k) - starts


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """The k-th largest entry of every row of `x` [R, N] on the CPU, [R, 1]; NaN counts as the largest value."""
    if torch.get_num_threads() > _NUMPY_THREADS or x.dtype not in (torch.float32, torch.float64):
        return x.topk(k, sorted=False).values.amin(-1, keepdim=True)
    # numpy partitions with vector instructions: per thread 1.5 (rows of 2305) to 4 times (of 197) as fast as topk.
    place = x.shape[1] - k
    return torch.from_numpy(np.partition(x.detach().numpy(), place, axis=1)[:, place : place + 1])


def keep_largest(x: Tensor, k: int) -> Tensor:
    """`x` [..., K, T], not negative, with all but the k largest entries of every column set to 0, ties as above.

    Columns instead of rows because a small K is then compared T numbers at a time: four times faster than topk.
    """
    if k >= x.shape[-2]:
        return x
    values = x.detach()
    if k <= _MAX_PASSES and not branch_free(x):
        kept = torch.empty(values.shape, dtype=values.dtype)
        for own, marks in zip(values.reshape(-1, *x.shape[-2:]), kept.view(-1, *x.shape[-2:]), strict=True):
            _mark_largest(own, marks, k)
        return x * kept if torch.is_grad_enabled() and x.requires_grad else kept.mul_(values)
    return x * largest_mask(values.transpose(-1, -2).contiguous(), k).transpose(-1, -2)


def _mark_largest(x: Tensor, kept: Tensor, k: int) -> None:
    """Write 1 into `kept` [K, T] at the k largest entries of each column, else 0; more where what they mark is 0.

    One pass takes the largest entries away. Masks are floats: torch makes and applies them faster than bools.
    """
    least = x.amax(0)
    for _ in range(k - 1):
        least = torch.lt(x, least, out=kept).mul_(x).amax(0)
    torch.ge(x, least, out=kept)
    wrong = kept.sum(0) != k
    if bool(wrong.any()):
        # Equal entries, or NaN; where at most k entries are above 0, all are marked, and that is right.
        columns = (wrong & ~((least == 0) & (x.count_nonzero(0) <= k))).nonzero().view(-1)
        kept[:, columns] = largest_mask(x[:, columns].t(), k).t().to(kept.dtype)
