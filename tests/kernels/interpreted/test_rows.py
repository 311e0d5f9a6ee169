"""K4 and K4f: merged rows, sizes and gradients against the float64 reference and autograd through torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_close
from vtoken.ops import REDUCTIONS, MergePlan, add_merge_norm, plan_pitome, plan_random, plan_stride, plan_tome
from vtoken.ops.reference import merge_reference
from vtoken_kernels import configs

#: Relative RMS error of one rounding, to nearest (truncating would fail).
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
DTYPES = list(ROUNDING)
PLANNERS: dict[str, Callable[[Tensor], MergePlan]] = {
    "pitome": lambda m: plan_pitome(m, 9, margin=0.5, num_prefix=1, backend="triton"),
    "tome": lambda m: plan_tome(m, 9, num_prefix=2, backend="triton"),
    # Made by torch, so the groups are made when the rows are merged.
    "torch": lambda m: plan_pitome(m, 9, margin=0.5, backend="torch"),
    "random": lambda m: plan_random(m, 9, num_prefix=1),
    "stride": lambda m: plan_stride(m, 10),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_size(seed: int, kind: str = "counts", tokens: int = 26) -> Tensor | None:
    size = torch.randint(1, 9, (2, tokens), generator=torch.Generator().manual_seed(seed)).float()
    return {"none": None, "counts": size, "counts_3d": size.unsqueeze(-1), "bf16": size.bfloat16()}[kind]


def reference(plan: MergePlan, x: Tensor, size: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    return merge_reference(x, size, plan.keep.tolist(), plan.src.tolist(), plan.slot.tolist(), reduction)


def untouched(plan: MergePlan, b: int) -> list[int]:
    return [out for out in range(plan.num_tokens) if out not in set(plan.slot[b].tolist())]


@each_reduction
@each_dtype
@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS.keys())
def test_rows_and_sizes(planner: Callable[[Tensor], MergePlan], dtype: torch.dtype, reduction: str) -> None:
    plan, x = planner(draw(1, 2, 26, 6)), draw(2, 2, 26, 21, dtype=dtype)
    kinds = ("none", "counts", "counts_3d", "bf16") if planner is PLANNERS["pitome"] else ("counts",)
    for kind in kinds:
        size = draw_size(3, kind)
        y, new_size = plan.apply(x, size, reduction, backend="triton")
        expected, expected_size = reference(plan, x, size, reduction)
        assert (y.dtype, new_size.dtype) == (dtype, torch.float32)
        assert_close(f"rows, sizes {kind}", expected, y, ROUNDING[dtype])
        assert torch.equal(new_size.reshape(expected_size.shape).double(), expected_size)
        assert new_size.dim() == (3 if kind == "counts_3d" else 2)
        for b in range(2):
            rows = list(range(plan.num_tokens)) if reduction == "prune" else untouched(plan, b)
            assert torch.equal(y[b, rows], x[b, plan.keep[b, rows]])


@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients(dtype: torch.dtype, reduction: str) -> None:
    for name in ("pitome", "torch", "stride") if dtype == torch.float32 else ("tome",):
        plan = PLANNERS[name](draw(4, 2, 26, 6))
        grad = draw(5, 2, 26, 21, dtype=dtype)[:, : plan.num_tokens]
        # Whole numbers, so that "amax" has equal rows, which share the gradient.
        x = draw(6, 2, 26, 21).mul(2).round().to(dtype) if reduction == "amax" else draw(6, 2, 26, 21, dtype=dtype)
        size = draw_size(7)
        exact = x.double().requires_grad_()
        expected = torch.autograd.grad(plan.apply(exact, size, reduction, backend="torch")[0], exact, grad.double())[0]
        leaf = x.clone().requires_grad_()
        y, new_size = plan.apply(leaf, size, reduction, backend="triton")
        assert not new_size.requires_grad
        (got,) = torch.autograd.grad(y, leaf, grad)
        assert got.dtype == dtype
        assert_close(f"{name}, {reduction}", expected, got, ROUNDING[dtype])
        # A gradient without memory of its own, as sum() makes it.
        (got,) = torch.autograd.grad(plan.apply(leaf, size, reduction, backend="triton")[0].sum(), leaf)
        (expected,) = torch.autograd.grad(plan.apply(exact, size, reduction, backend="torch")[0].sum(), exact)
        assert_close(f"{name}, {reduction}, sum", expected, got, ROUNDING[dtype])


@pytest.mark.parametrize("reduction", ["wavg", "mean", "prune"])
def test_second_derivatives(reduction: str) -> None:
    # Merging is linear, so only its argument's square curves.
    plan, size = PLANNERS["pitome"](draw(8, 2, 26, 6)), draw_size(9)
    found = []
    for backend in ("torch", "triton"):
        x = draw(10, 2, 26, 5).requires_grad_()
        y = plan.apply(x, size, reduction, backend=backend)[0]
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    assert_close("second derivative", found[0], found[1], 1e-5)


@each_reduction
def test_a_bad_row_spoils_its_own_group_only(reduction: str) -> None:
    plan, x = PLANNERS["pitome"](draw(11, 2, 26, 6)), draw(12, 2, 26, 5)
    x[0, int(plan.src[0, 0])] = float("nan")
    y, _ = plan.apply(x, None, reduction, backend="triton")
    bad = int(plan.slot[0, 0])
    assert y[0, bad].isnan().all() == (reduction != "prune")
    assert torch.cat([y[0, :bad], y[0, bad + 1 :], y[1]]).isfinite().all()
    # And a bad gradient of a kept row does not reach the rows that were dropped.
    leaf = draw(12, 2, 26, 5).requires_grad_()
    y, _ = plan.apply(leaf, None, reduction, backend="triton")
    y.backward(torch.zeros_like(y).index_fill_(1, torch.tensor([bad]), float("inf")))
    assert leaf.grad[0, [r for r in range(26) if int(plan.dest[0, r]) != bad]].eq(0).all()
    if reduction == "prune":
        assert leaf.grad[0, plan.src[0]].eq(0).all()


@each_reduction
def test_groups_of_equal_rows_stay_exact(reduction: str) -> None:
    plan = PLANNERS["tome"](draw(13, 2, 26, 6))
    x = plan.unmerge(draw(14, 2, plan.num_tokens, 7))
    y, _ = plan.apply(x, draw_size(15), reduction, backend="triton")
    assert torch.equal(plan.unmerge(y), x)


def test_bfloat16_rounds_to_nearest() -> None:
    # One source joins one destination: every value is a mean of two, which torch rounds to nearest even.
    plan = plan_stride(draw(39, 2, 2, 4), 2)
    x = draw(40, 2, 2, 300, dtype=torch.bfloat16)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = 0.0, torch.tensor([1.0, -1.0]), float("inf")
    y, _ = plan.apply(x, backend="triton")
    mean = x[:, :1].float() + (x[:, 1:].float() - x[:, :1].float()) * 0.5
    assert torch.equal(y[:, :, 3:], mean[:, :, 3:].bfloat16())
    assert y[0, 0, :2].tolist() == [0.0, 0.0]


def test_strides_and_wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x, size = PLANNERS["pitome"](draw(16, 2, 26, 6)), draw(17, 2, 26, 40), draw_size(18)
    expected = plan.apply(x, size, backend="torch")
    wide = torch.zeros(2, 52, 80)
    wide[:, ::2, ::2] = x
    for same in (wide[:, ::2, ::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
        y, new_size = plan.apply(same, size.t().contiguous().t(), backend="triton")
        assert_close("strided", expected[0], y, 1e-6)
        assert torch.equal(new_size, expected[1])
    # Rows wider than one block of channels, of which only the first writes the sizes.
    monkeypatch.setattr(configs, "rows", lambda width: {"BLOCK_C": 16})
    for reduction in REDUCTIONS:
        leaf = x.clone().requires_grad_()
        y, new_size = plan.apply(leaf, size, reduction, backend="triton")
        other = x.clone().requires_grad_()
        expected = plan.apply(other, size, reduction, backend="torch")
        assert_close("wide", expected[0], y, 1e-6)
        assert torch.equal(new_size, expected[1])
        weights = draw(19, *y.shape)
        for merged in (y, expected[0]):
            (merged * weights).sum().backward()
        assert_close("wide, gradient", other.grad, leaf.grad, 1e-6)


def test_edges() -> None:
    for batch, tokens, r in ((0, 9, 3), (1, 2, 1), (2, 3, 1), (1, 64, 32)):
        plan = plan_tome(draw(20, batch, tokens, 4), r, backend="triton")
        x = draw(21, batch, tokens, 3).requires_grad_()
        y, size = plan.apply(x, backend="triton")
        expected, expected_size = plan.apply(x, backend="torch")
        assert_close("rows", expected, y, 1e-6)
        assert torch.equal(size, expected_size)
        y.sum().backward()
        assert_close("gradient", 1 / plan.unmerge(expected_size.unsqueeze(-1)).expand_as(x), x.grad, 1e-6)
    both = PLANNERS["pitome"](draw(22, 2, 26, 6))
    both = both.then(plan_tome(draw(23, 2, both.num_tokens, 4), 5, num_prefix=1, backend="triton"))
    x = draw(24, 2, 26, 6)
    assert_close("then", both.apply(x, backend="torch")[0], both.apply(x, backend="triton")[0], 1e-6)


# --- residual, merge and norm together ---


@each_dtype
@pytest.mark.parametrize("width", [24, 37])
def test_add_merge_norm(width: int, dtype: torch.dtype) -> None:
    for planner in (PLANNERS["pitome"], PLANNERS["stride"]):
        plan = planner(draw(25, 2, 26, 6))
        x, branch = draw(26, 2, 26, width, dtype=dtype), draw(27, 2, 26, width, dtype=dtype)
        for weight, bias, kind in (
            (draw(28, width), draw(29, width), "counts"),
            (draw(28, width, dtype=dtype), None, "none"),
            (None, draw(29, width), "counts_3d"),
        ):
            size = draw_size(30, kind)
            rows, normed, new_size = add_merge_norm(
                plan, x, branch, size, weight, bias, eps=1e-5, backend="triton"
            )  # fmt: skip
            added = x.double() + branch.double()
            expected, expected_size = reference(plan, added, size, "wavg")
            assert rows.dtype == normed.dtype == dtype
            # Twice: the sum is rounded before it is merged, as an addition alone would do.
            assert_close("rows", expected, rows, 2 * ROUNDING[dtype])
            assert torch.equal(new_size.reshape(expected_size.shape).double(), expected_size)
            double = [None if t is None else t.double() for t in (weight, bias)]
            assert_close("norm", F.layer_norm(rows.double(), (width,), *double, 1e-5), normed, ROUNDING[dtype] + 1e-6)
            # The same bits as one after the other; rows that receive nothing are the sum as torch rounds it.
            assert torch.equal(rows, plan.apply(x + branch, size, backend="triton")[0])
            assert torch.equal(rows[0, untouched(plan, 0)], (x + branch)[0, plan.keep[0, untouched(plan, 0)]])


@pytest.mark.parametrize("half_branch", [False, True])
def test_gradients_of_add_merge_norm(half_branch: bool) -> None:
    plan, size = PLANNERS["pitome"](draw(31, 2, 26, 6)), draw_size(32)
    found = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        values = [draw(33, 2, 26, 20), draw(34, 2, 26, 20), draw(35, 20), draw(36, 20)]
        if half_branch:
            values[1] = values[1].half()
        leaves = [v.to(torch.float64 if dtype == torch.float64 else v.dtype).requires_grad_() for v in values]
        x, branch, weight, bias = leaves
        rows, normed, new_size = add_merge_norm(plan, x, branch, size, weight, bias, backend=backend)
        assert not new_size.requires_grad
        loss = (rows * draw(37, *rows.shape)).sum() + (normed * draw(38, *normed.shape)).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for name, expected, got in zip(("x", "branch", "weight", "bias"), *found, strict=True):
        assert got.dtype == (torch.float16 if half_branch and name == "branch" else torch.float32)
        assert_close(name, expected, got, 1e-3 if half_branch else 2e-6)
