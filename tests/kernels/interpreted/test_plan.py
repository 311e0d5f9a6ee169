"""K0 to K3b: plans made by kernels against the torch plans and against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken.ops import MergePlan, key_metric, plan_pitome, plan_tome
from vtoken.ops.reference import energy_reference, pitome_reference, tome_reference
from vtoken_kernels import energy, layout, match, metric, order

VARIANTS = ["pitome", "pitome_pairs", "tome"]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_clustered(seed: int, batch: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Similarities near 0 and near 0.9, so that a margin between them matters; clusters of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (2, batch, tokens), generator=generator).amin(0)
    centres = draw(seed + 1, batch, 4, width, dtype=torch.float64)
    rows = centres.gather(1, which.unsqueeze(-1).expand(-1, -1, width))
    return (rows + 0.3 * draw(seed + 2, batch, tokens, width, dtype=torch.float64)).to(dtype)


def one_hot(seed: int, batch: int, tokens: int, kinds: int) -> Tensor:
    """With margin 0 all similarities and energies are exact, so ties are true ties; lengths differ (powers of two)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(kinds, (batch, tokens), generator=generator)
    length = torch.exp2(torch.randint(-9, 9, (batch, tokens, 1), generator=generator))
    return F.one_hot(which, kinds).float() * length


def assert_groups(plan: MergePlan) -> None:
    """The sources of every destination, in the order of src, and the dest map are those of keep, src and slot."""
    assert plan.groups is not None
    dest, start, member = plan.groups
    assert (start.dtype, member.dtype) == (torch.int32, torch.int32)
    first = plan.num_tokens - plan.num_dest
    assert tuple(start.shape) == (plan.keep.shape[0], plan.num_dest + 1)
    for b in range(plan.keep.shape[0]):
        assert (start[b, 0], start[b, -1]) == (0, plan.removed)
        for d in range(plan.num_dest):
            expected = [s for s, t in zip(plan.src[b].tolist(), plan.slot[b].tolist(), strict=True) if t == first + d]
            assert member[b, start[b, d] : start[b, d + 1]].tolist() == expected
    assert torch.equal(dest, MergePlan(plan.keep, plan.src, plan.slot, plan.num_tokens_in, plan.num_dest).dest)


def assert_same_plan(x: Tensor, r: int, **options: Any) -> MergePlan:
    """Kernels and torch decide alike, to the last index."""
    expected = plan_pitome(x, r, backend="torch", **options)
    plan = plan_pitome(x, r, backend="triton", **options)
    for name in ("keep", "src", "slot", "dest"):
        got = getattr(plan, name)
        assert got.dtype == torch.int64
        assert torch.equal(got, getattr(expected, name)), (name, r, options)
    assert (plan.num_tokens_in, plan.num_dest) == (expected.num_tokens_in, expected.num_dest)
    if plan.removed:
        assert_groups(plan)
    return plan


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("mergeable", [1, 2, 3, 15, 33, 64])
def test_plan_equals_torch(mergeable: int, num_prefix: int, variant: str) -> None:
    x = draw_clustered(mergeable + num_prefix, 2, num_prefix + mergeable, 20)
    for r in sorted({0, 1, mergeable // 3, mergeable // 2}):
        assert_same_plan(x, r, margin=0.5, num_prefix=num_prefix, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_ties_keep_index_order(num_prefix: int, variant: str) -> None:
    for seed, (tokens, kinds) in enumerate([(40, 4), (37, 2), (64, 1), (51, 20)]):
        x = one_hot(seed, 2, tokens, kinds)
        for r in (1, 9, tokens // 2):
            plan = assert_same_plan(x, r, margin=0.0, num_prefix=num_prefix, variant=variant)
            expected = pitome_reference(x, r, margin=0.0, num_prefix=num_prefix, variant=variant)
            assert (plan.keep.tolist(), plan.src.tolist(), plan.slot.tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_plan_equals_float64_reference(variant: str, dtype: torch.dtype) -> None:
    x = draw_clustered(7, 2, 2 + 31, 24, dtype)
    options: dict[str, Any] = {"margin": 0.45, "alpha": 0.5, "num_prefix": 2, "variant": variant}
    for r in (4, 12):
        plan = plan_pitome(x, r, backend="triton", **options)
        expected = pitome_reference(x.float(), r, **options)
        assert plan.keep.tolist() == expected.keep
        for b in range(2):
            pairs = dict(zip(plan.src[b].tolist(), plan.slot[b].tolist(), strict=True))
            assert pairs == dict(zip(expected.src[b], expected.slot[b], strict=True))


@pytest.mark.parametrize("settings", [{"energy": "eq4"}, {"alpha": 0.0}, {"alpha": 2.0}, {"margin": -0.3}], ids=str)
def test_settings_of_the_energy(settings: dict[str, Any]) -> None:
    x = draw_clustered(8, 2, 30, 12)
    plan = assert_same_plan(x, 9, **{"margin": 0.6, **settings})
    assert not torch.equal(plan.keep, plan_pitome(x, 9, margin=0.6, backend="triton").keep)


def test_protected_rows() -> None:
    x, mask = draw_clustered(9, 2, 27, 8), torch.rand(2, 26, generator=torch.Generator().manual_seed(0)) < 0.3
    plan = assert_same_plan(x, 6, margin=0.5, num_prefix=1, protect=mask)
    merging = torch.cat([plan.src, plan.keep[:, -plan.num_dest :]], 1) - 1
    assert not mask.gather(1, merging).any()
    assert_same_plan(x, 20, margin=0.5, num_prefix=1, protect=[0, 3, 25])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 3e38])
@pytest.mark.parametrize("variant", VARIANTS)
def test_special_values_give_a_valid_plan(variant: str, value: float) -> None:
    x = draw(10, 2, 22, 5)
    for where in ((0, 4, 2), (0, 5), (0,)):
        x[where] = value
        plan = plan_pitome(x, 6, margin=0.5, num_prefix=1, variant=variant, backend="triton")
        assert sorted([*plan.keep[0].tolist(), *plan.src[0].tolist()]) == list(range(22))
        assert int(plan.slot.min()) >= plan.num_tokens - plan.num_dest
        assert_groups(plan)
        other = plan_pitome(x, 6, margin=0.5, num_prefix=1, variant=variant)
        assert torch.equal(plan.keep[1], other.keep[1])
    if value in (0.0, 3e38):  # 3e38: lengths overflow, rows become zero, in torch too
        assert_same_plan(x, 6, margin=0.5, num_prefix=1, variant=variant)


def test_empty_batch_and_strides() -> None:
    for variant in VARIANTS:
        plan = plan_pitome(torch.zeros(0, 13, 4), 4, margin=0.5, variant=variant, backend="triton")
        assert tuple(plan.keep.shape) == (0, 9)
    x = draw_clustered(11, 2, 26, 6)
    wide = torch.zeros(2, 52, 12)
    wide[:, ::2, ::2] = x
    for same in (wide[:, ::2, ::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
        plan = plan_pitome(same, 8, margin=0.5, backend="triton")
        assert torch.equal(plan.keep, plan_pitome(x, 8, margin=0.5).keep)
    assert_same_plan(x[:1].expand(2, -1, -1), 8, margin=0.5)


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 3])
def test_tome_equals_reference(num_prefix: int) -> None:
    x = draw(12, 2, num_prefix + 13, 8)
    for r in (1, 4, 99):
        plan = plan_tome(x, r, num_prefix=num_prefix, backend="triton")
        expected = tome_reference(x, r, num_prefix=num_prefix)
        assert (plan.keep.tolist(), plan.src.tolist(), plan.slot.tolist()) == expected


# --- the kernels one by one ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (33, 40), (65, 72), (5, 200)])
def test_metric(tokens: int, width: int, dtype: torch.dtype) -> None:
    # Keys as a fused qkv leaves them.
    keys = draw(13, 2, tokens, 3, 4, width, dtype=dtype)[:, :, 1].transpose(1, 2)
    expected = keys.double().sum(1)
    got = key_metric(keys, backend="triton")
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=2e-6)
    unit = metric.unit_rows(got, 1)
    assert torch.allclose(unit, F.normalize(got[:, 1:], dim=-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eq4", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (31, 64), (64, 16), (65, 20), (40, 150)])
def test_energies(tokens: int, width: int, eq4: bool) -> None:
    x = draw_clustered(14, 2, tokens, width)
    got = energy.energies(metric.unit_rows(x, 0), 0.4, 0.7, eq4, "ieee") / tokens
    expected = energy_reference(x, margin=0.4, alpha=0.7, energy="eq4" if eq4 else "elu")
    assert torch.allclose(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 31, 64, 150])
def test_rank_is_a_stable_sort(n: int) -> None:
    value = torch.randint(-3, 3, (2, n), generator=torch.Generator().manual_seed(n)).float()
    value[0, n // 2] = float("nan")
    value[1, 0] = float("-inf")
    rank, found = order.rank_descending(value)
    expected = value.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(found.long(), expected)
    assert torch.equal(rank.long(), expected.argsort(1))


@pytest.mark.parametrize("first_a", [0, 1])
@pytest.mark.parametrize(("tokens", "width"), [(3, 8), (64, 16), (147, 24), (40, 150)])
def test_match_is_argmax(tokens: int, width: int, first_a: int) -> None:
    unit = metric.unit_rows(draw(15, 2, tokens, width), 0)
    num_a = (tokens + 1 - first_a) // 2
    dealt = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1)).argsort(1)
    for given in (None, dealt.int()):
        rows = torch.arange(tokens).expand(2, -1) if given is None else dealt
        a, b = (unit.gather(1, rows[:, f::2].unsqueeze(-1).expand(-1, -1, width)) for f in (first_a, 1 - first_a))
        expected = (a @ b.transpose(1, 2)).max(-1)
        partner, value = match.best_partners(unit, given, num_a, tokens - num_a, first_a, "ieee")
        assert torch.equal(partner.long(), expected.indices)
        assert torch.allclose(value, expected.values, atol=1e-6)


def test_first_of_equal_partners_across_tiles() -> None:
    # 80 equal destinations take three tiles; the 70th is a little better for one source.
    x = torch.zeros(1, 160, 4)
    x[..., 0] = 1.0
    x[0, 141, 1] = 0.5
    x[0, 6, 1] = 0.5
    partner, _ = match.best_partners(metric.unit_rows(x, 0), None, 80, 80, 0, "ieee")
    assert partner[0].tolist() == [70 if i == 3 else 0 for i in range(80)]


def test_layout_beyond_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    # The running count of kept rows must carry over tiles of tokens and of prefix rows.
    monkeypatch.setitem(layout.configs.LAYOUT, "BLOCK", 8)
    for num_prefix in (0, 9):
        x = draw_clustered(16, 2, num_prefix + 45, 12)
        for variant in VARIANTS:
            assert_same_plan(x, 13, margin=0.5, num_prefix=num_prefix, variant=variant)


def test_groups_of_any_plan() -> None:
    generator = torch.Generator().manual_seed(2)
    for r, num_dest in ((1, 1), (40, 3), (3, 40), (33, 140), (140, 33)):
        slot = torch.randint(5, 5 + num_dest, (2, r), generator=generator)
        src = torch.randint(1000, (2, r), generator=generator)
        start, member = layout.group_sources(src, slot, 5 + num_dest, num_dest)
        for b in range(2):
            by_dest = slot[b].argsort(stable=True)
            assert member[b].tolist() == src[b, by_dest].tolist()
            assert start[b].tolist() == [int((slot[b] < 5 + d).sum()) for d in range(num_dest + 1)]
