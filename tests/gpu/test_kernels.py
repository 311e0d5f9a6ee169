"""The kernels on a real GPU: right at real sizes, the same bits every time, and what the default path takes.

pytest tests/gpu
compute-sanitizer --tool memcheck  python -m pytest tests/gpu -k "small"   # reads and writes out of bounds
compute-sanitizer --tool racecheck python -m pytest tests/gpu -k "small"   # shared memory
PYTORCH_NO_CUDA_MEMORY_CACHING=1 for memcheck, or the caching allocator hides what is out of bounds.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_close
from vtoken.ops import (
    REDUCTIONS,
    MergePlan,
    add_merge_norm,
    attention_with_sizes,
    explain,
    key_metric,
    plan_pitome,
    plan_tome,
    select_grouped,
    select_threshold,
    select_topk,
    sparse_attention,
)
from vtoken.ops.sparse import lists
from vtoken.ops.sparse.connections import Connections, query_order

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: Relative RMS error against float64: a few roundings in the dtype.
ERROR = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
#: Batch, tokens, heads, head width; T of ViT-B, ViT-L 336, DINOv2-L 518, and odd ones.
SHAPES = {
    "small": (2, 37, 2, 40),
    "vit_b": (64, 197, 12, 64),
    "vit_l_336": (8, 577, 16, 64),
    "so400m": (4, 729, 16, 72),
    "dinov2_l": (4, 1370, 16, 64),
    "vit_h": (8, 257, 16, 80),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_dtype = pytest.mark.parametrize("dtype", ERROR, ids=str)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def draw_clustered(seed: int, batch: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    which = torch.randint(12, (2, batch, tokens), generator=generator, device="cuda").amin(0)
    centres = draw(seed + 1, batch, 12, width)
    rows = centres.gather(1, which.unsqueeze(-1).expand(-1, -1, width))
    return (rows + 0.3 * draw(seed + 2, batch, tokens, width)).to(dtype)


def draw_size(seed: int, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(1, 30, (batch, tokens), generator=generator, device="cuda").float()


def assert_valid(plan: MergePlan) -> None:
    every = torch.cat([plan.keep, plan.src], 1).sort(1).values
    assert torch.equal(every, torch.arange(plan.num_tokens_in, device="cuda").expand_as(every))
    assert torch.equal(plan.dest, MergePlan(plan.keep, plan.src, plan.slot, plan.num_tokens_in, plan.num_dest).dest)


@each_shape
@each_dtype
@pytest.mark.parametrize("variant", ["pitome", "pitome_pairs", "tome"])
def test_plans(variant: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    batch, tokens, _, width = shape
    metric = draw_clustered(1, batch, tokens, width, dtype)
    options = {"margin": 0.45, "num_prefix": 1, "variant": variant}
    r = tokens // 10
    plan = plan_pitome(metric, r, backend="triton", **options)
    exact = plan_pitome(metric.double(), r, backend="torch", **options)
    assert_valid(plan)
    same = torch.stack([(plan.dest == exact.dest).all(1), (plan.keep == exact.keep).all(1)]).all(0)
    # Sets, as near ties swap neighbouring ranks: docs/performance.md 6 found 1.000 of the merge set in common with
    # tf32.
    merging, wanted = (torch.cat([p.src, p.keep[:, -p.num_dest :]], 1).sort(1).values for p in (plan, exact))
    common = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(merging, wanted, strict=True)]).mean()
    print(f"{variant} {dtype} {shape}: identical images {same.float().mean():.3f}, merge set in common {common:.4f}")
    assert common > 0.98
    if dtype == torch.float32:
        assert same.float().mean() > 0.5


def test_exact_ties() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    which = torch.randint(4, (8, 301), generator=generator, device="cuda")
    metric = F.one_hot(which, 4).float()
    for variant in ("pitome", "pitome_pairs", "tome"):
        plan, expected = (
            plan_pitome(metric, 99, margin=0.0, num_prefix=1, variant=variant, backend=b) for b in ("triton", "torch")
        )
        for name in ("keep", "src", "slot", "dest"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), (variant, name)


@each_shape
@each_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_merged_rows_and_gradients(reduction: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, width = shape
    plan = plan_tome(draw(4, batch, tokens, width), tokens // 3, num_prefix=1, backend="triton")
    x, size = draw(5, batch, tokens, heads * width, dtype=dtype), draw_size(6, batch, tokens)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, new_size = plan.apply(leaf, size, reduction, backend="triton")
    expected, expected_size = plan.apply(exact, size, reduction, backend="torch")
    assert_close("rows", expected, y, ERROR[dtype])
    assert torch.equal(new_size, expected_size)
    grad = draw(7, *y.shape, dtype=dtype)
    (got,) = torch.autograd.grad(y, leaf, grad)
    assert_close("gradient", torch.autograd.grad(expected, exact, grad.double())[0], got, ERROR[dtype])


@each_shape
@each_dtype
def test_add_merge_norm(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, width = shape
    plan = plan_tome(draw(8, batch, tokens, width), tokens // 3, num_prefix=1, backend="triton")
    x, y = (draw(s, batch, tokens, heads * width, dtype=dtype) for s in (9, 10))
    weight, bias = draw(11, heads * width), draw(12, heads * width)
    size = draw_size(13, batch, tokens)
    rows, normed, _ = add_merge_norm(plan, x, y, size, weight, bias, backend="triton")
    assert_close("rows", plan.apply(x.double() + y.double(), size, backend="torch")[0], rows, ERROR[dtype])
    expected = F.layer_norm(rows.double(), (heads * width,), weight.double(), bias.double(), 1e-6)
    assert_close("norm", expected, normed, ERROR[dtype])


@each_shape
@each_dtype
def test_attention(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, width = shape
    batch = min(batch, 8)
    qkv = draw(14, batch, tokens, 3, heads, width, dtype=dtype).requires_grad_()
    size = draw_size(15, batch, tokens)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = attention_with_sizes(q, k, v, size, backend="triton")
    exact = qkv.detach().double().requires_grad_()
    expected = attention_with_sizes(*exact.permute(2, 0, 3, 1, 4), size, backend="torch")
    assert_close("out", expected, out, ERROR[dtype])
    grad = draw(16, *out.shape, dtype=dtype)
    (got,) = torch.autograd.grad(out, qkv, grad)
    assert_close("gradient", torch.autograd.grad(expected, exact, grad.double())[0], got, 2 * ERROR[dtype])


#: Batch, patch grid (one class token beside it), heads, head width, share of keys.
SPARSE = {
    "small": (2, (7, 10), 2, 40, 0.1),
    "deit_s": (8, (14, 14), 6, 64, 0.25),
    "vit_l_336": (4, (24, 24), 16, 64, 0.1),
    "so400m": (2, (27, 27), 16, 72, 0.1),
    "wide": (2, (32, 32), 8, 128, 0.05),
    "long": (1, (64, 64), 6, 64, 0.05),
}
each_sparse = pytest.mark.parametrize("shape", SPARSE.values(), ids=SPARSE.keys())
FORMS = ("topk", "threshold", "grouped", "listed", "listed threshold")


def coefficients_and_basis(shape: tuple[int, tuple[int, int], int, int, float]) -> tuple[Tensor, Tensor]:
    """As the predictor leaves them: eight of 32 coefficients, a sparse basis, columns apart."""
    batch, grid, heads, _, _ = shape
    queries = grid[0] * grid[1]
    columns = draw(30, batch, heads, 32, queries).mul(2).softmax(2)
    columns = columns * (columns >= columns.topk(8, dim=2).values[:, :, -1:])
    basis = draw(31, 32, queries + 1).abs()
    return columns.transpose(2, 3), basis * (basis > 0.5)


def connect(form: str, shape: tuple[int, tuple[int, int], int, int, float]) -> Connections:
    _, grid, _, _, ratio = shape
    coefficients, basis = coefficients_and_basis(shape)
    tokens = basis.shape[1]
    order = query_order(grid, None, tokens, tokens - 1, coefficients)
    scores = (coefficients[:1, :, :200] @ basis).transpose(0, 1).flatten(1)
    threshold = scores.kthvalue(int((1 - ratio) * scores.shape[1]), dim=1).values
    if form == "topk":
        return select_topk(coefficients, basis, ratio, backend="triton")
    if form == "grouped":
        return select_grouped(coefficients, basis, ratio, grid=grid, backend="triton")
    if form == "threshold":
        return select_threshold(coefficients, basis, threshold)
    if form == "listed":
        return lists.select(coefficients, basis, kept=int(ratio * tokens), order=order)
    return lists.select(coefficients, basis, threshold=threshold, order=order)


@each_sparse
def test_selection(shape: tuple[int, tuple[int, int], int, int, float]) -> None:
    # Whole numbers: scores are exact whatever the order of additions, and full of ties.
    coefficients, basis = coefficients_and_basis(shape)
    whole = (coefficients * 7).round(), (basis * 3).round()
    expected = select_topk(*whole, shape[4], backend="torch")
    assert torch.equal(select_topk(*whole, shape[4], backend="triton").index, expected.index)
    kept = expected.index.shape[3]
    order = query_order(shape[1], None, basis.shape[1], basis.shape[1] - 1, basis)
    assert torch.equal(lists.select(*whole, kept=kept, order=order).mask(), expected.mask())
    limit = torch.full((shape[2],), 2.0, device="cuda")
    above = select_threshold(*whole, limit)
    assert torch.equal(lists.select(*whole, threshold=limit, order=order).mask(), above.mask())
    # Real scores: what is kept and what is not differ at most by rounding at the k-th score.
    found = lists.select(coefficients, basis, kept=kept, order=order).mask()[:, :, 1:]
    assert bool((found.sum(-1) == kept).all())
    scores = (coefficients.double() @ basis.double()).float()
    worst = scores.masked_fill(~found, float("inf")).amin(-1)
    best = scores.masked_fill(found, -float("inf")).amax(-1)
    assert bool((worst >= best * (1 - 1e-5) - 1e-6).all())


@each_sparse
@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_sparse_attention(form: str, dtype: torch.dtype, shape: tuple[int, tuple[int, int], int, int, float]) -> None:
    batch, grid, heads, width, _ = shape
    tokens, connections = grid[0] * grid[1] + 1, connect(form, shape)
    qkv = draw(32, batch, tokens, 3, heads, width, dtype=dtype).requires_grad_()
    bias = draw_size(33, batch, tokens).log()[:, None, None]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    assert explain("sparse_attention", q, k, v, connections).backend == "triton"
    out = sparse_attention(q, k, v, connections, scale=width**-0.5, key_bias=bias)
    exact = qkv.detach().double().requires_grad_()
    options = {"scale": width**-0.5, "key_bias": bias.double(), "backend": "dense_masked"}
    expected = sparse_attention(*exact.permute(2, 0, 3, 1, 4), connections, **options)
    assert_close("out", expected, out, ERROR[dtype])
    grad = draw(34, *out.shape, dtype=dtype)
    (got,) = torch.autograd.grad(out, qkv, grad)
    assert_close("gradient", torch.autograd.grad(expected, exact, grad.double())[0], got, 2 * ERROR[dtype])


@pytest.mark.parametrize("shape", [SPARSE["small"], SPARSE["deit_s"]], ids=["small", "deit_s"])
def test_sparse_attention_gives_the_same_bits_every_time(shape: tuple[int, tuple[int, int], int, int, float]) -> None:
    batch, grid, heads, width, _ = shape
    first = None
    for _ in range(100):
        qkv = draw(35, batch, grid[0] * grid[1] + 1, 3, heads, width, dtype=torch.bfloat16).requires_grad_()
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        outs = [sparse_attention(q, k, v, connect(form, shape), scale=width**-0.5) for form in FORMS]
        sum(out.float().square().sum() for out in outs).backward()
        first = first or [*outs, qkv.grad]
        assert all(torch.equal(a, b) for a, b in zip(first, [*outs, qkv.grad], strict=True))


def test_selection_and_attention_in_a_graph() -> None:
    # Nothing waits for the device, and no size depends on what was selected.
    shape = SPARSE["deit_s"]
    coefficients, basis = coefficients_and_basis(shape)
    q = draw(36, 8, 6, 197, 64, dtype=torch.bfloat16)
    limit = torch.full((6,), 0.4, device="cuda")

    def step() -> Tensor:
        listed = lists.select(coefficients, basis, threshold=limit)
        return sparse_attention(q, q, q, listed, scale=0.125) + sparse_attention(
            q, q, q, select_grouped(coefficients, basis, 0.1, grid=(14, 14)), scale=0.125
        )

    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("shape", [SHAPES["small"], SHAPES["vit_b"]], ids=["small", "vit_b"])
def test_same_bits_every_time(shape: tuple[int, int, int, int]) -> None:
    # A race shows as a result that changes.
    batch, tokens, heads, width = shape
    keys = draw(17, batch, tokens, heads, width, dtype=torch.bfloat16).transpose(1, 2)
    x, size = draw(18, batch, tokens, heads * width, dtype=torch.bfloat16), draw_size(19, batch, tokens)
    first = None
    for _ in range(100):
        q = keys.clone().requires_grad_()
        leaf = x.clone().requires_grad_()
        plan = plan_pitome(key_metric(keys), tokens // 4, margin=0.3, num_prefix=1)
        rows, new_size = plan.apply(leaf, size)
        out = attention_with_sizes(q, q, q, size)
        (out.float().square().sum() + rows.float().square().sum()).backward()
        found = [plan.keep, plan.src, plan.slot, plan.dest, rows, new_size, out, q.grad, leaf.grad]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    # Rows times strides leave 32 bits: 2.26e9 elements, 4.5 GB.
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GB")
    batch, tokens, width = 2800, 197, 4096
    plan = plan_tome(draw(20, 1, tokens, 8).expand(batch, -1, -1), 60, num_prefix=1, backend="triton")
    x = torch.zeros(batch, tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-1] = draw(21, tokens, width).bfloat16()
    y, _ = plan.apply(x, backend="triton")
    expected = plan_tome(draw(20, 1, tokens, 8), 60, num_prefix=1).apply(x[-1:], backend="torch")[0]
    assert_close("last image", expected, y[-1:], ERROR[torch.bfloat16])


def test_default_path_and_graph() -> None:
    keys = draw(22, 4, 12, 197, 64, dtype=torch.bfloat16)
    x = draw(23, 4, 197, 768, dtype=torch.bfloat16)
    assert explain("apply", x) == ("triton", "")

    def step(keys: Tensor, x: Tensor) -> Tensor:
        plan = plan_pitome(key_metric(keys), 19, margin=0.5, num_prefix=1)
        rows, size = plan.apply(x)
        q = rows.unflatten(-1, (12, 64)).transpose(1, 2)
        return attention_with_sizes(q, q, q, size)

    expected = step(keys, x)
    assert torch.equal(torch.compile(step, fullgraph=True)(keys, x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(keys, x)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
