"""Which backend serves a call: torch on the CPU, and a reason for it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vtoken import ConfigError, InputError, ShapeError, ops
from vtoken.ops import (
    BACKENDS,
    add_merge_norm,
    attention_with_bias,
    attention_with_sizes,
    backend,
    explain,
    key_metric,
    plan_pitome,
    plan_tome,
    select_grouped,
    select_topk,
    size_bias,
)

pytestmark = pytest.mark.skipif(bool(backend.FORCED) or backend.INTERPRETED, reason="about the unforced choice")
METRIC = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
Q = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))
PLAN = plan_tome(METRIC, 4)
COEFFICIENTS, BASIS = METRIC.unsqueeze(0), METRIC[0].t()
CALLS: dict[str, Callable[[str], Any]] = {
    "plan_pitome": lambda b: plan_pitome(METRIC, 3, margin=0.5, backend=b).keep,
    "plan_tome": lambda b: plan_tome(METRIC, 3, backend=b).keep,
    "key_metric": lambda b: key_metric(Q, backend=b),
    "apply": lambda b: PLAN.apply(METRIC, backend=b)[0],
    "add_merge_norm": lambda b: add_merge_norm(PLAN, METRIC, METRIC, backend=b)[1],
    "attention_with_bias": lambda b: attention_with_bias(Q, Q, Q, None, backend=b),
    "attention_with_sizes": lambda b: attention_with_sizes(Q, Q, Q, torch.ones(2, 12), backend=b),
    "select_topk": lambda b: select_topk(COEFFICIENTS, BASIS, 0.3, backend=b).index,
    "select_grouped": lambda b: select_grouped(COEFFICIENTS, BASIS, 0.3, grid=(3, 4), group_size=4, backend=b).index,
}


@pytest.mark.parametrize("name", CALLS)
def test_on_the_cpu_auto_gives_what_torch_does_and_triton_says_why_not(name: str) -> None:
    call = CALLS[name]
    assert torch.equal(call("auto"), call("torch"))
    with pytest.raises(ConfigError, match=r"backend='triton' cannot serve this call: .*on 'cpu'.*need a GPU"):
        call("triton")
    with pytest.raises(ConfigError, match=f"backend='cuda'.: backend must be one of {', '.join(BACKENDS)}"):
        call("cuda")


TENSORS: dict[str, tuple[Any, ...]] = {
    "plan_pitome": (METRIC,),
    "plan_tome": (METRIC,),
    "key_metric": (Q,),
    "apply": (METRIC,),
    "add_merge_norm": (METRIC, METRIC),
    "attention_with_bias": (Q, Q, Q),
    "attention_with_sizes": (Q, Q, Q, torch.ones(2, 12)),
    "select_topk": (COEFFICIENTS, BASIS),
    "select_grouped": (COEFFICIENTS, BASIS),
}


def test_explain_knows_every_op_that_has_a_backend() -> None:
    functions = {name: getattr(ops, name) for name in ops.__all__} | {"apply": ops.MergePlan.apply}
    chosen = {n for n, f in functions.items() if inspect.isfunction(f) and "backend" in inspect.signature(f).parameters}
    assert chosen == set(CALLS) | {"sparse_attention"}
    with pytest.raises(ConfigError) as unknown:
        explain("nothing", METRIC)
    assert set(str(unknown.value).split("must be one of ")[1].split(", ")) == chosen


def test_explain() -> None:
    for op, tensors in TENSORS.items():
        choice = explain(op, *tensors)
        if op in ("plan_pitome", "plan_tome", "key_metric", "apply"):  # tests/ops/test_native.py has more of these
            assert choice.backend == "native" or "C functions" in choice.reason
            continue
        assert choice == ("torch", "the tensors are on 'cpu'; kernels need a GPU")
        assert str(choice) == f"torch: {choice.reason}"
    assert str(backend.Choice("triton", "")) == "triton"
    with pytest.raises(ConfigError, match=r"op='merge'.: op must be one of .*plan_pitome"):
        explain("merge", METRIC)
    with pytest.raises(InputError, match=r"explain\('attention_with_bias'\): takes \(q, k, v, bias\): missing"):
        explain("attention_with_bias", Q)
    with pytest.raises(InputError, match=r"takes \(x, reduction\): got an unexpected keyword argument 'variant'"):
        explain("apply", METRIC, variant="text")


def test_explain_names_every_way_of_sparse_attention() -> None:
    connections = select_topk(COEFFICIENTS, BASIS, 0.3)
    q = torch.zeros(1, 2, 12, 4)
    choice = explain("sparse_attention", q, q, q, connections)
    assert choice == ("masked", "12 tokens are too few for gathering keys to pay (150)")
    assert str(choice) == f"masked: {choice.reason}"
    assert explain("sparse_attention", q, q, q, connections, dropout_p=0.5) == choice
    with pytest.raises(ShapeError, match="to fit the connections"):
        explain("sparse_attention", q[:, :1], q, q, connections)
    with pytest.raises(InputError, match=r"connections must be what a vtoken\.ops\.select_ function returns"):
        explain("sparse_attention", q, q, q, q)
    with pytest.raises(ConfigError, match="dropout_p=2"):
        explain("sparse_attention", q, q, q, connections, dropout_p=2)


def test_the_cpu_path_never_touches_the_kernels_of_triton() -> None:
    code = (
        "import sys, torch, vtoken.ops as o\n"
        "m = torch.randn(2, 12, 6, requires_grad=True)\n"
        "p = o.plan_pitome(m, 3, margin=0.5)\n"
        "o.add_merge_norm(p, m, m)[0].sum().backward()\n"
        "o.attention_with_sizes(*[torch.randn(2, 3, 12, 16)] * 3, torch.ones(2, 12))\n"
        "found = {n for n in sys.modules if n.startswith('vtoken_kernels')}\n"
        "assert found <= {'vtoken_kernels', 'vtoken_kernels.native'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_with_sizes() -> None:
    size = torch.randint(1, 9, (2, 12), generator=torch.Generator().manual_seed(2)).float()
    expected = F.scaled_dot_product_attention(Q, Q, Q, attn_mask=size_bias(size, Q.dtype))
    for given in (size, size.unsqueeze(-1)):
        assert torch.equal(attention_with_sizes(Q, Q, Q, given), expected)
    assert torch.equal(attention_with_sizes(Q, Q, Q, None), F.scaled_dot_product_attention(Q, Q, Q))
    scaled = F.scaled_dot_product_attention(Q, Q, Q, attn_mask=size_bias(size, Q.dtype), scale=0.3)
    assert torch.equal(attention_with_sizes(Q, Q, Q, size, scale=0.3), scaled)
    for wrong in (size[:1], size[:, :5], size[:, None]):
        with pytest.raises(ShapeError, match=r"size must be \[2, 12\] or \[2, 12, 1\], got"):
            attention_with_sizes(Q, Q, Q, wrong)
    for shape in ((2, 12), (2, 3, 1, 12), (2, 1, 12, 12), (3, 1, 1, 12)):
        with pytest.raises(ShapeError, match=r"bias must be \[2, 1, 1, 12\], one per key, got"):
            attention_with_bias(Q, Q, Q, torch.zeros(shape))


def test_add_merge_norm() -> None:
    branch, weight, bias = METRIC.flip(1), torch.rand(6), torch.rand(6)
    size = torch.full((2, 12, 1), 2.0)
    rows, normed, new_size = add_merge_norm(PLAN, METRIC, branch, size, weight, bias, eps=1e-5)
    expected, expected_size = PLAN.apply(METRIC + branch, size)
    assert torch.equal(rows, expected)
    assert torch.equal(new_size, expected_size)
    assert torch.equal(normed, F.layer_norm(expected, (6,), weight, bias, 1e-5))
    nothing = plan_tome(METRIC, 0)
    assert torch.equal(add_merge_norm(nothing, METRIC, branch)[0], METRIC + branch)
    with pytest.raises(ShapeError, match="x and branch must have one shape"):
        add_merge_norm(PLAN, METRIC, branch[:, :5])
    with pytest.raises(ShapeError, match="the plan takes x of shape"):
        add_merge_norm(PLAN, METRIC[:, :5], branch[:, :5])
