"""DivPrune, VisionZip, CDPruner and the controls: against slow references in float64, and what always holds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Cell, Chosen, Seen, TowerFacts, Visual
from vtoken.methods.cdpruner import conditional_kernel, greedy_map, text_relevance
from vtoken.methods.divprune import max_min
from vtoken.methods.visionzip import merge_rest
from vtoken.prompts.engine import select

CONFIGS: dict[str, type] = {
    "vtc_cls": vtoken.VTCCLS, "divprune": vtoken.DivPrune, "visionzip": vtoken.VisionZip, "cdpruner": vtoken.CDPruner,
    "random": vtoken.RandomTokens, "uniform": vtoken.UniformTokens, "pooled": vtoken.PooledTokens,
}  # fmt: skip


def rows(n: int, c: int, seed: int) -> Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


def shown(method: PromptMethod, visual: Visual, seed: int = 0, c: int = 24) -> Seen:
    n = visual.content
    x = rows(n, c, seed)
    return Seen(
        visual, method.count(visual, {}), {}, rows(1, n, seed + 1).softmax(-1), after=x, stack=x, before=x * 2,
        keys=rows(n, 8, seed + 2), text=rows(3, c, seed + 3),
    )  # fmt: skip


def kept(config: Any, visual: Visual, seed: int = 0) -> tuple[Tensor, Chosen]:
    method = config.build(0)
    method.needs(TowerFacts(3, 2, class_token=True, per_token=True))
    return select(method, shown(method, visual, seed))


@pytest.mark.parametrize("seed", range(12))
def test_max_min_is_the_slow_one(seed: int) -> None:
    n, k = 3 + 2 * seed, 1 + seed
    x = rows(n, 5, seed).double()
    unit = x / x.norm(dim=1, keepdim=True)
    d = [[1 - float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    picked: list[int] = []
    while len(picked) < min(k, n):
        least = [
            min((d[i][j] for j in (picked or range(n)) if j != i), default=0.0) if i not in picked else -1.0
            for i in range(n)
        ]
        picked.append(max(range(n), key=lambda i: (least[i], -i)))
    assert max_min(x.float().unsqueeze(0), k)[0].tolist() == sorted(picked)
    assert max_min(x.unsqueeze(0), k)[0].tolist() == sorted(picked)


def test_max_min_properties() -> None:
    x = rows(20, 6, 1)
    turn = torch.linalg.qr(rows(6, 6, 2)).Q
    sets = [set(max_min(x.unsqueeze(0), k)[0].tolist()) for k in range(1, 21)]
    assert all(a < b for a, b in itertools.pairwise(sets)), "nested"
    assert max_min((x @ turn * torch.rand(20, 1) * 3).unsqueeze(0), 7)[0].tolist() != []
    scaled = x @ turn * (0.5 + torch.rand(20, 1, generator=torch.Generator().manual_seed(3)))
    assert set(max_min(scaled.unsqueeze(0), 7)[0].tolist()) == sets[6], "turned and scaled rows"
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    assert {int(order[i]) for i in max_min(x[order].unsqueeze(0), 7)[0]} == sets[6], "permuted rows"
    both = max_min(torch.stack([x, x.flip(0)]), 7)
    assert set(both[0].tolist()) == sets[6]
    assert {19 - i for i in both[1].tolist()} == sets[6]
    broken = x.clone()
    broken[5] = math.nan
    assert 5 in max_min(broken.unsqueeze(0), 2)[0].tolist(), "what is no number is the most distant"


@pytest.mark.parametrize("seed", range(6))
def test_the_angle_is_at_least_half_the_best(seed: int) -> None:
    x, k = rows(9, 3, seed).double(), 4
    unit = x / x.norm(dim=1, keepdim=True)
    angle = (unit @ unit.T).clamp(-1, 1).arccos()

    def least(chosen: Any) -> float:
        return min(float(angle[i, j]) for i, j in itertools.combinations(chosen, 2))

    best = max(least(c) for c in itertools.combinations(range(9), k))
    assert least(max_min(x.unsqueeze(0), k)[0].tolist()) >= best / 2 - 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_greedy_map_is_the_slow_log_determinant(seed: int) -> None:
    n = 4 + 2 * seed
    x, text = rows(n, n + 3, seed).double(), rows(3, n + 3, seed + 50).double()
    unit, words = x / x.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    r = torch.stack([torch.stack([u @ w for w in words]).mean() for u in unit])
    assert float((text_relevance(x.float(), text.float()) - r).abs().max()) < 1e-6
    r = ((r - r.min()) / (r.max() - r.min())).clamp_min(1e-3)
    kernel = torch.stack([torch.stack([r[i] * r[j] * (unit[i] @ unit[j]) for j in range(n)]) for i in range(n)])
    picked: list[int] = []
    for k in range(1, min(n, 8) + 1):
        gains = {
            i: float(torch.linalg.slogdet(kernel[[*picked, i]][:, [*picked, i]])[1])
            for i in range(n)
            if i not in picked
        }
        picked.append(max(gains, key=lambda i: (gains[i], -i)))
        found = greedy_map(*conditional_kernel(x.float(), text_relevance(x.float(), text.float())), k)
        assert found.tolist() == sorted(picked)
    assert picked[0] == int(r.argmax()), "the first is the most relevant"


def test_greedy_map_beyond_the_rank_and_with_broken_values() -> None:
    x = rows(12, 3, 0)
    r = torch.rand(12, generator=torch.Generator().manual_seed(1))
    sets = [set(greedy_map(*conditional_kernel(x, r), k).tolist()) for k in range(1, 13)]
    assert all(len(s) == k + 1 for k, s in enumerate(sets))
    assert all(a < b for a, b in itertools.pairwise(sets))
    first = sets[2]
    rest = sorted((i for i in range(12) if i not in first), key=lambda i: -float(r[i]))
    assert sets[4] == first | set(rest[:2]), "beyond the rank by relevance"
    plain = greedy_map(*conditional_kernel(x, torch.full((12,), 0.3)), 3)
    assert len(set(plain.tolist())) == 3
    broken = r.clone()
    broken[2] = math.nan
    assert 2 not in greedy_map(*conditional_kernel(x, broken), 3).tolist(), "what is no number is the least relevant"
    x[4] = math.nan
    assert len(set(greedy_map(*conditional_kernel(x, r), 6).tolist())) == 6


@pytest.mark.parametrize("seed", range(8))
def test_contextual_tokens_are_means_by_one_hot_products(seed: int) -> None:
    n, k, context = 14 + seed, 9, 1 + seed % 5
    x, keys = rows(n, 6, seed), rows(n, 4, seed + 9)
    top = rows(1, n, seed + 20)[0].topk(k - context).indices.sort().values
    places, merged = merge_rest(x, keys, top, context)
    rest = [i for i in range(n) if i not in top.tolist()]
    targets = [rest[i * len(rest) // context] for i in range(context)]
    assert places.tolist() == sorted([*top.tolist(), *targets])
    unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
    one_hot = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        where = i
        if i in rest and i not in targets:
            where = max(targets, key=lambda t: (float(unit[i] @ unit[t]), -t))
        one_hot[where, i] = 1
    sizes = one_hot.sum(1)
    means = (one_hot @ x.double())[places] / sizes[places].unsqueeze(1)
    assert float((means - merged).abs().max()) < 1e-5
    total = (merged.double() * sizes[places].unsqueeze(1)).sum(0)
    assert float((total - x.double().sum(0)).abs().max()) < 1e-4, "nothing is lost"
    same = merge_rest(torch.ones(n, 6), keys, top, context)[1]
    assert torch.equal(same, torch.ones(k, 6))


def test_contextual_tokens_pass_gradients_and_none_is_a_plain_choice() -> None:
    x = rows(20, 6, 1).requires_grad_()
    merge_rest(x, rows(20, 4, 2), torch.tensor([3, 7]), 2)[1].sum().backward()
    assert bool((x.grad.abs().sum(1) > 0).all()), "every token is in some mean"
    visual = Visual("image", (Cell((4, 5)),))
    zip_, cls = kept(vtoken.VisionZip(num_tokens=6, contextual=0), visual), kept(vtoken.VTCCLS(num_tokens=6), visual)
    assert zip_[0].tolist() == cls[0].tolist()
    assert [vtoken.VisionZip(num_tokens=k).contextual_of(k) for k in (64, 128, 192, 1)] == [10, 20, 30, 0]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_counts_are_what_is_chosen(name: str) -> None:
    lines = tuple(range(12 + 5, 12 + 6 * 4, 6))  # behind every row of a detail grid of 3 x 5 and more
    for visual in (
        Visual("image", (Cell((1, 1)),)), Visual("image", (Cell((7, 4)),)), Visual("image", (Cell((1, 40)),)),
        Visual("image", (Cell((23, 3)),), fixed=1), Visual("video", (Cell((3, 4), "frame"),) * 5),
        Visual("image", (Cell((3, 4), "overview"), Cell((2, 5), "detail")), lines[:2]),
    ):  # fmt: skip
        for share in (0.01, 0.2, 0.5, 0.77, 1.0):
            config = CONFIGS[name](keep_ratio=share)
            places, chosen = kept(config, visual)
            counts = [math.ceil(share * visual.cells[0].tokens - 1e-6)]
            part = counts[0] / visual.cells[0].tokens
            counts += [max(1, math.ceil(part * cell.tokens - 1e-6)) for cell in visual.cells[1:]]
            assert len(chosen.index) == sum(counts) == config.build(0).count(visual, {})
            found = torch.bincount(
                torch.bucketize(chosen.index, torch.tensor([c.tokens for c in visual.cells]).cumsum(0), right=True),
                minlength=len(visual.cells),
            )
            assert found.tolist() == counts, "every cell has its share"
            content = set(visual.places()[chosen.index].tolist())
            assert content <= set(places.tolist())
            assert set(places.tolist()) - content <= {*range(visual.fixed), *visual.separators}


def test_draws_and_grids() -> None:
    visual = Visual("image", (Cell((6, 6)),))
    one, two = kept(vtoken.RandomTokens(num_tokens=9), visual)[0], kept(vtoken.RandomTokens(num_tokens=9), visual, 5)[0]
    assert torch.equal(one, two)
    assert not torch.equal(one, kept(vtoken.RandomTokens(num_tokens=9, seed=1), visual)[0])
    assert kept(vtoken.UniformTokens(num_tokens=9), visual)[0].tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    pooled = kept(vtoken.PooledTokens(num_tokens=9), visual)[1]
    x = rows(36, 24, 0).view(3, 2, 3, 2, 24).mean((1, 3)).flatten(0, 1)
    assert float((pooled.rows - x).abs().max()) < 1e-6
    assert pooled.index.tolist() == kept(vtoken.UniformTokens(num_tokens=9), visual)[1].index.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vtoken.DivPrune(), "exactly one"), (lambda: vtoken.DivPrune(num_tokens=3, space="keys"), "after"),
        (lambda: vtoken.VisionZip(num_tokens=4, contextual=4), "less than num_tokens"),
        (lambda: vtoken.VisionZip(num_tokens=4, contextual=-1), "from 0 on"),
        (lambda: vtoken.CDPruner(num_tokens=4, relevance_sign=0), "1 or -1"),
        (lambda: vtoken.RandomTokens(num_tokens=4, seed=-1), "seed"),
        (lambda: vtoken.PooledTokens(num_tokens=True), "from 1 on"),
    ],
)  # fmt: skip
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(vtoken.ConfigError, match=message):
        make()


class _Broken(vtoken.RandomTokens(num_tokens=3).build(0).__class__):  # type: ignore[misc]
    """Says three and returns what the test sets."""

    found: Any = None

    def choose(self, seen: Seen) -> Any:
        return self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.tensor([1, 2]), "its count said 3"), (torch.tensor([1, 2, 9]), "of 9 tokens"),
        (torch.tensor([2, 1, 3]), "ascending"), (torch.tensor([1, 1, 3]), "ascending"),
        (torch.tensor([1.0, 2.0, 3.0]), "int64"), ([0, 1, 2], "int64"),
        (Chosen(torch.tensor([0, 1, 2]), torch.zeros(3, 24)), "does not say that it replaces"),
    ],
)  # fmt: skip
def test_a_broken_contract_is_named(found: Any, message: str) -> None:
    method = _Broken(vtoken.RandomTokens(num_tokens=3))
    method.found = found
    with pytest.raises(vtoken.VTokenError, match=message):
        select(method, shown(method, Visual("image", (Cell((3, 3)),))))
