"""How merged rows are combined: MergePlan against the reference, gradients, precision, composition.

Source: docs/methods/pitome.md 14.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtoken.ops.merging.plan
from vtoken import ConfigError, ShapeError
from vtoken.ops import REDUCTIONS, MergePlan, plan_pitome, plan_random, plan_stride, plan_tome, size_bias
from vtoken.ops.merging.plan import _add_by_product
from vtoken.ops.reference import merge_reference
from vtoken.ops.rows import add_rows

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: Relative error of one rounding, and what a few operations in the accumulation type may add.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2.0**-11 + 1e-6, torch.bfloat16: 2.0**-8 + 1e-6}
Planner = Callable[[Tensor, int, int], MergePlan]
PLANNERS: dict[str, Planner] = {
    "pitome": lambda m, r, p: plan_pitome(m, r, margin=0.5, num_prefix=p),
    "pitome_pairs": lambda m, r, p: plan_pitome(m, r, margin=0.5, num_prefix=p, variant="pitome_pairs"),
    "tome": lambda m, r, p: plan_tome(m, r, num_prefix=p),
    "random": lambda m, r, p: plan_random(m, r, num_prefix=p, seed=3),
    "stride": lambda m, r, p: plan_stride(m, 4, num_prefix=p),
}
each_planner = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
#: Sizes are counts and may be known to any caller in any of these forms.
SIZES = ["none", "ones", "counts", "counts_3d"]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_size(seed: int, batch: int, num_tokens: int, kind: str = "counts") -> Tensor | None:
    if kind == "none":
        return None
    size = torch.randint(1, 9, (batch, num_tokens), generator=torch.Generator().manual_seed(seed)).float()
    return torch.ones_like(size) if kind == "ones" else size.unsqueeze(-1) if kind == "counts_3d" else size


def assert_close(name: str, got: Tensor, expected: Tensor, rtol: float) -> None:
    """Every element within rtol of the expected one or of the values that went into it (which are of order 1)."""
    assert got.shape == expected.shape, name
    if not got.numel():
        return
    error = (got.double() - expected).abs() / expected.abs().clamp_min(1.0)
    worst = int(error.argmax())
    assert error.max() <= rtol, (
        f"{name}: {got.flatten()[worst].item()} at flat index {worst}, expected {expected.flatten()[worst].item()}"
    )


def as_lists(plan: MergePlan) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    return plan.keep.tolist(), plan.src.tolist(), plan.slot.tolist()


# --- against the reference ---


@each_reduction
@each_dtype
@each_planner
def test_apply_equals_reference(planner: Planner, dtype: torch.dtype, reduction: str) -> None:
    for seed, (batch, mergeable, num_prefix, r) in enumerate(
        [
            (1, 2, 0, 1),
            (2, 9, 1, 4),
            (3, 16, 0, 1),
            (2, 21, 5, 10),
            (3, 14, 2, 40),
            (2, 30, 3, 9),
            (0, 8, 1, 3),
            (2, 6, 1, 0),
        ]
    ):
        num_tokens = num_prefix + mergeable
        plan = planner(draw(seed, batch, num_tokens, 4), r, num_prefix)
        x = draw(seed + 100, batch, num_tokens, 7, dtype=dtype)
        for kind in SIZES:
            size = draw_size(seed, batch, num_tokens, kind)
            y, new_size = plan.apply(x, size, reduction)
            expected, expected_size = merge_reference(x, size, *as_lists(plan), reduction)
            if batch == 0:
                expected, expected_size = x.new_zeros(0, plan.num_tokens, 7).double(), x.new_zeros(0, plan.num_tokens)
            assert y.dtype == dtype
            assert new_size.dtype == torch.float32
            assert_close(f"rows, {reduction}, sizes {kind}", y, expected, ROUNDING[dtype])
            assert tuple(new_size.shape) == (batch, plan.num_tokens, *((1,) if kind == "counts_3d" else ()))
            assert torch.equal(new_size.reshape(expected_size.shape).double(), expected_size.double())


@each_reduction
def test_apply_is_exact_where_the_arithmetic_is(reduction: str) -> None:
    # Whole numbers whose weighted sums float32 holds exactly; every size a power of two, so are the quotients.
    plan = MergePlan(torch.tensor([[0, 2, 4]]), torch.tensor([[1, 3]]), torch.tensor([[2, 1]]), 5, 2)
    x = torch.tensor([[[7.0], [3.0], [-2.0], [10.0], [5.0]]])
    size = torch.tensor([[1.0, 2.0, 1.0, 3.0, 6.0]])
    y, new_size = plan.apply(x, size, reduction)
    expected = {
        "wavg": ([7.0, 28.0 / 4, 36.0 / 8], [1.0, 4.0, 8.0]),
        "mean": ([7.0, 4.0, 4.0], [1.0, 4.0, 8.0]),
        "amax": ([7.0, 10.0, 5.0], [1.0, 4.0, 8.0]),
        "prune": ([7.0, -2.0, 5.0], [1.0, 1.0, 6.0]),
    }[reduction]
    assert (y.flatten().tolist(), new_size.flatten().tolist()) == expected


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_may_have_no_channels(batch: int) -> None:
    rows, size = plan_tome(torch.randn(batch, 20, 8), 4).apply(torch.empty(batch, 20, 0))
    assert rows.shape == (batch, 16, 0)
    assert (size.sum(1) == 20).all()


def test_size_defaults_to_ones_and_reduction_to_wavg() -> None:
    plan, x = plan_tome(draw(1, 2, 11, 4), 4, num_prefix=1), draw(2, 2, 11, 3)
    for got, expected in zip(plan.apply(x), plan.apply(x, torch.ones(2, 11), "wavg"), strict=True):
        assert torch.equal(got, expected)


# --- properties of docs/methods/pitome.md 14 ---


@each_reduction
@each_dtype
@each_planner
def test_rows_that_receive_nothing_are_bit_equal(planner: Planner, dtype: torch.dtype, reduction: str) -> None:
    plan = planner(draw(3, 3, 4 + 25, 6), 8, 4)
    x = draw(4, 3, 29, 16, dtype=dtype) * 1000
    for kind in SIZES:
        y, _ = plan.apply(x, draw_size(5, 3, 29, kind), reduction)
        assert torch.equal(y[:, :4], x[:, :4])
        for b in range(3):
            receiving = set(plan.slot[b].tolist())
            untouched = [out for out in range(plan.num_tokens) if reduction == "prune" or out not in receiving]
            assert len(untouched) >= 4
            assert torch.equal(y[b, untouched], x[b, plan.keep[b, untouched]])


@each_planner
def test_sizes_sum_to_the_number_of_tokens(planner: Planner) -> None:
    size = torch.ones(2, 2 + 64)
    x = draw(6, 2, 66, 8)
    for _ in range(5):
        plan = planner(x, 9, 2)
        x, size = plan.apply(x, size)
        assert size.dtype == torch.float32
        assert size.sum(1).tolist() == [66.0, 66.0]
        assert torch.equal(size[:, :2], torch.ones(2, 2))
        assert size.min() >= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_planner
def test_weighted_mean_conserves_mass(planner: Planner, dtype: torch.dtype) -> None:
    plan = planner(draw(7, 2, 33, 6), 12, 1)
    x, size = draw(8, 2, 33, 5, dtype=dtype), draw_size(9, 2, 33)
    y, new_size = plan.apply(x, size)
    before = (x.double() * size.double().unsqueeze(-1)).sum(1)
    after = (y.double() * new_size.double().unsqueeze(-1)).sum(1)
    assert_close("mass", after, before, 1e-12 if dtype == torch.float64 else 1e-5)
    assert new_size.sum() == size.sum()


def test_plain_mean_ignores_sizes_but_tracks_them() -> None:
    plan, x, size = plan_tome(draw(1, 2, 21, 4), 7, num_prefix=1), draw(2, 2, 21, 3), draw_size(3, 2, 21)
    mean, mean_size = plan.apply(x, size, "mean")
    assert torch.equal(mean, plan.apply(x, None, "wavg")[0])
    assert torch.equal(mean_size, plan.apply(x, size, "wavg")[1])
    assert (mean - plan.apply(x, size, "wavg")[0]).abs().max() > 0.01


@each_reduction
@each_planner
def test_an_image_does_not_depend_on_its_neighbours(planner: Planner, reduction: str) -> None:
    metric, x = draw(10, 4, 26, 6), draw(11, 4, 26, 5, dtype=torch.float32)
    size = draw_size(12, 4, 26)
    y, new_size = planner(metric, 9, 1).apply(x, size, reduction)
    for b in range(4):
        one = slice(b, b + 1)
        alone, alone_size = planner(metric[one], 9, 1).apply(x[one], size[one], reduction)
        assert torch.allclose(alone, y[one], rtol=1e-6, atol=1e-6)
        assert torch.equal(alone_size, new_size[one])


@each_planner
def test_unmerge_gives_every_row_its_groups_value(planner: Planner) -> None:
    plan = planner(draw(13, 3, 31, 6), 11, 2)
    y = draw(14, 3, plan.num_tokens, 4)
    dense = plan.unmerge(y)
    assert tuple(dense.shape) == (3, 31, 4)
    for b in range(3):
        assert torch.equal(dense[b, :2], y[b, :2])
        for row, out in enumerate(plan.dest[b].tolist()):
            assert torch.equal(dense[b, row], y[b, out])


@each_reduction
@each_dtype
def test_unmerge_is_exact_if_groups_are_equal_inside(dtype: torch.dtype, reduction: str) -> None:
    # Whole numbers times whole sizes are summed and divided without rounding, so the result must be the very input.
    for planner in PLANNERS.values():
        plan = planner(draw(15, 2, 41, 6), 15, 1)
        generator = torch.Generator().manual_seed(1)
        x = plan.unmerge(torch.randint(-60, 60, (2, plan.num_tokens, 5), generator=generator).to(dtype))
        y, _ = plan.apply(x, draw_size(16, 2, 41), reduction)
        assert torch.equal(plan.unmerge(y), x)


@each_reduction
def test_equal_float64_rows_stay_equal_to_float64_precision(reduction: str) -> None:
    # The duplicate-token test of docs/methods/pitome.md 14 asks for 1e-12 after two blocks.
    plan = plan_stride(draw(17, 2, 30, 4), 10)
    x = plan.unmerge(draw(18, 2, 3, 5))
    y, _ = plan.apply(x, draw_size(19, 2, 30), reduction)
    assert_close("rows", y, draw(18, 2, 3, 5), 1e-14)


@each_reduction
@each_planner
def test_same_call_same_bits(planner: Planner, reduction: str) -> None:
    plan, x = planner(draw(20, 4, 197, 16), 80, 1), draw(21, 4, 197, 48, dtype=torch.float32)
    size = draw_size(22, 4, 197)
    state = torch.random.get_rng_state()
    first, second = plan.apply(x, size, reduction), plan.apply(x, size, reduction)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_merged_keys_with_size_bias_attend_like_all_keys() -> None:
    # Property 10 at op level: equal keys and values, merged, with log(size) on the logits.
    plan = plan_stride(draw(23, 2, 20, 4), 4)
    keys, values, queries = plan.unmerge(draw(24, 2, 5, 8)), plan.unmerge(draw(25, 2, 5, 8)), draw(26, 2, 3, 6, 8)
    few_keys, size = plan.apply(keys, torch.ones(2, 20))
    few_values, _ = plan.apply(values)
    full = F.scaled_dot_product_attention(queries, *(t[:, None].expand(2, 3, 20, 8) for t in (keys, values)))
    few = [t[:, None].expand(2, 3, 5, 8) for t in (few_keys, few_values)]
    merged = F.scaled_dot_product_attention(queries, *few, attn_mask=size_bias(size, torch.float64))
    assert_close("attention", merged, full, 1e-6)
    assert (F.scaled_dot_product_attention(queries, *few) - full).abs().max() > 0.01  # the term matters here


@each_dtype
def test_size_bias(dtype: torch.dtype) -> None:
    size = torch.tensor([[1.0, 2.0, 577.0], [3.0, 1.0, 257.0]])
    bias = size_bias(size, dtype)
    assert tuple(bias.shape) == (2, 1, 1, 3)
    assert bias.dtype == dtype
    # The logarithm is taken in float32: 257 is no bfloat16 number, but its logarithm must not be that of 256.
    assert torch.equal(
        bias[:, 0, 0], size.to(torch.float64 if dtype == torch.float64 else torch.float32).log().to(dtype)
    )


# --- one image, which takes fewer operations ---


@each_planner
@pytest.mark.parametrize("kind", SIZES)
def test_one_image_merges_as_it_would_among_others(planner: Planner, kind: str) -> None:
    plan = planner(draw(60, 1, 43, 6), 15, 2)
    alone, size = draw(61, 1, 43, 24, dtype=torch.float32), draw_size(62, 1, 43, kind)
    pair = MergePlan(*(torch.cat([t, t]) for t in (plan.keep, plan.src, plan.slot)), plan.num_tokens_in, plan.num_dest)
    y, new_size = plan.apply(alone, size)
    both, both_size = pair.apply(torch.cat([alone, alone]), None if size is None else torch.cat([size, size]))
    assert torch.equal(y, both[:1])
    assert torch.equal(new_size, both_size[:1])
    # The same with a gradient, which takes the way of a batch.
    assert torch.equal(plan.apply(alone.clone().requires_grad_(), size)[0], y)


@each_planner
def test_one_image_leaves_its_inputs_alone(planner: Planner) -> None:
    plan, x, size = planner(draw(63, 1, 43, 6), 15, 2), draw(64, 1, 43, 8, dtype=torch.float32), draw_size(65, 1, 43)
    rows = [plan.keep.clone(), plan.src.clone(), plan.slot.clone(), x.clone(), size.clone()]
    first = plan.apply(x, size)
    assert all(torch.equal(a, b) for a, b in zip(rows, (plan.keep, plan.src, plan.slot, x, size), strict=True))
    again = plan.apply(x, size)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_image_in_every_mode() -> None:
    plan, x, size = plan_tome(draw(66, 1, 43, 6), 15), draw(67, 1, 43, 8, dtype=torch.float32), draw_size(68, 1, 43)
    expected, _ = plan.apply(x, size)
    assert expected.is_contiguous()
    with torch.inference_mode():
        assert torch.equal(plan.apply(x, size)[0], expected)
    with torch.no_grad():
        assert torch.equal(plan.apply(x.clone().requires_grad_(), size)[0], expected)
    weight = torch.ones(8, requires_grad=True)  # a frozen tower in front of something that learns
    (plan.apply(x, size)[0] * weight).sum().backward()
    torch.testing.assert_close(weight.grad, expected.sum((0, 1)))
    assert torch.equal(torch.func.vmap(lambda t: plan.apply(t, size)[0])(x.unsqueeze(0))[0], expected)
    value, tangent = torch.func.jvp(lambda t: plan.apply(t, size)[0], (x,), (x,))
    assert torch.equal(value, expected)
    torch.testing.assert_close(tangent, expected)  # merging is linear
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, 2 * x)
        torch.testing.assert_close(
            torch.autograd.forward_ad.unpack_dual(plan.apply(dual, size)[0]).tangent, 2 * expected
        )
    grown = size.clone().requires_grad_()
    plan.apply(x, grown)[1].sum().backward()
    assert torch.equal(grown.grad, torch.ones_like(size))
    compiled = torch.compile(lambda t: plan.apply(t, size), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x)[0], expected)


# --- precision (docs/methods/pitome.md 8) ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["wavg", "mean"])
def test_half_precision_accumulates_in_float32(reduction: str, dtype: torch.dtype) -> None:
    # 300 rows into one: adding them in half precision would lose most of them.
    plan = plan_stride(draw(27, 2, 900, 4), 300)
    x = (1 + 0.1 * draw(28, 2, 900, 6)).to(dtype)
    size = draw_size(29, 2, 900)
    y, _ = plan.apply(x, size, reduction)
    expected, _ = merge_reference(x, size, *as_lists(plan), reduction)
    assert y.dtype == dtype
    assert_close("rows", y, expected, ROUNDING[dtype] + 3e-6)
    # One rounding at the end, so nearly every value is the nearest one there is.
    assert (y == expected.to(dtype)).float().mean() > 0.98


@each_dtype
def test_sizes_stay_exact_beyond_256(dtype: torch.dtype) -> None:
    for num_tokens in (257, 601, 4097):
        plan = plan_stride(draw(30, 1, num_tokens, 2), num_tokens)
        y, size = plan.apply(torch.ones(1, num_tokens, 3, dtype=dtype))
        assert size.dtype == torch.float32
        assert size.tolist() == [[float(num_tokens)]]
        assert torch.allclose(y, torch.ones(1, 1, 3, dtype=dtype), rtol=1e-4)
    size, x = torch.ones(1, 1024), draw(31, 1, 1024, 4, dtype=dtype)
    while x.shape[1] > 1:
        x, size = plan_tome(x, x.shape[1]).apply(x, size)
    assert size.tolist() == [[1024.0]]
    assert torch.isfinite(x).all()


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """torch's default, which programs set while they build models of another dtype."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("batch", [1, 2])
@each_reduction
def test_sizes_are_float32_whatever_torchs_default_is(default_dtype: torch.dtype, reduction: str, batch: int) -> None:
    x = draw(3, batch, 600, 2, dtype=torch.float32)
    for r in (0, 299):
        plan = plan_tome(x, r)
        rows, size = plan.apply(x, reduction=reduction)
        assert (rows.dtype, size.dtype) == (torch.float32, torch.float32)
        torch.set_default_dtype(torch.float32)
        expected = plan.apply(x, reduction=reduction)
        torch.set_default_dtype(default_dtype)
        assert torch.equal(rows, expected[0])
        assert torch.equal(size, expected[1])


def test_half_precision_sizes_are_taken_up_to_float32() -> None:
    plan = plan_stride(draw(32, 1, 3, 2), 3)
    size = torch.tensor([[256.0, 1.0, 3.0]], dtype=torch.bfloat16)
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    y, new_size = plan.apply(x, size)
    assert new_size.dtype == torch.float32
    assert new_size.item() == 260
    assert y.item() == pytest.approx(267 / 260, rel=1e-6)


@each_reduction
@each_dtype
def test_apply_under_autocast_is_apply(dtype: torch.dtype, reduction: str) -> None:
    plan, x, size = plan_tome(draw(33, 2, 40, 4), 15), draw(34, 2, 40, 8, dtype=dtype), draw_size(35, 2, 40)
    expected = plan.apply(x, size, reduction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = plan.apply(x, size, reduction)
        assert size_bias(size, torch.float32).dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@each_dtype
def test_prune_drops_sources_whatever_they_hold(dtype: torch.dtype, value: float) -> None:
    # docs/methods/baselines.md 4: with "prune" destination values are unchanged.
    plan, x = plan_tome(draw(36, 2, 12, 4), 4), draw(37, 2, 12, 3, dtype=dtype)
    x = x.scatter(1, plan.src.unsqueeze(-1).expand(-1, -1, 3), value)
    y, _ = plan.apply(x, None, "prune")
    assert torch.equal(y, x.gather(1, plan.keep.unsqueeze(-1).expand(-1, -1, 3)))


@each_reduction
def test_a_bad_row_spoils_its_own_group_only(reduction: str) -> None:
    plan, x = plan_tome(draw(38, 2, 16, 4), 6), draw(39, 2, 16, 3)
    x[0, 5] = float("nan")
    y, _ = plan.apply(x, None, reduction)
    group = int(plan.dest[0, 5])
    assert torch.isfinite(y[1]).all()
    assert torch.isfinite(torch.cat([y[0, :group], y[0, group + 1 :]])).all()


# --- gradients, with the plan fixed ---


@pytest.mark.parametrize("kind", ["none", "counts_3d"])
@each_reduction
@each_planner
def test_gradient_against_finite_differences(planner: Planner, reduction: str, kind: str) -> None:
    plan = planner(draw(40, 2, 11, 4), 4, 1)
    size = draw_size(41, 2, 11, kind)
    x = draw(42, 2, 11, 3).requires_grad_()

    def rows(t: Tensor) -> Tensor:
        return plan.apply(t, size, reduction)[0]

    assert torch.autograd.gradcheck(rows, x, atol=1e-8)
    if reduction != "amax":  # its second derivative is zero, and torch offers none
        assert torch.autograd.gradgradcheck(rows, x)


def test_gradient_is_the_share_times_the_gradient_of_the_group() -> None:
    plan, size = plan_tome(draw(43, 2, 17, 4), 6, num_prefix=1), draw_size(44, 2, 17)
    x = draw(45, 2, 17, 3).requires_grad_()
    y, new_size = plan.apply(x, size)
    upstream = draw(46, *y.shape)
    y.backward(upstream)
    for b in range(2):
        for row, out in enumerate(plan.dest[b].tolist()):
            share = float(size[b, row]) / float(new_size[b, out])
            assert torch.allclose(x.grad[b, row], share * upstream[b, out], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@each_reduction
def test_gradients_in_low_precision(reduction: str, dtype: torch.dtype) -> None:
    plan, size = plan_tome(draw(43, 2, 17, 4), 6), draw_size(44, 2, 17)
    x = draw(45, 2, 17, 3, dtype=dtype)
    upstream = draw(46, 2, 11, 3, dtype=dtype)
    exact, low = x.double().requires_grad_(), x.clone().requires_grad_()
    plan.apply(exact, size, reduction)[0].backward(upstream.double())
    plan.apply(low, size, reduction)[0].backward(upstream)
    assert low.grad.dtype == dtype
    assert_close("gradient", low.grad, exact.grad, ROUNDING[dtype])


@each_reduction
@each_dtype
def test_values_are_the_same_with_and_without_gradient(dtype: torch.dtype, reduction: str) -> None:
    plan, x, size = plan_tome(draw(47, 2, 17, 4), 6), draw(48, 2, 17, 3, dtype=dtype), draw_size(49, 2, 17)
    expected = plan.apply(x, size, reduction)[0]
    tracked = plan.apply(x.clone().requires_grad_(), size, reduction)[0]
    assert tracked.requires_grad
    assert torch.equal(tracked, expected)
    with torch.no_grad():
        assert not plan.apply(x.clone().requires_grad_(), size, reduction)[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(plan.apply(x, size, reduction)[0], expected)


def test_gradients_of_rows_with_strides() -> None:
    plan = plan_tome(draw(50, 3, 12, 4), 4)
    for make in (
        lambda t: t.expand(3, -1, -1),
        lambda t: t.repeat(3, 1, 1).transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.repeat(3, 1, 2)[..., ::2],
    ):
        base = draw(51, 1, 12, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda t, make=make: plan.apply(make(t))[0], base)


def test_functional_transforms() -> None:
    plan, x = plan_tome(draw(52, 2, 9, 4), 3), draw(53, 2, 9, 3)
    tracked = x.clone().requires_grad_()
    plan.apply(tracked)[0].square().sum().backward()
    got = torch.func.grad(lambda t: plan.apply(t)[0].square().sum())(x)
    assert torch.allclose(got, tracked.grad)


def test_checkpointing_recomputes_the_same() -> None:
    plan, x = plan_tome(draw(54, 2, 9, 4), 3), draw(55, 2, 9, 3)
    plain, checkpointed = x.clone().requires_grad_(), x.clone().requires_grad_()
    plan.apply(plain)[0].square().sum().backward()
    run = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    run(lambda t: plan.apply(t)[0].square(), checkpointed).sum().backward()
    assert torch.equal(plain.grad, checkpointed.grad)


# --- composition ---


@pytest.mark.parametrize("reduction", ["wavg", "amax", "prune"])
@pytest.mark.parametrize("second", PLANNERS.values(), ids=PLANNERS.keys())
@pytest.mark.parametrize("first", PLANNERS.values(), ids=PLANNERS.keys())
def test_two_plans_as_one(first: Planner, second: Planner, reduction: str) -> None:
    x = draw(56, 2, 36, 5)
    one = first(draw(58, 2, 36, 4), 10, 2)
    two = second(draw(59, 2, one.num_tokens, 4), 4, 2)
    both = one.then(two)
    assert both.num_tokens_in == 36
    assert both.num_tokens == two.num_tokens
    assert both.removed == one.removed + two.removed
    assert sorted(both.keep[0].tolist() + both.src[0].tolist()) == list(range(36))
    assert torch.equal(both.dest, two.dest.gather(1, one.dest))
    for kind in SIZES:
        size = draw_size(57, 2, 36, kind)
        expected, expected_size = two.apply(*one.apply(x, size, reduction), reduction)
        y, new_size = both.apply(x, size, reduction)
        assert torch.equal(new_size, expected_size)
        assert torch.equal(y[:, :2], x[:, :2])
        assert_close("rows", y, expected, 1e-6)
        assert_close("reference", y, merge_reference(x, size, *as_lists(both), reduction)[0], 1e-6)
        assert torch.equal(both.unmerge(expected), one.unmerge(two.unmerge(expected)))


def test_composition_is_associative_and_has_an_identity() -> None:
    x, size = draw(60, 2, 30, 5), draw_size(61, 2, 30)
    plans = [
        plan_tome(draw(62, 2, 30, 4), 8),
        plan_pitome(draw(63, 2, 22, 4), 5, margin=0.3),
        plan_stride(draw(64, 2, 17, 4), 3),
    ]
    left, right = plans[0].then(plans[1]).then(plans[2]), plans[0].then(plans[1].then(plans[2]))
    for a, b in zip(left.apply(x, size), right.apply(x, size), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
    assert torch.equal(left.dest, right.dest)
    none_before = MergePlan.identity(2, 30, x.device)
    none_after = MergePlan.identity(2, 22, x.device)
    for same in (none_before.then(plans[0]), plans[0].then(none_after)):
        for a, b in zip(same.apply(x, size), plans[0].apply(x, size), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(same.dest, plans[0].dest)
    nothing = none_before.then(none_before)
    assert nothing.apply(x, size)[0] is x


def test_plans_that_do_not_follow_each_other() -> None:
    one, two = plan_tome(draw(65, 2, 12, 4), 4), plan_tome(draw(66, 2, 9, 4), 2)
    with pytest.raises(ShapeError, match="starts from 9 rows, this one ends with 8"):
        one.then(two)


# --- edge cases (docs/methods/pitome.md 9) ---


@each_reduction
@each_dtype
def test_identity_returns_the_same_objects(dtype: torch.dtype, reduction: str) -> None:
    for batch, num_tokens in ((2, 5), (0, 5), (2, 0), (1, 1)):
        plan = MergePlan.identity(batch, num_tokens, torch.device("cpu"))
        x, size = draw(67, batch, num_tokens, 3, dtype=dtype), torch.ones(batch, num_tokens, 1)
        y, new_size = plan.apply(x, size, reduction)
        assert y is x
        assert new_size is size
        assert plan.unmerge(x).shape == x.shape
        without = plan.apply(x, None, reduction)[1]
        assert (without.dtype, without.tolist()) == (torch.float32, [[1.0] * num_tokens] * batch)
        assert (plan.num_tokens, plan.removed, plan.num_tokens_in) == (num_tokens, 0, num_tokens)


@each_reduction
def test_empty_batch(reduction: str) -> None:
    plan = plan_tome(torch.zeros(0, 9, 4), 3, num_prefix=1)
    y, size = plan.apply(torch.zeros(0, 9, 5), torch.ones(0, 9, 1), reduction)
    assert (tuple(y.shape), tuple(size.shape)) == ((0, 6, 5), (0, 6, 1))
    assert tuple(plan.unmerge(y).shape) == (0, 9, 5)
    x = torch.zeros(0, 9, 5, requires_grad=True)
    plan.apply(x, None, reduction)[0].sum().backward()
    assert tuple(x.grad.shape) == (0, 9, 5)


@each_reduction
@each_dtype
def test_inputs_are_not_modified(dtype: torch.dtype, reduction: str) -> None:
    plan, x, size = plan_tome(draw(68, 2, 14, 4), 5), draw(69, 2, 14, 6, dtype=dtype), draw_size(70, 2, 14)
    tensors = [x, size, plan.keep, plan.src, plan.slot]
    before = [(t.clone(), t._version) for t in tensors]
    y, new_size = plan.apply(x, size, reduction)
    plan.apply(x.requires_grad_(), size, reduction)[0].sum().backward()
    plan.unmerge(y)
    for t, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(t.detach(), copy)
        assert t._version == version
    # And the results are tensors of their own.
    y.fill_(0)
    new_size.fill_(0)
    assert torch.equal(x.detach(), before[0][0])
    assert torch.equal(size, before[1][0])


@each_reduction
def test_strides_do_not_matter(reduction: str) -> None:
    plan, x, size = plan_tome(draw(71, 3, 14, 4), 5), draw(72, 3, 14, 6, dtype=torch.float32), draw_size(73, 3, 14)
    expected, expected_size = plan.apply(x, size, reduction)
    wide = torch.zeros(3, 28, 12)
    wide[:, ::2, ::2] = x
    channels_last = (
        x.transpose(1, 2).reshape(3, 6, 2, 7).to(memory_format=torch.channels_last).flatten(2).transpose(1, 2)
    )
    for same in (wide[:, ::2, ::2], x.transpose(1, 2).contiguous().transpose(1, 2), channels_last):
        y, new_size = plan.apply(same, size.t().contiguous().t(), reduction)
        assert torch.equal(y, expected)
        assert torch.equal(new_size, expected_size)
    y, _ = plan.apply(x[:1].expand(3, -1, -1), size[:1].expand(3, -1), reduction)
    assert torch.equal(y, plan.apply(x[:1].repeat(3, 1, 1), size[:1].repeat(3, 1), reduction)[0])


@pytest.mark.parametrize("shape", [(12, 3), (2, 12), (2, 12, 3, 1), (2, 11, 3), (3, 12, 3), (1, 12, 3)])
def test_x_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    plan = plan_tome(draw(74, 2, 12, 4), 4)
    with pytest.raises(ShapeError, match=r"the plan takes x of shape \[2, 12, C\], got"):
        plan.apply(torch.zeros(shape))
    with pytest.raises(ValueError, match="got"):
        plan.apply(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(12,), (2, 11), (3, 12), (2, 12, 2), (2, 1, 12), (2, 12, 1, 1)])
def test_size_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    for plan in (plan_tome(draw(74, 2, 12, 4), 4), MergePlan.identity(2, 12, torch.device("cpu"))):
        with pytest.raises(ShapeError, match=r"size must be \[2, 12\] or \[2, 12, 1\], got"):
            plan.apply(torch.zeros(2, 12, 3), torch.ones(shape))


@pytest.mark.parametrize("shape", [(8, 3), (2, 12, 3), (2, 8, 3, 1), (3, 8, 3)])
def test_unmerge_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="unmerge takes"):
        plan_tome(draw(74, 2, 12, 4), 4).unmerge(torch.zeros(shape))


def test_unknown_reduction() -> None:
    for plan in (plan_tome(draw(74, 2, 12, 4), 4), MergePlan.identity(2, 12, torch.device("cpu"))):
        with pytest.raises(ConfigError, match=r"reduction='sum'.: reduction must be one of wavg, mean, amax, prune"):
            plan.apply(torch.zeros(2, 12, 3), reduction="sum")


# --- devices ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_product_adds_like_index_add(dtype: torch.dtype) -> None:
    for batch, num_dest, num_src in ((2, 5, 9), (1, 7, 1), (3, 1, 6), (0, 4, 3), (2, 4, 4)):
        rows, sources = draw(78, batch, num_dest, 6, dtype=dtype), draw(79, batch, num_src, 6, dtype=dtype)
        slot = torch.randint(num_dest, (batch, num_src), generator=torch.Generator().manual_seed(80))
        before = rows.clone()
        got = _add_by_product(rows, sources, slot)
        assert torch.equal(rows, before)
        assert_close("rows", got, add_rows(rows.clone(), sources, slot).double(), ROUNDING[dtype])


def test_product_is_not_rounded_by_autocast() -> None:
    # docs/methods/pitome.md 8: averages accumulate in float32; autocast would make a batched product bfloat16.
    rows, sources = draw(81, 2, 5, 6, dtype=torch.float32), draw(82, 2, 9, 6, dtype=torch.float32)
    slot = torch.arange(9).remainder(5).expand(2, -1)
    expected = _add_by_product(rows, sources, slot)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _add_by_product(rows, sources, slot)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@each_reduction
@each_dtype
def test_apply_with_the_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str) -> None:
    # What runs off the CPU, run on it; add_rows writes into its first argument.
    calls = []

    def add(rows: Tensor, sources: Tensor, slot: Tensor) -> Tensor:
        calls.append(slot)
        return rows.copy_(_add_by_product(rows, sources, slot))

    monkeypatch.setattr(vtoken.ops.merging.plan, "add_rows", add)
    for name, planner in PLANNERS.items():
        plan = planner(draw(83, 2, 25, 4), 9, 2)
        x, size = draw(84, 2, 25, 6, dtype=dtype), draw_size(85, 2, 25)
        y, new_size = plan.apply(x, size, reduction, backend="torch")
        expected, expected_size = merge_reference(x, size, *as_lists(plan), reduction)
        assert y.dtype == dtype
        assert_close(name, y, expected, ROUNDING[dtype])
        assert torch.equal(new_size.double(), expected_size)
        assert torch.equal(y[:, :2], x[:, :2])
    assert len(calls) == (len(PLANNERS) if reduction in ("wavg", "mean") else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
@each_reduction
@each_dtype
def test_other_devices_give_the_result_of_the_cpu(dtype: torch.dtype, reduction: str, autocast: bool) -> None:
    for name, planner in PLANNERS.items():
        metric, size = draw(75, 3, 40, 4), draw_size(76, 3, 40)
        x = draw(77, 3, 40, 8, dtype=dtype)
        plan = planner(metric, 12, 1)
        expected, expected_size = merge_reference(x, size, *as_lists(plan), reduction)
        there = planner(metric.cuda(), 12, 1)
        assert as_lists(there) == as_lists(plan)
        with torch.autocast("cuda", dtype=torch.float16, enabled=autocast):
            y, new_size = there.apply(x.cuda(), size.cuda(), reduction)
            again, _ = there.apply(x.cuda(), size.cuda(), reduction)
        assert y.dtype == dtype
        assert torch.equal(y, again)
        assert_close(name, y.cpu(), expected, ROUNDING[dtype])
        assert torch.equal(new_size.cpu().double(), expected_size)


@each_reduction
def test_meta_tensors_give_shapes(reduction: str) -> None:
    for planner in PLANNERS.values():
        plan = planner(torch.zeros(2, 21, 4, device="meta"), 6, 1)
        y, size = plan.apply(torch.zeros(2, 21, 8, device="meta"), None, reduction)
        assert tuple(y.shape) == (2, plan.num_tokens, 8)
        assert tuple(size.shape) == (2, plan.num_tokens)


def test_plans_for_other_batches_do_not_follow() -> None:
    one = plan_tome(draw(74, 2, 12, 4), 4)
    with pytest.raises(ShapeError, match="for 3 images, this one for 2"):
        one.then(plan_tome(draw(74, 3, 8, 4), 2))
    assert one.then(plan_tome(draw(74, 2, 8, 4), 2)).num_tokens == 6
