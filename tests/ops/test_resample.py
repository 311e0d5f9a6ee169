"""Frames as any number of tokens: row plans for every count, and every mode against what it must equal."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_close
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.ops import assign, row_widths
from vtoken.ops.frames.resample import MODES

GRIDS = [(27, 27), (9, 9), (8, 12), (24, 24), (5, 7), (1, 1), (1, 13), (13, 1), (1, 40), (2, 31)]


def grid_of(height: int, width: int, channels: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(height, width, channels, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_row_plan_of_every_count(height: int, width: int) -> None:
    for t in range(height * width + 1):
        widths = row_widths(t, height, width)
        assert sum(widths) == t
        if t == 0:
            assert widths == []
            continue
        assert max(widths) - min(widths) <= 1
        assert min(widths) >= 1
        assert max(widths) <= width
        assert len(widths) <= height
        # The row count is the rounded ideal, sqrt(t H / W), as far as the grid allows; halves are rounded up.
        ideal = Fraction(t * height, width)
        nearest = max(h for h in range(height + t + 2) if h == 0 or Fraction(2 * h - 1, 2) ** 2 <= ideal)
        assert len(widths) == max(1, min(nearest, height, t), math.ceil(Fraction(t, width)))
        # The wider rows are spread evenly: no run of rows is more than one token off its share.
        for r in range(len(widths)):
            assert abs(sum(widths[: r + 1]) - Fraction(t * (r + 1), len(widths))) < 1
    assert row_widths(height * width, height, width) == [width] * height


def test_row_plan_by_hand() -> None:
    assert row_widths(196, 27, 27) == [14] * 14
    assert row_widths(25, 9, 9) == [5] * 5
    assert row_widths(23, 9, 9) == [4, 5, 4, 5, 5]
    assert row_widths(7, 5, 7) == [3, 4]
    assert row_widths(11, 1, 13) == [11]
    assert row_widths(3, 13, 1) == [1, 1, 1]


def test_floor_shape_is_the_largest_of_the_two_that_fits() -> None:
    for t in range(1, 800):
        side = int(math.sqrt(t))
        best = max(n for n in (side * side, side * (side + 1)) if n <= t)
        widths = row_widths(t, 27, 27, shape="floor")
        assert set(widths) == {side}
        assert sum(widths) == best <= t


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width"), [(9, 9), (8, 12), (5, 7), (1, 13), (13, 1)])
def test_every_count_gives_that_many_tokens_in_raster_order(mode: str, height: int, width: int) -> None:
    grid = grid_of(height, width)
    for t in range(height * width + 1):
        out = assign(grid, t, mode)
        assert out.tokens.shape == (t, 8)
        assert out.coords.shape == (t, 2)
        assert out.coords.dtype == torch.int64
        assert sum(out.rows) == t
        assert all(type(n) is int and n > 0 for n in out.rows)
        if t == 0:
            continue
        assert int(out.coords.min()) >= 0
        assert int(out.coords[:, 0].max()) < height
        assert int(out.coords[:, 1].max()) < width
        flat = out.coords[:, 0] * width + out.coords[:, 1]
        assert bool((flat.diff() > 0).all()), f"{mode}, t={t}: {out.coords.tolist()}"
        lines = [row for row, n in enumerate(out.rows) for _ in range(n)]
        distinct = {c: i for i, c in enumerate(sorted(set(out.coords[:, 0].tolist())))}
        assert [distinct[c] for c in out.coords[:, 0].tolist()] == lines


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_grid_is_the_identity(mode: str) -> None:
    grid = grid_of(8, 12)
    out = assign(grid, 96, mode)
    assert torch.equal(out.tokens, grid.flatten(0, 1))
    assert out.coords.tolist() == [[r, c] for r in range(8) for c in range(12)]
    assert out.rows == [12] * 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_constant_grid_stays_constant(mode: str, dtype: torch.dtype) -> None:
    value = torch.tensor([0.1, -3.7, 0.0, 512.0], dtype=dtype)
    for t in (1, 2, 11, 37, 80):
        tokens = assign(value.expand(9, 9, 4), t, mode).tokens
        assert tokens.dtype == dtype
        # Weights of an interpolation or a mean add up to 1 but for rounding.
        torch.testing.assert_close(tokens, value.expand(t, 4), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("height", "width"), [(27, 27), (9, 9), (8, 12), (24, 24), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bilinear_at_half_size_is_plain_interpolation(height: int, width: int, dtype: torch.dtype) -> None:
    """Bit-equal to what LLaVA-OneVision does to its frames: [T, C, H, W] halved, rounded up."""
    frames = torch.stack([grid_of(height, width, 32, seed, dtype) for seed in range(3)])
    size = (math.ceil(height / 2), math.ceil(width / 2))
    image = frames.permute(0, 3, 1, 2).contiguous()
    expected = F.interpolate(image, size=list(size), mode="bilinear").flatten(2).transpose(1, 2)
    for frame, tokens in zip(frames, expected, strict=True):
        out = assign(frame, size[0] * size[1])
        assert out.rows == [size[1]] * size[0]
        assert torch.equal(out.tokens, tokens)


def slow_bilinear(grid: Tensor, widths: list[int]) -> Tensor:
    """Row by row, token by token, from the definition with half-pixel centres."""
    height, width, _ = grid.shape

    def between(index: int, count: int, size: int) -> tuple[int, int, float]:
        place = max((index + 0.5) * size / count - 0.5, 0)
        low = min(int(place), size - 1)
        return low, min(low + 1, size - 1), place - low

    tokens = []
    for r, w in enumerate(widths):
        top, bottom, down = between(r, len(widths), height)
        for c in range(w):
            left, right, over = between(c, w, width)
            upper = grid[top, left] * (1 - over) + grid[top, right] * over
            lower = grid[bottom, left] * (1 - over) + grid[bottom, right] * over
            tokens.append(upper * (1 - down) + lower * down)
    return torch.stack(tokens)


def slow_pool(grid: Tensor, widths: list[int]) -> Tensor:
    """Token by token: the mean of the cells that its share of the grid touches."""
    height, width, _ = grid.shape
    tokens = []
    for r, w in enumerate(widths):
        down = slice(r * height // len(widths), -(-(r + 1) * height // len(widths)))
        for c in range(w):
            tokens.append(grid[down, c * width // w : -(-(c + 1) * width // w)].mean((0, 1)))
    return torch.stack(tokens)


@pytest.mark.parametrize(("height", "width"), [(9, 9), (8, 12), (5, 7), (1, 13)])
def test_bilinear_and_pool_against_loops(height: int, width: int) -> None:
    grid = grid_of(height, width, 3, dtype=torch.float64)
    for t in range(1, height * width + 1):
        widths = row_widths(t, height, width)
        assert_close(f"bilinear {t}", slow_bilinear(grid, widths), assign(grid, t, "bilinear").tokens, 1e-12)
        assert_close(f"pool {t}", slow_pool(grid, widths), assign(grid, t, "pool").tokens, 1e-12)


def test_floor_shape_may_enlarge_the_grid() -> None:
    grid = grid_of(9, 9, 3, dtype=torch.float64)
    out = assign(grid, 125, shape="floor")  # 11 x 11
    assert out.rows == [11] * 11
    assert_close("enlarged", slow_bilinear(grid, [11] * 11), out.tokens, 1e-12)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (8, 12), (2, 2), (8, 8)])
def test_pool_at_half_size_of_an_even_grid_is_average_pooling(height: int, width: int) -> None:
    frames = torch.stack([grid_of(height, width, 32, seed) for seed in range(3)])
    expected = F.avg_pool2d(frames.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    for frame, tokens in zip(frames, expected, strict=True):
        assert torch.equal(assign(frame, height * width // 4, "pool").tokens, tokens)


def test_bilinear_reproduces_a_linear_ramp_in_the_interior() -> None:
    height, width = 27, 27
    ramp = torch.stack(torch.meshgrid(torch.arange(27.0), torch.arange(27.0), indexing="ij"), dim=-1).double()
    for t in (50, 101, 196, 333, 700):
        out = assign(ramp, t)
        place = [
            ((r + 0.5) * height / len(out.rows) - 0.5, (c + 0.5) * width / w - 0.5)
            for r, w in enumerate(out.rows)
            for c in range(w)
        ]
        inside = [i for i, p in enumerate(place) if all(0 <= x <= 26 for x in p)]
        assert len(inside) > t // 2
        expected = torch.tensor([place[i] for i in inside], dtype=torch.float64)
        torch.testing.assert_close(out.tokens[inside], expected, rtol=0, atol=1e-5)
        # `coords` names the cell of the native grid that this place falls into.
        cell = torch.tensor(place, dtype=torch.float64).add(0.5).floor()
        assert torch.equal(out.coords.double(), cell)


def slow_merge(grid: Tensor, t: int) -> tuple[list[Tensor], list[int], list[int]]:
    """Tokens, sizes and positions after the rounds of docs/methods/quota.md 7.4, one pair at a time in float64."""
    tokens = [row.double() for row in grid.flatten(0, 1)]
    sizes, places = [1] * len(tokens), list(range(len(tokens)))
    while len(tokens) > t:
        r = min(len(tokens) - t, len(tokens) // 2)
        proposals = []
        for a in range(0, len(tokens), 2):
            cosines = [
                float(tokens[a] @ tokens[b] / (tokens[a].norm() * tokens[b].norm())) for b in range(1, len(tokens), 2)
            ]
            best = max(range(len(cosines)), key=lambda i: (cosines[i], -i))
            proposals.append((-cosines[best], a, 2 * best + 1))
        gone = sorted(proposals)[:r]
        for _, a, b in gone:
            tokens[b] = (tokens[a] * sizes[a] + tokens[b] * sizes[b]) / (sizes[a] + sizes[b])
            sizes[b] += sizes[a]
        left = [i for i in range(len(tokens)) if i not in {a for _, a, _ in gone}]
        tokens, sizes, places = ([values[i] for i in left] for values in (tokens, sizes, places))
    return tokens, sizes, places


def sizes_of(grid: Tensor, t: int) -> Tensor:
    """Cells behind every token: a cell's share in the sum of all tokens is 1 / size of its group."""
    leaf = grid.clone().requires_grad_()
    out = assign(leaf, t, "merge")
    (share,) = torch.autograd.grad(out.tokens[:, 0].sum(), leaf)
    counts = torch.zeros(t, dtype=torch.float64)
    for i in range(t):
        (mine,) = torch.autograd.grad(assign(leaf, t, "merge").tokens[i, 0], leaf)
        members = mine[..., 0] > 0
        counts[i] = members.sum()
        # Every member has the same share: it is a mean of the cells, whatever the order of the rounds.
        torch.testing.assert_close(mine[..., 0][members], share[..., 0][members])
        torch.testing.assert_close(mine[..., 0][members], torch.full_like(mine[..., 0][members], 1 / float(counts[i])))
    return counts


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 7), (4, 3), (1, 13)])
def test_merge_against_a_slow_loop(height: int, width: int) -> None:
    grid = grid_of(height, width, 4, dtype=torch.float64)
    for t in range(1, height * width + 1):
        tokens, _, places = slow_merge(grid, t)
        out = assign(grid, t, "merge")
        assert (out.coords[:, 0] * width + out.coords[:, 1]).tolist() == places, f"t={t}"
        assert_close(f"t={t}", torch.stack(tokens), out.tokens, 1e-10)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 7)])
def test_merge_keeps_the_mean_and_counts_every_cell(height: int, width: int) -> None:
    grid = grid_of(height, width, 5, dtype=torch.float64)
    for t in (1, 2, 3, 7, 13, 20, height * width - 1):
        sizes = sizes_of(grid, t)
        assert int(sizes.sum()) == height * width
        assert sizes.tolist() == [float(n) for n in slow_merge(grid, t)[1]]
        tokens = assign(grid, t, "merge").tokens
        assert_close("mean", grid.mean((0, 1)), (tokens * sizes[:, None]).sum(0) / sizes.sum(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_in_half_precision_keeps_the_mean_roughly(dtype: torch.dtype) -> None:
    grid = grid_of(9, 9, 16, dtype=dtype)
    out = assign(grid, 1, "merge")
    assert out.tokens.dtype == dtype
    torch.testing.assert_close(out.tokens[0].double(), grid.double().mean((0, 1)), rtol=0, atol=0.02)


def test_stride_takes_evenly_spaced_cells() -> None:
    grid = torch.arange(35.0).reshape(5, 7, 1)
    assert assign(grid, 1, "stride").tokens.flatten().tolist() == [0]
    assert assign(grid, 2, "stride").tokens.flatten().tolist() == [0, 34]
    assert assign(grid, 4, "stride").tokens.flatten().tolist() == [0, 11, 22, 34]
    assert assign(grid, 4, "stride").coords.tolist() == [[0, 0], [1, 4], [3, 1], [4, 6]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", [0, 1, 23, 25, 80])
def test_gradients_reach_the_grid(mode: str, t: int) -> None:
    grid = grid_of(9, 9, 3, dtype=torch.float64).requires_grad_()
    out = assign(grid, t, mode)
    assert out.tokens.requires_grad
    if t in (23, 80):
        assert torch.autograd.gradcheck(lambda g: assign(g, t, mode).tokens, (grid,), fast_mode=True)
    (got,) = torch.autograd.grad(out.tokens.sum(), grid)
    assert bool(got.isfinite().all())
    if t:
        # A token is a mixture of cells with weights that add up to 1.
        assert float(got[..., 0].sum()) == pytest.approx(t, rel=1e-5)


def test_a_view_of_a_larger_tensor_is_served_and_left_alone() -> None:
    video = grid_of(9, 18, 8).view(9, 2, 9, 8).transpose(0, 1)  # frames that are not contiguous
    before = video.clone()
    for mode in MODES:
        assert torch.equal(assign(video[1], 31, mode).tokens, assign(video[1].contiguous(), 31, mode).tokens)
    assert torch.equal(video, before)


def test_counting_on_the_meta_device() -> None:
    for mode in ("bilinear", "pool"):
        assert assign(torch.empty(27, 27, 16, device="meta"), 101, mode).tokens.shape == (101, 16)


def test_errors_state_the_numbers() -> None:
    grid = grid_of(4, 5)
    with pytest.raises(InputError, match="t=21: a grid of 4 x 5 gives 0 to 20"):
        assign(grid, 21)
    with pytest.raises(InputError, match="t=-1"):
        row_widths(-1, 4, 5)
    with pytest.raises(InputError, match="height=0"):
        row_widths(1, 0, 5)
    with pytest.raises(ConfigError, match="one of exact, floor"):
        row_widths(1, 4, 5, shape="round")
    with pytest.raises(ConfigError, match="supported: bilinear, pool, merge, stride"):
        assign(grid, 3, "area")
    with pytest.raises(ConfigError, match="lays out rows"):
        assign(grid, 3, "merge", shape="floor")
    with pytest.raises(ShapeError, match=r"got \(2, 4, 5, 8\)"):
        assign(grid.expand(2, 4, 5, 8), 3)
    with pytest.raises(ShapeError, match=r"got \(0, 5, 8\)"):
        assign(grid[:0], 0)


@pytest.mark.parametrize(
    ("grid", "t", "words"),
    [
        (torch.zeros(4, 4, 8).numpy(), 3, "torch.as_tensor"), (torch.zeros(4, 4, 8).long(), 3, "floating"),
        (torch.zeros(64, 4, 5), 3, r"\[C, H, W\]"), (torch.zeros(4, 4, 8), 2.5, "whole number"),
        (torch.zeros(4, 4, 8), True, "whole number"),
    ],
)  # fmt: skip
def test_what_is_no_grid_or_count_has_a_name(grid: Any, t: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        assign(grid, t)


def test_a_known_size_tells_where_channels_are() -> None:
    """Three numbers do not: a frame of 8 x 27 with 27 channels, or 8 channels first."""
    channels_first = torch.randn(8, 27, 27)
    with pytest.raises(ShapeError, match=r"looks like \[C, H, W\]"):
        assign(channels_first, 101, size=(27, 27))
    grid = channels_first.permute(1, 2, 0)
    assert torch.equal(assign(grid, 101, size=[27, 27]).tokens, assign(grid, 101).tokens)
    with pytest.raises(ShapeError, match=r"has not the size \(26, 27\)"):
        assign(grid, 101, size=(26, 27))
    with pytest.raises(InputError, match="two whole numbers"):
        assign(grid, 101, size=(27, 2.5))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="two whole numbers"):
        assign(grid, 101, size=27)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_tall_frames_with_few_channels_are_frames_where_their_size_is_known(mode: str) -> None:
    tall = torch.randn(20, 3, 2)
    with pytest.raises(ShapeError, match=r"say so by size=\(20, 3\)"):
        assign(tall, 30, mode)
    found = assign(tall, 60, mode, size=(20, 3))
    assert torch.allclose(found.tokens, tall.flatten(0, 1), atol=1e-6)
