"""Costs of schedules are those of reports, and dynamic programming finds what trying everything finds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vtoken
from vtoken.tuning.cost import Costs
from vtoken.tuning.search import Curve, cheapest, constant, filled, per_block, removing, shares


def _clip_tower() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=8)).eval()


def _open_clip_tower() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(48, 8, width=32, layers=4, heads=2, mlp_ratio=2.0, output_dim=16).eval()


def _plain() -> nn.Module:
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**options).eval()


def _eva() -> nn.Module:
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.Eva(**options, use_rot_pos_emb=True, swiglu_mlp=True).eval()


def _pooled() -> nn.Module:
    """Its attention pooling costs less after a merge, outside all blocks."""
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**options, class_token=False, global_pool="map").eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "timm": (_plain, (3, 48, 48)),
    "timm, map": (_pooled, (3, 48, 48)),
    "timm, gated and rotary": (_eva, (3, 48, 48)),
    "open_clip": (_open_clip_tower, (3, 48, 48)),
    "transformers": (_clip_tower, (3, 48, 48)),
}
METHODS = {
    "pitome": vtoken.PiToMe(),
    "tome after": vtoken.ToMe(place="after", metric="hidden"),
    "pairs": vtoken.PiToMe(variant="pitome_pairs", layers=(1, -1)),
    "random": vtoken.RandomMerge(),
}


@pytest.mark.parametrize(
    ("name", "method"), [(name, "pitome") for name in MODELS] + [("timm, map", name) for name in METHODS]
)
def test_costs_are_those_of_reports(name: str, method: str) -> None:
    make, size = MODELS[name]
    model, config = make(), METHODS[method]
    costs = Costs(model, config, size)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        r = torch.randint(0, 5, (costs.spec.depth,), generator=generator).tolist()
        settings = config.replace(r=r)
        found = vtoken.report(model, settings, input_size=size)
        assert costs.removed(settings) == list(vtoken.plan(model, settings, img_size=size[1:]).removed)
        assert costs.of(costs.removed(settings)) == found.macs_after
        assert costs.before == found.macs_before


def _by_hand(costs: Tensor, changes: Tensor, budget: int) -> tuple[float, list[tuple[int, ...]]]:
    """The least change of every path that fits, and all paths that have it."""
    depth, levels, _ = costs.shape
    found: list[tuple[float, tuple[int, ...]]] = []
    for path in itertools.product(range(levels), repeat=depth):
        steps = list(enumerate(itertools.pairwise((0, *path))))
        if sum(int(costs[i, a, b]) for i, (a, b) in steps) <= budget:
            found.append((sum(float(changes[i, a, b]) for i, (a, b) in steps), path))
    least = min((change for change, _ in found), default=math.inf)
    return least, [path for change, path in found if abs(change - least) < 1e-12]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [6, 12, 20])
def test_dynamic_programming_finds_what_brute_force_finds(seed: int, budget: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(0, 9, (3, 5, 5), generator=generator)
    changes = torch.rand(3, 5, 5, generator=generator, dtype=torch.float64) - 0.2
    upwards = torch.ones(5, 5, dtype=torch.bool).triu()
    changes = changes.masked_fill(~upwards | (torch.rand(3, 5, 5, generator=generator) < 0.2), torch.inf)
    least, paths = _by_hand(costs, changes, budget)
    found = cheapest(costs, changes, budget)
    if math.isinf(least):
        assert found is None
    else:
        assert found is not None
        assert tuple(found) in paths


def test_nothing_is_found_where_nothing_fits() -> None:
    assert cheapest(torch.full((2, 2, 2), 5), torch.zeros(2, 2, 2, dtype=torch.float64), 9) is None


def _tiny() -> Costs:
    """Three blocks and eight patches."""
    options = {"img_size": (16, 32), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
    return Costs(timm.models.VisionTransformer(**options).eval(), vtoken.ToMe(), (3, 16, 32))


def test_schedules_per_block_are_those_of_brute_force() -> None:
    """Of all schedules within what was measured, on a model so small that each can be tried.

    Every block's cost is rounded up to a unit, so the best of those that fit with so much to spare must be reached.
    """
    costs, found_any = _tiny(), 0
    every = [r for r in itertools.product(range(5), repeat=3) if costs.removed(removing(costs.config, r)) == list(r)]
    for seed, share in itertools.product(range(4), (0.9, 0.8, 0.7)):
        values = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(1)
        curves = [Curve([0.0, 0.25, 0.5], [0.0, *row]) for row in values.tolist()]
        budget = share * costs.before

        def change(r: Sequence[int], curves: Sequence[Curve] = curves) -> float:
            return sum(curve.at(at) for curve, at in zip(curves, shares(costs, r), strict=True))

        found = per_block(costs, curves, budget)
        fit = [change(r) for r in every if costs.of(r) <= budget]
        easily = [change(r) for r in every if costs.of(r) <= budget * (1 - 3 / 1024)]
        if found is None:
            assert not easily
            continue
        found_any += 1
        assert costs.of(found) <= budget
        assert min(fit) - 1e-9 <= change(found) <= min(easily, default=math.inf) + 1e-9
    assert found_any > 6


def test_a_filled_schedule_removes_no_token_too_many() -> None:
    costs = Costs(_plain(), vtoken.PiToMe(), (3, 48, 48))
    curves, budget = [Curve([0.0, 0.5], [0.0, 1.0 + i]) for i in range(4)], 0.6 * costs.before
    found = filled(costs, curves, [18, 9, 3, 2], budget)
    assert found != [18, 9, 3, 2]
    assert costs.of(found) <= budget
    for layer in range(4):
        if found[layer]:
            assert costs.of([r - (i == layer) for i, r in enumerate(found)]) > budget


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_constant_schedules_are_as_near_as_they_come(share: float) -> None:
    costs = Costs(_plain(), vtoken.ToMe(), (3, 48, 48))
    budget = share * costs.before
    found = constant(costs, budget)
    assert list(found) == ["constant ratio", "constant r", "falling", "rising"]

    def fits(config: Any) -> bool:
        return costs.of(costs.removed(config)) <= budget

    assert all(fits(config) for config in found.values())
    ratio, r = found["constant ratio"].ratio, found["constant r"].r
    assert not fits(costs.config.replace(ratio=ratio + 1e-4))
    assert not fits(costs.config.replace(r=r - 1))


def test_curves_are_straight_between_what_was_measured() -> None:
    curve = Curve([0.1, 0.2, 0.4], [1.0, 0.0, 4.0])
    assert [curve.at(x) for x in (0.1, 0.15, 0.2, 0.3, 0.4)] == pytest.approx([1.0, 0.5, 0.0, 2.0, 4.0])
    assert curve.at(0.05) == pytest.approx(1.5)
    assert curve.at(0.5) == pytest.approx(6.0)
    assert Curve([0.3], [0.7]).at(0.1) == 0.7
