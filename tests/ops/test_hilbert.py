"""The order of a grid's patches along a Hilbert curve."""

from __future__ import annotations

import pytest
import torch

from vtoken import ShapeError
from vtoken.ops.sparse.hilbert import hilbert_order

GRIDS = [(r, c) for r in range(1, 10) for c in range(1, 10)] + [
    (14, 14),
    (24, 24),
    (48, 48),
    (5, 37),
    (37, 5),
    (20, 48),
]


def steps(rows: int, columns: int) -> torch.Tensor:
    """Distance in patches of consecutive patches of the curve (the larger of both directions)."""
    order = hilbert_order(rows, columns)
    return torch.stack([(order // columns).diff().abs(), (order % columns).diff().abs()])


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_every_patch_once_and_no_jumps(rows: int, columns: int) -> None:
    order = hilbert_order(rows, columns)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(rows * columns))
    assert order[0] == 0
    moved = steps(rows, columns)
    assert int(moved.max()) <= 1 if moved.numel() else True
    assert int((moved.sum(0) > 1).sum()) <= 1  # at most one diagonal step


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_powers_of_two_are_the_classic_curve(side: int) -> None:
    # Its defining property: every aligned block of 2^i x 2^i patches is walked without leaving it.
    order = hilbert_order(side, side)
    row, column = order // side, order % side
    block = 2
    while block < side:
        blocks = ((row // block) * (side // block) + column // block).view(-1, block * block)
        assert bool((blocks == blocks[:, :1]).all())
        block *= 2


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (32, 32), (48, 48), (24, 36), (48, 20)])
@pytest.mark.parametrize("group", [32, 64])
def test_groups_are_compact(rows: int, columns: int, group: int) -> None:
    def spread(order: torch.Tensor) -> float:
        """Mean distance of a patch to the centre of its group."""
        places = torch.stack([order // columns, order % columns]).float()[:, : len(order) // group * group]
        places = places.unflatten(1, (-1, group))
        return float((places - places.mean(2, keepdim=True)).norm(dim=0).mean())

    square = 0.383 * group**0.5  # mean distance to the centre of a square of that area
    curve = spread(hilbert_order(rows, columns))
    assert curve < 1.25 * square
    assert curve < 0.7 * spread(torch.arange(rows * columns))


def test_no_patch_is_an_error() -> None:
    with pytest.raises(ShapeError, match="rows=0"):
        hilbert_order(0, 5)


def test_made_in_inference_mode_it_serves_autograd() -> None:
    with torch.inference_mode():
        hilbert_order(3, 11)
    x = torch.randn(33, requires_grad=True)
    (x[hilbert_order(3, 11)] * torch.arange(33)).sum().backward()
    assert x.grad is not None


def test_compiles_as_a_constant() -> None:
    turned = torch.compile(lambda x: x[hilbert_order(4, 6)] + 1, fullgraph=True, backend="eager")
    x = torch.arange(24)
    assert torch.equal(turned(x), x[hilbert_order(4, 6)] + 1)
