"""Learned sparse attention: selection and lists against definitions, attention along lists against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close
from vtoken import ConfigError
from vtoken.ops import Connections, select_grouped, select_threshold, select_topk, size_bias, sparse_attention
from vtoken.ops.sparse import lists as lists_module
from vtoken.ops.sparse.lists import ListedConnections
from vtoken_kernels import library

ERROR = {torch.float32: 2e-6, torch.float16: 7e-4, torch.bfloat16: 6e-3}
FORMS = ["topk", "threshold", "grouped", "listed", "listed threshold"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def whole_numbers(
    seed: int, batch: int, heads: int, queries: int, keys: int, width: int, per_image: bool = False
) -> tuple[Tensor, Tensor]:
    """Coefficients as the predictor leaves them (columns apart) and a basis; scores are exact and full of ties."""
    rng = torch.Generator().manual_seed(seed)
    coefficients = torch.randint(0, 4, (batch, heads, width, queries), generator=rng).float().transpose(2, 3)
    shape = (batch, width, keys) if per_image else (width, keys)
    return coefficients, torch.randint(0, 3, shape, generator=rng).float()


def best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of every row, the first of equals; ascending. NaN is the smallest."""
    scores = torch.where(scores.isnan(), -math.inf, scores)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(-1).values


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "width", "k"),
    [(1, 1, 1, 1, 1, 1), (2, 2, 5, 7, 3, 2), (1, 1, 70, 71, 5, 9), (1, 1, 9, 130, 40, 65), (1, 1, 64, 64, 8, 64)],
)  # fmt: skip
@pytest.mark.parametrize("per_image", [False, True])
def test_best_keys(batch: int, heads: int, queries: int, keys: int, width: int, k: int, per_image: bool) -> None:
    coefficients, basis = whole_numbers(queries, batch, heads, queries, keys, width, per_image)
    scores = coefficients @ (basis.unsqueeze(1) if per_image else basis)
    expected = best(scores, k)
    assert torch.equal(library.select_rows(coefficients, basis, k).long(), expected)
    found = select_topk(coefficients, basis, k / keys, backend="triton")
    assert found.index is not None
    assert torch.equal(found.index, expected)
    listed = lists_module.select(coefficients, basis, kept=k)
    assert torch.equal(listed.mask(), found.mask())
    assert (listed.count, listed.num_prefix) == (found.count, keys - queries)


def test_search_ends_at_the_very_score() -> None:
    # A basis of one vector makes scores single products, which round alike everywhere: any floats, a last bit apart.
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(90, generator=rng)
    one = torch.tensor(1.0).view(torch.int32) + torch.randint(-2, 3, (90,), generator=rng, dtype=torch.int32)
    wild = (torch.randint(-(2**31), 2**31 - 1, (90,), generator=rng)).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38, -3e38] * 10)
    for values in (plain, one.view(torch.float32), wild, special, torch.zeros(90), torch.full((90,), math.nan)):
        for k in (1, 7, 45, 90):
            found = library.select_rows(torch.ones(1, 1, 1, 1), values.view(1, 90), k)
            assert torch.equal(found.long().view(-1), best(values, k)), (values, k)


@pytest.mark.parametrize(("heads", "queries", "keys"), [(2, 70, 71), (1, 3, 200)])
def test_lists_of_a_threshold(heads: int, queries: int, keys: int) -> None:
    coefficients, basis = whole_numbers(1, 2, heads, queries, keys, 4)
    coefficients[:, :, 1] = 0.0  # a query without keys
    threshold = torch.tensor([7.0, 11.0])[:heads]
    expected = select_threshold(coefficients, basis, threshold)
    order = torch.stack([torch.randperm(queries, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    for given in (None, order, order[:1]):
        found = lists_module.select(coefficients, basis, threshold=threshold, order=given)
        assert torch.equal(found.mask(), expected.mask())
        assert found.count == expected.count
        assert found.density == pytest.approx(expected.density)
        pick = torch.zeros_like(found.mask())
        pick[found.pairs()] = True
        pick[:, :, : keys - queries] = True
        assert torch.equal(pick, expected.mask())


def test_entries_ascend_and_words_are_not_empty() -> None:
    coefficients, basis = whole_numbers(2, 1, 1, 100, 150, 6)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3)).unsqueeze(0)
    index, word, start = lists_module.select(coefficients, basis, kept=4, order=order).lists
    assert index.shape == word.shape == (1, 1, 2, 150)
    assert start.shape == (1, 1, 2, 4)
    for block in range(2):
        count = int(start[0, 0, block, -1])
        used = index[0, 0, block, :count]
        assert bool((used.diff() > 0).all())
        assert bool((word[0, 0, block, :count] != 0).all())
        assert start[0, 0, block].tolist() == [int((used < edge).sum()) for edge in (0, 64, 128, 192)]
    # A list never holds more than the block's queries can keep.
    index, _, _ = lists_module.select(coefficients, basis, kept=1).lists
    assert index.shape[3] == 64


def connect(form: str, batch: int, heads: int, grid: tuple[int, int], prefix: int, ratio: float, group: int = 40):
    """Connections of random scores; thresholds leave some queries without keys."""
    rng = torch.Generator().manual_seed(7)
    queries = grid[0] * grid[1]
    coefficients = torch.rand(batch, heads, queries, 6, generator=rng) ** 4
    coefficients[:, :, ::3] *= 0.02
    basis = torch.rand(6, queries + prefix, generator=rng)
    threshold = (coefficients @ basis).quantile(1 - ratio).expand(heads)
    if form == "topk":
        return select_topk(coefficients, basis, ratio)
    if form == "threshold":
        return select_threshold(coefficients, basis, threshold)
    if form == "grouped":
        return select_grouped(coefficients, basis, ratio, grid=grid, group_size=group)
    order = torch.randperm(queries, generator=rng).unsqueeze(0)
    if form == "listed":
        return lists_module.select(coefficients, basis, kept=math.ceil(ratio * (queries + prefix)), order=order)
    return lists_module.select(coefficients, basis, threshold=threshold, order=order)


def draw_qkv(seed: int, batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """As a fused projection leaves them."""
    return [x.requires_grad_() for x in draw(seed, batch, tokens, 3, heads, width).to(dtype).permute(2, 0, 3, 1, 4)]


def check(connections: Connections, width: int, dtype: torch.dtype = torch.float32, **options: Tensor) -> None:
    """Output and gradients against attention in float64 over the same connections."""
    (batch, heads), tokens = connections.batch_and_heads, connections.num_tokens
    inputs = draw_qkv(tokens, batch, heads, tokens, width, dtype)
    out = sparse_attention(*inputs, connections, scale=0.3, backend="triton", **options)
    double = [x.detach().double().requires_grad_() for x in inputs]
    exact = {name: x.double() if x.is_floating_point() else x for name, x in options.items()}
    expected = sparse_attention(*double, connections, scale=0.3, backend="dense_masked", **exact)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_close("out", expected, out, ERROR[dtype])
    grad = draw(3, *out.shape).to(dtype)
    found = torch.autograd.grad(out, inputs, grad)
    for name, a, b in zip("qkv", torch.autograd.grad(expected, double, grad.double()), found, strict=True):
        if float(a.abs().max()) < 1e-12:  # one key per query: what cancels leaves rounding
            assert float(b.abs().max()) < 10 * ERROR[dtype]
        else:
            assert_close(f"gradient of {name}", a, b, 2 * ERROR[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_attention(form: str, dtype: torch.dtype) -> None:
    check(connect(form, 1, 2, (7, 10), 1, 0.1), 20, dtype)


@pytest.mark.parametrize(
    ("batch", "heads", "grid", "prefix", "ratio", "width"),
    [(1, 1, (1, 1), 0, 0.9, 16), (2, 1, (9, 7), 0, 0.02, 64), (1, 1, (4, 5), 70, 0.5, 33), (2, 1, (2, 3), 2, 0.4, 128)],
)  # fmt: skip
@pytest.mark.parametrize("form", ["topk", "grouped", "listed threshold"])
def test_shapes(
    form: str, batch: int, heads: int, grid: tuple[int, int], prefix: int, ratio: float, width: int
) -> None:
    check(connect(form, batch, heads, grid, prefix, ratio), width)


@pytest.mark.parametrize("group", [1, 7, 64, 65])
def test_groups_of_any_size(group: int) -> None:
    check(connect("grouped", 1, 1, (10, 13), 1, 0.1, group), 16)


def test_images_with_different_orders() -> None:
    rng = torch.Generator().manual_seed(0)
    live = torch.stack([torch.randperm(30, generator=rng)[:20].sort().values for _ in range(2)])
    live = torch.cat([torch.zeros(2, 1, dtype=torch.int64), live + 1], 1)
    coefficients, basis = torch.rand(2, 2, 20, 4, generator=rng), torch.rand(2, 4, 21, generator=rng)
    for group in (3, 20):
        check(select_grouped(coefficients, basis, 0.3, grid=(5, 6), group_size=group, live=live), 16)


@pytest.mark.parametrize("form", ["listed threshold", "grouped"])
def test_biases_and_masks_per_key(form: str) -> None:
    connections = connect(form, 2, 1, (5, 6), 1, 0.3)
    size = torch.randint(1, 9, (2, 31), generator=torch.Generator().manual_seed(1)).float()
    keys = torch.rand(2, 1, 1, 31, generator=torch.Generator().manual_seed(2)) > 0.5
    check(connections, 16, key_bias=size_bias(size, torch.float32), attn_mask=keys)
    check(connections, 16, attn_mask=draw(4, 31))
    check(connections, 16, attn_mask=torch.zeros(1, 31, dtype=torch.bool))  # nothing is left


def test_queries_without_keys_give_zeros() -> None:
    connections = connect("listed threshold", 1, 2, (6, 6), 1, 0.03)
    empty = ~connections.mask().any(-1)
    assert 10 < int(empty.sum()) < 72
    inputs = draw_qkv(5, 1, 2, 37, 16, torch.float32)
    out = sparse_attention(*inputs, connections, scale=1.0, backend="triton")
    assert bool((out[empty] == 0).all())
    gradients = torch.autograd.grad(out.square().sum() + out.sum(), inputs)
    assert bool((gradients[0][empty] == 0).all())
    assert all(bool(x.isfinite().all()) for x in gradients)


def test_large_scores_do_not_overflow() -> None:
    connections = connect("listed", 1, 1, (5, 6), 1, 0.3)
    q, k, v = (x.detach() * 100 for x in draw_qkv(6, 1, 1, 31, 16, torch.float32))
    expected = sparse_attention(q.double(), k.double(), v.double(), connections, scale=1.0, backend="dense_masked")
    assert_close("out", expected, sparse_attention(q, k, v, connections, scale=1.0, backend="triton"), 1e-4)


def test_strides_and_repeats() -> None:
    connections = connect("listed", 2, 2, (5, 6), 1, 0.3)
    inputs = [x.detach() for x in draw_qkv(8, 2, 2, 31, 16, torch.float32)]
    expected = sparse_attention(*inputs, connections, scale=0.3, backend="triton")
    assert torch.equal(sparse_attention(*inputs, connections, scale=0.3, backend="triton"), expected)
    flipped = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]  # channels are not neighbours
    assert torch.equal(sparse_attention(*flipped, connections, scale=0.3, backend="triton"), expected)
    alone = [x[1:] for x in inputs]
    index, word, start = (x[1:] for x in connections.lists)
    one = ListedConnections(31, order=connections.order, lists=(index, word, start), kept=connections.kept)
    assert torch.equal(sparse_attention(*alone, one, scale=0.3, backend="triton"), expected[1:])


def test_no_images() -> None:
    index = torch.zeros(0, 2, 30, 4, dtype=torch.int64)
    inputs = draw_qkv(9, 0, 2, 31, 16, torch.float32)
    out = sparse_attention(*inputs, Connections(31, index=index), scale=0.3, backend="triton")
    assert out.shape == (0, 2, 31, 16)
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


def test_other_backends_take_what_kernels_selected() -> None:
    connections = connect("listed threshold", 2, 2, (5, 6), 1, 0.2)
    inputs = [x.detach() for x in draw_qkv(10, 2, 2, 31, 8, torch.float32)]
    expected = sparse_attention(*inputs, connections, scale=0.3, backend="dense_masked")
    for backend in ("masked", "auto"):  # heads of 8 are too narrow for kernels
        assert_close(backend, expected, sparse_attention(*inputs, connections, scale=0.3, backend=backend), 1e-6)
    with pytest.raises(ConfigError, match="takes connections per query"):
        sparse_attention(*inputs, connections, scale=0.3, backend="sparse")
    with pytest.raises(ConfigError, match="select_grouped"):
        sparse_attention(*inputs, connections, scale=0.3, backend="grouped")


def test_what_the_kernels_do_not_serve() -> None:
    connections = connect("topk", 1, 1, (3, 4), 1, 0.3)
    q, k, v = (x.detach() for x in draw_qkv(11, 1, 1, 13, 16, torch.float32))
    refused: dict[str, dict[str, object]] = {
        "dropout of attention weights": {"dropout_p": 0.1},
        "the mask is not one per key": {"attn_mask": torch.ones(13, 13, dtype=torch.bool)},
        "the bias needs a gradient": {"key_bias": torch.zeros(1, 1, 1, 13, requires_grad=True)},
    }
    for why, options in refused.items():
        with pytest.raises(ConfigError, match=f"cannot serve this call: {why}"):
            sparse_attention(q, k, v, connections, scale=1.0, backend="triton", **options)
    with pytest.raises(ConfigError, match=r"heads are 8 wide; kernels take 16 to 128"):
        sparse_attention(q[..., :8], k[..., :8], v[..., :8], connections, scale=1.0, backend="triton")
    with pytest.raises(ConfigError, match=r"q is torch\.float64"):
        sparse_attention(q.double(), k.double(), v.double(), connections, scale=1.0, backend="triton")
    with pytest.raises(ConfigError, match=r"coefficients are torch\.float64; kernels select by float32"):
        select_topk(torch.rand(1, 1, 3, 2).double(), torch.rand(2, 3), 0.5, backend="triton")
