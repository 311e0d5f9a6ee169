"""Counts before pixels, masks after, final rows of images: what a server asks for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vtoken
from tests.helpers import assert_close

CONFIGS: list[Any] = [
    vtoken.DivPrune(keep_ratio=0.3), vtoken.DivPrune(num_tokens=4), vtoken.RandomTokens(keep_ratio=0.5),
    vtoken.UniformTokens(num_tokens=3), vtoken.CDPruner(keep_ratio=0.2),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_mask_has_the_count(config: Any) -> None:
    for thw in ((1, 4, 4), (1, 16, 24), (3, 8, 4), (1, 2, 2)):
        n = thw[0] * thw[1] * thw[2] // 4
        rows = torch.randn(n, 12, generator=torch.Generator().manual_seed(n))
        clues = {"relevance": rows[:, 0]} if config.method == "cdpruner" else None
        mask = vtoken.retention_mask(config, rows, thw, 2, clues)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == vtoken.retained_count(config, thw, 2)
        first = n // thw[0]
        u = min(config.num_tokens or math.ceil(config.keep_ratio * first - 1e-6), first)
        assert int(mask.sum()) == u * thw[0]


def test_what_cannot_be_served() -> None:
    rows = torch.randn(24, 8)
    for config in (vtoken.VTCCLS(num_tokens=3), vtoken.VisionZip(num_tokens=3), vtoken.PooledTokens(num_tokens=3),
                   vtoken.DivPrune(num_tokens=3, space="before")):  # fmt: skip
        with pytest.raises(vtoken.ConfigError, match="encode_images"):
            vtoken.retention_mask(config, rows, (1, 8, 12), 2)
        assert vtoken.retained_count(config, (1, 8, 12), 2) == 3
    with pytest.raises(vtoken.InputError, match="relevance"):
        vtoken.retention_mask(vtoken.CDPruner(num_tokens=3), rows, (1, 8, 12), 2)
    with pytest.raises(vtoken.ShapeError, match="24 rows for a grid of 6"):
        vtoken.retention_mask(vtoken.DivPrune(num_tokens=3), rows, (1, 4, 6), 2)
    with pytest.raises(vtoken.ShapeError, match="divides"):
        vtoken.retained_count(vtoken.DivPrune(num_tokens=3), (1, 5, 6), 2)
    with pytest.raises(vtoken.ConfigError, match="prompt method"):
        vtoken.retained_count(vtoken.PiToMe(ratio=0.9), (1, 4, 6), 2)


@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3"])
@torch.no_grad()
def test_final_rows_rebuild_the_call(kind: str) -> None:
    pytest.importorskip("transformers")
    from tests.prompts import qwens

    model, given = qwens.build(kind), qwens.call(video=True, kind=kind)
    vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    with pytest.raises(vtoken.InputError, match="input_ids"):
        vtoken.encode_images(model, {"pixel_values": given["pixel_values"]})
    with vtoken.budget(model, num_tokens=[2, 3, 1, 4]):
        ran: list[int] = []
        model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
        found = vtoken.encode_images(model, given)
        assert not ran
        _, trace = vtoken.trace(model, **given)
    assert [len(f.rows) for f in found] == [2, 3, 2, 4]
    assert [f.kind for f in found] == ["image", "image", "video", "image"]
    assert [f.kept.tolist() for f in found] == [k.tolist() for k in trace.prompt.kept]
    outputs = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
    assert_close("rows", outputs.pooler_output[1][found[1].kept], found[1].rows, 1e-6)
    assert len(found[0].deeper) == (2 if kind == "qwen3" else 0)
    if kind == "qwen3":
        level = outputs.deepstack_features[1]
        level = level if isinstance(level, torch.Tensor) else torch.cat(list(level))
        assert_close("deeper", level[6:14][found[1].kept], found[1].deeper[1], 1e-6)
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(2), indexing="ij")).flatten(1)
    assert found[1].places.tolist() == [[0] * 3, *grid[:, found[1].kept].tolist()]


@torch.no_grad()
def test_vllms_pruning_share() -> None:
    """Engines speak of the share that goes; counts and masks agree at any of them."""
    rows = torch.randn(96, 8)
    for gone in (0.1, 0.25, 0.5, 0.9):
        config = vtoken.DivPrune(keep_ratio=1 - gone)
        assert int(vtoken.retention_mask(config, rows, (1, 16, 24), 2).sum()) == math.ceil((1 - gone) * 96 - 1e-6)
