"""`cls_attention_scores` on class-token towers of all three libraries against their own attention maps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vtoken
from tests.helpers import GatedAttention, assert_close, distilled, images, randomise_, vit

BLOCKS = 3


def attention_maps(model: nn.Module, attentions: list[Any], run: Any) -> list[Tensor]:
    """Attention probabilities [B, H, T, T] by what fused attention is called with."""
    maps: list[Tensor] = []
    stock = nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        maps.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        return stock(q, k, v, *args, **kwargs)

    nn.functional.scaled_dot_product_attention = watch  # type: ignore[assignment]
    try:
        with torch.no_grad():
            run()
    finally:
        nn.functional.scaled_dot_product_attention = stock
    return maps


TIMM: dict[str, Any] = {
    "plain": vit,
    "registers": functools.partial(vit, reg_tokens=3),
    "qk_norm": functools.partial(vit, qk_norm=True, init_values=1.0),
    "gated": functools.partial(vit, attn_layer=GatedAttention),
    "distilled": distilled,
}


@pytest.mark.parametrize("kind", list(TIMM))
def test_timm(kind: str) -> None:
    model, x = randomise_(TIMM[kind](), 0).eval(), images((3, 32, 32))
    maps = attention_maps(model, [], lambda: model(x))
    assert len(maps) == BLOCKS
    prefix = maps[0].shape[-1] - 64
    for start, last in ((None, None), (0, 1), (2, 2), (-2, -1)):
        first, end = (2 if start is None else start % 3), (2 if last is None else last % 3)
        expected = torch.stack([m.mean(1)[:, 0, prefix:] for m in maps[first : end + 1]]).mean(0)
        found = vtoken.cls_attention_scores(model, x, start_layer=start, last=last)
        assert float((found - expected).abs().max()) < 1e-6
        for k in (1, 9, 30):
            assert torch.equal(vtoken.select_tokens(found, k), vtoken.select_tokens(expected, k))
    assert float(expected.std(1).mean()) > 1e-4
    total = vtoken.cls_attention_scores(model, x, start_layer=0, ensemble="sum")
    assert_close("sum", torch.stack([m.mean(1)[:, 0, prefix:] for m in maps]).sum(0), total, 1e-5)


ROTARY = ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384",
          "vit_small_patch16_rope_mixed_224"]  # fmt: skip


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_towers_are_read_behind_the_rotation(name: str) -> None:
    size = 56 if "patch14" in name else 64
    model = randomise_(timm.create_model(name, img_size=size, depth=BLOCKS, num_classes=0), 0).eval()
    x = images((3, size, size))
    maps = attention_maps(model, [], lambda: model.forward_features(x))
    assert len(maps) == BLOCKS
    expected = torch.stack([m.mean(1)[:, 0, -16:] for m in maps]).mean(0)
    found = vtoken.cls_attention_scores(model, x, start_layer=0)
    assert float((found - expected).abs().max()) < 1e-6
    assert torch.equal(vtoken.select_tokens(found, 5), vtoken.select_tokens(expected, 5))


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_a_llava_is_read_up_to_the_block_that_its_projector_reads(layer: int) -> None:
    pytest.importorskip("transformers")
    from tests.hosts.llavas import build, images, prompt

    model = build("llava", vision_feature_layer=layer)
    pixels = images(2)
    scores = vtoken.cls_attention_scores(model, pixels)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=4))
    with vtoken.tracing(model) as record:
        model(**prompt([1, -36, -36]), pixel_values=pixels)
    assert record.prompt is not None
    for row, kept in zip(scores, record.prompt.kept, strict=True):
        assert torch.equal(vtoken.select_tokens(row, 4), kept)


def test_the_old_name_of_the_ensemble() -> None:
    model, x = randomise_(vit(), 0).eval(), images((3, 32, 32))
    with pytest.warns(DeprecationWarning, match="ensemble") as seen:
        old = vtoken.cls_attention_scores(model, x, start_layer=0, how="sum")
    assert len(seen) == 1
    assert torch.equal(old, vtoken.cls_attention_scores(model, x, start_layer=0, ensemble="sum"))
    with pytest.raises(vtoken.ConfigError, match="ensemble"):
        vtoken.cls_attention_scores(model, x, ensemble="median")


@pytest.mark.parametrize("own", [False, True], ids=["packed", "custom"])
def test_open_clip(own: bool) -> None:
    open_clip = pytest.importorskip("open_clip")
    options = {"block_type": "custom", "qk_norm": True} if own else {}
    model = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=4, width=48, layers=BLOCKS, heads=3, mlp_ratio=2.0, output_dim=8, **options
    )
    model, x = randomise_(model, 0), images((3, 32, 32))
    # While training: nn.MultiheadAttention's fast path would hide its queries and keys.
    maps = attention_maps(model, [], lambda: model.train()(x))
    model.eval()
    assert len(maps) == BLOCKS
    expected = torch.stack([m.reshape(2, 3, 65, 65).mean(1)[:, 0, 1:] for m in maps]).mean(0)
    found = vtoken.cls_attention_scores(model, x, start_layer=0)
    assert float((found - expected).abs().max()) < 1e-6
    assert torch.equal(vtoken.select_tokens(found, 7), vtoken.select_tokens(expected, 7))
    whole = open_clip.model.CLIP.__new__(open_clip.model.CLIP)
    nn.Module.__init__(whole)
    whole.visual = model
    assert torch.equal(vtoken.cls_attention_scores(whole, x, start_layer=0), found)


@pytest.mark.parametrize("kind", ["CLIPVision", "ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"])
def test_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = {
        "hidden_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 3, "image_size": 32, "patch_size": 4,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**options)
    model, x = randomise_(getattr(transformers, f"{kind}Model")(config), 0).eval(), images((3, 32, 32))
    first: Any = next(m for m in model.modules() if type(m).__name__.endswith("Layer"))
    if not any(hasattr(m, "q_proj") for m in first.modules()):
        with pytest.raises(vtoken.UnsupportedModelError, match="nested"):
            vtoken.cls_attention_scores(model, x)
        return
    found = vtoken.cls_attention_scores(model, x, start_layer=1)
    config._attn_implementation = "eager"
    eager: Any = type(model)(config)
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = eager.eval()(x, output_attentions=True).attentions
    prefix = maps[0].shape[-1] - 64
    expected = torch.stack([m.mean(1)[:, 0, prefix:] for m in maps[1:]]).mean(0)
    assert float((found - expected).abs().max()) < 1e-6
    before = [sorted(vars(m)) for m in model.modules()]
    vtoken.cls_attention_scores(model, x)
    assert [sorted(vars(m)) for m in model.modules()] == before


def test_towers_that_cannot_be_read() -> None:
    with pytest.raises(vtoken.ConfigError, match="no class token"):
        vtoken.cls_attention_scores(vit(global_pool="avg"), images((3, 32, 32)))
    with pytest.raises(vtoken.ShapeError, match=r"\[B, C, H, W\]"):
        vtoken.cls_attention_scores(vit(), images((3, 32, 32))[0])
    registers = vit(class_token=False, reg_tokens=2, global_pool="avg")
    with pytest.raises(vtoken.ConfigError, match="no class token"):
        vtoken.cls_attention_scores(registers, images((3, 32, 32)))
    model = vit()
    with pytest.raises(vtoken.ConfigError, match="blocks -3 to 2"):
        vtoken.cls_attention_scores(model, images((3, 32, 32)), last=3)
    vtoken.apply(model, vtoken.PiToMe(ratio=0.9))
    with pytest.raises(vtoken.VTokenError, match="remove"):
        vtoken.cls_attention_scores(model, images((3, 32, 32)))
    with pytest.raises(vtoken.UnsupportedModelError):
        vtoken.cls_attention_scores(nn.Linear(2, 2), images((3, 32, 32)))
