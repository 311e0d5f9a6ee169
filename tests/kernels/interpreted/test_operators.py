"""torch.ops.vtoken.*: schema, shapes without data, autograd; compiling, exporting and counting see through them."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import counted
from vtoken import ConfigError
from vtoken.ops import (
    add_merge_norm,
    attention_with_bias,
    attention_with_sizes,
    explain,
    plan_pitome,
    select_grouped,
    select_threshold,
    select_topk,
    sparse_attention,
)
from vtoken.ops.merging.norm import norm_reason
from vtoken.ops.sparse import lists
from vtoken_kernels import library


def draw(seed: int, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator: with and without what is optional."""
    plan = plan_pitome(draw(1, 2, 20, 12), 6, margin=0.5, num_prefix=1, backend="triton")
    assert plan.groups is not None
    dest, start, member = plan.groups
    size, new_size = torch.ones(2, 20), plan.apply(draw(2, 2, 20, 1), torch.ones(2, 20), backend="torch")[1]
    x, y, grad = draw(3, 2, 20, 10, grad=True), draw(4, 2, 20, 10, grad=True), draw(5, 2, 14, 10, grad=True)
    weight, bias = draw(6, 10, grad=True), draw(7, 10, grad=True)
    q, k, v = (t.detach().requires_grad_() for t in draw(8, 2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4))
    out, lse = library.attention(q.detach(), k.detach(), v.detach(), None, 0.25)
    coefficients, basis = draw(12, 2, 2, 6, 4).abs(), draw(13, 4, 7).abs()
    listed, above = select_topk(coefficients, basis, 0.4), select_threshold(coefficients, basis, 1.0)
    order, words = torch.arange(6, dtype=torch.int32).unsqueeze(0), library.connect_lists(listed.index, None, 6, 7, 1)
    inference = (draw(9, 2, 20, 10), None, plan.keep, None, start, member)
    return {
        "plan_pitome": [
            (draw(1, 2, 20, 12), None, 6, 1, 0.5, 1.0, False, False),
            (draw(1, 2, 20, 12).half(), torch.zeros(2, 19, dtype=torch.bool), 6, 1, 0.5, 1.0, True, False),
            (draw(1, 2, 20, 12), None, 6, 0, 0.5, 1.0, False, True),
        ],
        "plan_tome": [(draw(1, 2, 20, 12), 6, 1), (draw(1, 2, 21, 12), 6, 0), (draw(1, 2, 21, 12), 6, 2)],
        "group_sources": [(plan.src, plan.slot, 14, plan.num_dest)],
        "sum_heads": [(draw(10, 2, 3, 5, 8),)],
        "merge": [(x, size, plan.keep, dest, start, member, r) for r in ("wavg", "mean", "amax", "prune")]
        + [(*inference, "wavg")],
        "merge_bwd": [(grad, size, new_size, plan.keep, dest, start, member, "wavg")],
        "merge_amax_bwd": [(grad.detach(), x.detach(), plan.keep, start, member)],
        "add_merge_norm": [
            (x, y, size, plan.keep, dest, start, member, weight, bias, 1e-6),
            (*inference[:1], *inference, None, None, 1e-6),
        ],
        "attention": [(q, k, v, draw(11, 2, 7), 0.25), (q, k, v, None, 0.25), (q, k, v, draw(11, 1, 7), 0.25)],
        "select_rows": [(coefficients, basis, 3), (coefficients, basis.expand(2, -1, -1).contiguous(), 1)],
        "select_lists": [(coefficients, basis, None, None, 3), (coefficients, basis, order, torch.ones(2), 0)],
        "connect_lists": [(listed.index, None, 6, 7, 1), (above.col, above.crow, 6, 7, 1)],
        "sparse_attention": [
            (q, k, v, draw(11, 2, 7), order, *words, 1, 64, 3, 0.25),
            (q, k, v, None, None, listed.index[:, :, :1].int().contiguous(), None, None, 1, 6, 3, 0.25),
        ],
        "sparse_attention_bwd": [
            (torch.ones_like(out), *(t.detach() for t in (q, k, v)), None, order, *words, out, lse, 1, 64, 3, 0.25)
        ],
        "attention_bwd": [(torch.ones_like(out), *(t.detach() for t in (q, k, v)), draw(11, 2, 7), out, lse, 0.25)],
    }


def test_every_operator_is_sampled() -> None:
    assert set(samples()) == set(library.__all__)
    source = "".join(
        inspect.getsource(sys.modules[f"vtoken_kernels.{m}_ops"]) for m in ("plan", "merge", "attention", "sparse")
    )
    assert source.count("torch.library.custom_op(") == len(library.__all__)


@pytest.mark.parametrize("name", library.__all__)
def test_operator(name: str) -> None:
    for args in samples()[name]:
        opcheck(getattr(library, name), args)


def block(x: Tensor, metric: Tensor, q: Tensor, size: Tensor) -> tuple[Tensor, ...]:
    """A merge step and an attention, all by kernels."""
    plan = plan_pitome(metric, 5, margin=0.5, num_prefix=1, backend="triton")
    rows, new_size = plan.apply(x, size, backend="triton")
    out = add_merge_norm(plan, x, x, size, backend="triton")[1]
    return rows, new_size, out, attention_with_sizes(q, q, q, size, backend="triton"), plan.dest


def block_inputs(batch: int = 2, tokens: int = 18) -> tuple[Tensor, ...]:
    return (draw(12, batch, tokens, 10, grad=True), draw(13, batch, tokens, 8), draw(14, batch, 2, tokens, 16),
            torch.ones(batch, tokens))  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str) -> None:
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for batch, tokens in ((2, 18), (3, 18), (3, 23)):  # the second and third with dynamic shapes
        inputs = block_inputs(batch, tokens)
        got, expected = compiled(*inputs), block(*inputs)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        grads = [torch.autograd.grad(out[0].square().sum() + out[2].sum(), inputs[0])[0] for out in (got, expected)]
        assert torch.allclose(*grads, rtol=1e-6, atol=1e-6)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
            return block(*args)

    inputs = tuple(t.detach() for t in block_inputs())
    program = torch.export.export(Module(), inputs)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"vtoken.plan_pitome.default", "vtoken.merge.default", "vtoken.attention.default"} <= targets
    for a, b in zip(program.module()(*inputs), block(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["pitome", "pitome_pairs", "tome"])
def test_flops_of_a_plan_are_those_of_torch(variant: str) -> None:
    metric, found = draw(15, 2, 27, 12), []
    for backend in ("torch", "triton"):
        with FlopCounterMode(display=False) as counter:
            plan = plan_pitome(metric, 7, margin=0.5, num_prefix=2, variant=variant, backend=backend)
            plan.apply(draw(16, 2, 27, 6), backend=backend)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_flops_of_attention_are_those_of_torch() -> None:
    found = []
    for backend in ("torch", "triton"):
        q, k, v = (draw(s, 2, 3, n, 16, grad=True) for s, n in ((17, 11), (18, 9), (19, 9)))
        with counted() as counter:
            attention_with_bias(q, k, v, None, backend=backend).sum().backward()
        found.append(counter.get_total_flops())
    expected = 14 * 2 * 3 * 11 * 9 * 16  # 4 forward, 10 backward
    assert found[1] == expected
    assert found[0] == expected - 2 * 2 * 3 * 11 * 9 * 16  # plain products keep the scores, fused ones make them again


def sparse_block(q: Tensor, k: Tensor, v: Tensor, coefficients: Tensor, basis: Tensor) -> tuple[Tensor, ...]:
    """Every way to select and attend by kernels."""
    limit = torch.full((q.shape[1],), 1.0)
    found = (
        lists.select(coefficients, basis, kept=3),
        lists.select(coefficients, basis, threshold=limit),
        select_topk(coefficients, basis, 0.3, backend="triton"),
        select_grouped(coefficients, basis, 0.3, grid=(4, 5), group_size=20, backend="triton"),
    )
    return tuple(sparse_attention(q, k, v, c, scale=0.3, backend="triton") for c in found)


def sparse_inputs(batch: int) -> tuple[Tensor, ...]:
    q, k, v = (draw(s, batch, 2, 21, 16, grad=True) for s in (40, 41, 42))
    return q, k, v, draw(43, batch, 2, 20, 4).abs(), draw(44, 4, 21).abs()


def test_sparse_attention_compiles_as_one_graph() -> None:
    compiled = torch.compile(sparse_block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second with a dynamic shape
        inputs = sparse_inputs(batch)
        got, expected = compiled(*inputs), sparse_block(*inputs)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        grads = [torch.autograd.grad(sum(o.square().sum() for o in out), inputs[0])[0] for out in (got, expected)]
        assert torch.allclose(*grads, rtol=1e-6, atol=1e-6)


def test_sparse_attention_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
            return sparse_block(*args)

    inputs = tuple(t.detach() for t in sparse_inputs(2))
    program = torch.export.export(Module(), inputs)
    for a, b in zip(program.module()(*inputs), sparse_block(*inputs), strict=True):
        assert torch.equal(a, b)


def test_flops_of_sparse_attention_are_those_of_the_kept_pairs() -> None:
    q, k, v, coefficients, basis = sparse_inputs(2)
    for connections, kept in (
        (select_topk(coefficients, basis, 0.3, backend="torch"), 7),
        (lists.select(coefficients, basis, kept=3), 3),
        (lists.select(coefficients, basis, threshold=torch.ones(2)), 21),  # unknown without looking: as if all
    ):
        with FlopCounterMode(display=False) as counter:
            sparse_attention(q, k, v, connections, scale=0.3, backend="triton").sum().backward()
        assert counter.get_total_flops() == 14 * 2 * 2 * (20 * kept + 21) * 16
    with FlopCounterMode(display=False) as counter:
        select_topk(coefficients, basis, 0.3, backend="triton")
    assert counter.get_total_flops() == 2 * 2 * 2 * 20 * 4 * 21


def test_sparse_attention_under_autocast() -> None:
    q, k, v, coefficients, basis = (t.detach() for t in sparse_inputs(2))
    connections = select_topk(coefficients, basis, 0.3)
    with torch.autocast("cpu", dtype=torch.float16):
        out = sparse_attention(q, k, v, connections, scale=0.3, backend="triton")
    assert torch.equal(out, sparse_attention(q.half(), k.half(), v.half(), connections, scale=0.3, backend="triton"))


def test_autocast() -> None:
    q, k, v = (draw(s, 2, 3, 11, 16) for s in (20, 21, 22))
    size = torch.full((2, 11), 3.0)
    plan = plan_pitome(draw(23, 2, 11, 8), 4, margin=0.5, backend="triton")
    with torch.autocast("cpu", dtype=torch.float16):
        out = attention_with_sizes(q, k, v, size, backend="triton")
        other = attention_with_sizes(q.half(), k.half(), v.half(), size, backend="triton")
        rows, new_size = plan.apply(draw(24, 2, 11, 5), size, backend="triton")
        normed = add_merge_norm(plan, draw(25, 2, 11, 5), draw(26, 2, 11, 5).half(), backend="triton")[1]
        assert why_not_half() == "autocast norms in float32"
    assert torch.equal(out, other)
    assert (out.dtype, rows.dtype, new_size.dtype, normed.dtype) == (torch.float16, *[torch.float32] * 3)
    assert torch.allclose(out.float(), F.scaled_dot_product_attention(q, k, v), atol=5e-3)


def why_not_half() -> str:
    """Why not Triton, for half-precision rows under autocast."""
    x = torch.zeros(2, 3, 4, dtype=torch.float16)
    return norm_reason(x, x)


def test_functional_transforms_take_torch() -> None:
    plan, x = plan_pitome(draw(27, 2, 11, 8), 4, margin=0.5, backend="triton"), draw(28, 2, 11, 5)
    leaf = x.clone().requires_grad_()
    plan.apply(leaf, backend="triton")[0].pow(3).sum().backward()
    assert torch.allclose(torch.func.grad(lambda t: plan.apply(t)[0].pow(3).sum())(x), leaf.grad, rtol=1e-5)
    with pytest.raises(ConfigError, match="transforms do not see through custom operators"):
        torch.func.grad(lambda t: plan.apply(t, backend="triton")[0].sum())(x)


def test_what_the_kernels_do_not_serve() -> None:
    metric, q = draw(29, 2, 12, 6), draw(30, 1, 1, 4, 16)
    narrow, wide, bias = q[..., :8], draw(30, 1, 1, 4, 256), draw(31, 1, 1, 1, 4, grad=True)
    pairs = {"margin": 0.5, "variant": "pitome_pairs", "backend": "triton"}
    refused = [
        (lambda: plan_pitome(metric.double(), 3, margin=0.5, backend="triton"), "torch.float64"),
        (lambda: plan_pitome(metric, 3, protect=[1], **pairs), "protect with the variant"),
        (lambda: attention_with_bias(narrow, narrow, narrow, None, backend="triton"), "8 wide; kernels take 16 to 128"),
        (lambda: attention_with_bias(wide, wide, wide, None, backend="triton"), "256 wide; kernels take 16 to 128"),
        (lambda: attention_with_bias(q, q, q, bias, backend="triton"), "bias needs a gradient"),
    ]
    for call, reason in refused:
        with pytest.raises(ConfigError, match=rf"cannot serve this call: .*{reason}.*backend='auto'"):
            call()


def test_auto_on_the_cpu_takes_no_kernels_unless_forced() -> None:
    # Even where the interpreter could run the kernels.
    assert explain("apply", torch.zeros(2, 3, 4)).backend in ("torch", "native")
    assert plan_pitome(draw(32, 2, 12, 6), 3, margin=0.5).groups is None
    code = (
        "import torch, vtoken.ops as o\n"
        "m = torch.randn(2, 12, 6)\n"
        "assert o.explain('plan_pitome', m) == ('triton', '')\n"
        "assert o.plan_pitome(m, 3, margin=0.5).groups is not None\n"
        "assert o.plan_pitome(m, 3, margin=0.5, backend='torch').groups is None\n"
        "assert o.explain('plan_pitome', m.double()).backend == 'torch'\n"
        "assert o.plan_pitome(m.double(), 3, margin=0.5).groups is None\n"
    )
    forced = os.environ | {"VTOKEN_TEST_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], env=forced, check=True)
