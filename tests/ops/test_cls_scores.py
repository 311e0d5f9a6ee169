"""Class-token rows, received attention, ensembles and selection against their plain definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtoken
from tests.helpers import assert_close
from vtoken.ops import class_row, cls_scores, ensemble, received_row, scored_layers, select_tokens


def heads(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    q, k = torch.randn(2, batch, 3, tokens, 8, generator=rng)
    return 2 * q, 2 * k


def test_class_row_is_the_first_row_of_attention() -> None:
    q, k = heads(17)
    bias = torch.rand(2, 1, 17)
    maps = (q @ k.transpose(2, 3) * 0.3).softmax(-1)
    assert_close("row", maps[:, :, 0].mean(1), class_row(q[:, :, 0], k, scale=0.3), 1e-6)
    biased = (q @ k.transpose(2, 3) * 0.3 + bias.unsqueeze(2)).softmax(-1)
    assert_close("bias", biased[:, :, 0].mean(1), class_row(q[:, :, 0], k, scale=0.3, bias=bias), 1e-6)
    scores = cls_scores(q[:, :, 0], k, scale=0.3, num_prefix=2)
    assert_close("scores", maps[:, :, 0, 2:].mean(1), scores, 1e-6)
    assert bool((scores.sum(1) < 1).all()), "the prefix keeps its share"


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_received_attention_over_chunks(tokens: int) -> None:
    q, k = heads(tokens)
    maps = (q @ k.transpose(2, 3) * 0.3).softmax(-1)
    assert_close("received", maps.mean((1, 2)), received_row(q, k, scale=0.3), 1e-6)
    bias = torch.randn(len(q), 1, tokens, tokens, generator=torch.Generator().manual_seed(tokens))
    maps = (q @ k.transpose(2, 3) * 0.3 + bias).softmax(-1)
    assert_close("a bias by query", maps.mean((1, 2)), received_row(q, k, scale=0.3, bias=bias), 1e-6)


def test_scores_are_float32_and_detached_whatever_comes_in() -> None:
    q, k = (x.bfloat16().requires_grad_() for x in heads(9))
    with torch.autocast("cpu", torch.bfloat16):
        row = class_row(q[:, :, 0], k, scale=0.3)
    assert row.dtype == torch.float32
    assert not row.requires_grad
    exact = class_row(q[:, :, 0].double(), k.double(), scale=0.3)
    assert exact.dtype == torch.float64
    assert_close("not rounded to bfloat16", exact, row, 1e-6)


def test_wrong_shapes_are_refused() -> None:
    q, k = heads(5)
    with pytest.raises(vtoken.ShapeError, match=r"\[B, H, D\]"):
        class_row(q, k, scale=1.0)
    with pytest.raises(vtoken.ShapeError, match="no patch"):
        cls_scores(q[:, :, 0], k[:, :, :1], scale=1.0)
    with pytest.raises(vtoken.ShapeError, match="queries and keys"):
        received_row(q[:, :, :3], k, scale=1.0)
    with pytest.raises(vtoken.ShapeError, match="no scores"):
        ensemble([])
    with pytest.raises(vtoken.ConfigError, match="median"):
        ensemble([torch.zeros(1, 2)], "median")


@pytest.mark.parametrize("how", ["mean", "sum", "max", "min"])
def test_ensembles(how: str) -> None:
    rows = [torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 2.0]]), torch.tensor([[2.0, 2.0]])]
    expected = {"mean": [2.0, 3.0], "sum": [6.0, 9.0], "max": [3.0, 5.0], "min": [1.0, 2.0]}[how]
    assert ensemble(rows, how).tolist() == [expected]


@given(st.lists(st.sampled_from([0.0, 0.1, 0.1, 0.3, 0.5, float("nan")]), min_size=1, max_size=12), st.integers(1, 14))
def test_selection_is_stable_and_monotone(values: list[float], k: int) -> None:
    scores = torch.tensor(values)
    key = [(-v if v == v else 9.0, i) for i, v in enumerate(values)]  # NaN last
    expected = sorted(i for _, i in sorted(key)[:k])
    assert select_tokens(scores, k).tolist() == expected
    assert set(expected) <= set(select_tokens(scores, k + 1).tolist())
    assert select_tokens(torch.stack([scores, scores.flip(0)]), k)[0].tolist() == expected


def test_selection_refuses_nothing_and_odd_shapes() -> None:
    for k in (0, 0.5, 2.5, True):
        with pytest.raises(vtoken.ConfigError, match="at least one"):
            select_tokens(torch.ones(3), k)  # type: ignore[arg-type]
    with pytest.raises(vtoken.ShapeError, match=r"\[N\]"):
        select_tokens(torch.ones(1, 1, 3), 1)


@pytest.mark.parametrize(
    ("depth", "start", "last", "layers"),
    [
        (24, None, 22, range(16, 23)), (24, None, 23, range(16, 24)), (24, None, 5, range(5, 6)),
        (4, None, 2, range(2, 3)), (4, 1, 2, range(1, 3)), (4, -3, -2, range(1, 3)), (4, 0, 0, range(1)),
        (12, None, 10, range(8, 11)), (4, None, 3, range(3, 4)), (26, None, 25, range(18, 26)),
    ],
)  # fmt: skip
def test_layers(depth: int, start: int | None, last: int, layers: range) -> None:
    assert scored_layers(depth, start, last) == layers


@pytest.mark.parametrize(("start", "last"), [(3, 2), (4, 3), (-5, 3), (-1, 2), (None, 4), (None, -5)])
def test_layers_outside_are_refused_with_the_range(start: int | None, last: int) -> None:
    with pytest.raises(vtoken.ConfigError, match=r"0 to \d|-4 to 3"):
        scored_layers(4, start, last)
