"""Attention over kept connections: every backend against loops over the pairs, values and gradients."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import assert_close
from tests.ops.test_connections import Sizes
from vtoken import ConfigError, ShapeError
from vtoken.ops import Connections, explain, select_grouped, select_threshold, select_topk, size_bias, sparse_attention
from vtoken.ops.sparse import edges as edges_module
from vtoken.ops.sparse.attention import attention_map

FORMS = ["topk", "threshold", "grouped"]
BACKENDS = {
    "topk": ["dense_masked", "masked", "sparse", "auto"],
    "threshold": ["dense_masked", "masked", "sparse", "auto"],
    "grouped": ["dense_masked", "masked", "grouped", "auto"],
}
PAIRS = [(form, backend) for form in FORMS for backend in BACKENDS[form]]
each_pair = pytest.mark.parametrize(("form", "backend"), PAIRS)


def connect(
    form: str, batch: int, heads: int, grid: tuple[int, int], prefix: int, ratio: float, seed: int = 0
) -> Connections:  # fmt: skip
    """Connections of random scores; "threshold" leaves some queries without keys."""
    rng = torch.Generator().manual_seed(seed)
    queries = grid[0] * grid[1]
    coefficients = torch.rand(batch, heads, queries, 6, generator=rng) ** 4
    coefficients[:, :, ::3] *= 0.02
    basis = torch.rand(6, queries + prefix, generator=rng)
    if form == "topk":
        return select_topk(coefficients, basis, ratio)
    if form == "threshold":
        return select_threshold(coefficients, basis, float((coefficients @ basis).quantile(1 - ratio)))
    return select_grouped(coefficients, basis, ratio, grid=grid, group_size=5)


def draw(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 1):
    """q, k, v [B, H, N, D] in the layout of a fused projection."""
    rng = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=rng, dtype=torch.float64)
    return (qkv * 1.5).to(dtype).permute(2, 0, 3, 1, 4)


def loops(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and attention, a query at a time, in Python floats; `bias` [B, H, N, N]."""
    batch, heads, tokens, _ = q.shape
    out = torch.zeros(batch, heads, tokens, v.shape[3], dtype=torch.float64)
    weights = torch.zeros(batch, heads, tokens, tokens, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(tokens)):
        logits = {}
        for j in keep[b, h, i].nonzero().flatten().tolist():
            logit = scale * math.fsum((q[b, h, i].double() * k[b, h, j].double()).tolist())
            logits[j] = logit + (0.0 if bias is None else float(bias[b, h, i, j]))
        logits = {j: s for j, s in logits.items() if s > -math.inf}
        if not logits:
            continue
        most = max(logits.values())
        total = math.fsum(math.exp(s - most) for s in logits.values())
        for j, s in logits.items():
            weights[b, h, i, j] = math.exp(s - most) / total
        out[b, h, i] = weights[b, h, i] @ v[b, h].double()
    return out, weights


CASES = [(1, 1, (1, 1), 0, 1.0), (2, 2, (3, 4), 1, 0.3), (1, 3, (4, 5), 2, 0.05), (2, 1, (2, 7), 0, 0.5),
         (1, 2, (4, 4), 1, 1.0)]  # fmt: skip


@each_pair
@pytest.mark.parametrize(("batch", "heads", "grid", "prefix", "ratio"), CASES)
def test_equals_loops(
    form: str, backend: str, batch: int, heads: int, grid: tuple[int, int], prefix: int, ratio: float
) -> None:
    connections = connect(form, batch, heads, grid, prefix, min(ratio, 0.99) if form == "threshold" else ratio)
    q, k, v = draw(batch, heads, grid[0] * grid[1] + prefix, 4)
    expected, weights = loops(q, k, v, connections.mask(), 0.7)
    found = sparse_attention(q, k, v, connections, scale=0.7, num_prefix=prefix, backend=backend)
    assert found.dtype == q.dtype
    assert_close(f"{form} {backend}", expected, found, 1e-12)
    assert_close("weights", weights, attention_map(q, k, connections, scale=0.7), 1e-12)


def masks(batch: int, heads: int, tokens: int) -> dict[str, Tensor]:
    """Masks of every kind; all of them empty some rows."""
    rng = torch.Generator().manual_seed(5)
    pick = torch.rand(batch, heads, tokens, tokens, generator=rng) > 0.4
    pick[:, :, 2] = False
    pick[:, :, 0] = False
    added = torch.randn(batch, heads, tokens, tokens, generator=rng, dtype=torch.float64)
    return {
        "bool": pick,
        "bool keys": torch.rand(batch, 1, 1, tokens, generator=rng) > 0.7,
        "bool queries": torch.rand(tokens, 1, generator=rng) > 0.5,
        "bool two-sided": pick[0, 0],
        "float": added.masked_fill(~pick, -math.inf),
        "float heads": added[0, :, :, :1].masked_fill(~pick[0, :, :, :1], -math.inf),
        "nothing": torch.zeros(tokens, tokens, dtype=torch.bool),
    }


@each_pair
@pytest.mark.parametrize("kind", masks(1, 1, 3))
@pytest.mark.parametrize("sized", [False, True])
def test_masks_and_key_bias(form: str, backend: str, kind: str, sized: bool) -> None:
    batch, heads, tokens = 2, 2, 13
    connections = connect(form, batch, heads, (3, 4), 1, 0.3)
    q, k, v = draw(batch, heads, tokens, 4)
    mask = masks(batch, heads, tokens)[kind]
    size = torch.randint(1, 5, (batch, tokens), generator=torch.Generator().manual_seed(2))
    key_bias = size_bias(size.double(), torch.float64) if sized else None
    full = torch.zeros(batch, heads, tokens, tokens, dtype=torch.float64)
    full = full.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else full + mask
    full = full if key_bias is None else full + key_bias
    expected, weights = loops(q, k, v, connections.mask(), 0.5, full)
    options = {"scale": 0.5, "attn_mask": mask, "key_bias": key_bias}
    assert_close(kind, expected, sparse_attention(q, k, v, connections, backend=backend, **options), 1e-12)
    assert_close("weights", weights, attention_map(q, k, connections, **options), 1e-12)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    sparse_attention(*inputs, connections, backend=backend, **options).square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in inputs)


@each_pair
def test_gradients(form: str, backend: str) -> None:
    connections = connect(form, 2, 2, (2, 3), 1, 0.35)
    assert form != "threshold" or not bool(connections.mask().any(-1).all())  # empty rows take part
    inputs = [x.clone().requires_grad_() for x in draw(2, 2, 7, 3)]
    bias = torch.randn(2, 1, 1, 7, dtype=torch.float64, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sparse_attention(q, k, v, connections, scale=0.6, key_bias=bias, backend=backend)

    assert torch.autograd.gradcheck(run, (*inputs, bias))
    # What an empty query asks has no effect, so it gets no gradient.
    run(*inputs, bias).sum().backward()
    empty = ~connections.mask().any(-1)
    assert inputs[0].grad is not None
    assert bool((inputs[0].grad[empty] == 0).all())


@each_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision(form: str, backend: str, dtype: torch.dtype) -> None:
    connections = connect(form, 2, 2, (6, 6), 1, 0.2)
    q, k, v = draw(2, 2, 37, 16, dtype)
    exact = sparse_attention(*(x.double() for x in (q, k, v)), connections, scale=0.25, backend="dense_masked")
    plain = sparse_attention(q, k, v, connections, scale=0.25, backend="dense_masked")
    found = sparse_attention(q, k, v, connections, scale=0.25, backend=backend)
    assert found.dtype == dtype
    error = float((plain.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert_close(f"{form} {backend} {dtype}", exact, found, max(2 * error, 1e-7))


@each_pair
def test_large_logits_do_not_overflow(form: str, backend: str) -> None:
    connections = connect(form, 1, 2, (3, 4), 1, 0.3)
    q, k, v = (x.float() for x in draw(1, 2, 13, 4))
    expected, _ = loops(q * 100, k, v, connections.mask(), 1.0)
    assert_close(backend, expected, sparse_attention(q * 100, k, v, connections, scale=1.0, backend=backend), 1e-4)


@pytest.mark.parametrize("form", ["topk", "grouped"])
def test_all_keys_is_dense_attention(form: str) -> None:
    q, k, v = draw(2, 2, 17, 8, torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    connections = connect(form, 2, 2, (4, 4), 1, 1.0)
    assert torch.equal(sparse_attention(q, k, v, connections, scale=0.3), dense)
    for backend in BACKENDS[form]:
        assert_close(backend, dense, sparse_attention(q, k, v, connections, scale=0.3, backend=backend), 1e-6)


@pytest.mark.parametrize("form", ["topk", "threshold"])
def test_without_mkl(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = connect(form, 2, 2, (5, 6), 1, 0.3)
    inputs = [x.clone().requires_grad_() for x in draw(2, 2, 31, 4)]
    expected = torch.autograd.grad(
        sparse_attention(*inputs, connections, scale=0.5, backend="dense_masked").square().sum(), inputs
    )
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(edges_module, "_GATHERED", 64)  # several pieces
    found = torch.autograd.grad(
        sparse_attention(*inputs, connections, scale=0.5, backend="sparse").square().sum(), inputs
    )
    for name, ref, got in zip("qkv", expected, found, strict=True):
        assert_close(name, ref, got, 1e-12)


@pytest.mark.parametrize(("form", "backend"), [("topk", "sparse"), ("threshold", "sparse"), ("grouped", "grouped")])
def test_no_matrix_of_all_pairs(form: str, backend: str) -> None:
    grid, tokens = (16, 16), 257
    connections = connect(form, 2, 2, grid, 1, 0.05)
    q, k, v = draw(2, 2, tokens, 8, torch.float32)
    bias = size_bias(torch.ones(2, tokens), torch.float32)
    mask = torch.rand(tokens, tokens) > 0.1
    for options in ({}, {"key_bias": bias}, {"attn_mask": mask}):
        with torch.no_grad(), Sizes() as sizes:
            sparse_attention(q, k, v, connections, scale=0.3, backend=backend, **options)
        assert 0 < sizes.largest < tokens * tokens
        with torch.no_grad(), Sizes() as sizes:
            sparse_attention(q, k, v, connections, scale=0.3, backend="dense_masked", **options)
        assert sizes.largest >= 4 * tokens * tokens


@pytest.mark.parametrize(("form", "backend"), [("topk", "sparse"), ("threshold", "sparse"), ("grouped", "grouped")])
def test_repeatable_and_independent_of_the_batch(form: str, backend: str) -> None:
    connections = connect(form, 3, 2, (8, 8), 1, 0.1)
    q, k, v = draw(3, 2, 65, 16, torch.float32)
    first, second = (sparse_attention(q, k, v, connections, scale=0.25, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    if form != "threshold":
        index, order = connections.index, connections.order
        assert index is not None
        alone = Connections(65, index=index[1:2], order=order)
        out = sparse_attention(q[1:2], k[1:2], v[1:2], alone, scale=0.25, backend=backend)
        assert_close("alone", first[1:2], out, 1e-6)


def test_many_groups_are_gathered_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["vtoken.ops.sparse.attention"]
    connections = connect("grouped", 2, 2, (7, 6), 1, 0.2)
    q, k, v = draw(2, 2, 43, 4)
    mask = torch.rand(43, 43, generator=torch.Generator().manual_seed(0)) > 0.3
    expected = sparse_attention(q, k, v, connections, scale=0.5, attn_mask=mask, backend="dense_masked")
    for size in (1, 100, 250):
        monkeypatch.setattr(module, "_GATHERED", size)
        found = sparse_attention(q, k, v, connections, scale=0.5, attn_mask=mask, backend="grouped")
        assert_close(str(size), expected, found, 1e-12)


@pytest.mark.parametrize("backend", ["masked", "grouped", "dense_masked"])
def test_images_with_different_orders(backend: str) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(20, generator=rng)[:11].sort().values for _ in range(3)])
    live = torch.cat([torch.zeros(3, 1, dtype=torch.int64), rows + 1], 1)
    coefficients, basis = torch.rand(3, 2, 11, 4, generator=rng), torch.rand(3, 4, 12, generator=rng)
    connections = select_grouped(coefficients, basis, 0.3, grid=(4, 5), group_size=3, live=live)
    q, k, v = draw(3, 2, 12, 4)
    expected, _ = loops(q, k, v, connections.mask(), 0.5)
    assert_close(backend, expected, sparse_attention(q, k, v, connections, scale=0.5, backend=backend), 1e-12)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    assert_close(backend, expected, sparse_attention(*inputs, connections, scale=0.5, backend=backend), 1e-12)


@each_pair
def test_dropout(form: str, backend: str) -> None:
    connections = connect(form, 1, 2, (10, 10), 1, 0.2)
    q, k, v = draw(1, 2, 101, 4, torch.float32)
    torch.manual_seed(0)
    runs = [sparse_attention(q, k, v, connections, scale=0.3, dropout_p=0.4, backend=backend) for _ in range(200)]
    kept = sparse_attention(q, k, v, connections, scale=0.3, backend=backend)
    for rows in (slice(0, 1), slice(1, None)):  # prefix and patch queries
        assert not torch.equal(runs[0][:, :, rows], runs[1][:, :, rows])
    assert_close("mean over draws", kept, torch.stack(runs).mean(0), 0.15)


@pytest.mark.parametrize(("form", "backend"), [("topk", "masked"), ("grouped", "masked"), ("grouped", "grouped")])
def test_meta_counts_what_a_cpu_does(form: str, backend: str) -> None:
    connections = connect(form, 2, 2, (6, 6), 1, 0.2)
    meta = Connections(37, *(None if x is None else x.to("meta") for x in (connections.index, connections.order)))
    q, k, v = draw(2, 2, 37, 8, torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = sparse_attention(q.to("meta"), k.to("meta"), v.to("meta"), meta, scale=0.3, backend=backend)
    assert out.shape == q.shape
    size = 5 if backend == "grouped" else None
    groups = -(-36 // 5)
    per_head = 2 * 37 * 37 * 8 if size is None else 2 * (groups * size * 8 + 37) * 8
    assert counter.get_total_flops() == 2 * 4 * per_head


@pytest.mark.parametrize("form", ["topk", "grouped"])
def test_compiles_into_one_graph(form: str) -> None:
    connections = connect(form, 2, 2, (13, 13), 1, 0.1)
    q, k, v = draw(2, 2, 170, 8, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor, order: Tensor | None) -> Tensor:
        return sparse_attention(q, k, v, Connections(170, index=index, order=order), scale=0.3)

    assert connections.index is not None
    expected = sparse_attention(q, k, v, connections, scale=0.3, backend="dense_masked")
    assert_close(form, expected, run(q, k, v, connections.index, connections.order), 1e-6)


def test_choice_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(form: str, grid: tuple[int, int], ratio: float, grad: bool = False) -> tuple[str, str]:
        connections = connect(form, 1, 1, grid, 1, ratio)
        tokens = grid[0] * grid[1] + 1
        q = torch.zeros(1, 1, tokens, 4, requires_grad=grad)
        return explain("sparse_attention", q, q, q, connections)

    assert choose("topk", (14, 14), 0.2)[0] == "sparse"
    assert choose("threshold", (14, 14), 0.2)[0] == "sparse"
    assert choose("grouped", (14, 14), 0.2)[0] == "grouped"
    assert choose("grouped", (14, 14), 0.2, grad=True)[0] == "grouped"
    backend, reason = choose("topk", (14, 14), 0.2, grad=True)
    assert backend == "masked"
    assert "gradients" in reason
    with torch.no_grad():
        assert choose("topk", (14, 14), 0.2, grad=True)[0] == "sparse"
    assert choose("topk", (14, 14), 0.48)[0] == "sparse"
    assert choose("topk", (14, 14), 0.6) == ("masked", "60% of the keys are kept, gathering pays up to 50 %")
    assert choose("topk", (12, 12), 0.2)[0] == "masked"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert "MKL" in choose("topk", (14, 14), 0.2)[1]
    meta = connect("topk", 1, 1, (14, 14), 1, 0.1)
    meta = Connections(197, index=meta.index.to("meta"))
    q = torch.zeros(1, 1, 197, 4, device="meta")
    assert "kernels do not serve this call on meta" in explain("sparse_attention", q, q, q, meta).reason


def test_errors() -> None:
    connections = connect("topk", 2, 2, (3, 4), 1, 0.3)
    grouped = connect("grouped", 2, 2, (3, 4), 1, 0.3)
    q, k, v = draw(2, 2, 13, 4)
    with pytest.raises(ShapeError, match=r"k must be \[2, 2, 13, D\]"):
        sparse_attention(q, k[:, :, 1:], v, connections, scale=1.0)
    with pytest.raises(ShapeError, match="num_prefix=2"):
        sparse_attention(q, k, v, connections, scale=1.0, num_prefix=2)
    for bad in (torch.zeros(12), torch.zeros(3, 1, 13, 13), torch.zeros(1, 2, 2, 13, 13)):
        with pytest.raises(ShapeError, match="attn_mask must be broadcastable"):
            sparse_attention(q, k, v, connections, scale=1.0, attn_mask=bad)
    with pytest.raises(ConfigError, match="backend='triton' cannot serve this call: "):
        sparse_attention(q, k, v, connections, scale=1.0, backend="triton")
    with pytest.raises(ConfigError, match=r"backend='cuda'.: backend must be one of auto, dense_masked"):
        sparse_attention(q, k, v, connections, scale=1.0, backend="cuda")
    with pytest.raises(ConfigError, match="select_grouped"):
        sparse_attention(q, k, v, connections, scale=1.0, backend="grouped")
    with pytest.raises(ConfigError, match="takes connections per query"):
        sparse_attention(q, k, v, grouped, scale=1.0, backend="sparse")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dense_reference_does_not_overflow_in_half_precision(dtype: torch.dtype) -> None:
    connections = connect("topk", 1, 2, (6, 6), 1, 0.3)
    q, k, v = draw(1, 2, 37, 64, dtype)
    q, k = 60 * q, 60 * k  # q k^T passes 65504, the scaled logits do not
    exact = sparse_attention(q.double(), k.double(), v.double(), connections, scale=0.125, backend="dense_masked")
    assert float((q.double() @ k.double().transpose(-1, -2)).abs().max()) > 65504
    out = sparse_attention(q, k, v, connections, scale=0.125, backend="dense_masked")
    assert out.dtype == dtype
    assert_close("out", exact, out, 4e-3)
    assert attention_map(q, k, connections, scale=0.125).isfinite().all()


# --- masks that are alike for all pairs, and no image ---


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["added", "bool", "none left"])
@pytest.mark.parametrize("form", ["topk", "grouped", "threshold"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_mask_of_one_number(shape: tuple[int, ...], kind: str, form: str, grad: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(2, 2, 13, 8, generator=generator, dtype=torch.float64).requires_grad_(grad) for _ in range(3)
    )
    coefficients = torch.rand(2, 2, 12, 5, generator=generator, dtype=torch.float64)
    basis = torch.rand(5, 13, generator=generator, dtype=torch.float64)
    connections = {
        "topk": lambda: select_topk(coefficients, basis, 0.3),
        "grouped": lambda: select_grouped(coefficients, basis, 0.3, grid=(3, 4), group_size=5),
        "threshold": lambda: select_threshold(coefficients, basis, 1.2),
    }[form]()
    mask = {"added": torch.full(shape, 0.7, dtype=torch.float64), "bool": torch.ones(shape, dtype=torch.bool),
            "none left": torch.zeros(shape, dtype=torch.bool)}[kind]  # fmt: skip
    expected = sparse_attention(q, k, v, connections, scale=0.25, backend="dense_masked")
    if kind == "none left":
        expected = torch.zeros_like(expected)
    own = {"topk": "sparse", "grouped": "grouped", "threshold": "sparse"}[form]
    for backend in ("auto", "masked", "dense_masked", own):
        out = sparse_attention(q, k, v, connections, scale=0.25, attn_mask=mask, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    if kind == "added":  # one number for all pairs, beside one per key
        bias = torch.randn(2, 1, 1, 13, generator=generator, dtype=torch.float64)
        both = [sparse_attention(q, k, v, connections, scale=0.25, attn_mask=mask, key_bias=bias, backend=b)
                for b in ("dense_masked", own)]  # fmt: skip
        torch.testing.assert_close(both[0], both[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [13, 200])
@pytest.mark.parametrize("form", ["topk", "grouped", "threshold"])
def test_no_image(form: str, tokens: int) -> None:
    q = torch.randn(0, 2, tokens, 8)
    coefficients, basis = torch.rand(0, 2, tokens - 1, 5), torch.rand(5, tokens)
    connections = {
        "topk": lambda: select_topk(coefficients, basis, 0.3),
        "grouped": lambda: select_grouped(coefficients, basis, 0.3, grid=(1, tokens - 1), group_size=5),
        "threshold": lambda: select_threshold(coefficients, basis, 1.2),
    }[form]()
    own = {"topk": "sparse", "grouped": "grouped", "threshold": "sparse"}[form]
    for backend in ("auto", "masked", "dense_masked", own):
        for mask in (None, torch.zeros(1, 1), torch.ones(tokens, tokens, dtype=torch.bool)):
            out = sparse_attention(q, q, torch.randn(0, 2, tokens, 6) if backend != "auto" else q, connections,
                                   scale=0.25, attn_mask=mask, backend=backend)  # fmt: skip
            assert out.shape == (0, 2, tokens, 8 if backend == "auto" else 6)
            assert out.dtype == torch.float32
