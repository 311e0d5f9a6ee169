"""What attention with connectivity masks costs: check values of docs/methods/sparsifiner.md 7, and whole reports."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import vtoken
from tests.contract.table import attention
from tests.helpers import randomise_, vit
from tests.methods.sparse_hosts import GRID, HOSTS, TOWERS, blocks, sparse

M = 1e6
_WIDTH = {"tiny": 192, "small": 384, "base": 768}


def deit(size: str = "small") -> Any:
    with torch.device("meta"):
        return timm.create_model(f"deit_{size}_patch16_224")


@pytest.mark.parametrize(("size", "dense"), [("tiny", 178.8), ("small", 357.7), ("base", 715.3)])
def test_dense_cores(size: str, dense: float) -> None:
    cost = vtoken.report(deit(size), vtoken.Sparsifiner(keep_ratio=1.0))
    assert cost.attention is not None
    assert cost.attention.dense / M == pytest.approx(dense, abs=0.05)
    assert cost.attention.core == cost.attention.dense
    assert (cost.attention.predictor, cost.attention.up) == (0, 0)
    assert cost.macs_after == cost.macs_before


def test_a_key_and_the_class_rows() -> None:
    """1.80634 M for each kept key per query of DeiT-S, 1.8156 M for the class rows."""
    counts = (1, 10, 11, 99, 158, *range(2, 9))
    cost = vtoken.report(deit(), vtoken.Sparsifiner(keep_ratio=tuple((n - 0.5) / 197 for n in counts)))
    cores = {n: 12 * layer.attention.core / M for n, layer in zip(counts, cost.layers, strict=True)}
    assert cores[11] - cores[10] == pytest.approx(1.80634, abs=1e-5)
    assert cores[158] - cores[99] == pytest.approx(59 * 1.80634, abs=1e-3)
    assert cores[1] == pytest.approx(1.80634 + 1.8156, abs=1e-3)


@pytest.mark.parametrize(("basis", "predictor"), [(32, 87.1), (16, 72.6), (None, 87.1)])
def test_predictors_are_shown_separately(basis: int | None, predictor: float) -> None:
    cost = vtoken.report(deit(), vtoken.Sparsifiner(keep_ratio=0.25, num_basis=basis))
    assert cost.attention is not None
    assert cost.attention.predictor / M == pytest.approx(predictor, abs=0.05)
    assert "predictor" in str(cost)
    assert cost.to_dict()["layers"][0]["attention"]["predictor"] == cost.attention.predictor // 12


def test_published_keep_ratios_count_the_keys_of_the_table() -> None:
    table = {0.9: 178, 0.8: 158, 0.7: 138, 0.6: 119, 0.5: 99, 0.4: 79, 0.3: 60, 0.2: 40, 0.1: 20, 0.05: 10, 0.01: 2}
    cost = vtoken.report(deit(), vtoken.Sparsifiner(keep_ratio=(*table, 1.0)))
    for layer, keys in zip(cost.layers, table.values(), strict=False):
        assert layer.attention is not None
        assert layer.attention.core == 2 * 384 * (196 * keys + 197)


@pytest.mark.parametrize(
    "name", ["cls", "registers", "no prefix", "open_clip", "rope", "eva", "hf_vit", "hf_siglip", "hf_dinov3"]
)
@pytest.mark.parametrize("options", [{}, {"mode": "grouped", "query_group": 5}, {"layers": (1,)}, {"mode": "random"},
                                     {"phase": "recon"}, {"keep_ratio": (0.2, 1.0, 0.6)}])  # fmt: skip
def test_totals_are_the_stock_count_with_cores_exchanged(name: str, options: dict[str, Any]) -> None:
    host = (HOSTS | TOWERS)[name]
    model, shape = host.model(), host.shape
    config = vtoken.Sparsifiner(**({"keep_ratio": 0.3} | options))
    stock = vtoken.report(model, vtoken.PiToMe(ratio=1.0), input_size=shape)
    before = vtoken.report(model, config, input_size=shape)
    sparse(model, config)
    cost = vtoken.report(model, input_size=shape)
    assert stock.macs_before == stock.macs_after == cost.macs_before == before.macs_before
    patches = shape[1] * shape[2] // 16
    prefix = cost.tokens[0] - patches
    n, change = patches + prefix, 0
    for i, block in enumerate(blocks(model)):
        layer = cost.layers[i]
        assert layer.attention is not None
        dense, ratio = (
            2 * n * n * 16,
            config.keep_ratio if isinstance(config.keep_ratio, float) else config.keep_ratio[i],
        )
        assert layer.attention.dense == dense
        if config.phase == "recon" or ratio == 1 or i not in (config.layers or (0, 1, 2)):
            assert layer.macs_after == layer.macs_before
            assert layer.attention.core == dense
            continue
        kept = -(-round(ratio * n * 10) // 10)
        core, parts = 2 * 16 * (patches * kept + prefix * n), [0, 0]
        if config.mode != "random":
            p = attention(block).predictor
            k = n // 6
            assert p.num_basis == k
            parts[0] = 2 * n * 16 * 4 + n * k * 2 * 4 + patches * k * 2 * 4
            entries = int((p.w_up.detach().abs() > 0.02).sum()) / k
            parts[1] = round((patches if config.mode == "exact" else 5) * 2 * min(8, k) * entries)
        assert (layer.attention.core, layer.attention.predictor, layer.attention.up) == (core, *parts)
        assert layer.macs_after == layer.macs_before - dense + core + sum(parts)
        change += core + sum(parts) - dense
    assert cost.macs_after == cost.macs_before + change
    assert cost.other_macs_after == cost.other_macs_before


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (8, 9)])
def test_another_image_size_has_its_own_budget(grid: tuple[int, int]) -> None:
    model = randomise_(vit(img_size=(16, 24), embed_dim=16, num_heads=2, dynamic_img_size=True), 0).eval()
    n = 1 + grid[0] * grid[1]
    for config in (vtoken.Sparsifiner(keep_ratio=0.5), [vtoken.ToMe(r=2), vtoken.Sparsifiner(keep_ratio=0.5)]):
        cost = vtoken.report(model, config, input_size=(3, 4 * grid[0], 4 * grid[1]))
        for layer, tokens in zip(cost.layers, cost.tokens[:-1], strict=True):
            kept = min(-(-n // 2), tokens)
            assert layer.attention is not None
            assert layer.attention.core == 2 * 16 * ((tokens - 1) * kept + tokens)
            k = 25 // 6  # that of the model's own size
            assert layer.attention.predictor == 2 * tokens * 16 * 4 + (2 * tokens - 1) * k * 2 * 4


def test_pruned_and_merged_tokens_count_as_fewer() -> None:
    for config in (vtoken.Sparsifiner(keep_ratio=0.3, token_keep_ratio=0.5, prune_after=(0, 1)),
                   [vtoken.PiToMe(ratio=0.7), vtoken.Sparsifiner(keep_ratio=0.3)]):  # fmt: skip
        model = HOSTS["registers"].model()
        cost = vtoken.report(model, config, input_size=HOSTS["registers"].shape)
        assert cost.tokens[0] == 27
        for layer, tokens in zip(cost.layers, cost.tokens[:-1], strict=True):
            kept = min(9, tokens)
            assert layer.attention is not None
            assert layer.attention.core == 2 * 16 * ((tokens - 3) * kept + 3 * tokens)
            assert layer.attention.dense == 2 * 16 * tokens**2
        assert cost.macs_after < cost.macs_before
    assert cost.tokens == tuple(vtoken.plan(model, config).tokens)


def test_predicted_counts_are_those_of_a_forward() -> None:
    """Kept pairs by the trace; core = 2 * C / H * pairs."""
    model = sparse(HOSTS["registers"].model(), keep_ratio=0.3, token_keep_ratio=0.7, prune_after=(0, 1))
    cost = vtoken.report(model, input_size=HOSTS["registers"].shape)
    with torch.no_grad():
        _, trace = vtoken.trace(model, HOSTS["registers"].images(batch=1))
    for record, layer in zip(trace.attention, cost.layers, strict=True):
        assert layer.attention is not None
        assert layer.attention.core == 2 * 8 * record.kept


def test_reports_change_nothing() -> None:
    model = sparse(HOSTS["cls"].model(), keep_ratio=0.3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    vtoken.report(model, vtoken.Sparsifiner(num_basis=2, keep_ratio=0.1))
    assert vtoken.config_of(model) == vtoken.Sparsifiner(keep_ratio=0.3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert blocks(model)[0].attn.predictor.grid == GRID
