"""The drop-in modules give what `apply` gives inside a timm block."""

from __future__ import annotations

import pytest
import timm
import torch

import vtoken
from vtoken.nn import MergeBlock, MergeTokens

CONFIGS = [
    vtoken.PiToMe(ratio=0.8),
    vtoken.PiToMe(ratio=0.8, metric="key_concat", prop_attn=False),
    vtoken.PiToMe(ratio=0.8, metric="hidden"),
    vtoken.ToMe(r=5),
    vtoken.RandomPrune(ratio=0.8),
]


def copy_block(source: timm.models.vision_transformer.Block, target: MergeBlock) -> None:
    for name in ("norm1", "norm2"):
        getattr(target, name).load_state_dict(getattr(source, name).state_dict())
    target.qkv.load_state_dict(source.attn.qkv.state_dict())
    target.proj.load_state_dict(source.attn.proj.state_dict())
    target.mlp[0].load_state_dict(source.mlp.fc1.state_dict())
    target.mlp[2].load_state_dict(source.mlp.fc2.state_dict())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.metric}")
def test_blocks_equal_a_patched_timm_model(config: vtoken.MethodConfig) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.models.VisionTransformer(**options).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    blocks = [MergeBlock(48, 3, MergeTokens(config, layer=i, depth=3, num_prefix=1)).double().eval() for i in range(3)]
    for block, source in zip(blocks, model.blocks, strict=True):
        block.norm1.eps, block.norm2.eps = source.norm1.eps, source.norm2.eps
        copy_block(source, block)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        x, size = model._pos_embed(model.patch_embed(images)), None
        for block in blocks:
            x, size = block(x, size)
        ours = model.forward_head(model.norm(x))
        vtoken.apply(model, config)
        expected, trace = vtoken.trace(model, images)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert x.shape[1] == trace.tokens[-1] < 65


def test_merge_tokens_trains_and_keeps_mass() -> None:
    merge = MergeTokens(vtoken.PiToMe(ratio=0.6), num_prefix=2)
    x = torch.randn(3, 22, 8, requires_grad=True)
    y, size = merge(x, metric=x)
    assert y.shape == (3, 14, 8)
    torch.testing.assert_close((y * size.unsqueeze(-1)).sum(1), x.sum(1))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[:, :2], torch.ones(3, 2, 8))
    again, sizes = merge(y, metric=y, size=size)
    assert sizes.sum().item() == 66
    assert again.shape[1] == 14 - 4
    assert "ratio=0.6" in repr(merge)


def test_errors() -> None:
    with pytest.raises(vtoken.ConfigError, match="merging settings"):
        MergeTokens("pitome")
    with pytest.raises(vtoken.ConfigError, match="layer=3"):
        MergeTokens(vtoken.PiToMe(), layer=3, depth=3)
    with pytest.raises(vtoken.ConfigError, match="divisible"):
        MergeBlock(10, 3, MergeTokens(vtoken.PiToMe()))
    with pytest.raises(vtoken.ConfigError, match="between"):
        MergeBlock(9, 3, MergeTokens(vtoken.PiToMe(place="after")))
    with pytest.raises(vtoken.ShapeError, match="metric"):
        MergeTokens(vtoken.PiToMe())(torch.randn(2, 5, 4), torch.randn(2, 6, 4))


def test_nothing_to_remove_is_the_same_tensor() -> None:
    x = torch.randn(1, 9, 4)
    y, size = MergeTokens(vtoken.PiToMe(ratio=1.0))(x, x)
    assert y is x
    assert torch.equal(size, torch.ones(1, 9))
