"""Patches of a grid in the order of a Hilbert curve: consecutive patches are neighbours in the picture."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from vtoken import checks
from vtoken.errors import ShapeError


def hilbert_order(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Patch numbers (row * columns + column) along a curve through the whole grid, [rows * columns] int64.

    Any grid is walked without a jump: every step goes to an adjacent patch (at most one of them diagonally, where an
    odd side leaves no other way). The curve starts in patch 0.

    Raises:
        ShapeError: if a side is no whole number from 1 on.

    Source: the generalised Hilbert curve for rectangles of J. Cerveny.
    """
    rows = checks.whole("hilbert_order", "rows", rows, 1, error=ShapeError)
    columns = checks.whole("hilbert_order", "columns", columns, 1, error=ShapeError)
    order = _constant_order(rows, columns)
    return order if device is None or device.type == "cpu" else order.to(device)


def _constant_order(rows: int, columns: int) -> Tensor:
    """For the compiler a constant: it must not trace the walk, and it does not see through a cache."""
    return _cached_order(rows, columns)


# What torch.compiler.assume_constant_result sets; calling it would import the whole compiler with vtoken.
_constant_order._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _cached_order(rows: int, columns: int) -> Tensor:
    """Shared by all callers, so nobody may write to it."""
    steps = _walk(0j, complex(columns), complex(0, rows))
    # Made outside inference mode: a tensor from inside would not be usable by autograd later.
    with torch.inference_mode(False):
        return torch.tensor([int(at.imag) * columns + int(at.real) for at in steps])


def _walk(at: complex, along: complex, across: complex) -> Iterator[complex]:
    """Cells (column + row * 1j) of the block spanned by two signed sides, from `at` to the far end of `along`."""
    length, width = _size(along), _size(across)
    step, sidestep = along / length, across / width
    if width == 1 or length == 1:
        for i in range(max(length, width)):
            yield at + i * (step if width == 1 else sidestep)
        return
    half, half_across = _half(along), _half(across)
    # Even halves where possible: a block with odd sides ends in a diagonal step.
    if 2 * length > 3 * width:
        if _size(half) % 2 and length > 2:
            half += step
        yield from _walk(at, half, across)
        yield from _walk(at + half, along - half, across)
        return
    if _size(half_across) % 2 and width > 2:
        half_across += sidestep
    yield from _walk(at, half_across, half)
    yield from _walk(at + half_across, along, across - half_across)
    yield from _walk(at + (along - step) + (half_across - sidestep), -half_across, half - along)


def _size(side: complex) -> int:
    return int(abs(side.real) + abs(side.imag))


def _half(side: complex) -> complex:
    return complex(side.real // 2, side.imag // 2)
