"""The wrapper: bit-equality where nothing is masked, what the student sees, outputs, state, pass-through."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtoken
from tests.clip.models import EMBED, batch, clip, gradients, timm_clip, trunk_clip, wrap
from tests.helpers import assert_close, assert_same, randomise_, vit
from vtoken.methods.attentive_clip.mapping import map_scores

MODELS: dict[str, Any] = {
    "default": clip,
    "custom_text": lambda: clip(custom=True),
    "qk_norm": lambda: clip(qk_norm=True),
    "average_pool": lambda: clip(pool_type="avg", final_ln_after_pool=True),
    "attention_pool": lambda: clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=4),
    "no_ln_pre": lambda: clip(no_ln_pre=True),
    "sin_cos": lambda: clip(pos_embed_type="sin_cos_2d"),
    "timm": timm_clip,
    "timm_average": lambda: timm_clip(timm_pool="avg", timm_proj="mlp"),
    "timm_no_head": lambda: timm_clip(timm_proj=""),
    "timm_registers": lambda: trunk_clip(vit(embed_dim=64, reg_tokens=3, no_embed_class=True, num_classes=0)),
    "timm_map": lambda: trunk_clip(vit(class_token=False, global_pool="map", embed_dim=64, num_classes=0)),
    "timm_map_registers": lambda: trunk_clip(
        vit(class_token=False, reg_tokens=2, global_pool="map", embed_dim=64, num_classes=0)
    ),
    "vit_tiny": lambda: timm_clip("vit_tiny_patch16_224", image_size=224),
}


def pixels(name: str) -> int:
    """Side of its images."""
    return {"timm": 160, "vit_t": 224}.get(name.partition("_")[0] if name != "vit_tiny" else "vit_t", 32)


def size(name: str) -> int:
    return 32 if "registers" in name or "map" in name else pixels(name)


@pytest.mark.parametrize("name", list(MODELS))
def test_nothing_masked_is_bit_equal(name: str) -> None:
    x, t = batch(2, size(name))
    model = MODELS[name]().train()
    expected = model(x, t)
    wrapper = wrap(model, keep_ratio=1.0)
    assert_same("one view", expected, wrapper(x, t))
    assert_same("a list of one", expected, wrapper([x], t))
    wrapper.keep_ratio = 0.5
    assert not torch.equal(expected["image_features"], wrapper(x, t)["image_features"])
    for ratio in (1.0, 0.5, 0.1):
        wrapper.keep_ratio = ratio
        assert_same("eval", model.eval()(x, t), wrapper.eval()(x, t))
    assert_same("text only", model(text=t), wrapper.train()(text=t))


def slow_masked(model: Any, x: Tensor, kept: Tensor) -> Tensor:
    """Features of a built-in tower on some patches of each image, one image at a time, tokens taken out by hand."""
    visual, out = model.visual, []
    for image, patches in zip(x, kept, strict=True):
        tokens = visual.conv1(image[None]).flatten(2)[0].T
        tokens = tokens + visual.positional_embedding[1:]
        first = (visual.class_embedding + visual.positional_embedding[0])[None]
        rows = visual.ln_pre(torch.cat([first, torch.stack([tokens[int(p)] for p in patches])]))
        rows = visual.ln_post(visual.transformer(rows[None]))
        out.append(F.normalize((rows[:, 0] @ visual.proj)[0], dim=0))
    return torch.stack(out)


@pytest.mark.parametrize("block", [1, 2])
def test_the_student_sees_the_kept_patches(block: int) -> None:
    x, t = batch()
    wrapper = wrap(block=block, keep_ratio=0.3)
    kept = wrapper.select(wrapper.score(x))
    assert kept.shape == (4, 20)
    found = wrapper(x, t)
    assert_close("features", slow_masked(wrapper.model, x, kept), found["image_features"], 1e-5)
    others = torch.stack([torch.tensor(sorted(set(range(64)) - set(row.tolist()))) for row in kept])
    wrong = slow_masked(wrapper.model, x, others)
    assert float((wrong - found["image_features"]).detach().abs().max()) > 0.05


def test_timm_students_see_the_kept_patches() -> None:
    """Masked pixels of other patches cannot matter: replacing them leaves the features as they are."""
    wrapper = wrap(trunk_clip(vit(embed_dim=64, reg_tokens=2, num_classes=0)))
    x, t = batch()
    kept = wrapper.select(wrapper.score(x))
    mask = torch.zeros(4, 64).scatter(1, kept, 1.0).view(4, 1, 8, 8)
    mask = F.interpolate(mask, scale_factor=4.0)
    found = wrapper(x, t)["image_features"]
    other = x * mask + (1 - mask) * 7.0
    assert_close("same kept pixels", found, wrapper(other, t, teacher_image=x)["image_features"], 1e-6)
    changed = wrapper(x * (1 - mask) + mask * 7.0, t, teacher_image=x)["image_features"]
    assert float((changed - found).detach().abs().max()) > 0.05


def test_views_have_their_own_masks_by_boxes() -> None:
    """Two crops of a source whose teacher saw all of it: each view is masked by the scores of its own part."""
    source, t = batch(4, 64)
    views = [source[:, :, :32, :32], source[:, :, 20:52, 30:62]]
    teacher = F.interpolate(source, size=(32, 32), mode="area")
    view_boxes = torch.tensor([[[0, 0, 32, 32], [20, 30, 32, 32]]] * 4)
    teacher_boxes = torch.tensor([[0, 0, 64, 64]] * 4)
    wrapper = wrap()
    found = wrapper(views, t, teacher_image=teacher, view_boxes=view_boxes, teacher_boxes=teacher_boxes)
    assert found["image_features"].shape == (4, 2, EMBED)
    scores = wrapper.score(teacher)
    mapped = map_scores(scores, (8, 8), view_boxes, teacher_boxes)
    kept = [vtoken.select_tokens(mapped[:, v].flatten(1), 32) for v in (0, 1)]
    assert not torch.equal(kept[0], kept[1])
    for v in (0, 1):
        expected = slow_masked(wrapper.model, views[v], kept[v])
        assert_close(f"view {v}", expected, found["image_features"][:, v], 1e-5)


def test_two_views_of_one_crop_share_the_mask() -> None:
    x, t = batch()
    wrapper = wrap()
    kept = wrapper.select(wrapper.score(x))
    found = wrapper([x, 0.3 * x], t)["image_features"]
    for v, view in enumerate((x, 0.3 * x)):
        assert_close(f"view {v}", slow_masked(wrapper.model, view, kept), found[:, v], 1e-5)


@pytest.mark.parametrize("mode", ["random", "sample", "mix"])
def test_random_modes_mask_each_view_anew(mode: str) -> None:
    x, t = batch()
    wrapper = wrap(mode=mode, generator=torch.Generator().manual_seed(0))
    found = wrapper([x, x], t)["image_features"]
    assert float((found[:, 0] - found[:, 1]).abs().max()) > 0.01
    again = wrap(mode=mode, generator=torch.Generator().manual_seed(0))([x, x], t)["image_features"]
    assert torch.equal(found, again)


def test_half_size_teachers_choose_units_by_their_patches() -> None:
    """Grid 4 x 4 of the teacher is that of the 2 x 2 units: its scores are used as they are."""
    x, _ = batch()
    wrapper = wrap(block=2, teacher_scale=0.5, keep_ratio=0.25)
    scores = wrapper.score(x)
    best = vtoken.select_tokens(scores.flatten(1), 4)
    corner = best // 4 * 16 + best % 4 * 2
    expected = torch.stack([corner, corner + 1, corner + 8, corner + 9], 2).flatten(1).sort(1).values
    assert torch.equal(wrapper.select(scores), expected)


def test_warm_up_shows_everything() -> None:
    x, t = batch()
    wrapper, bare = wrap(warmup_steps=2), clip().train()
    for step in range(4):
        masked = not torch.equal(wrapper(x, t)["image_features"], bare(x, t)["image_features"])
        assert masked is (step >= 2)
        wrapper.update_ema()


def test_another_warm_up_counts_at_once() -> None:
    x, t = batch()
    wrapper, bare = wrap(), clip().train()
    wrapper.update_ema()
    for steps, masked in ((2, False), (1, True)):
        wrapper.warmup_steps = steps
        assert masked is not torch.equal(wrapper(x, t)["image_features"], bare(x, t)["image_features"])


def calls_of_the_teacher(wrapper: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = []
    for index, block in enumerate(wrapper.teacher.visual.transformer.resblocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    return calls


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        ({}, [0, 1, 2]),
        ({"layers": [0, 1]}, [0, 1]),
        ({"layers": [0]}, [0]),
        ({"mode": "lowest"}, [0, 1, 2]),
        ({"mode": "random"}, []),
        ({"keep_ratio": 1.0}, []),
        ({"warmup_steps": 1}, []),
        ({"byol_weight": 1.0}, [0, 1, 2]),
        ({"byol_weight": 1.0, "layers": [0]}, [0, 1, 2]),
        ({"byol_weight": 1.0, "mode": "random"}, [0, 1, 2]),
        ({"byol_weight": 1.0, "keep_ratio": 1.0}, [0, 1, 2]),
    ],
)
def test_the_teacher_runs_as_far_as_it_is_needed(
    options: dict[str, Any], ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper, (x, t) = wrap(**options), batch()
    calls = calls_of_the_teacher(wrapper, monkeypatch)
    wrapper(x, t)
    assert calls == ran


def test_outputs() -> None:
    x, t = batch()
    out = wrap(simclr_weight=1.0, byol_weight=1.0)([x, x], t)
    shapes = {n: tuple(v.shape) for n, v in out.items()}
    assert shapes == {
        "image_features": (4, 2, 16), "text_features": (4, 16), "logit_scale": (), "simclr": (4, 2, 8),
        "byol": (4, 2, 8), "byol_target": (4, 8),
    }  # fmt: skip
    assert_close("norm", torch.ones(4, 2), out["image_features"].norm(dim=-1), 1e-6)
    wrapper = wrap(byol_weight=1.0)
    wrapper.output_dict = False
    assert wrapper.model.output_dict is False
    assert isinstance(wrapper([x], t), dict)
    plain = wrap()
    plain.output_dict = False
    assert_same("tuple", tuple(wrap()(x, t).values()), plain(x, t))
    assert isinstance(plain([x, x], t), dict)
    assert plain(x)[1] is None


def test_biased_logits() -> None:
    x, t = batch()
    model = clip()
    model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0))
    out = wrap(model)(x, t)
    assert out["logit_bias"] is model.logit_bias
    vtoken.AttentiveMaskLoss()(**out).backward()
    assert model.logit_bias.grad is not None
    model.output_dict = False
    assert len(wrap(model)(x, t)) == 4


def test_gradients_reach_everything_but_what_was_never_shown() -> None:
    x, t = batch()
    wrapper = wrap(keep_ratio=0.1, simclr_weight=1.0, byol_weight=1.0)
    vtoken.AttentiveMaskLoss()(**wrapper([x, x], t)).backward()
    trainable = {n for n, p in wrapper.named_parameters() if p.requires_grad}
    found = gradients(wrapper)
    assert found.keys() == trainable
    assert all(bool((g != 0).any()) for n, g in found.items())
    shown = wrapper.select(wrapper.score(x)).unique()
    assert len(shown) < 64
    rows = found["model.visual.positional_embedding"][1:].abs().sum(1)
    assert set(rows.nonzero().flatten().tolist()) == set(shown.tolist())


def test_state_dict_layout_and_resume() -> None:
    x, t = batch()
    options: dict[str, Any] = {"byol_weight": 1.0, "momentum": 0.5, "total_steps": 9, "warmup_steps": 3}
    wrapper = wrap(**options)
    for _ in range(3):
        with torch.no_grad():
            wrapper.model.visual.proj.mul_(1.1)
        wrapper.update_ema()
    state = copy.deepcopy(wrapper.state_dict())
    assert {name.partition(".")[0] for name in state} == {
        "model", "teacher", "byol_projector", "byol_predictor", "ema_step",
    }  # fmt: skip
    assert state["ema_step"].dtype == torch.int64
    plain = clip(seed=5)
    plain.load_state_dict({n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")})
    assert_same("plain", plain(x, t), wrapper.model(x, t))
    plain.visual.load_state_dict(
        {n.removeprefix("teacher.visual."): v for n, v in state.items() if n.startswith("teacher.visual.")}
    )
    assert torch.equal(plain.visual.proj, wrapper.teacher.visual.proj)
    other = wrap(clip(seed=5), **options)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same("resumed", wrapper(x, t), other(x, t))
    for each in (wrapper, other):
        with torch.no_grad():
            each.model.visual.proj.add_(0.1)
        each.update_ema()
    assert int(other.ema_step) == 4
    assert_same("continued", wrapper.state_dict(), other.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("mode", ["topk", "random"])
def test_copies(how: str, mode: str) -> None:
    x, t = batch()
    generator = torch.Generator().manual_seed(0) if mode == "random" else None
    wrapper = wrap(simclr_weight=1.0, mode=mode, generator=generator, warmup_steps=1)
    wrapper.update_ema()
    torch.optim.SGD(wrapper.parameters(), 0.1)
    if how == "deepcopy":
        copied = copy.deepcopy(wrapper)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(wrapper))
    else:
        buffer = io.BytesIO()
        torch.save(wrapper, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert_same("copy", wrapper([x, x], t), copied([x, x], t))
    with torch.no_grad():
        copied.model.visual.proj.zero_()
    assert bool((wrapper.model.visual.proj != 0).any())
    copied.update_ema()
    assert (int(wrapper.ema_step), int(copied.ema_step)) == (1, 2)


def test_what_falls_through() -> None:
    x, t = batch()
    wrapper = wrap()
    model = wrapper.model
    assert wrapper.visual is model.visual
    assert wrapper.logit_scale is model.logit_scale
    assert wrapper.logit_bias is None
    assert wrapper.context_length == 8
    assert torch.equal(wrapper.encode_text(t, normalize=True), model.encode_text(t, normalize=True))
    assert torch.equal(wrapper.encode_image(x), model.encode_image(x))
    assert torch.equal(wrapper.encode_image(x, normalize=True), model.encode_image(x, normalize=True))
    assert_same("logits", model.get_logits(x, t), wrapper.get_logits(x, t))
    names = {n for n, _ in wrapper.named_parameters()}
    assert wrapper.no_weight_decay() == {f"model.{n}" for n in model.no_weight_decay()}
    assert wrapper.no_weight_decay() <= names
    wrapper.set_grad_checkpointing()
    assert model.visual.transformer.grad_checkpointing
    assert model.transformer.grad_checkpointing
    wrapper.set_grad_checkpointing(False)
    wrapper.lock_text_tower()
    assert not model.token_embedding.weight.requires_grad
    wrapper.lock_image_tower()
    assert not any(p.requires_grad for p in model.visual.parameters())
    assert wrapper(x, t)["image_features"].grad_fn is None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        wrapper.nothing_like_it
    assert not hasattr(wrapper, "module")


def test_settings_that_change_between_steps() -> None:
    x, t = batch()
    wrapper = wrap()
    outs = [wrapper(x, t)["image_features"]]
    for name, value in (("keep_ratio", 0.25), ("layers", "last"), ("mode", "lowest"), ("layers", [0, -1])):
        setattr(wrapper, name, value)
        outs.append(wrapper(x, t)["image_features"])
    assert wrapper.layers == (0, 2)
    assert (wrapper.keep_ratio, wrapper.mode) == (0.25, "lowest")
    assert all(not torch.equal(a, b) for a, b in pairwise(outs))
    for name, value in (("keep_ratio", 0), ("mode", "best"), ("layers", [3]), ("layers", "some"), ("layers", [])):
        with pytest.raises(vtoken.ConfigError, match=name):
            setattr(wrapper, name, value)
    assert (wrapper.keep_ratio, wrapper.mode, wrapper.layers) == (0.25, "lowest", (0, 2))


def test_towers_of_any_size() -> None:
    """A timm trunk that resamples its positions takes views of any size."""
    wrapper = wrap(trunk_clip(vit(embed_dim=64, dynamic_img_size=True, num_classes=0)), teacher_scale=0.5)
    t = batch(2)[1]
    for side in (32, 48):
        x, _ = batch(2, side)
        assert wrapper(x, t)["image_features"].shape == (2, EMBED)
        assert wrapper.score(x).shape == (2, side // 8, side // 8)


@pytest.mark.parametrize("timm_tower", [False, True])
def test_sizes_that_are_no_whole_number_of_patches(timm_tower: bool) -> None:
    """32 pixels in patches of 5: the rest is cut off by the tower, as ever."""
    trunk = vit(embed_dim=64, patch_size=5, num_classes=0)
    model, (x, t) = trunk_clip(trunk) if timm_tower else clip(patch_size=5), batch()
    wrapper = wrap(model)
    assert wrapper.score(x).shape == (4, 6, 6)
    assert wrapper(x, t)["image_features"].shape == (4, EMBED)
    wrapper.keep_ratio = 1.0
    assert_same("all", model(x, t), wrapper(x, t))
    dynamic = wrap(trunk_clip(vit(embed_dim=64, dynamic_img_size=True, dynamic_img_pad=True, num_classes=0)))
    with pytest.raises(vtoken.ShapeError, match=r"multiples of \(4, 4\)"):
        dynamic(batch(4, 30)[0], t)


def test_the_model_is_not_copied_and_stays_usable() -> None:
    model = randomise_(clip(), 3)
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    classes = [type(m) for m in model.modules()]
    wrapper = wrap(model)
    x, t = batch()
    wrapper(x, t)
    assert wrapper.model is model
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model.modules()] == classes
    assert all("vtoken" not in name for m in model.modules() for name in vars(m))
