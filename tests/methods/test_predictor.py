"""The connectivity predictor: definition (docs/methods/sparsifiner.md 2), remembered bases, other grids, live rows."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_close
from tests.ops.test_connections import Sizes
from vtoken import ConfigError, ShapeError
from vtoken.methods.sparsifiner.predictor import ConnectivityPredictor
from vtoken.ops import select_grouped, select_topk
from vtoken.ops.sparse.resize import resize_rows


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> ConnectivityPredictor:
    """A predictor in eval mode whose every parameter matters."""
    settings: dict[str, Any] = {"grid": (3, 4), "num_prefix": 1, "num_basis": 5, "coef_topk": 2} | options
    predictor = ConnectivityPredictor(6, 3, **settings)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in predictor.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.5 if p.dim() == 2 else 0.2))
    return predictor.to(dtype).eval()


def draw(predictor: ConnectivityPredictor, batch: int = 2, tokens: int | None = None, seed: int = 1):
    """q and k [B, 3, n, 6]."""
    rng = torch.Generator().manual_seed(seed)
    shape = (2, batch, 3, tokens or predictor.num_tokens, 6)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(predictor.w_down.dtype).unbind()


def loops(
    p: ConnectivityPredictor, q: Tensor, k: Tensor, live: list[list[int]] | None = None, raw: bool = False
) -> tuple[Tensor, Tensor]:
    """Coefficients and scores from section 2, a number at a time; `raw`: the reconstruction path."""
    wq, bq, wk, bk = (t.tolist() for t in (p.reduce_q.weight, p.reduce_q.bias, p.reduce_k.weight, p.reduce_k.bias))
    down, up = p.w_down.tolist(), p.w_up.tolist()
    batch, heads, tokens, _ = q.shape
    basis_count, width = len(down[0]), len(wq)

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    coefficients = torch.zeros(batch, heads, tokens - p.num_prefix, basis_count, dtype=torch.float64)
    scores = torch.zeros(batch, heads, tokens - p.num_prefix, tokens, dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        rows = live[b] if live else list(range(tokens))
        reduced_q = [[dot(w, x) + c for w, c in zip(wq, bq, strict=True)] for x in q[b, h].tolist()]
        reduced_k = [[dot(w, x) + c for w, c in zip(wk, bk, strict=True)] for x in k[b, h].tolist()]
        mixed = [
            [math.fsum(down[rows[n]][m] * reduced_k[n][c] for n in range(tokens)) for c in range(width)]
            for m in range(basis_count)
        ]
        for t, x in enumerate(reduced_q[p.num_prefix :]):
            z = [dot(x, mixed[m]) * p.scale for m in range(basis_count)]
            top = max(z)
            total = math.fsum(math.exp(v - top) for v in z)
            a = [math.exp(v - top) / total for v in z]
            if not raw and p.coef_topk:
                best = sorted(range(basis_count), key=lambda m, a=a: (-a[m], m))[: p.coef_topk]
                a = [v if m in best else 0.0 for m, v in enumerate(a)]
            elif not raw and p.coef_threshold > 0:
                a = [v if v > p.coef_threshold else 0.0 for v in a]
            coefficients[b, h, t] = torch.tensor(a, dtype=torch.float64)
            for n in range(tokens):
                row = up[rows[n]]
                if not raw:
                    row = [abs(v) if p.basis_abs else v for v in row]
                    row = [v if v > p.basis_threshold else 0.0 for v in row]
                scores[b, h, t, n] = dot(a, row)
    return coefficients, scores


OPTIONS: list[dict[str, Any]] = [
    {},
    {"coef_topk": 1},
    {"coef_topk": 5},
    {"coef_topk": 9},
    {"coef_topk": 0},
    {"coef_topk": 0, "coef_threshold": 0.2},
    {"basis_threshold": 0.5},
    {"basis_abs": False},
    {"share_proj": True},
    {"scale": 2.5},
    {"num_prefix": 0},
    {"num_prefix": 2, "grid": None, "num_tokens": 9},
    {"reduce_c_factor": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_loops(options: dict[str, Any]) -> None:
    predictor = make(**options)
    q, k = draw(predictor)
    coefficients, scores = loops(predictor, q, k)
    assert_close("coefficients", coefficients, predictor.coefficients(q, k), 1e-12)
    assert_close("scores", scores, predictor.scores(q, k), 1e-12)
    assert_close("scores", scores, predictor.coefficients(q, k) @ predictor.basis(), 1e-12)
    if predictor.basis_abs:
        assert bool((predictor.scores(q, k) >= 0).all())
    assert_close("raw", loops(predictor, q, k, raw=True)[1], predictor.reconstruction(q, k), 1e-12)


@pytest.mark.parametrize("options", [*OPTIONS, {"live": True}], ids=str)
def test_another_order_of_the_products_rounds_otherwise_only(options: dict[str, Any]) -> None:
    live, options = bool(options.get("live")), {k: v for k, v in options.items() if k != "live"}
    predictor = make(**options)
    rows = torch.tensor([[0, 2, 3, 7, 12], [0, 1, 5, 6, 9]]) if live else None
    q, k = draw(predictor, tokens=5 if live else None)
    plain, other = (predictor.coefficients(q, k, live=rows, reorder=way) for way in (False, True))
    torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-13)
    half = predictor.bfloat16()
    plain, other = (half.coefficients(q.bfloat16(), k.bfloat16(), live=rows, reorder=way) for way in (False, True))
    assert other.dtype == torch.float32
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_parameters_are_those_of_the_page() -> None:
    predictor = ConnectivityPredictor(64, 6, num_tokens=197)
    shapes = {name: tuple(p.shape) for name, p in predictor.state_dict().items()}
    assert shapes == {
        "w_down": (197, 32), "w_up": (197, 32), "reduce_q.weight": (32, 64), "reduce_q.bias": (32,),
        "reduce_k.weight": (32, 64), "reduce_k.bias": (32,),
    }  # fmt: skip
    assert predictor.grid == (14, 14)
    assert predictor.scale == 6**-0.5
    assert predictor.coef_topk == 8
    assert predictor.basis_threshold == 0.02
    for name, p in predictor.named_parameters():
        if name.endswith("bias"):
            assert bool((p == 0).all())
        else:
            p = p.detach()
            assert 0.015 < float(p.std()) < 0.025
            assert abs(float(p.mean())) < 0.003
    assert predictor.w_up is not predictor.w_down
    for tokens, basis in [(577, 32), (1025, 32), (100, 16), (65, 10), (5, 1)]:
        assert ConnectivityPredictor(8, 2, num_tokens=tokens, num_prefix=0).num_basis == basis
    assert ConnectivityPredictor(8, 2, num_tokens=577, num_basis=96).w_up.shape == (577, 96)
    assert ConnectivityPredictor(8, 2, num_tokens=50, reduce_n_factor=5, reduce_c_factor=4).num_basis == 10
    assert ConnectivityPredictor(8, 2, grid=(2, 5), num_prefix=2).num_tokens == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 1}, "must exceed num_prefix=1"),
        ({}, "pass grid"),
        ({"grid": (3, 3), "num_tokens": 9}, "make 10 tokens, not 9"),
        ({"grid": (0, 3)}, "grid=\\(0, 3\\)"),
        ({"num_tokens": 17, "coef_topk": -1}, "coef_topk=-1"),
        ({"num_tokens": 17, "reduce_c_factor": 9}, "reduce_c_factor=9"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConnectivityPredictor(8, 2, **options)


def test_ties_go_to_the_first_coefficients() -> None:
    predictor = make(coef_topk=2)
    with torch.no_grad():
        predictor.w_down.zero_()  # all logits equal
    q, k = draw(predictor)
    expected = torch.tensor([0.2, 0.2, 0, 0, 0], dtype=torch.float64).expand(2, 3, 12, 5)
    assert_close("tied", expected, predictor.coefficients(q, k), 1e-12)
    with torch.no_grad():
        predictor.w_down[:, 2] = 1e4  # one coefficient 1 or 0, the others equal
    found = predictor.coefficients(q, k)
    assert_close("saturated", loops(predictor, q, k)[0], found, 1e-12)


def test_basis_entries_must_exceed_the_threshold() -> None:
    predictor = make(basis_threshold=0.5)
    with torch.no_grad():
        predictor.w_up.fill_(0.5)
        predictor.w_up[3, 1] = -0.5000001
    assert predictor.basis().nonzero().tolist() == [[1, 3]]


def test_autocast_and_half_inputs_change_no_mask() -> None:
    predictor = make(dtype=torch.float32)
    q, k = (x.bfloat16().float() for x in draw(predictor))
    expected = predictor.coefficients(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(predictor.coefficients(q, k), expected)
        assert torch.equal(predictor.coefficients(q.bfloat16(), k.bfloat16()), expected)
        assert predictor.reconstruction(q, k).dtype == torch.float32
    half = copy.deepcopy(predictor).bfloat16()
    assert half.coefficients(q.bfloat16(), k.bfloat16()).dtype == torch.float32
    assert half.basis().dtype == torch.float32


def test_reconstruction_has_gradients() -> None:
    predictor = make().train()
    q, k = draw(predictor)
    names = [name for name, _ in predictor.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        out = torch.func.functional_call(predictor, dict(zip(names, values, strict=True)), (q, k))
        assert isinstance(out, Tensor)
        return out

    predictor.forward = predictor.reconstruction  # type: ignore[method-assign]
    values = tuple(p.detach().clone().requires_grad_() for p in predictor.parameters())
    assert torch.autograd.gradcheck(run, values)


def test_coefficients_pass_gradients_to_the_kept_ones() -> None:
    predictor = make()
    q, k = (x.requires_grad_() for x in draw(predictor))
    assert torch.autograd.gradcheck(lambda q, k: predictor.coefficients(q, k), (q, k))
    assert not predictor.basis().requires_grad


# --- what is remembered ---


def test_basis_is_remembered_in_eval_mode_only() -> None:
    predictor = make()
    assert predictor.basis() is predictor.basis()
    predictor.train()
    assert predictor.basis() is not predictor.basis()
    predictor.eval()
    assert predictor.basis() is predictor.basis()


def change_in_place(p: ConnectivityPredictor) -> None:
    with torch.no_grad():
        p.w_up.add_(0.3)


def change_by_loading(p: ConnectivityPredictor) -> None:
    p.load_state_dict(make(seed=9).state_dict())


def change_by_assigning(p: ConnectivityPredictor) -> None:
    p.load_state_dict(make(seed=9).state_dict(), assign=True)


def change_the_parameter(p: ConnectivityPredictor) -> None:
    p.w_up = nn.Parameter(p.w_up.detach() + 0.3)


def change_data(p: ConnectivityPredictor) -> None:
    p.w_up.data = p.w_up.data + 0.3


def change_by_step(p: ConnectivityPredictor) -> None:
    p.w_up.grad = torch.ones_like(p.w_up)
    torch.optim.AdamW([p.w_up], lr=0.3).step()


def change_data_then_mode(p: ConnectivityPredictor) -> None:
    p.w_up.data.add_(0.3)
    p.eval()


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_by_loading, change_by_assigning, change_the_parameter, change_data, change_by_step,
     change_data_then_mode],
)  # fmt: skip
@pytest.mark.parametrize("grid", [None, (5, 2)])
def test_basis_follows_its_parameter(change: Any, grid: tuple[int, int] | None) -> None:
    predictor = make()
    old = predictor.basis(grid=grid).clone()
    change(predictor)
    fresh = ConnectivityPredictor(6, 3, grid=(3, 4), num_basis=5).double().eval()
    fresh.load_state_dict(predictor.state_dict())
    assert torch.equal(predictor.basis(grid=grid), fresh.basis(grid=grid))
    assert not torch.equal(predictor.basis(grid=grid), old)


def test_moving_forgets() -> None:
    predictor = make()
    predictor.basis()
    assert predictor.float().basis().dtype == torch.float32
    assert predictor.to("meta").basis().device.type == "meta"


def test_made_in_inference_mode_it_serves_autograd() -> None:
    predictor = make()
    q, k = draw(predictor)
    with torch.inference_mode():
        predictor.scores(q, k, grid=(3, 4))
        predictor.scores(*draw(predictor, tokens=11), grid=(5, 2))
    predictor.scores(q.requires_grad_(), k).sum().backward()
    predictor.requires_grad_(False)
    q, k = draw(predictor, tokens=11)
    predictor.scores(q.requires_grad_(), k, grid=(5, 2)).sum().backward()
    assert q.grad is not None


def test_copies_carry_no_memory() -> None:
    predictor = make()
    keys = set(predictor.state_dict())
    basis = predictor.basis()
    predictor.basis(grid=(6, 6))
    assert set(predictor.state_dict()) == keys
    assert not list(predictor.buffers())
    saved = io.BytesIO()
    torch.save(predictor, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(predictor),
        pickle.loads(pickle.dumps(predictor)),
        torch.load(saved, weights_only=False),
    ):
        assert not twin._cache
        assert torch.equal(twin.basis(), basis)
        with torch.no_grad():
            twin.w_up.mul_(2)
        assert not torch.equal(twin.basis(), basis)
        assert torch.equal(predictor.basis(), basis)
    assert predictor._cache


def test_memory_is_bounded() -> None:
    predictor = make()
    q, k = draw(predictor)
    with torch.no_grad():
        for columns in range(2, 40):
            predictor.coefficients(*draw(predictor, tokens=2 * columns + 1), grid=(2, columns))
            predictor.basis(grid=(2, columns))
        assert len(predictor._cache) <= 8
        assert_close("scores", loops(predictor, q, k)[1], predictor.scores(q, k), 1e-12)


def test_shared_projection_stays_shared() -> None:
    predictor = make(share_proj=True)
    assert len(list(predictor.parameters())) == 5
    other = make(seed=4, share_proj=True)
    predictor.load_state_dict(other.state_dict(), assign=True)
    assert predictor.w_up is predictor.w_down
    for moved in (copy.deepcopy(predictor), predictor.float(), predictor.to_empty(device="cpu")):
        assert moved.w_up is moved.w_down
    empty = ConnectivityPredictor(6, 3, num_tokens=17, share_proj=True, device="meta").to_empty(device="cpu")
    assert empty.w_up is empty.w_down


# --- live rows and other grids ---


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_live_rows(prefix: int) -> None:
    predictor = make(num_prefix=prefix)
    rng = torch.Generator().manual_seed(3)
    rows = torch.stack([torch.randperm(12, generator=rng)[:7].sort().values for _ in range(2)]) + prefix
    live = torch.cat([torch.arange(prefix).expand(2, -1), rows], 1)
    q, k = draw(predictor, tokens=7 + prefix)
    coefficients, scores = loops(predictor, q, k, live.tolist())
    assert_close("coefficients", coefficients, predictor.coefficients(q, k, live=live), 1e-12)
    assert_close("scores", scores, predictor.scores(q, k, live=live), 1e-12)
    assert predictor.basis(live=live).shape == (2, 5, 7 + prefix)
    connections = select_topk(predictor.coefficients(q, k, live=live), predictor.basis(live=live), 0.3)
    assert_close("kept", scores.gather(3, connections.index).sum(3), scores.topk(3).values.sum(3), 1e-12)
    select_grouped(
        predictor.coefficients(q, k, live=live), predictor.basis(live=live), 0.3, grid=(3, 4), live=live, group_size=3
    )
    everything = torch.arange(12 + prefix).expand(2, -1)
    q, k = draw(predictor)
    assert_close("all", predictor.scores(q, k), predictor.scores(q, k, live=everything), 1e-12)


def expected_rows(rows: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, gain: float) -> Tensor:
    """Bicubic resizing of every column (Keys, a = -0.75, borders repeated), a weight at a time."""

    def weights(n_old: int, n_new: int) -> list[list[tuple[int, float]]]:
        def kernel(x: float) -> float:
            x, a = abs(x), -0.75
            if x <= 1:
                return (a + 2) * x**3 - (a + 3) * x**2 + 1
            return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

        out = []
        for i in range(n_new):
            at = (i + 0.5) * n_old / n_new - 0.5
            base = math.floor(at)
            out.append([(min(max(j, 0), n_old - 1), kernel(at - j)) for j in range(base - 1, base + 3)])
        return out

    vertical, horizontal = weights(old[0], new[0]), weights(old[1], new[1])
    result = [row.double() for row in rows[:prefix]]
    for y, x in itertools.product(range(new[0]), range(new[1])):
        total = torch.zeros(rows.shape[1], dtype=torch.float64)
        for (i, wy), (j, wx) in itertools.product(vertical[y], horizontal[x]):
            total += wy * wx * rows[prefix + i * old[1] + j].double()
        result.append(total * gain)
    return torch.stack(result)


@pytest.mark.parametrize(("old", "new"), [((3, 4), (5, 2)), ((4, 4), (6, 7)), ((4, 4), (2, 2)), ((2, 3), (2, 6))])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_resizing(old: tuple[int, int], new: tuple[int, int], prefix: int) -> None:
    rows = torch.randn(prefix + old[0] * old[1], 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratio = (old[0] * old[1]) / (new[0] * new[1])
    found = resize_rows(rows, old, new, num_prefix=prefix, mean=False)
    assert_close("w_up", expected_rows(rows, old, new, prefix, 1.0), found, 1e-12)
    found = resize_rows(rows, old, new, num_prefix=prefix, mean=True)
    assert_close("w_down", expected_rows(rows, old, new, prefix, ratio), found, 1e-12)
    with pytest.raises(ShapeError, match="are not"):
        resize_rows(rows[1:], old, new, num_prefix=prefix, mean=True)


@pytest.mark.parametrize("training", [False, True])
def test_another_grid_on_the_fly(training: bool) -> None:
    predictor = make(num_prefix=2).train(training)
    q, k = draw(predictor, tokens=2 + 10)
    other = ConnectivityPredictor(6, 3, grid=(5, 2), num_prefix=2, num_basis=5, coef_topk=2).double()
    state = predictor.state_dict()
    state["w_down"] = expected_rows(predictor.w_down.detach(), (3, 4), (5, 2), 2, 1.2)
    state["w_up"] = expected_rows(predictor.w_up.detach(), (3, 4), (5, 2), 2, 1.0)
    other.load_state_dict(state)
    expected = loops(other, q, k)[1]
    assert_close("scores", expected, predictor.scores(q, k, grid=(5, 2)), 1e-12)
    with torch.no_grad():
        assert_close("scores", expected, predictor.scores(q, k, grid=(5, 2)), 1e-12)
    assert_close("raw", loops(other, q, k, raw=True)[1], predictor.reconstruction(q, k, grid=(5, 2)), 1e-12)
    predictor.reconstruction(q, k, grid=(5, 2)).sum().backward()
    assert predictor.w_down.grad is not None
    assert predictor.w_up.grad is not None


def test_a_mixture_keeps_its_magnitude() -> None:
    predictor = make(grid=(4, 4), num_prefix=1)
    with torch.no_grad():
        predictor.w_down.fill_(0.25)
    down = predictor._resized("down", (8, 6))
    assert_close("sum", torch.full((5,), 4.25, dtype=torch.float64), down.sum(0), 1e-12)


def test_a_checkpoint_of_another_grid() -> None:
    small = make(grid=(4, 4))
    state = small.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    large = nn.Sequential(ConnectivityPredictor(6, 3, grid=(5, 7), num_basis=5)).double().eval()
    large.load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    loaded = large[0]
    assert isinstance(loaded, ConnectivityPredictor)
    assert_close("w_down", resize_rows(small.w_down, (4, 4), (5, 7), num_prefix=1, mean=True), loaded.w_down, 1e-12)
    assert_close("w_up", resize_rows(small.w_up, (4, 4), (5, 7), num_prefix=1, mean=False), loaded.w_up, 1e-12)
    with pytest.raises(ShapeError, match=r"w_down has 13 rows, this predictor 36 tokens"):
        loaded.load_state_dict(make().state_dict())
    with pytest.raises(ShapeError, match="grid None"):
        make(grid=None, num_tokens=12).load_state_dict(state)
    with pytest.raises(ShapeError, match="share_proj"):
        make(grid=(5, 7), share_proj=True).load_state_dict(make(grid=(4, 4), share_proj=True).state_dict())


def test_tokens_that_match_no_grid() -> None:
    predictor = make()
    for tokens, grid in ((12, None), (13, (5, 2)), (17, (4, 5))):
        with pytest.raises(ShapeError, match=rf"{tokens} tokens, but the predictor is for \d+ \(1 prefix"):
            predictor.coefficients(*draw(predictor, tokens=tokens), grid=grid)
    with pytest.raises(ShapeError, match="live must be"):
        predictor.coefficients(*draw(predictor, tokens=7), live=torch.arange(6).expand(2, -1))
    odd = make(grid=None, num_tokens=12)
    with pytest.raises(ShapeError, match="no known grid"):
        odd.basis(grid=(2, 2))
    with pytest.raises(ShapeError, match=r"q and k must be \[B, H, n, 6\]"):
        predictor.coefficients(torch.zeros(1, 3, 13, 5), torch.zeros(1, 3, 13, 5))


# --- graphs, memory ---


def test_compiles_into_one_graph() -> None:
    predictor = make(dtype=torch.float32)
    q, k = draw(predictor)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        coefficients = predictor.coefficients(q, k)
        return coefficients, select_topk(coefficients, predictor.basis(), 0.3).index

    coefficients, index = run(q, k)
    assert_close("coefficients", predictor.coefficients(q, k), coefficients, 1e-5)
    assert torch.equal(index, select_topk(coefficients, predictor.basis(), 0.3).index)
    assert not predictor._cache or predictor.basis() is predictor.basis()


def test_memory_is_linear_in_tokens() -> None:
    predictor = ConnectivityPredictor(16, 2, grid=(20, 20)).eval()
    q, k = torch.randn(2, 1, 2, 401, 16).unbind()
    with torch.no_grad(), Sizes() as sizes:
        predictor.basis()
        predictor.coefficients(q, k)
    assert 0 < sizes.largest <= 2 * 401 * 32
    with torch.no_grad(), Sizes() as sizes:
        predictor.scores(q, k)
    assert sizes.largest >= 2 * 400 * 401


def test_meta() -> None:
    predictor = ConnectivityPredictor(16, 2, grid=(6, 6), device="meta").eval()
    x = torch.zeros(2, 2, 37, 16, device="meta")
    assert predictor.scores(x, x).shape == (2, 2, 36, 37)
    assert select_grouped(predictor.coefficients(x, x), predictor.basis(), 0.1, grid=(6, 6)).density < 0.2
