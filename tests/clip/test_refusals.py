"""What cannot be trained with attentive masks is refused by name, before anything is changed."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import timm
import torch

import vtoken
from tests.clip.models import TEXT, VISION, batch, clip, timm_clip, trunk_clip, wrap
from tests.helpers import assert_same, distilled, eva, naflex, randomise_, vit


def trunk(name: str, **options: Any) -> Any:
    """A CLIP whose timm trunk is replaced by another model."""
    model = timm_clip()
    model.visual.trunk = timm.create_model(name, num_classes=0, **options)
    return model


MODELS: dict[str, tuple[Any, str]] = {
    "siglip": (lambda: trunk_clip(vit(class_token=False, global_pool="avg")), "no class token"),
    "average and a pool that is not used": (
        lambda: trunk_clip(vit(class_token=False, global_pool="avg", embed_dim=64)),
        "nor an attention pool with one query",
    ),
    "registers only": (
        lambda: trunk_clip(vit(class_token=False, global_pool="avg", reg_tokens=2)),
        "no class token",
    ),
    "eva": (lambda: trunk_clip(eva(use_rot_pos_emb=True, ref_feat_shape=(8, 8))), "rotates queries and keys"),
    "absolute eva": (lambda: trunk_clip(eva()), "its timm trunk is a Eva"),
    "naflex": (lambda: trunk_clip(naflex(class_token=True)), "its timm trunk is a NaFlexVit"),
    "distilled": (lambda: trunk_clip(distilled()), "VisionTransformerDistilled"),
    "hybrid": (lambda: trunk("vit_tiny_r_s16_p8_224"), "patches come from a Hybrid"),
    "swin": (lambda: trunk("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1)), "windows"),
    "convnext": (lambda: trunk("test_convnext"), "ConvNeXt"),
    "resnet": (lambda: clip(layers=(1, 1, 1, 1), width=16, image_size=64), "ModifiedResNet"),
    "coca": (
        lambda: open_clip.CoCa(16, TEXT | {"layers": 2}, TEXT, vision_cfg=VISION),
        r"CoCa is not a CLIP that it knows",
    ),
    "bare tower": (lambda: clip().visual, "is not a CLIP that it knows"),
    "timm model": (vit, "is not a CLIP that it knows"),
    "tokens": (lambda: clip(output_tokens=True), "output_tokens"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_models(name: str) -> None:
    build, said = MODELS[name]
    model = randomise_(build(), 0)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(vtoken.UnsupportedModelError, match=said):
        vtoken.AttentiveMaskCLIP(model, block=1, freeze_patch_embed=True)
    assert_same("weights", before, model.state_dict())
    assert next(model.parameters()).requires_grad


def test_wrapped_and_compiled_models() -> None:
    with pytest.raises(vtoken.UnsupportedModelError, match="OptimizedModule"):
        wrap(torch.compile(clip()))
    with pytest.raises(vtoken.UnsupportedModelError, match="AttentiveMaskCLIP is not a CLIP"):
        wrap(wrap())


def test_own_patch_dropout() -> None:
    with pytest.raises(vtoken.ConfigError, match=r"drops patches itself \(patch_dropout=0\.5"):
        wrap(clip(patch_dropout=0.5))
    with pytest.raises(vtoken.ConfigError, match=r"drops patches itself \(patch_drop_rate=0\.25"):
        wrap(trunk_clip(vit(embed_dim=64, patch_drop_rate=0.25, num_classes=0)))


@pytest.mark.parametrize("timm_tower", [False, True])
def test_towers_that_carry_a_method(timm_tower: bool) -> None:
    """Refused while training; in eval mode the method works, and on what comes out in the end."""
    x, t = batch(4, 160 if timm_tower else 32)
    build = timm_clip if timm_tower else clip
    method = vtoken.PiToMe(ratio=0.8)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"carries a method.*vtoken\.remove\(model\)"):
        wrap(vtoken.apply(build(), method))
    wrapper = wrap(build())
    expected = vtoken.apply(build(), method).eval()(x, t)
    assert not torch.equal(expected["image_features"], wrapper.eval()(x, t)["image_features"])
    vtoken.apply(wrapper.model, method)
    assert_same("merged in eval mode", expected, wrapper.eval()(x, t))
    assert wrapper.score(x).shape[0] == 4
    with pytest.raises(vtoken.UnsupportedModelError, match="carries a method"):
        wrapper.train()(x, t)
    vtoken.remove(wrapper.model)
    wrapper(x, t)
    average = vtoken.apply(wrapper.unwrap(ema=True), method)
    assert vtoken.is_applied(average)
    assert not vtoken.is_applied(wrapper.model)


def test_methods_are_not_applied_to_the_wrapper_itself() -> None:
    with pytest.raises(vtoken.UnsupportedModelError, match=r"use model\.model"):
        vtoken.apply(wrap(), vtoken.PiToMe(ratio=0.9))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_ratio": 0}, "keep_ratio=0"),
        ({"mode": "best"}, "mode='best'"),
        ({"block": 3}, "block=3 does not divide the grid of 8 x 8"),
        ({"block": "auto"}, "nothing can be masked"),
        ({"layers": "first"}, "layers='first'"),
        ({"layers": [0, 3]}, r"layers=\[0, 3\]"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": 1}, r"layers=1\): must be"),
        ({"layers": [0.5]}, r"layers=\[0\.5\]\): must be"),
        ({"keep_ratio": "a"}, r"keep_ratio='a'\): .*must be a number"),
        ({"warmup_steps": "a"}, "warmup_steps='a'"),
        ({"momentum": "a"}, "momentum='a'"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"teacher_scale": 0.3}, r"teacher_scale=0\.3 makes images of \(10, 10\) pixels.*patch size \(4, 4\)"),
        ({"top_fraction": 2.0}, "top_fraction=2.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"teacher_scale": 0.0}, "teacher_scale=0.0"),
        ({"teacher_scale": 2.0}, "teacher_scale=2.0"),
        ({"simclr_weight": -1.0}, "simclr_weight=-1.0"),
        ({"byol_weight": -1.0}, "byol_weight=-1.0"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"head_norm": "group"}, "head_norm='group'"),
        ({"head_norm": ["batch"]}, "head_norm="),
        ({"top_fraction": 0}, r"top_fraction=0\): .*mode=\"random\""),
        ({"top_fraction": True}, "top_fraction=True"),
        ({"keep_ratio": True}, "keep_ratio=True"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"layers": [True]}, r"layers=\[True\]"),
        ({"warmup_steps": float("inf")}, "warmup_steps=inf"),
        ({"teacher_scale": True}, "teacher_scale=True"),
        ({"momentum": True}, "momentum=True"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"total_steps": float("inf")}, "total_steps=inf"),
        ({"simclr_weight": float("inf")}, "simclr_weight=inf"),
        ({"byol_weight": True}, "byol_weight=True"),
        ({"hidden_dim": 2.5}, r"hidden_dim=2\.5\): must be a whole number"),
        ({"out_dim": True}, "out_dim=True"),
        ({"ema_text": 3}, r"ema_text=3\): must be True or False"),
        ({"freeze_patch_embed": "no"}, r"freeze_patch_embed='no'\): must be True or False"),
        ({"generator": 5}, "generator=5 must be a torch.Generator"),
        ({"outside": "mean"}, "outside='mean'"),
    ],
)
def test_settings(options: dict[str, Any], said: str) -> None:
    model = clip()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vtoken.ConfigError, match=said):
        wrap(model, **options)
    assert_same("weights", before, model.state_dict())


CHANGES: dict[str, Any] = {
    "keep_ratio": 0.25, "mode": "mix", "block": 2, "layers": "last", "top_fraction": 0.25, "temperature": 2.0,
    "warmup_steps": 3, "teacher_scale": 0.5, "momentum": 0.9, "total_steps": 7, "outside": "zeros",
}  # fmt: skip
FIXED: dict[str, Any] = {
    "simclr_weight": 0.5, "byol_weight": 2.0, "hidden_dim": 16, "out_dim": 4, "head_norm": "layer", "ema_text": True,
    "freeze_patch_embed": True,
}  # fmt: skip


def test_settings_change_between_steps_and_are_checked() -> None:
    wrapper, built = wrap(), wrap(**CHANGES)
    for name, value in CHANGES.items():
        setattr(wrapper, name, value)
        assert getattr(wrapper, name) == getattr(built, name) == ((2,) if name == "layers" else value)
    scores = wrapper.score(batch()[0])
    assert torch.equal(scores, built.score(batch()[0]))
    wrapper.mode = built.mode = "topk"
    assert torch.equal(wrapper.select(scores), built.select(scores))
    for name, value in {
        "keep_ratio": 0, "mode": "best", "block": 3, "layers": [3], "top_fraction": 2.0, "temperature": 0.0,
        "warmup_steps": -1, "teacher_scale": 0.3, "momentum": 1.5, "total_steps": 0, "generator": "cpu", "outside": 0,
    }.items():  # fmt: skip
        before = getattr(wrapper, name)
        with pytest.raises(vtoken.ConfigError, match=name):
            setattr(wrapper, name, value)
        assert getattr(wrapper, name) == before


@pytest.mark.parametrize("name", list(FIXED))
def test_settings_of_what_is_built_once(name: str) -> None:
    wrapper = wrap(**FIXED)
    assert getattr(wrapper, name) == FIXED[name]
    with pytest.raises(vtoken.ConfigError, match=f"{name} is used when AttentiveMaskCLIP is built"):
        setattr(wrapper, name, FIXED[name])


def test_maps_and_step_costs() -> None:
    with pytest.raises(vtoken.ShapeError, match=r"relevance maps \[B, h, w\], got \(8, 8\)"):
        wrap().select(torch.rand(8, 8))
    for name in ("views", "batch"):
        for bad in (0, 1.5, True):
            with pytest.raises(vtoken.ConfigError, match=f"{name}={bad}"):
                wrap().step_macs(**{name: bad})
    for options in ({"keep_ratio": 0}, {"mode": "best"}, {"teacher_scale": 0}, {"teacher_scale": -0.5}):
        with pytest.raises(vtoken.ConfigError, match=next(iter(options))):
            wrap().step_macs(**options)


def test_calls() -> None:
    wrapper, (x, t) = wrap(), batch()
    boxes = torch.tensor([[[0, 0, 32, 32]]] * 4)
    cases: list[tuple[Any, dict[str, Any], type, str]] = [
        (x, {"view_boxes": boxes}, vtoken.ConfigError, "view_boxes without teacher_boxes"),
        (x, {"teacher_boxes": boxes[:, 0]}, vtoken.ConfigError, "teacher_boxes without view_boxes"),
        (x, {"view_boxes": boxes, "teacher_boxes": boxes}, vtoken.ShapeError, r"teacher_boxes \[4, 4\]"),
        (x, {"teacher_image": x[:, :, ::2, ::2]}, vtoken.ShapeError, "give view_boxes and teacher_boxes"),
        (x, {"teacher_image": x[:2]}, vtoken.ShapeError, r"teacher_image \[4, 3, H, W\]"),
        ([x, x[:, :, :16]], {}, vtoken.ShapeError, "of one shape"),
        ([x, x[:2]], {}, vtoken.ShapeError, "of one shape"),
        ([], {}, vtoken.ShapeError, "of one shape"),
        (x[:, :, :16, :16], {}, vtoken.ShapeError, r"views are \(16, 16\) pixels, the image tower takes \(32, 32\)"),
    ]
    for image, options, error, said in cases:
        with pytest.raises(error, match=said):
            wrapper(image, t, **options)
    with pytest.raises(vtoken.InputError, match="2 views in eval mode"):
        wrapper.eval()([x, x], t)


@pytest.mark.parametrize("views", [1, 3])
def test_simclr_needs_two_views(views: int) -> None:
    x, t = batch()
    with pytest.raises(vtoken.ConfigError, match=f"simclr_weight > 0 compares two views, but {views} were given"):
        wrap(simclr_weight=1.0)([x] * views, t)


def test_teacher_images_of_broken_patches() -> None:
    x, t = batch()
    boxes = torch.tensor([[[0, 0, 32, 32]]] * 4)
    with pytest.raises(vtoken.ShapeError, match=r"\(10, 10\) pixels with teacher_scale=0\.5.*patch size \(4, 4\)"):
        wrap(teacher_scale=0.5)(
            x, t, teacher_image=x[:, :, :20, :20], view_boxes=boxes, teacher_boxes=boxes[:, 0]
        )  # fmt: skip
    with pytest.raises(vtoken.ShapeError, match="multiples of the patch size"):
        wrap().score(x[:, :, :30])


def test_towers_without_pooling() -> None:
    x, t = batch()
    model = clip()
    model.visual.pool_type = "none"
    with pytest.raises(vtoken.ShapeError, match=r"features \(4, 33, 16\); CLIP training needs \[B, E\]"):
        wrap(model)(x, t)


def test_replaced_attention() -> None:
    model = clip()
    model.visual.transformer.resblocks[1].attn = torch.nn.Identity()
    with pytest.raises(vtoken.UnsupportedModelError, match=r"resblocks\.1"):
        wrap(randomise_(model, 0))
