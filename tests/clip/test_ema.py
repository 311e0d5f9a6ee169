"""The teacher: its schedule, its precision, what is averaged, and that nothing unfreezes it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import vtoken
from tests.clip.models import batch, clip, timm_clip, wrap
from tests.helpers import assert_close, assert_same, images


def test_momentum_check_values() -> None:
    wrapper = wrap(total_steps=8)
    given = [0.996, 0.99615224, 0.99658579, 0.99723463, 0.998, 0.99876537, 0.99941421, 0.99984776]
    assert [round(wrapper.momentum_at(n), 8) for n in range(8)] == given
    assert wrapper.momentum_at(8) == wrapper.momentum_at(100) == 1.0
    assert wrap(momentum=0.9).momentum_at(1000) == 0.9


@pytest.mark.parametrize("build", [clip, timm_clip])
def test_closed_form(build: Any) -> None:
    """After k steps: the weighted sum of all weights that the student had."""
    wrapper = wrap(build(), momentum=0.8, total_steps=6)
    history = [{n: p.detach().double().clone() for n, p in wrapper.model.visual.named_parameters()}]
    rng = torch.Generator().manual_seed(0)
    for step in range(1, 5):
        with torch.no_grad():
            for p in wrapper.model.visual.parameters():
                p.add_(torch.randn(p.shape, generator=rng))
        history.append({n: p.detach().double().clone() for n, p in wrapper.model.visual.named_parameters()})
        wrapper.update_ema()
        m = [1 - 0.2 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(1, step + 1)]
        weights = [math.prod(m)] + [(1 - m[i]) * math.prod(m[i + 1 :]) for i in range(step)]
        assert abs(sum(weights) - 1) < 1e-12
        for name, average in wrapper.teacher.visual.named_parameters():
            expected = sum(w * h[name] for w, h in zip(weights, history, strict=True))
            assert float((average - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert int(wrapper.ema_step) == 4


def test_bfloat16_students_have_float32_averages() -> None:
    """The measured example of docs/methods/attentive_clip.md 8: 1.0 pulled to 1.5 for 500 steps is 1.4326, not 1.0."""
    wrapper = wrap(clip(dtype=torch.bfloat16))
    with torch.no_grad():
        wrapper.teacher.visual.class_embedding.fill_(1.0)
        wrapper.model.visual.class_embedding.fill_(1.5)
    for _ in range(500):
        wrapper.update_ema()
    assert {p.dtype for p in wrapper.teacher.parameters()} == {torch.float32}
    assert float((wrapper.teacher.visual.class_embedding - 1.4326).abs().max()) < 1e-4
    assert {p.dtype for p in wrapper.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["to", "bfloat16", "half", "double"])
def test_no_conversion_of_the_wrapper_touches_its_precision(how: str) -> None:
    wrapper = wrap(byol_weight=1.0)
    before = copy.deepcopy(wrapper.teacher.state_dict())
    wrapper.to(torch.bfloat16) if how == "to" else getattr(wrapper, how)()
    assert wrapper.model.visual.proj.dtype != torch.float32
    assert_same("teacher", before, wrapper.teacher.state_dict())
    assert wrapper.to("meta").teacher.visual.proj.device.type == "meta"


def test_bfloat16_training_step() -> None:
    x, t = batch()
    wrapper = wrap(clip(dtype=torch.bfloat16), simclr_weight=1.0, byol_weight=1.0)
    wrapper.model.visual.conv1.weight.data.mul_(1.0)
    out = wrapper([x.bfloat16(), x.bfloat16()], t)
    assert out["image_features"].dtype == torch.bfloat16
    vtoken.AttentiveMaskLoss()(**out).backward()
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)
    assert wrapper.score(x.bfloat16()).dtype == torch.float32


def test_it_starts_as_an_exact_copy_and_stays_one_of_what_does_not_move() -> None:
    wrapper = wrap(freeze_patch_embed=True)
    assert_same("start", wrapper.model.visual.state_dict(), wrapper.teacher.visual.state_dict())
    with torch.no_grad():
        wrapper.model.visual.proj.add_(1.0)
    for _ in range(3):
        wrapper.update_ema()
    assert torch.equal(wrapper.teacher.visual.conv1.weight, wrapper.model.visual.conv1.weight)
    assert_close("proj", wrapper.model.visual.proj - 0.996**3, wrapper.teacher.visual.proj, 1e-6)


def test_nothing_unfreezes_it_or_trains_it() -> None:
    wrapper = wrap(simclr_weight=1.0, byol_weight=1.0, freeze_patch_embed=True, ema_text=True)

    def frozen() -> bool:
        modes = {m.training for m in wrapper.teacher.modules()}
        return modes == {False} and not any(p.requires_grad for p in wrapper.teacher.parameters())

    assert frozen()
    assert wrapper.train() is wrapper
    assert wrapper.requires_grad_(True) is wrapper
    assert frozen()
    assert not wrapper.model.visual.conv1.weight.requires_grad
    assert wrapper.model.visual.proj.requires_grad
    wrapper.teacher.train()
    wrapper.teacher.requires_grad_(True)
    nn.Sequential(wrapper).train()
    assert frozen()
    x, t = batch()
    vtoken.AttentiveMaskLoss()(**wrapper([x, x], t)).backward()
    assert all(p.grad is None for p in wrapper.teacher.parameters())
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)


def test_it_has_no_dropout_and_no_drop_path() -> None:
    torch.manual_seed(0)
    wrapper = wrap(timm_clip(timm_drop_path=0.5), byol_weight=1.0, keep_ratio=1.0)
    x = images((3, 160, 160), 4)
    outs = [wrapper([x], torch.ones(4, 8, dtype=torch.int64)) for _ in range(2)]
    assert not torch.equal(outs[0]["image_features"], outs[1]["image_features"])
    assert torch.equal(outs[0]["byol_target"], outs[1]["byol_target"])


def test_the_projectors_batch_norm_uses_the_batch_and_keeps_nothing() -> None:
    x, t = batch()
    wrapper = wrap(byol_weight=1.0)
    state = {n: v.clone() for n, v in wrapper.teacher.state_dict().items()}
    target = wrapper(x, t)["byol_target"]
    assert_same("teacher", state, wrapper.teacher.state_dict())
    assert not any("running" in name for name in state)
    projector = copy.deepcopy(wrapper.byol_projector).train()
    with torch.no_grad():
        pooled = wrapper.model.visual.ln_post(wrapper.model.eval().visual.transformer(wrapper.model.visual._embeds(x)))
        assert_close("target", projector(pooled[:, 0]), target, 1e-5)
        with torch.no_grad():
            wrapper.byol_projector[0].weight.add_(1.0)
        wrapper.update_ema()
        moved = wrapper.teacher.byol_projector[0].weight
        assert_close("projector", wrapper.byol_projector[0].weight - 0.996, moved, 1e-5)


@pytest.mark.parametrize("custom", [False, True])
def test_unwrap(custom: bool) -> None:
    wrapper = wrap(clip(custom=custom), ema_text=True)
    assert wrapper.unwrap() is wrapper.model
    text = wrapper.model.text if custom else wrapper.model
    with torch.no_grad():
        for p in (
            wrapper.model.visual.proj,
            text.token_embedding.weight,
            text.ln_final.bias,
            text.positional_embedding,
        ):
            p.add_(1.0)
        wrapper.model.logit_scale.fill_(3.0)
    wrapper.update_ema()
    average = wrapper.unwrap(ema=True)
    assert type(average) is type(wrapper.model)
    assert average is not wrapper.model
    theirs = average.text if custom else average
    for a, b in ((average.visual.proj, wrapper.model.visual.proj), (theirs.ln_final.bias, text.ln_final.bias),
                 (theirs.token_embedding.weight, text.token_embedding.weight),
                 (theirs.positional_embedding, text.positional_embedding)):  # fmt: skip
        assert_close("average", b - 0.996, a, 1e-5)
    assert average.logit_scale.item() == 3.0
    assert average.visual.proj.requires_grad
    x, t = batch()
    with torch.no_grad():
        assert torch.equal(average.eval().encode_image(x), wrapper.encode_image(x, ema=True))
        assert torch.equal(average.encode_image(x, normalize=True), wrapper.encode_image(x, True, ema=True))
        assert average(x, t)["text_features"].shape == (4, 16)


def test_without_ema_text_the_text_tower_is_the_students() -> None:
    wrapper = wrap()
    with torch.no_grad():
        wrapper.model.ln_final.bias.add_(1.0)
    wrapper.update_ema()
    assert torch.equal(wrapper.unwrap(ema=True).ln_final.bias, wrapper.model.ln_final.bias)
    assert not any("token_embedding" in name for name in wrapper.teacher.state_dict())


def test_a_student_whose_parameters_were_replaced_is_refused() -> None:
    wrapper = wrap()
    wrapper.model.visual.proj = nn.Parameter(torch.zeros(48, 8))
    with pytest.raises(vtoken.VTokenError, match=r"visual\.proj.*wrap the model again"):
        wrapper.update_ema()
    assert int(wrapper.ema_step) == 0


@pytest.mark.parametrize(
    ("options", "said"), [({"momentum": 1.1}, "momentum=1.1"), ({"total_steps": 0}, "total_steps=0")]
)
def test_bad_schedules(options: dict[str, Any], said: str) -> None:
    with pytest.raises(vtoken.ConfigError, match=said):
        wrap(**options)
