"""VTCCLS: its settings, how many tokens stay, and which of a grid with newlines."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.hosts.llavas import plain_top
from vtoken.core.visual import Cell, Needs, Seen, TowerFacts, Visual, length_of
from vtoken.prompts.engine import select


class Method:
    """The pruning, asked about features as they lie in a prompt: patches first, -1 marks a newline."""

    def __init__(self, depth: int, options: dict[str, Any]) -> None:
        self.depth, self.built = depth, vtoken.VTCCLS(**options).build(depth)

    def num_kept(self, patches: int) -> int:
        return self.built.count(Visual("image", (Cell((1, patches)),)), {})

    def needs(self, last: int, *, class_token: bool) -> Needs:
        return self.built.needs(TowerFacts(self.depth, last, class_token))

    def choose(self, scores: Tensor, overview: int) -> Tensor:
        visual = laid_out(scores, overview)
        seen = Seen(visual, self.built.count(visual, {}), attention=scores[visual.places()].unsqueeze(0))
        return select(self.built, seen)[0]

    def most(self, scores: Tensor, overview: int) -> int:
        visual = laid_out(scores, overview)
        return length_of(visual, self.built.count(visual, {}), self.built.newline)[0]


def laid_out(scores: Tensor, overview: int) -> Visual:
    lines = (scores < 0).nonzero()[:, 0].tolist()
    detail = len(scores) - overview - len(lines)
    cells = [Cell((1, overview), "overview")]
    if len(scores) > overview + 1:  # an image of one crop is the row itself
        cells.append(Cell((len(lines), detail // max(len(lines), 1)) if lines else (1, detail), "detail"))
    return Visual("image", tuple(cells), tuple(lines))


def method(depth: int = 24, **options: Any) -> Method:
    return Method(depth, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"), ({"num_tokens": 3, "keep_ratio": 0.5}, "exactly one"), ({"num_tokens": 0}, "from 1 on"),
        ({"num_tokens": -2}, "from 1 on"), ({"num_tokens": True}, "from 1 on"), ({"num_tokens": 2.0}, "from 1 on"),
        ({"keep_ratio": 0}, r"\(0, 1\]"), ({"keep_ratio": 1.1}, r"\(0, 1\]"), ({"keep_ratio": math.nan}, r"\(0, 1\]"),
        ({"keep_ratio": 64}, "did you mean num_tokens=64"), ({"num_tokens": 3, "start_layer": 1.5}, "whole number"),
        ({"num_tokens": 3, "ensemble": "median"}, "mean, sum, max, min"),
        ({"num_tokens": 3, "scorer": "clss"}, "'cls'"),
        ({"num_tokens": 3, "newline": "rows"}, "'row'"), ({"num_tokens": 3, "positions": "gaps"}, "original"),
    ],
)  # fmt: skip
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtoken.ConfigError, match=message):
        vtoken.VTCCLS(**options)
    with pytest.raises(ValueError, match=message):
        vtoken.VTCCLS(**options)


def test_settings_round_trip_and_replace() -> None:
    config = vtoken.VTCCLS(keep_ratio=0.25, newline="all")
    assert vtoken.config_from_dict(config.to_dict()) == config
    assert config.replace(num_tokens=3) == vtoken.VTCCLS(num_tokens=3, newline="all")
    assert config.replace(num_tokens=3).replace(keep_ratio=0.25) == config
    assert hash(config) == hash(vtoken.VTCCLS(keep_ratio=0.25, newline="all"))
    assert "vtc_cls" in vtoken.methods()


@pytest.mark.parametrize(
    ("options", "patches", "kept"),
    [({"num_tokens": 64}, 576, 64), ({"num_tokens": 64}, 50, 50), ({"num_tokens": 1}, 576, 1),
     ({"keep_ratio": 1 / 3}, 576, 192), ({"keep_ratio": 0.1}, 10, 1), ({"keep_ratio": 1e-9}, 576, 1),
     ({"keep_ratio": 0.1000001}, 10, 1), ({"keep_ratio": 0.11}, 10, 2), ({"keep_ratio": 1.0}, 7, 7),
     ({"keep_ratio": 0.07}, 100, 7)],
)  # fmt: skip
def test_budget(options: dict[str, Any], patches: int, kept: int) -> None:
    assert method(**options).num_kept(patches) == kept
    scores = torch.rand(patches)
    chosen = method(**options).choose(scores, patches)
    assert chosen.tolist() == plain_top(scores, kept)


def test_layers_and_scorers() -> None:
    def layers(made: Method, last: int, *, class_token: bool = True) -> range:
        found = made.needs(last, class_token=class_token).layers
        return range(found[0], found[-1] + 1)

    assert layers(method(num_tokens=1), 22) == range(16, 23)
    assert layers(method(27, num_tokens=1), 26, class_token=False) == range(26, 27)
    assert layers(method(num_tokens=1, start_layer=-8), 22) == range(16, 23)
    assert layers(method(num_tokens=1, start_layer=20), 22, class_token=False) == range(20, 23)
    assert method(num_tokens=1).needs(22, class_token=True).attention == "class"
    assert method(num_tokens=1).needs(22, class_token=False).attention == "received"
    assert method(num_tokens=1, scorer="received").needs(22, class_token=True).attention == "received"
    with pytest.raises(vtoken.ConfigError, match="no class token"):
        method(num_tokens=1, scorer="cls").needs(22, class_token=False)
    with pytest.raises(vtoken.ConfigError, match="embeddings"):
        method(num_tokens=1).needs(-1, class_token=True)
    with pytest.raises(vtoken.ConfigError, match="0 to 22"):
        method(num_tokens=1, start_layer=23).needs(22, class_token=True)


def grid(rows: int, columns: int, overview: int, seed: int = 0) -> Tensor:
    """Scores of an overview, then of a detail grid with a newline behind every row."""
    rng = torch.Generator().manual_seed(seed)
    detail = torch.cat([torch.rand(rows, columns, generator=rng), -torch.ones(rows, 1)], dim=1)
    return torch.cat([torch.rand(overview, generator=rng), detail.flatten()])


@pytest.mark.parametrize("newline", ["row", "all", "none"])
def test_detail_grid(newline: str) -> None:
    scores = grid(5, 7, overview=16)
    kept = method(num_tokens=2, newline=newline).choose(scores, 16).tolist()
    assert [i for i in kept if i < 16] == plain_top(scores[:16], 2)
    patches = [i for i in range(16, len(scores)) if scores[i] >= 0]
    best = [patches[i] for i in plain_top(scores[patches], math.ceil(35 * 2 / 16 - 1e-6))]
    lines = [16 + 8 * row + 7 for row in range(5)]
    used = {"all": lines, "none": [], "row": [n for n in lines if any(n - 7 <= i < n for i in best)]}[newline]
    assert [i for i in kept if i >= 16] == sorted(best + used)
    assert 0 < len(used) < 5 or newline != "row", "the rule was to matter"


@pytest.mark.parametrize("newline", ["row", "all", "none"])
def test_whole_budget_keeps_every_newline(newline: str) -> None:
    scores = grid(3, 4, overview=9)
    assert method(num_tokens=9, newline=newline).choose(scores, 9).tolist() == list(range(len(scores)))


def test_one_crop_with_its_newline_and_a_grid_without_rows() -> None:
    single = torch.tensor([0.1, 0.3, 0.2, -1.0])
    assert method(num_tokens=1).choose(single, 3).tolist() == [1, 3]
    assert method(num_tokens=1, newline="none").choose(single, 3).tolist() == [1]
    assert method(num_tokens=1).choose(single[:3], 3).tolist() == [1]
    only_newlines = torch.tensor([0.1, 0.3, 0.2, -1.0, -1.0, -1.0])
    assert method(num_tokens=1).choose(only_newlines, 3).tolist() == [1]
    assert method(num_tokens=1, newline="all").choose(only_newlines, 3).tolist() == [1, 3, 4, 5]


def test_broken_scores_are_the_lowest_and_no_newlines() -> None:
    scores = grid(2, 3, overview=4)
    scores[[0, 5]] = math.nan
    kept = method(num_tokens=3, newline="none").choose(scores, 4).tolist()
    assert kept == [1, 2, 3, 4, 6, 8, 9, 10]
    assert method(num_tokens=3).choose(torch.full((5,), math.nan), 5).tolist() == [0, 1, 2]


def test_customary_totals_of_a_full_grid() -> None:
    """2880 tokens of a 2 x 2 grid with U = 128, 64, 32 give 640, 320, 160 (docs/methods/vtc_cls.md 8)."""
    scores = grid(48, 48, overview=576)
    for budget, total in ((128, 640), (64, 320), (32, 160)):
        chosen = method(num_tokens=budget, newline="none")
        assert len(chosen.choose(scores, 576)) == total == chosen.most(scores, 576)
        assert chosen.num_kept(576) == budget


def test_more_budget_keeps_what_less_did() -> None:
    scores = grid(5, 7, overview=16)
    chosen = [set(method(num_tokens=u).choose(scores, 16).tolist()) for u in range(1, 17)]
    assert all(a < b for a, b in itertools.pairwise(chosen))
    assert len(method(num_tokens=5).choose(scores, 16)) <= method(num_tokens=5).most(scores, 16)
