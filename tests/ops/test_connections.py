"""Which keys a query keeps: against definitions written as loops from docs/methods/sparsifiner.md 3 and 8."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtoken import ConfigError, ShapeError
from vtoken.ops import Connections, backend, select_grouped, select_threshold, select_topk
from vtoken.ops.largest import keep_largest, largest_index, largest_mask
from vtoken.ops.sparse import connections
from vtoken.ops.sparse.connections import num_kept
from vtoken.ops.sparse.hilbert import hilbert_order
from vtoken.ops.sparse.packed import largest_packed


class Sizes(TorchDispatchMode):
    """Sees the size of every floating tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout == torch.strided:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def draw(seed: int, batch: int, heads: int, queries: int, prefix: int, width: int = 5, per_image: bool = False):
    """Coefficients [B, H, T, K] and a sparse basis; whole numbers, so that scores are exact and full of ties."""
    rng = torch.Generator().manual_seed(seed)
    coefficients = torch.randint(0, 4, (batch, heads, queries, width), generator=rng).float()
    shape = (batch, width, queries + prefix) if per_image else (width, queries + prefix)
    return coefficients, torch.randint(0, 3, shape, generator=rng).float()


def score_lists(coefficients: Tensor, basis: Tensor) -> list[list[list[list[float]]]]:
    """Scores [B][H][T][N] of whole numbers, one product at a time."""
    a = coefficients.tolist()
    basis = basis if basis.dim() == 3 else basis.expand(len(a), -1, -1)
    columns = [list(zip(*image, strict=True)) for image in basis.tolist()]
    return [
        [[[sum(x * y for x, y in zip(row, key, strict=True)) for key in columns[b]] for row in head] for head in image]
        for b, image in enumerate(a)
    ]


def best(scores: list[float], k: int) -> list[int]:
    """The k largest, the lowest index first among equals; ascending."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])


CASES = [
    (batch, heads, queries, prefix, per_image)
    for batch, heads, queries, prefix in [(1, 1, 1, 0), (2, 3, 12, 1), (1, 2, 30, 2), (3, 1, 7, 0), (2, 2, 5, 3)]
    for per_image in (False, True)
]


@pytest.mark.parametrize(("batch", "heads", "queries", "prefix", "per_image"), CASES)
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.99, 1.0])
def test_topk_equals_loops(
    batch: int, heads: int, queries: int, prefix: int, per_image: bool, ratio: float
) -> None:  # fmt: skip
    coefficients, basis = draw(queries, batch, heads, queries, prefix, per_image=per_image)
    found = select_topk(coefficients, basis, ratio)
    num_tokens = queries + prefix
    k = min(num_tokens, math.ceil(round(ratio * num_tokens, 6)))
    expected = [[[best(row, k) for row in head] for head in image] for image in score_lists(coefficients, basis)]
    assert found.index is not None
    assert found.index.dtype == torch.int64
    assert found.index.tolist() == expected
    assert (found.form, found.num_tokens, found.num_prefix) == ("topk", num_tokens, prefix)
    check_mask(found, expected, prefix)


def check_mask(found: Connections, lists: list[list[list[list[int]]]], prefix: int) -> None:
    mask = found.mask()
    num_tokens = found.num_tokens
    assert tuple(mask.shape) == (len(lists), len(lists[0]), num_tokens, num_tokens)
    assert mask.dtype == torch.bool
    for b, image in enumerate(lists):
        for h, head in enumerate(image):
            assert mask[b, h, :prefix].all()
            assert [row.nonzero().flatten().tolist() for row in mask[b, h, prefix:]] == head
    assert found.count == int(mask.sum())
    assert found.density == pytest.approx(float(mask.double().mean()))


@pytest.mark.parametrize(("batch", "heads", "queries", "prefix", "per_image"), CASES)
@pytest.mark.parametrize("threshold", [0.0, 3.0, 9.0, 1000.0])
def test_threshold_equals_loops(
    batch: int, heads: int, queries: int, prefix: int, per_image: bool, threshold: float
) -> None:  # fmt: skip
    coefficients, basis = draw(queries, batch, heads, queries, prefix, per_image=per_image)
    found = select_threshold(coefficients, basis, threshold)
    expected = [
        [[[j for j, s in enumerate(row) if s > threshold] for row in head] for head in image]
        for image in score_lists(coefficients, basis)
    ]
    assert found.form == "threshold"
    assert found.num_prefix == prefix
    check_mask(found, expected, prefix)
    assert found.crow is not None
    assert found.col is not None
    flat = [row for image in expected for head in image for row in head]
    assert found.col.tolist() == [j for row in flat for j in row]
    starts = [0]
    for row in flat:
        starts.append(starts[-1] + len(row))
    for i, crow in enumerate(found.crow.flatten(0, 1).tolist()):
        assert crow == starts[i * queries : (i + 1) * queries + 1]


def test_threshold_is_strict() -> None:
    found = select_threshold(torch.ones(1, 1, 1, 1), torch.tensor([[1.0, 1.0 + 2**-23, 0.5]]), 1.0)
    assert found.col is not None
    assert found.col.tolist() == [1]


def grouped_lists(coefficients: Tensor, basis: Tensor, order: list[list[int]], k: int, group: int):
    """Kept keys of every query: the groups are cut from `order` (one per image), scores are of mean coefficients."""
    batch, heads, queries, _ = coefficients.shape
    size = math.ceil(queries / math.ceil(queries / group))
    lists = [[[[] for _ in range(queries)] for _ in range(heads)] for _ in range(batch)]
    for b in range(batch):
        for h in range(heads):
            for first in range(0, queries, size):
                members = order[b][first : first + size]
                # Sums are scaled by the size of the group, which no order sees: they stay whole numbers.
                total = coefficients[b, h, members].sum(0)[None, None, None]
                scores = score_lists(total, basis if basis.dim() == 2 else basis[b])[0][0][0]
                for t in members:
                    lists[b][h][t] = best(scores, k)
    return lists


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (6, 5), (1, 9), (4, 4)])
@pytest.mark.parametrize("group", [2, 4, 7, 64])
def test_grouped_equals_loops(grid: tuple[int, int], group: int) -> None:
    queries, prefix = grid[0] * grid[1], 1
    coefficients, basis = draw(group, 2, 2, queries, prefix)
    coefficients *= 5040.0  # so that means over 1 to 7 queries are whole numbers, too
    found = select_grouped(coefficients, basis, 0.3, grid=grid, group_size=group)
    order = hilbert_order(*grid).tolist()
    k = num_kept(0.3, queries + prefix)
    expected = grouped_lists(coefficients, basis, [order, order], k, group)
    assert found.form == ("grouped")
    assert found.index is not None
    assert found.index.shape[2] == math.ceil(queries / math.ceil(queries / math.ceil(queries / group)))
    if queries < 8 or group < 8:
        check_mask(found, expected, prefix)


@pytest.mark.parametrize("live_count", [11, 6, 1])
def test_grouped_live_rows_keep_the_order_of_the_grid(live_count: int) -> None:
    grid, prefix, group = (4, 5), 2, 3
    rng = torch.Generator().manual_seed(live_count)
    kept = torch.stack([torch.randperm(20, generator=rng)[:live_count].sort().values for _ in range(3)])
    live = torch.cat([torch.arange(prefix).expand(3, -1), kept + prefix], dim=1)
    coefficients, basis = draw(1, 3, 2, live_count, prefix, per_image=True)
    coefficients *= 5040.0
    found = select_grouped(coefficients, basis, 0.2, grid=grid, group_size=group, live=live, num_original=22)
    rank = hilbert_order(*grid).argsort().tolist()
    order = [sorted(range(live_count), key=lambda t, row=row: rank[row[t]]) for row in kept.tolist()]
    assert found.order is not None
    if live_count > 1:  # groups of one need no order
        assert found.order.tolist() == order
    k = min(5, live_count + prefix)  # ceil(0.2 * 22)
    check_mask(found, grouped_lists(coefficients, basis, order, k, group), prefix)


@pytest.mark.parametrize("grid", [(5, 6), (7, 3)])
def test_groups_of_one_are_exact(grid: tuple[int, int]) -> None:
    coefficients, basis = draw(3, 2, 3, grid[0] * grid[1], 1)
    exact = select_topk(coefficients, basis, 0.2)
    grouped = select_grouped(coefficients, basis, 0.2, grid=grid, group_size=1)
    assert torch.equal(grouped.mask(), exact.mask())


def test_number_of_kept_keys() -> None:
    # docs/methods/sparsifiner.md 12: keys of DeiT-S at each keep ratio.
    published = {0.9: 178, 0.8: 158, 0.7: 138, 0.6: 119, 0.5: 99, 0.4: 79, 0.3: 60, 0.2: 40, 0.1: 20, 0.05: 10, 0.01: 2}
    assert {ratio: num_kept(ratio, 197) for ratio in published} == published
    assert 0.07 * 100 > 7  # in floating point
    assert num_kept(0.07, 100) == 7
    assert num_kept(0.25, 100, num_original=197) == 50
    assert num_kept(0.9, 100, num_original=197) == 100
    assert num_kept(1e-9, 10) == 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_ratios(ratio: float) -> None:
    coefficients, basis = draw(0, 1, 1, 4, 0)
    with pytest.raises(ConfigError, match="keep_ratio"):
        select_topk(coefficients, basis, ratio)


def test_tensors_that_do_not_fit() -> None:
    coefficients, basis = draw(0, 2, 1, 9, 1)
    for bad in (basis[:4], basis[:, :8], basis[0], basis.expand(3, -1, -1)):
        with pytest.raises(ShapeError):
            select_topk(coefficients, bad, 0.5)
    with pytest.raises(ShapeError, match="4 x 4 has 16 patches, but there are 9"):
        select_grouped(coefficients, basis, 0.5, grid=(4, 4))
    with pytest.raises(ShapeError, match="live must be"):
        select_grouped(coefficients, basis, 0.5, grid=(4, 4), live=torch.arange(9).expand(2, -1))
    with pytest.raises(ConfigError, match="group_size=0"):
        select_grouped(coefficients, basis, 0.5, grid=(3, 3), group_size=0)


@pytest.mark.parametrize("width", [1, 2, 9, 64])
@pytest.mark.parametrize("threads", [0, 10**6], ids=["topk", "numpy"])
def test_largest_of_rows(width: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtoken.ops.largest._NUMPY_THREADS", threads)
    rng = torch.Generator().manual_seed(width)
    for x in (
        torch.randint(-2, 3, (4, 3, width), generator=rng).float(),
        torch.randn(4, 3, width, generator=rng),
        torch.zeros(4, 3, width),
    ):
        for k in {1, 2, width // 2 + 1, width} - {0}:
            if k > width:
                continue
            expected = torch.tensor([[best(row, k) for row in rows] for rows in x.tolist()])
            assert torch.equal(largest_index(x, k), expected)
            assert torch.equal(largest_mask(x, k), torch.zeros_like(x).scatter(2, expected, 1.0).bool())
            columns = x.abs().transpose(1, 2)
            expected = torch.tensor([[best(row, k) for row in rows] for rows in x.abs().tolist()])
            marked = torch.zeros_like(x).scatter(2, expected, 1.0).transpose(1, 2)
            assert torch.equal(keep_largest(columns, k), columns * marked)


def first_of_sorted(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of every row, the first of equals, ascending; NaN counts as the smallest."""
    order = x.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).sort(dim=1, descending=True, stable=True)
    return order.indices[:, :k].sort(1).values


def draw_rows(kind: str, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(width)
    x = torch.randn(64, width, generator=rng)
    return {
        "normal": lambda: x,
        "positive": lambda: x.abs(),
        "few values": lambda: (2 * x).round(),
        "mostly zero": lambda: x.where(x > 1.5, 0.0),
        "all equal": lambda: torch.full_like(x, 0.1),
        "zeros of both signs": lambda: x.sign() * 0.0,
        "subnormal": lambda: x * 1e-43,
        "tiny": lambda: x * 1e-37,
        "huge": lambda: x * 1e37,
        "near the largest float": lambda: (x.sign() * 3e38).where(x.abs() > 1, x),
        "far from zero": lambda: 1000 + x / 100,
        "neighbours in floating point": lambda: 1 + (4 * x).round() * 2**-23,
        "ten powers of ten": lambda: (10 * x).exp(),
        "one far above": lambda: x.index_fill(1, torch.tensor([width // 2]), 1e9),
        "infinite": lambda: x.where(x < 1, math.inf).where(x > -1, -math.inf),
        "NaN": lambda: x.where(x < 1.5, math.nan),
    }[kind]()


#: Rows of these are all told apart by the rounded entries, or are ties that are equal before rounding, too.
PLAIN = {"normal", "positive", "few values", "mostly zero", "all equal", "zeros of both signs", "tiny"}
OTHERS = {
    "subnormal", "huge", "near the largest float", "far from zero", "neighbours in floating point", "ten powers of ten",
    "one far above", "infinite", "NaN",
}  # fmt: skip


@pytest.mark.parametrize("width", [2, 3, 197, 1024, 1025, 2305, 8192])
@pytest.mark.parametrize("kind", sorted(PLAIN | OTHERS))
def test_packed_rows_are_right_or_listed(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtoken.ops.largest._PACKED_ENTRIES", 0)
    x = draw_rows(kind, width)
    before = x.clone()
    for k in sorted({1, -(-width // 10), width // 2, width - 1}):
        expected = first_of_sorted(x, k)
        index, unsure = largest_packed(x, k)
        assert unsure.unique().shape == unsure.shape
        sure = torch.ones(len(x), dtype=torch.bool).index_fill(0, unsure, False)
        assert torch.equal(index[sure], expected[sure])
        if kind in PLAIN:
            assert len(unsure) <= 4  # of 64
        assert torch.equal(largest_index(x, k), expected)
        assert torch.equal(largest_index(x, k, torch.full((x.numel() + 5,), math.nan)), expected)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("onednn", [True, False])
def test_topk_of_many_rows_is_chosen_in_pieces(
    per_image: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    coefficients, basis = draw(7, 2, 3, 150, 1, width=9, per_image=per_image)
    scores = coefficients.double() @ (basis.unsqueeze(1) if per_image else basis).double()
    expected = first_of_sorted(scores.view(-1, 151), 16).view(2, 3, 150, 16)
    for room in (2**8, 2**15, 2**19):
        monkeypatch.setitem(connections._SCORES, "cpu", room)
        with torch.backends.mkldnn.flags(enabled=onednn):
            assert torch.equal(select_topk(coefficients, basis, 0.1).index, expected)


@pytest.mark.parametrize("tokens", [1025, 2305])
def test_topk_of_random_scores_equals_the_sorted_scores(tokens: int) -> None:
    rng = torch.Generator().manual_seed(tokens)
    logits = torch.randn(1, 2, 40, 32, generator=rng)
    coefficients = keep_largest(logits.softmax(-1).transpose(-1, -2), 8).transpose(-1, -2)
    basis = torch.randn(32, tokens, generator=rng).mul(0.05).abs()
    basis[basis < 0.02] = 0.0
    found = select_topk(coefficients, basis, 0.1).index
    scores = (coefficients.double() @ basis.double()).view(-1, tokens)
    k = num_kept(0.1, tokens)
    worst = scores.gather(1, found.view(-1, k)).amin(1)
    # Scores are float32: whatever their rounding, no key may be left out for one that is worse by more than it.
    best_left_out = scores.scatter(1, found.view(-1, k), -1.0).amax(1)
    assert (worst >= best_left_out - 1e-7).all()
    assert (found.diff(dim=-1) > 0).all()
    scores32 = torch.cat(list(connections._score_chunks(coefficients, basis)), dim=1)[0]
    assert torch.equal(found.view(-1, k), first_of_sorted(scores32, k))


@pytest.mark.parametrize("threads", [0, 10**6], ids=["topk", "numpy"])
def test_nan_is_never_among_the_largest(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtoken.ops.largest._NUMPY_THREADS", threads)
    x = torch.tensor([[0.5, float("nan"), 0.1, 0.7, float("nan")], [0.5, 0.2, 0.1, 0.7, 0.3]])
    assert largest_index(x, 3).tolist() == [[0, 2, 3], [0, 3, 4]]
    assert largest_index(torch.full((2, 6), float("nan")), 2).tolist() == [[0, 1], [0, 1]]


def test_graph_and_meta_select_the_same() -> None:
    coefficients, basis = draw(8, 2, 2, 16, 1)
    compiled = torch.compile(
        lambda a, b: (
            select_topk(a, b, 0.3).index,
            select_grouped(a, b, 0.3, grid=(4, 4), group_size=4).index,
            select_topk(a, b, 1.0).index,
        ),
        fullgraph=True,
        backend="eager",
    )
    exact, grouped, everything = compiled(coefficients, basis)
    assert torch.equal(exact, select_topk(coefficients, basis, 0.3).index)
    assert torch.equal(grouped, select_grouped(coefficients, basis, 0.3, grid=(4, 4), group_size=4).index)
    assert torch.equal(everything, select_topk(coefficients, basis, 1.0).index)
    meta = select_grouped(coefficients.to("meta"), basis.to("meta"), 0.3, grid=(4, 4), group_size=4)
    assert meta.index.shape == grouped.shape
    assert meta.mask().shape == (2, 2, 17, 17)
    assert select_topk(coefficients.to("meta"), basis.to("meta"), 0.3).index.shape == exact.shape


@pytest.mark.parametrize("batch", [1, 3])
def test_never_all_scores_at_once(batch: int) -> None:
    queries, heads = 256, 2
    rng = torch.Generator().manual_seed(0)
    coefficients = torch.rand(batch, heads, queries, 8, generator=rng)
    basis = torch.rand(8, queries + 1, generator=rng)
    for select in (
        lambda: select_topk(coefficients, basis, 0.1),
        lambda: select_threshold(coefficients, basis, 2.5),
        lambda: select_grouped(coefficients, basis, 0.1, grid=(16, 16), group_size=64),
    ):
        with Sizes() as sizes:
            select()
        assert sizes.largest <= batch * heads * queries * (queries + 1) // 2
        assert sizes.largest > 0 or backend.FORCED  # kernels make no scores at all


def test_selection_is_repeatable_and_without_gradient() -> None:
    coefficients = torch.rand(2, 3, 64, 8, requires_grad=True)
    basis = torch.rand(8, 65, requires_grad=True)
    first, second = (select_topk(coefficients, basis, 0.2) for _ in range(2))
    assert torch.equal(first.index, second.index)
    assert not first.index.requires_grad
    single = select_topk(coefficients[1:], basis, 0.2)
    assert torch.equal(single.index, first.index[1:])


# --- no image ---


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_no_image_gives_empty_connections_of_the_right_shape(per_image: bool, prefix: int) -> None:
    queries = 12
    tokens = prefix + queries
    coefficients, basis = torch.rand(0, 2, queries, 5), torch.rand(5, tokens)
    live = None
    if per_image:
        basis, live = basis.expand(0, -1, -1), torch.zeros(0, tokens, dtype=torch.int64)
    kept = -(-tokens // 2)
    topk = select_topk(coefficients, basis, 0.5)
    assert topk.index.shape == (0, 2, queries, kept)
    assert select_topk(coefficients, basis, 1.0).index.shape == (0, 2, queries, tokens)
    for size, groups in ((5, 3), (1, queries), (64, 1)):
        grouped = select_grouped(coefficients, basis, 0.5, grid=(3, 4), group_size=size, live=live)
        assert grouped.index.shape == (0, 2, groups, kept)
        assert grouped.order.shape == (0 if per_image and size > 1 else 1, queries)
    threshold = select_threshold(coefficients, basis, torch.tensor([0.1, 0.2]))
    assert threshold.crow.shape == (0, 2, queries + 1)
    assert threshold.col.shape == (0,)
    for found, form in ((topk, "topk"), (grouped, "grouped"), (threshold, "threshold")):
        assert found.form == form
        assert found.batch_and_heads == (0, 2)
        assert (found.num_tokens, found.num_queries, found.num_prefix) == (tokens, queries, prefix)
        assert (found.count, found.density) == (0, 0.0)
        assert found.mask().shape == (0, 2, tokens, tokens)
        assert found.mask().dtype == torch.bool
        assert all(i.dtype == torch.int64 for i in found.pairs())
        assert torch.zeros(0, 2, tokens, tokens)[found.pairs()].numel() == 0
