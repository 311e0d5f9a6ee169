"""The k largest entries of rows by one partition of integers that hold both an entry's rank and its index.

Choosing on integers, in place, takes half the time that it takes on floats; and what is left at the end of a row are
the indices themselves, while a mask of the chosen entries would have to be searched for them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Bits of a key that hold an index, at least: the others hold what is left of the entry, and a float has no more.
_INDEX_BITS = 10
#: Longer rows would leave so few bits for the entries that many a row had two alike.
MAX_WIDTH = 2**13


def largest_packed(x: Tensor, k: int, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the k largest entries of every row of `x`, the first of equals, and the rows where they may be wrong.

    Entries are rounded to about 2^20 equal steps between the least and the largest of their row. Rounding keeps their
    order but may make equals of unequal ones. So a row is right where the last chosen entry and the first one left out
    are a step apart, and where all entries on their step are equal before rounding, too. Other rows are listed, and
    rows with NaN or infinities.

    Args:
        x: [R, N] float32 on the CPU, N <= MAX_WIDTH.
        k: 1 to N - 1.
        room: float32, R * N numbers or more, which are overwritten; saves the time that new memory takes.

    Returns:
        [R, k] int64, ascending; and row numbers, int64 [R'].
    """
    width = x.shape[1]
    bits = max(_INDEX_BITS, (width - 1).bit_length())
    offset, finite = _offsets(x, 32 - bits)
    # x + offset has one exponent in the whole row: its last bits count steps, as a number with a sign.
    room = torch.empty_like(x) if room is None else room.view(-1)[: x.numel()].view(x.shape)
    steps = torch.add(x, offset, out=room).view(torch.int32)
    last = (1 << bits) - 1
    # Of equals the one with the lower index gets the larger key.
    torch.add(torch.arange(last, last - width, -1, dtype=torch.int32), steps, alpha=1 << bits, out=steps)
    keys = steps.numpy()
    keys.partition(width - k - 1, axis=1)
    chosen, next_best = keys[:, width - k :], keys[:, width - k - 1]
    worst = chosen.min(1)
    close = np.flatnonzero(finite & (worst >> bits == next_best >> bits))
    if close.shape[0]:
        kept = torch.from_numpy(last - (worst[close] & last)).long()
        close = close[~_alike(x[close], offset[close], kept).numpy()]
    index = chosen.astype(np.int16)
    np.bitwise_and(index, last, out=index)
    np.subtract(last, index, out=index)
    index.sort(axis=1)
    unsure = np.concatenate([close, np.flatnonzero(~finite)])
    return torch.from_numpy(index.astype(np.int64)), torch.from_numpy(unsure)


def _alike(x: Tensor, offset: Tensor, place: Tensor) -> Tensor:
    """Whether all entries of a row on the step of its entry number `place` [R] equal that entry; bool [R]."""
    value = x.gather(1, place.unsqueeze(1))
    return ((x + offset == value + offset) == (x == value)).all(1)


def _offsets(x: Tensor, bits: int) -> tuple[Tensor, np.ndarray]:
    """What makes the last `bits` bits of x + offset count steps, float32 [R, 1]; and which rows have one, bool [R].

    With a step u, a power of two, floats from 2^23 u to 2^24 u are the multiples of u. The offset moves the middle of
    the row to the middle of them, 1.5 * 2^23 u, whose last 22 bits are 0.
    """
    # Not aminmax, which takes ten times as long.
    least, most = (bound.double().numpy() for bound in (x.amin(1), x.amax(1)))
    with np.errstate(invalid="ignore"):
        spread, size = most - least, np.maximum(most, -least)
    # The offset must be a multiple of u, too, and less than 2^24 u: hence the bound by the largest number.
    step = np.maximum(spread / (2.0**bits - 4), size * 2.0**-21)
    finite = step < 2.0**100  # not NaN, and small enough for the offset to be a float32
    step = np.ldexp(1.0, np.maximum(np.frexp(np.where(finite, step, 1.0))[1], -149))
    middle = np.rint(np.where(finite, least + spread / 2, 0.0) / step)
    offset = (1.5 * 2**23 - middle) * step
    return torch.from_numpy(offset.astype(np.float32)).unsqueeze(1), finite
