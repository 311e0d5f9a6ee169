"""Which units are kept: counts, hand-computed maps, distributions of the random modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtoken
from vtoken.checks import share_of
from vtoken.methods.attentive_clip.select import MODES, Selection, patches_of, unit_scores


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 13), (0.5, 25), (0.75, 37), (1.0, 49), (1e-4, 1)])
def test_kept_counts_of_the_published_grid(ratio: float, kept: int) -> None:
    assert share_of(ratio, 49) == kept
    if 0.1 < ratio < 1:
        assert kept == int(49 * ratio) + 1, "the reference rule"


@pytest.mark.parametrize(("n", "ratio", "kept"), [(100, 0.07, 7), (100, 0.29, 29), (10, 0.7, 7), (64, 0.5, 32)])
def test_float_noise_keeps_no_unit_more(n: int, ratio: float, kept: int) -> None:
    assert share_of(ratio, n) == kept


def test_published_case_keeps_100_of_196_patches() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 14, 14, generator=rng)
    how = Selection()
    block = how.block_of((14, 14), 16)
    assert block == 2
    kept = patches_of(how.choose(unit_scores(scores, block)), (14, 14), block)
    assert kept.shape == (3, 100)
    for row, map_ in zip(kept.tolist(), scores.numpy(), strict=True):
        units = map_.reshape(7, 2, 7, 2).mean((1, 3)).ravel()
        best = sorted(np.argsort(-units, kind="stable")[:25])
        by_hand = sorted((2 * (u // 7) + i) * 14 + 2 * (u % 7) + j for u in best for i in (0, 1) for j in (0, 1))
        assert row == by_hand


def test_known_map() -> None:
    scores = torch.zeros(1, 4, 6)
    scores[0, 0:2, 4:6] = 1.0  # unit 2
    scores[0, 2, 0] = 3.0  # unit 3, mean 0.75
    scores[0, 3, 3] = 2.0  # unit 4, mean 0.5
    units = unit_scores(scores, 2)
    assert units.tolist() == [[0, 0, 1, 0.75, 0.5, 0]]
    for ratio, expected in ((0.34, [2, 3, 4]), (1 / 3, [2, 3]), (0.1, [2])):
        assert Selection(keep_ratio=ratio).choose(units).tolist() == [expected]
    assert Selection(keep_ratio=0.5, mode="lowest").choose(units).tolist() == [[0, 1, 5]]
    assert patches_of(torch.tensor([[2, 3]]), (4, 6), 2).tolist() == [[4, 5, 10, 11, 12, 13, 18, 19]]
    assert patches_of(torch.tensor([[2, 3]]), (4, 6), 1).tolist() == [[2, 3]]


def test_ties_go_to_the_lower_unit() -> None:
    assert Selection().choose(torch.ones(1, 6)).tolist() == [[0, 1, 2]]


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5), block=st.integers(1, 3), ratio=st.floats(0.01, 1.0),
    mode=st.sampled_from(MODES), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_mode_keeps_distinct_whole_units(
    rows: int, columns: int, block: int, ratio: float, mode: str, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    grid = (rows * block, columns * block)
    scores = torch.rand(3, *grid, generator=rng)
    units = Selection(keep_ratio=ratio, mode=mode).choose(unit_scores(scores, block), rng)
    kept = patches_of(units, grid, block)
    k = share_of(ratio, rows * columns)
    assert units.shape == (3, k)
    assert kept.shape == (3, k * block**2)
    for row in kept:
        assert row.tolist() == sorted(set(row.tolist()))
        places = {((p // grid[1]) // block, (p % grid[1]) // block) for p in row.tolist()}
        assert len(places) == k
        assert int(row[0]) >= 0
        assert int(row[-1]) < grid[0] * grid[1]


def shares(how: Selection, scores: Tensor, draws: int = 4000) -> Tensor:
    """How often each unit was kept."""
    kept = how.choose(scores.expand(draws, -1), torch.Generator().manual_seed(0))
    return torch.zeros(draws, scores.shape[-1]).scatter(1, kept, 1.0).mean(0)


def test_random_is_uniform() -> None:
    found = shares(Selection(keep_ratio=0.25, mode="random"), torch.arange(8.0))
    assert float((found - 0.25).abs().max()) < 0.035  # five standard deviations


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_sample_follows_the_scores(temperature: float) -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = shares(Selection(keep_ratio=0.25, mode="sample", temperature=temperature), scores)
    expected = scores ** (1 / temperature)
    assert float((found - expected / expected.sum()).abs().max()) < 0.04


def test_sampling_is_without_replacement() -> None:
    """Two of three units: inclusion by the sequential draw's exact probabilities."""
    p = [0.2, 0.3, 0.5]
    exact = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    found = shares(Selection(keep_ratio=2 / 3, mode="sample"), torch.tensor(p))
    assert float((found - torch.tensor(exact)).abs().max()) < 0.04


def test_mix_keeps_the_best_and_any_others() -> None:
    scores = torch.tensor([5.0, 1, 4, 2, 3, 0, 6, 7])
    found = shares(Selection(keep_ratio=0.5, mode="mix", top_fraction=0.5), scores)
    assert found[[6, 7]].tolist() == [1.0, 1.0]
    assert float((found[:6] - 1 / 3).abs().max()) < 0.04
    assert shares(Selection(keep_ratio=0.5, mode="mix", top_fraction=1.0), scores)[[0, 2, 6, 7]].tolist() == [1.0] * 4


@pytest.mark.parametrize("mode", ["random", "sample", "mix"])
def test_a_generator_decides_alone(mode: str) -> None:
    how, scores = Selection(mode=mode), torch.rand(4, 20, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = how.choose(scores, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, how.choose(scores, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, how.choose(scores, torch.Generator().manual_seed(4)))
    torch.manual_seed(5)
    plain = how.choose(scores)
    torch.manual_seed(5)
    assert torch.equal(plain, how.choose(scores))


def test_topk_draws_nothing() -> None:
    state = torch.get_rng_state()
    Selection().choose(torch.rand(2, 9, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("grid", "patch", "block"),
    [((14, 14), 16, 2), ((7, 7), 32, 1), ((16, 16), 14, 2), ((15, 15), 16, 1), ((12, 20), 8, 4), ((7, 7), 64, 1)],
)
def test_auto_blocks_are_32_pixels(grid: tuple[int, int], patch: int, block: int) -> None:
    assert Selection().block_of(grid, patch) == block


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"keep_ratio": 1.1}, "keep_ratio=1.1"),
        ({"keep_ratio": float("nan")}, "keep_ratio=nan"),
        ({"mode": "best"}, "mode='best'"),
        ({"block": 0}, "block=0"),
        ({"block": "2"}, "block='2'"),
        ({"top_fraction": -0.1}, "top_fraction=-0.1"),
        ({"top_fraction": 0.0}, "top_fraction=0.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_bad_values(options: dict[str, object], said: str) -> None:
    with pytest.raises(vtoken.ConfigError, match=said):
        Selection(**options)  # type: ignore[arg-type]


def test_blocks_that_do_not_fit_the_grid() -> None:
    with pytest.raises(vtoken.ConfigError, match="block=4 does not divide the grid of 14 x 14"):
        Selection(block=4).block_of((14, 14), 16)
    with pytest.raises(vtoken.ConfigError, match=r"nothing can be masked.*block=1"):
        Selection().block_of((8, 8), 4)
    assert Selection(keep_ratio=1.0).block_of((8, 8), 4) == 8
