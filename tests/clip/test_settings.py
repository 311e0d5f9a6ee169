"""Settings of attentive masking: values, JSON, two ways to give them, changes between steps, verbs that refuse them."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vtoken
from tests.clip.models import batch, clip, wrap
from tests.helpers import assert_same
from vtoken import AttentiveMaskCLIP, AttentiveMasks, ConfigError

SMALL = AttentiveMasks(block=1, hidden_dim=24, out_dim=8)
#: Of every setting a value that is not its default, and what it becomes where that differs.
OTHERS: dict[str, Any] = {
    "keep_ratio": 0.25, "mode": "mix", "block": 2, "top_fraction": 0.25, "temperature": 2.0, "layers": (0, -1),
    "warmup_steps": 3, "teacher_scale": 0.5, "momentum": 0.9, "total_steps": 7, "simclr_weight": 0.5,
    "byol_weight": 2.0, "hidden_dim": 16, "out_dim": 4, "head_norm": "layer", "ema_text": True,
    "freeze_patch_embed": True, "outside": "zeros",
}  # fmt: skip
FIXED = ("simclr_weight", "byol_weight", "hidden_dim", "out_dim", "head_norm", "ema_text", "freeze_patch_embed")
EXAMPLES = [
    AttentiveMasks.example(), AttentiveMasks(layers="last"), AttentiveMasks(layers=[2, 0], total_steps=2.5),
    AttentiveMasks(warmup_steps=0.5, keep_ratio=1), AttentiveMasks(**OTHERS),
]  # fmt: skip


def settings_of(wrapper: nn.Module) -> AttentiveMasks:
    found = vtoken.config_of(wrapper)
    assert isinstance(found, AttentiveMasks)
    return found


# --- values ---


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: str(config.layers))
def test_round_trip(config: AttentiveMasks) -> None:
    text = json.dumps(config.to_dict())
    back = vtoken.config_from_dict(json.loads(text))
    assert back == config
    assert type(back) is AttentiveMasks
    assert hash(back) == hash(config)
    assert json.dumps(back.to_dict()) == text
    assert eval(repr(config)) == config == pickle.loads(pickle.dumps(config)) == config.replace()
    with pytest.raises(AttributeError):
        config.keep_ratio = 0.1  # type: ignore[misc]
    assert "attentive_clip" in vtoken.methods()


def test_the_same_settings_in_other_forms() -> None:
    given = [0, -1]
    config = AttentiveMasks(layers=given)  # type: ignore[arg-type]
    given[0] = 2
    for layers in ((0, -1), np.array([0, -1]), [np.int64(0), -1]):
        assert AttentiveMasks(layers=layers) == config  # type: ignore[arg-type]
    assert AttentiveMasks(layers={1}).layers == (1,)  # type: ignore[arg-type]
    assert AttentiveMasks(layers=range(2)).layers == (0, 1)  # type: ignore[arg-type]
    assert (AttentiveMasks(total_steps=8.0).total_steps, AttentiveMasks(warmup_steps=2.5).warmup_steps) == (8, 2.5)
    assert type(AttentiveMasks(total_steps=np.int64(8)).total_steps) is int


@pytest.mark.parametrize("name", list(OTHERS))
def test_every_setting_is_an_attribute(name: str) -> None:
    wrapper = AttentiveMaskCLIP(clip(), SMALL.replace(**{name: OTHERS[name]}))
    assert {f.name for f in dataclasses.fields(AttentiveMasks)} == set(OTHERS)
    assert getattr(settings_of(wrapper), name) == OTHERS[name]
    assert getattr(wrapper, name) == ((0, 2) if name == "layers" else OTHERS[name])
    if name in FIXED:
        with pytest.raises(ConfigError, match=f"{name} is used when AttentiveMaskCLIP is built and cannot be changed"):
            setattr(wrapper, name, OTHERS[name])
        return
    before = getattr(SMALL, name)
    setattr(wrapper, name, before)
    assert settings_of(wrapper) == SMALL


# --- two ways to give them ---


def test_settings_and_names_build_the_same_wrapper() -> None:
    x, t = batch()
    config = SMALL.replace(keep_ratio=0.25, mode="mix", layers="last", simclr_weight=1.0)
    made = []
    for build in (
        lambda **more: AttentiveMaskCLIP(clip(), config, **more),
        lambda **more: AttentiveMaskCLIP(clip(), config=config, **more),
        lambda **more: AttentiveMaskCLIP(
            clip(), keep_ratio=0.25, mode="mix", layers="last", simclr_weight=1.0, block=1, hidden_dim=24, out_dim=8,
            **more,
        ),
    ):  # fmt: skip
        torch.manual_seed(0)
        made.append(build(generator=torch.Generator().manual_seed(0)).train())
    assert [settings_of(wrapper) for wrapper in made] == [config] * 3
    first, *others = [wrapper([x, x], t) for wrapper in made]
    for other in others:
        assert_same("output", first, other)


@pytest.mark.parametrize(
    ("args", "options", "said"),
    [
        ((SMALL,), {"keep_ratio": 0.5}, r"not both: keep_ratio.*config\.replace"),
        ((SMALL,), {"mode": "mix", "layers": "last"}, "not both: mode, layers"),
        (("topk",), {}, r"config='topk'.*vtoken\.AttentiveMasks"),
        ((0.5,), {}, r"config=0\.5"),
        ((vtoken.PiToMe(ratio=0.9),), {}, r"config=PiToMe\("),
        ((), {"keepratio": 0.5}, r"no setting 'keepratio' \(did you mean 'keep_ratio'\?\)"),
        ((SMALL.replace(block=3),), {}, "block=3 does not divide the grid of 8 x 8"),
        ((SMALL.replace(layers=(3,)),), {}, r"layers=\[3\] must name blocks"),
        ((SMALL.replace(teacher_scale=0.3),), {}, r"teacher_scale=0\.3 makes images"),
    ],
)
def test_what_no_wrapper_is_built_from(args: Any, options: Any, said: str) -> None:
    model = clip()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=said):
        AttentiveMaskCLIP(model, *args, **options)
    assert_same("weights", before, model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


# --- changes between steps ---


def test_configure_is_as_good_as_building_anew() -> None:
    x, _ = batch()
    wrapper = wrap()
    changes = {"keep_ratio": 0.25, "block": 2, "layers": "last", "teacher_scale": 0.5}
    assert vtoken.configure(wrapper, **changes) is wrapper
    anew = AttentiveMaskCLIP(clip(), settings_of(wrapper))
    assert settings_of(wrapper) == SMALL.replace(**changes)
    scores = wrapper.score(x)
    assert torch.equal(scores, anew.score(x))
    assert wrapper.select(scores).shape == (4, 16)
    assert torch.equal(wrapper.select(scores), anew.select(scores))
    holder = nn.ModuleDict({"a": wrapper})
    vtoken.configure(holder, keep_ratio=0.5)  # also where it lies inside another module
    assert settings_of(holder).keep_ratio == wrapper.keep_ratio == 0.5


def test_another_warm_up_by_configure_counts_at_once() -> None:
    x, t = batch()
    wrapper, bare = wrap(), clip().train()
    wrapper.update_ema()
    for steps, masked in ((2, False), (1, True)):
        vtoken.configure(wrapper, warmup_steps=steps)
        assert masked is not torch.equal(wrapper(x, t)["image_features"], bare(x, t)["image_features"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({name: OTHERS[name]}, f"{name} is used when AttentiveMaskCLIP is built.*wrap the model") for name in FIXED),
        ({"keep_ratio": 0.25, "mode": "best"}, "mode='best'"),
        ({"keep_ratio": 0.25, "block": 3}, "block=3 does not divide"),
        ({"keep_ratio": 0.25, "block": 8}, "nothing can be masked"),
        ({"mode": "mix", "layers": [3]}, r"layers=\[3\]"),
        ({"mode": "mix", "teacher_scale": 0.3}, "patch size"),
        ({"mode": "mix", "momentum": 1.5}, r"momentum=1\.5"),
        ({"keep_ratio": 0.25, "ema_text": False}, "ema_text is used"),
        ({"mode": "mix", "moed": "mix"}, r"no setting 'moed' \(did you mean 'mode'\?\)"),
        ({"generator": None}, "no setting 'generator'"),
    ],
    ids=str,
)
def test_a_change_that_is_refused_changes_nothing(changes: dict[str, Any], said: str) -> None:
    wrapper = wrap()
    before = {n: v for n, v in vars(wrapper).items() if n not in ("_watch", "_buffers", "_parameters", "_modules")}
    with pytest.raises(ConfigError, match=said):
        vtoken.configure(wrapper, **changes)
    assert {n: v for n, v in vars(wrapper).items() if n in before} == before
    assert settings_of(wrapper) == SMALL


def test_wrappers_do_not_share_what_they_were_given() -> None:
    pair = nn.ModuleList([AttentiveMaskCLIP(clip(), SMALL), AttentiveMaskCLIP(clip(), SMALL)])
    with pytest.raises(vtoken.VTokenError, match="exactly one"):
        vtoken.configure(pair, keep_ratio=0.25)
    vtoken.configure(pair[0], keep_ratio=0.25)
    assert vtoken.config_of(pair) == (SMALL.replace(keep_ratio=0.25), SMALL)
    assert SMALL.keep_ratio == 0.5


def test_a_method_in_the_tower_has_settings_of_its_own() -> None:
    wrapper = wrap()
    vtoken.apply(wrapper.model, vtoken.PiToMe(ratio=0.8))
    assert vtoken.config_of(wrapper) == (SMALL, vtoken.PiToMe(ratio=0.8))
    assert vtoken.config_of(wrapper.model) == vtoken.PiToMe(ratio=0.8)
    vtoken.configure(wrapper, ratio=0.9)
    vtoken.configure(wrapper, keep_ratio=0.25)
    assert vtoken.config_of(wrapper) == (SMALL.replace(keep_ratio=0.25), vtoken.PiToMe(ratio=0.9))
    with pytest.raises(vtoken.VTokenError, match="exactly one"):
        vtoken.configure(wrapper, layers=[0])
    assert vtoken.remove(wrapper) is wrapper
    assert not vtoken.is_applied(wrapper)
    assert settings_of(wrapper) == SMALL.replace(keep_ratio=0.25)


# --- copies ---


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_settings_of_their_own(how: str) -> None:
    x, t = batch()
    wrapper = wrap(warmup_steps=1, layers="last")
    wrapper.update_ema()
    vtoken.configure(wrapper, keep_ratio=0.25)
    if how == "deepcopy":
        copied = copy.deepcopy(wrapper)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(wrapper))
    else:
        buffer = io.BytesIO()
        torch.save(wrapper, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert settings_of(copied) == settings_of(wrapper)
    expected = wrapper(x, t)
    assert_same("copy", expected, copied(x, t))
    vtoken.configure(copied, keep_ratio=0.5, layers="all")
    assert (wrapper.keep_ratio, wrapper.layers, copied.layers) == (0.25, (2,), (0, 1, 2))
    assert_same("the first", expected, wrapper(x, t))
    assert not torch.equal(expected["image_features"], copied(x, t)["image_features"])
    with pytest.raises(ConfigError, match="ema_text is used"):
        vtoken.configure(copied, ema_text=True)
    for plain in (copied.unwrap(), copied.unwrap(ema=True)):
        assert vtoken.config_of(plain) is None


# --- verbs for methods in a model ---


@pytest.mark.parametrize(
    "config", ["attentive_clip", SMALL, [vtoken.PiToMe(ratio=0.9), SMALL]], ids=["name", "one", "list"]
)
@pytest.mark.parametrize("verb", ["apply", "applied", "plan", "num_tokens", "report", "prompt_report"])
def test_verbs_say_what_takes_the_settings(verb: str, config: Any) -> None:
    model = clip()
    classes = [type(m) for m in model.modules()]
    enter = lambda *args: vtoken.applied(*args).__enter__()  # noqa: E731
    call = enter if verb == "applied" else getattr(vtoken, verb)
    with pytest.raises(
        ConfigError, match=r"attentive_clip .*a CLIP is trained with it as vtoken\.AttentiveMaskCLIP\(model, "
    ):
        call(model, config)
    assert [type(m) for m in model.modules()] == classes
    assert vtoken.config_of(model) is None


def test_verbs_on_the_wrapper_say_the_truth() -> None:
    wrapper = wrap()
    assert not vtoken.is_applied(wrapper)  # nothing is patched
    for verb in (vtoken.plan, vtoken.num_tokens, vtoken.report):
        with pytest.raises(ConfigError, match=r"step_macs\(\) counts a training step"):
            verb(wrapper)
        with pytest.raises(vtoken.UnsupportedModelError, match=r"use model\.model"):
            verb(wrapper, vtoken.PiToMe(ratio=0.9))
    for name in (None, "attentive_clip", "pitome"):
        with pytest.raises(
            vtoken.VTokenError, match=r"AttentiveMaskCLIP patches nothing, its unwrap\(\) gives the model"
        ):
            vtoken.remove(wrapper, name)
    with pytest.raises(ConfigError, match="merging settings"):
        vtoken.nn.MergeTokens(SMALL)  # type: ignore[arg-type]
    assert settings_of(wrapper) == SMALL
