"""open_clip towers: what is theirs alone. (The promises that hold for every host are in tests/contract.)"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import vtoken
from tests.contract.slow_model import Settings, Tokens, merge

open_clip = pytest.importorskip("open_clip")
transformer = pytest.importorskip("open_clip.transformer")

PITOME = vtoken.PiToMe(ratio=0.8)
TOWERS: dict[str, dict[str, Any]] = {
    "token": {},
    "average": {"pool_type": "avg"},
    "none": {"pool_type": "none"},
    "tokens out": {"output_tokens": True},
    "average, tokens out": {"pool_type": "avg", "output_tokens": True},
    "norm after pool": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.5},
    "attention pool": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "pool_type": "avg"},
    "parallel pools": {"attentional_pool": "parallel", "attn_pooler_queries": 5, "attn_pooler_heads": 4},
    "cascade": {"attentional_pool": "cascade", "attn_pooler_queries": 5, "attn_pooler_heads": 4},
    "q/k norm": {"qk_norm": True},
    "custom": {"scale_heads": True, "scale_attn": True, "scale_fc": True, "scale_attn_inner": True},
}


def tower(**options: Any) -> Any:
    torch.manual_seed(0)
    model = transformer.VisionTransformer(
        image_size=32, patch_size=4, width=48, layers=3, heads=3, mlp_ratio=2.0, output_dim=48, **options
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def flat(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


@pytest.fixture(params=TOWERS, ids=str)
def any_tower(request: pytest.FixtureRequest) -> Any:
    return tower(**TOWERS[request.param])


def test_no_op_apply_and_remove_are_bit_equal(any_tower: Any) -> None:
    x, names = images(), list(any_tower.state_dict())
    with torch.no_grad():
        before = flat(any_tower(x))
        vtoken.apply(any_tower, vtoken.PiToMe(ratio=1.0))
        assert all(map(torch.equal, before, flat(any_tower(x))))
        vtoken.configure(any_tower, ratio=0.8)
        assert not all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, flat(any_tower(x)), strict=True)
        )
        assert list(any_tower.state_dict()) == names
        vtoken.remove(any_tower)
        assert all(map(torch.equal, before, flat(any_tower(x))))
    assert not any(n.startswith("_vtoken") for m in any_tower.modules() for n in m.__dict__)


def test_counts_trace_and_report(any_tower: Any) -> None:
    vtoken.apply(any_tower, PITOME)
    with torch.no_grad():
        out, trace = vtoken.trace(any_tower, images())
        assert all(map(torch.equal, flat(out), flat(any_tower(images())))), "a trace changes nothing"
    # 64 patches at 0.8: floor(64 - 51.2) = 12, floor(52 - 41.6) = 10, floor(42 - 33.6) = 8
    assert trace.tokens == [65, 53, 43, 35] == list(vtoken.plan(any_tower).tokens)
    assert trace.size.sum(1).tolist() == [65.0, 65.0]
    cost = vtoken.report(any_tower)
    width, layers = 48, 0
    for t, s in ((65, 53), (53, 43), (43, 35)):
        layers += 4 * t * width**2 + 2 * t * t * width + 4 * s * width**2
    assert sum(c.macs_after for c in cost.layers) == layers + cost.matching_macs
    assert sum(c.macs_before for c in cost.layers) == 3 * (8 * 65 * width**2 + 2 * 65 * 65 * width)


@pytest.mark.parametrize("name", ["token", "q/k norm"])
def test_tokens_are_matched_by_their_keys(name: str) -> None:
    """The groups of block 0 are those of the slow model, which is given this block's normed keys."""
    model, x = tower(**TOWERS[name]).double(), images().double()
    block, rows = model.transformer.resblocks[0], []
    handle = block.ln_1.register_forward_hook(lambda module, args, out: rows.append(out))
    with torch.no_grad():
        model(x)
        handle.remove()
        weight, bias = block.attn.in_proj_weight.chunk(3)[1], block.attn.in_proj_bias.chunk(3)[1]
        keys = (rows[0] @ weight.T + bias).unflatten(2, (3, 16)).transpose(1, 2)
        if name == "q/k norm":
            keys = block.attn.ln_k(keys)
        vtoken.apply(model, vtoken.PiToMe(ratio=0.7, layers=[0]))
        _, trace = vtoken.trace(model, x)
    for b, metric in enumerate(keys.mean(1)):
        start = Tokens(metric, [1.0] * 65, list(range(65)), [[i] for i in range(65)])
        found = merge(start, metric, 0, 3, Settings(ratio=0.7), 1)
        order = sorted(range(len(found.anchor)), key=found.anchor.__getitem__)
        for row, i in enumerate(order):
            assert (trace.dest[b] == row).nonzero().flatten().tolist() == sorted(found.members[i])


def test_packed_attention_is_multihead_attention() -> None:
    from vtoken.core.state import TokenState
    from vtoken.core.tap import Tap
    from vtoken.hosts.open_clip.blocks import packed_attention

    torch.manual_seed(0)
    attn = nn.MultiheadAttention(24, 3, batch_first=True)
    nn.init.normal_(attn.in_proj_bias)
    x, size = torch.randn(2, 7, 24), torch.randint(1, 5, (2, 7)).float()
    bias = vtoken.ops.size_bias(size, x.dtype)
    method = vtoken.ToMe(r=1).build(1)
    tap = Tap(TokenState(method, 1, track_anchor=False, track_dest=False), 0, removes=True)
    expected = attn(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(packed_attention(attn, x, tap, None), expected, rtol=1e-5, atol=1e-6)
    masked = attn(x, x, x, need_weights=False, attn_mask=bias.expand(2, 3, 7, 7).reshape(6, 7, 7))[0]
    torch.testing.assert_close(packed_attention(attn, x, tap, bias), masked, rtol=1e-5, atol=1e-6)
    keys = nn.functional.linear(x, attn.in_proj_weight[24:48], attn.in_proj_bias[24:48])
    torch.testing.assert_close(tap.keys.transpose(1, 2).flatten(2), keys)


@pytest.mark.parametrize("name", ["average", "norm after pool", "attention pool", "parallel pools"])
def test_pools_weigh_tokens_by_their_size(name: str) -> None:
    """Pooling merged tokens with sizes equals the host's own pooling of the rows spread back over all patches."""
    model, x = tower(**TOWERS[name]).double(), images().double()
    with torch.no_grad():
        stock = copy.deepcopy(model)
        vtoken.apply(model, vtoken.ToMe(ratio=0.6))
        merged = model(x)
        dense = model.forward_intermediates(x, indices=1, output_fmt="NCHW", output_extra_tokens=True)
        rows = torch.cat(
            [dense["image_intermediates_prefix"][0][:, :1], dense["image_intermediates"][0].flatten(2).transpose(1, 2)],
            1,
        )
        pooled = stock._pool(rows)[0] @ stock.proj
    torch.testing.assert_close(merged, pooled, rtol=1e-9, atol=1e-9)


def test_tokens_leave_in_raster_order_and_unmerge_gives_the_dense_map() -> None:
    model, x = tower(output_tokens=True), images()
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        (_, tokens), trace = vtoken.trace(model, x)
        dense = model.forward_intermediates(x, indices=1, normalize_intermediates=True)["image_intermediates"][0]
        nlc = model.forward_intermediates(x, indices=1, normalize_intermediates=True, output_fmt="NLC")
    assert (trace.anchor.diff(dim=1) > 0).all()
    torch.testing.assert_close(tokens, nlc["image_intermediates"][0])
    rows = vtoken.unmerge(torch.cat([torch.zeros(2, 1, 48), tokens], 1), trace)[:, 1:]
    torch.testing.assert_close(rows.transpose(1, 2).reshape(2, 48, 8, 8), dense)


def test_sequence_first_blocks_give_the_same() -> None:
    model, x = tower(), images()
    other = tower()
    other.transformer.batch_first = False
    for block in other.transformer.resblocks:
        block.attn.batch_first = False
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))
        for config in (PITOME, vtoken.PiToMe(ratio=0.8, layers=[0])):
            with vtoken.applied(model, config), vtoken.applied(other, config):
                torch.testing.assert_close(other(x), model(x))


def test_whole_clip_leaves_the_text_tower_alone() -> None:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 4, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    x, ids = images(), torch.randint(0, 20, (2, 8))
    with torch.no_grad():
        image, words, _ = clip(x, ids)
        vtoken.apply(clip, PITOME)
        assert {type(m).__name__ for m in clip.modules() if "_vtoken_index" in m.__dict__} == {"ResidualAttentionBlock"}
        assert not any("_vtoken_index" in m.__dict__ for m in clip.transformer.modules())
        merged, same, _ = clip(x, ids)
        assert torch.equal(same, words)
        assert not torch.equal(merged, image)
        _, trace = vtoken.trace(clip, x, ids)
        assert trace.tokens == [65, 53, 43]
        assert vtoken.report(clip).tokens == (65, 53, 43)
        file = io.BytesIO()
        torch.save(clip, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x, ids)[0], merged)
        vtoken.remove(clip)
        assert torch.equal(clip(x, ids)[0], image)


def test_timm_trunk_inside_is_patched_by_its_own_adapter() -> None:
    torch.manual_seed(0)
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
    clip = open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = clip.encode_image(x)
        vtoken.apply(clip, PITOME)
        assert vtoken.is_applied(clip.visual.trunk)
        assert not torch.equal(clip.encode_image(x), before)
        cost = vtoken.report(clip)
        assert cost.tokens == vtoken.report(clip.visual.trunk).tokens
        vtoken.remove(clip)
        assert torch.equal(clip.encode_image(x), before)


@pytest.mark.parametrize("name", ["token", "custom"])
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    model, first, second = tower(**TOWERS[name]), images(), images().flip(-1)
    vtoken.apply(model, PITOME)
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()
        (model(first).square().sum() + model(second).sin().sum()).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_in_one_graph() -> None:
    model, x = tower(pool_type="avg"), images()
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))


def test_refusals_leave_the_model_alone() -> None:
    model = tower(scaled_cosine_attn=True)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(vtoken.UnsupportedModelError, match="scaled cosine"):
        vtoken.apply(model, PITOME)
    assert [type(m) for m in model.modules()] == classes
    resnet = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1},
    )
    with pytest.raises(vtoken.UnsupportedModelError, match="ModifiedResNet"):
        vtoken.apply(resnet, PITOME)
    with pytest.raises(vtoken.UnsupportedModelError, match="TextTransformer"):
        vtoken.apply(transformer.TextTransformer(width=32, heads=2, layers=1), PITOME)
