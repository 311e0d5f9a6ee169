"""The teacher's relevance map against attention maps that the attentions themselves compute or are called with."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor

import vtoken
from tests.clip.models import DEPTH, GRID, TIMM_SIZE, batch, clip, timm_clip, trunk_clip, wrap
from tests.helpers import GatedAttention, assert_close, vit


def needed_weights(visual: Any, x: Tensor) -> list[Tensor]:
    """Class rows [B, T] of nn.MultiheadAttention asked for its weights, block by block."""
    rows: list[Tensor] = []

    def ask(attn: Any, args: tuple[Any, ...]) -> None:
        rows.append(attn.forward(*args, need_weights=True)[1][:, 0])

    handles = [b.attn.register_forward_pre_hook(ask) for b in visual.transformer.resblocks]
    with torch.no_grad():
        visual(x)
    for handle in handles:
        handle.remove()
    return rows


def fused_rows(visual: Any, x: Tensor) -> list[Tensor]:
    """Class rows [B, T] by what fused attention is called with."""
    rows: list[Tensor] = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0])
        return stock(q, k, v, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = watch  # type: ignore[assignment]
    try:
        with torch.no_grad():
            visual(x)
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock
    return rows


def check(model: Any, expected: list[Tensor], x: Tensor, prefix: int) -> None:
    """Each block alone, all of them and a choice of two."""
    depth = len(expected)
    wrapper = wrap(model)
    for layers in ([0], [depth - 1], *([i] for i in range(1, depth - 1)), "all", "last", [-1, 0]):
        wrapper.layers = layers
        chosen = [expected[i] for i in wrapper.layers]
        scores = wrapper.score(x).flatten(1)
        assert scores.dtype == torch.float32
        assert float((scores - torch.stack(chosen).mean(0)[:, prefix:]).abs().max()) < 1e-6
        assert float(scores.std(1).mean()) > 1e-4
        assert bool((scores.sum(1) < 1).all())


def test_packed_attention() -> None:
    model, (x, _) = clip(), batch()
    expected = needed_weights(model.visual, x)
    assert len(expected) == DEPTH
    check(model, expected, x, 1)


OWN: dict[str, dict[str, Any]] = {
    "plain": {"block_type": "custom"},
    "qk_norm": {"qk_norm": True},
    "scaled": {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
    "all": {"qk_norm": True, "scale_heads": True, "scale_attn": True, "ls_init_value": 0.5, "no_ln_pre": True},
}


@pytest.mark.parametrize("kind", list(OWN))
def test_open_clips_own_attention(kind: str) -> None:
    model, (x, _) = clip(**OWN[kind]), batch()
    expected = fused_rows(model.visual, x)
    assert len(expected) == DEPTH
    check(model, expected, x, 1)


TRUNKS: dict[str, Any] = {
    "plain": functools.partial(vit, num_classes=0),
    "registers": functools.partial(vit, reg_tokens=3, num_classes=0),
    "no_embed_class": functools.partial(vit, reg_tokens=2, no_embed_class=True, init_values=0.5, num_classes=0),
    "qk_norm": functools.partial(vit, qk_norm=True, num_classes=0),
    "no_bias": functools.partial(vit, qkv_bias=False, pre_norm=True, num_classes=0),
    "gated": functools.partial(vit, attn_layer=GatedAttention, num_classes=0),
    "respost": functools.partial(vit, block_fn=ResPostBlock, init_values=0.5, class_token=True, num_classes=0),
    "dynamic": functools.partial(vit, dynamic_img_size=True, num_classes=0),
}


@pytest.mark.parametrize("kind", list(TRUNKS))
def test_timm_trunks(kind: str) -> None:
    model, (x, _) = trunk_clip(TRUNKS[kind]()), batch()
    expected = fused_rows(model.visual.trunk.eval(), x)
    check(model, expected, x, model.visual.trunk.num_prefix_tokens)


def test_scores_are_those_of_vtokens_reader() -> None:
    model, (x, _) = clip(), batch()
    expected = vtoken.cls_attention_scores(model.visual, x, start_layer=0).unflatten(1, (GRID, GRID))
    assert_close("scores", expected, wrap(model).score(x), 1e-6)


@pytest.mark.parametrize("timm_tower", [False, True])
def test_smaller_images_get_resampled_positions(timm_tower: bool) -> None:
    """As the same tower at that size, its position table resampled by timm's own function."""
    model = timm_clip() if timm_tower else clip()
    pixels = 96 if timm_tower else 16
    x, _ = batch(2, pixels)
    before = {n: p.clone() for n, p in model.named_parameters()}
    small = timm_clip() if timm_tower else clip(image_size=pixels)
    if timm_tower:
        small.visual.trunk.set_input_size((pixels, pixels))
        expected = torch.stack(fused_rows(small.visual.trunk.eval(), x)).mean(0)[:, 1:]
        assert pixels < TIMM_SIZE
    else:
        table = model.visual.positional_embedding[None]
        resampled = timm.layers.resample_abs_pos_embed(table, [4, 4], [8, 8])[0]
        own = model.state_dict()
        small.load_state_dict(own | {"visual.positional_embedding": resampled.detach()})
        expected = torch.stack(needed_weights(small.visual, x)).mean(0)[:, 1:]
    wrapper = wrap(model)
    assert float((wrapper.score(x).flatten(1) - expected).abs().max()) < 1e-6
    after = dict(wrapper.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_scores_of_a_half_size_teacher() -> None:
    model, (x, _) = clip(), batch()
    small = torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear", antialias=True)
    expected = wrap(model).score(small)
    assert expected.shape == (4, GRID // 2, GRID // 2)
    assert torch.equal(wrap(model, teacher_scale=0.5).score(x), expected)


def test_scores_are_float32_under_autocast_and_near() -> None:
    x, _ = batch()
    wrapper = wrap()
    exact = wrapper.score(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = wrapper.score(x)
    assert rough.dtype == torch.float32
    assert_close("scores", exact, rough, 0.05)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    x, _ = batch()
    wrapper = wrap()
    whole = wrapper.score(x)
    assert_close("split", whole, torch.cat([wrapper.score(x[:1]), wrapper.score(x[1:])]), 1e-6)
    order = torch.tensor([2, 0, 3, 1])
    assert_close("permuted", whole[order], wrapper.score(x[order]), 1e-6)


@pytest.mark.parametrize("registers", [0, 2])
def test_without_a_class_token_the_query_of_the_attention_pool_counts(registers: int) -> None:
    """A SigLIP-like trunk: the pool's own attention by hand. Registers are no keys of the pool."""
    trunk = vit(class_token=False, reg_tokens=registers, global_pool="map", embed_dim=64, num_classes=0)
    wrapper, (x, t) = wrap(trunk_clip(trunk)), batch()
    tower: Any = wrapper.model.visual.trunk
    pool, rows = tower.attn_pool, tower.forward_features(x)[:, registers:]
    q = pool.q(pool.latent[0, 0]).view(pool.num_heads, -1)
    k = pool.kv(rows)[..., :64].reshape(4, 64, pool.num_heads, -1)
    expected = (torch.einsum("hd,bnhd->bhn", q, k) * pool.scale).softmax(-1).mean(1)
    assert_close("scores", expected.view(4, 8, 8), wrapper.score(x), 1e-5)
    assert wrapper.layers == (len(tower.blocks),)
    with pytest.raises(vtoken.ConfigError, match="the query of its attention pool says what matters"):
        wrapper.layers = [0]
    wrapper(x, t)["image_features"].sum().backward()
    assert tower.attn_pool.latent.grad is not None
