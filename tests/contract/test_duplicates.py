"""Duplicate tokens: merging equal tokens changes nothing if sizes enter where they must (docs/methods/pitome.md 14)."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.contract.table import HOSTS, feature_rows, installed, run, traced
from tests.contract.table import host as host_row
from tests.helpers import Host, assert_close

# A stem that looks beyond one patch would make equal patches at different places unequal tokens.
_LOCAL = [h for h in HOSTS if h.name not in ("hybrid", "vitamin")]
_ids = [h.name for h in _LOCAL]


def without_positions(model: Any) -> Any:
    """Positions zeroed, learned and rotary, so that equal patches stay equal tokens."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(word in name for word in ("pos_embed", "position_embedding", "positional_embedding")):
                p.zero_()
    if getattr(model, "rope", None) is not None:
        turn = type(model.rope).get_embed

        def no_turn(*args: Any, **kwargs: Any) -> Any:
            table = turn(model.rope, *args, **kwargs)
            sin, cos = table.chunk(2, -1)
            return torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], -1)

        model.rope.get_embed = no_turn
    if hasattr(model, "rope_embeddings"):  # of transformers: cosines, sines
        model.rope_embeddings.inv_freq.zero_()
    return model


def tile(rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Patches [B, N, C, 4, 4] in raster order as images [B, C, H, W]."""
    channels, height, width = shape
    grid = rows.reshape(rows.shape[0], height // 4, width // 4, channels, 4, 4)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(rows.shape[0], channels, height, width)


def repeated(shape: tuple[int, int, int], copies: int, batch: int = 2) -> Tensor:
    """Images of which every 4 x 4 patch occurs `copies` or twice `copies` times, scattered anew in each image."""
    count = (shape[1] // 4) * (shape[2] // 4) // copies
    often = count // 3
    rng = torch.Generator().manual_seed(0)
    patches = torch.randn(batch, count - often, shape[0], 4, 4, generator=rng, dtype=torch.float64)
    index = torch.tensor([*range(count - often), *range(often)]).repeat(copies)
    return tile(torch.stack([p[index[torch.randperm(len(index), generator=rng)]] for p in patches]), shape)


@pytest.mark.parametrize("host", _LOCAL, ids=_ids)
@pytest.mark.parametrize("metric", ["key", "key_concat", "hidden"])
def test_merged_duplicates_count_as_often_as_they_occurred(host: Host, metric: str) -> None:
    """Logits, every pooling included, are those of the full model."""
    patches = (host.shape[1] // 4) * (host.shape[2] // 4)
    copies = 4 if patches % 4 == 0 else 2  # two merges or one can pair every patch with a copy of itself
    model = without_positions(host.model(dtype=torch.float64))
    x = repeated(host.shape, copies)

    def outputs() -> tuple[Tensor, Tensor]:
        """Logits and dense features; a model without pooling has only the latter."""
        with torch.no_grad(), vtoken.tracing(model) if vtoken.is_applied(model) else contextlib.nullcontext() as trace:
            rows = feature_rows(model, x)
        if trace is not None and rows.shape[1] == trace.tokens[-1]:  # a backbone spreads its rows itself
            rows = vtoken.unmerge(rows, trace)
        return (rows if host.name == "vit_nopool" else run(model, x)), rows

    logits, rows = outputs()
    # The second merge takes only some groups: were all halved alike, sizes would cancel in every softmax and mean.
    ratio = (0.5, 0.75, 1.0) if copies == 4 else (0.75, 1.0, 1.0)
    vtoken.apply(model, vtoken.PiToMe(ratio=ratio, metric=metric))
    merged, merged_rows = outputs()
    _, trace = traced(model, x)
    assert trace.size is not None
    assert len(trace.size[:, trace.num_prefix :].unique()) > 1
    rtol = 1e-6 if host.name == "hf_vit_eager" else 1e-11  # transformers' eager attention has its softmax in float32
    assert_close("features", rows, merged_rows, rtol)
    assert_close("logits", logits, merged, rtol)
    vtoken.configure(model, prop_attn=False)
    wrong, _ = outputs()
    error = float((wrong - logits).square().mean().sqrt() / logits.square().mean().sqrt())
    assert error > 1e-3, f"without proportional attention the error is only {error:.2g}"


@pytest.mark.parametrize(
    "name",
    ["vit_token", "vit_qk_norm", "eva_dinov3", "eva_gqa", "naflex_map",
     *installed("oc_map", "oc_qk_norm", "hf_siglip", "hf_dino_reg")],
)  # fmt: skip
@pytest.mark.parametrize("place", ["between", "after"])
@pytest.mark.parametrize(
    "config", [vtoken.PiToMe(r=16, layers=(0,)), vtoken.ToMe(r=16, layers=(0,))], ids=lambda c: c.method
)
def test_other_matchings_and_places(name: str, place: str, config: Any) -> None:
    """Partial merges: sizes 1 and 2 side by side, later blocks full of both."""
    host = host_row(name)
    model = without_positions(host.model(dtype=torch.float64))
    x = repeated(host.shape, 2)
    if isinstance(config, vtoken.ToMe):  # neighbours in a row are equal, so parity matching finds them
        rng = torch.Generator().manual_seed(1)
        x = tile(torch.randn(2, 32, 3, 4, 4, generator=rng, dtype=torch.float64).repeat_interleave(2, 1), host.shape)
    stock = run(model, x)
    vtoken.apply(model, config.replace(place=place))
    out, trace = traced(model, x)
    assert trace.size is not None
    assert {1.0, 2.0} <= set(trace.size.flatten().tolist())
    assert_close("logits", stock, out, 1e-11)
    vtoken.configure(model, prop_attn=False)
    wrong = run(model, x)
    assert float((wrong - stock).abs().max()) > 1e-3


def test_class_row_of_two_blocks_is_exact_with_and_wrong_without() -> None:
    """The trial of docs/methods/pitome.md 14: exact to 1e-12 with the size term, off by about 0.02 without."""
    host = host_row("vit_token")
    model = without_positions(host.model(dtype=torch.float64))
    model.blocks = model.blocks[:2]
    x = repeated(host.shape, 4)
    with torch.no_grad():
        stock = model.forward_features(x)[:, 0]
        vtoken.apply(model, vtoken.PiToMe(ratio=0.5, layers=(0,)))
        merged = model.forward_features(x)[:, 0]
        vtoken.configure(model, prop_attn=False)
        wrong = model.forward_features(x)[:, 0]
    assert float((merged - stock).abs().max()) < 1e-12
    assert float((wrong - stock).abs().max()) > 0.02


def test_where_nothing_was_merged_there_is_no_mask() -> None:
    """Absent, not zero, before the first merge (docs/mechanism.md 5): the fused kernel without a mask stays in use."""
    host = host_row("vit_token")
    model, seen = host.model(), []
    vtoken.apply(model, vtoken.PiToMe(ratio=0.75, layers=(1,)))
    stock = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        seen.append(None if attn_mask is None else tuple(attn_mask.shape))
        return stock(*args, attn_mask=attn_mask, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        run(model, host.images())
        assert seen == [None, None, (2, 1, 1, 49)]
        seen.clear()
        vtoken.configure(model, prop_attn=False)
        run(model, host.images())
        assert seen == [None, None, None]
