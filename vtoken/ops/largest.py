"""The k largest entries of a row, ties to the lowest index: torch.topk leaves open which of equal entries it takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def branch_free(x: Tensor) -> bool:
    """Whether values must not decide what runs next: graphs, meta tensors; on a GPU it would synchronise."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def largest_mask(x: Tensor, k: int) -> Tensor:
    """Where the k largest entries of every row of `x` [..., N] are; bool, exactly k per row, the first of equals.

    NaN counts as the smallest value.
    """
    if k >= x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    if not branch_free(x):
        mask = x >= x.topk(k, sorted=False).values.amin(-1, keepdim=True)
        # One count tells that no row has a tie at its k-th place, nor NaN: the usual case is done.
        if int(mask.count_nonzero()) == k * (x.numel() // x.shape[-1]):
            return mask
    x = x.nan_to_num(nan=-float("inf"))
    least = x.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = x > least, x == least
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def largest_index(x: Tensor, k: int) -> Tensor:
    """Indices of `largest_mask`, ascending: [..., k] int64."""
    mask = largest_mask(x, k)
    num = x.shape[-1]
    if not branch_free(x):
        return (mask.view(-1).nonzero().view(-1) % num).view(*x.shape[:-1], k)
    # The kept entries numbered from the end are distinct positive numbers, the others 0.
    countdown = torch.arange(num, 0, -1, device=x.device)
    return num - torch.where(mask, countdown, 0).topk(k).values


def keep_largest(x: Tensor, k: int) -> Tensor:
    """`x` [..., K, T] with all but the k largest entries of every column set to 0, the first of equals kept.

    Columns instead of rows because a small K is then compared T numbers at a time: four times faster than topk.
    """
    if k >= x.shape[-2]:
        return x
    values = x.detach()
    if not branch_free(x):
        # A mask of floats is made and applied several times faster than one of bools.
        least = _kth_largest(values, k)
        kept = torch.ge(values, least, out=torch.empty_like(values))
        # Ties at 0 do not matter: kept or not, the result is 0.
        if bool(((kept.sum(-2, keepdim=True) == k) | (least == 0)).all()):
            return x * kept
    return x * largest_mask(values.transpose(-1, -2).contiguous(), k).transpose(-1, -2)


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """The k-th largest entry of every column of `x` [..., K, T], [..., 1, T], by a bitonic network."""
    width = 1 << (k - 1).bit_length()
    lists = 1 << (-(-x.shape[-2] // width) - 1).bit_length()
    missing = lists * width - x.shape[-2]
    x = F.pad(x, (0, 0, 0, missing), value=-float("inf")) if missing else x
    rows = list(x.unflatten(-2, (lists, width)).unbind(-2))
    for block in (2**i for i in range(1, width.bit_length())):
        _compare(rows, block, block // 2)
    while lists > 1:
        lists //= 2
        # The larger half of two descending lists, of which one is read backwards, rises and falls once.
        rows = [torch.maximum(rows[i][..., :lists, :], rows[-1 - i][..., lists:, :]) for i in range(width)]
        _compare(rows, width, width // 2)
    return rows[k - 1]


def _compare(rows: list[Tensor], block: int, stride: int) -> None:
    """Sort stretches of `block` rows that rise and fall once: descending, every other one ascending."""
    while stride:
        for i in (i for i in range(len(rows)) if not i & stride):
            j = i | stride
            high, low = torch.maximum(rows[i], rows[j]), torch.minimum(rows[i], rows[j])
            rows[i], rows[j] = (low, high) if i & block and block < len(rows) else (high, low)
        stride //= 2
