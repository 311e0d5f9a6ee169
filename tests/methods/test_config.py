"""Settings of the merging methods: validation, schedules, presets, round trips, and the token counts they give."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

import vtoken
from vtoken import ConfigError, MethodConfig, PiToMe, RandomMerge, RandomPrune, StrideMerge, ToMe
from vtoken.cli.settings import key_values
from vtoken.core.config import make_config
from vtoken.core.counts import count_tokens
from vtoken.core.method import BlockMethod
from vtoken.core.spec import Plan
from vtoken.methods.merging.base import MergeConfig
from vtoken.methods.merging.schedule import chosen_layers

METHODS = {
    "pitome": PiToMe,
    "tome": ToMe,
    "random_merge": RandomMerge,
    "random_prune": RandomPrune,
    "stride": StrideMerge,
}
#: Those whose amount is set by ratio or r.
SCHEDULED = [PiToMe, ToMe, RandomMerge, RandomPrune]
each_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())
each_scheduled = pytest.mark.parametrize("cls", SCHEDULED, ids=[c.__name__ for c in SCHEDULED])


def amounts(config: MethodConfig, depth: int) -> list[Any]:
    """What each block is told to remove: a ratio or a number; None for blocks left alone."""
    assert isinstance(config, MergeConfig)
    chosen, found = chosen_layers("config", config.layers, depth), config.amounts(depth)
    return [found[layer] if layer in chosen else None for layer in range(depth)]


def layer_settings(config: MethodConfig, name: str, depth: int) -> list[Any]:
    assert isinstance(config, MergeConfig)
    return [config.layer_settings(layer, depth)[name] for layer in range(depth)]


def counts(config: MethodConfig, depth: int, num_tokens: int, num_prefix: int = 1) -> Plan:
    method = config.build(depth)
    assert isinstance(method, BlockMethod)
    return count_tokens(method, depth, num_tokens, num_prefix)


def refuses(cls: type[MethodConfig], message: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cls(**options)
    assert isinstance(caught.value, ValueError)
    name = next(iter(options))
    assert name in str(caught.value)
    assert cls.__name__ in str(caught.value)


# --- ratio and r ---


@each_scheduled
@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0001, 1.3, 90, [0.9, 0.0], [1.5, 0.5], -1])
def test_ratio_out_of_range(cls: type[MethodConfig], ratio: Any) -> None:
    refuses(cls, r"ratio is the share of tokens kept per layer, must be in \(0, 1\]", ratio=ratio)


@pytest.mark.parametrize(("ratio", "hint"), [(1.3, "0.7"), (1.1, "0.9"), (90, "0.9"), (92.5, "0.925"), (100, "1")])
def test_ratio_hint(ratio: float, hint: str) -> None:
    refuses(PiToMe, re.escape(f"Did you mean ratio={hint}?"), ratio=ratio)


@pytest.mark.parametrize("ratio", [0, -0.1, -5, 101, 1e9])
def test_ratio_without_a_likely_meaning_has_no_hint(ratio: float) -> None:
    with pytest.raises(ConfigError) as caught:
        PiToMe(ratio=ratio)
    assert "Did you mean" not in str(caught.value)


@each_scheduled
@pytest.mark.parametrize("name", ["ratio", "r"])
@pytest.mark.parametrize("value", ["0.9", True, False, [True], ["1"], {}, object, [[1]]], ids=repr)
def test_amounts_must_be_numbers(cls: type[MethodConfig], name: str, value: Any) -> None:
    refuses(cls, "expected a number or a sequence of numbers|ratio|whole numbers", **{name: value})


@each_scheduled
@pytest.mark.parametrize("name", ["ratio", "r"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [1, math.nan]])
def test_amounts_must_be_finite(cls: type[MethodConfig], name: str, value: Any) -> None:
    refuses(cls, "must be finite", **{name: value})


@each_scheduled
@pytest.mark.parametrize("r", [-1, 2.5, -0.5, [4, 3, -2], [1, 2, 3.5], [-3]])
def test_r_must_be_a_count(cls: type[MethodConfig], r: Any) -> None:
    refuses(cls, "whole numbers? from 0 on", r=r)


@pytest.mark.parametrize("r", [(8, 1.5), (8, -2), (8, -1.01), (-8, 0.5), (2.5, 0.5), (8, 4), (8, math.nan), (8, "1")])
def test_line_must_have_a_slope_within_one(r: Any) -> None:
    refuses(PiToMe, r"as \(r, slope\), r must be a whole number and slope within \[-1, 1\]", r=r)


@each_scheduled
def test_ratio_and_r_exclude_each_other(cls: type[MethodConfig]) -> None:
    with pytest.raises(ConfigError, match="give ratio or r, not both"):
        cls(ratio=0.9, r=8)
    with pytest.raises(ConfigError, match="give ratio or r, not both"):
        cls(ratio=0.9).replace(ratio=0.8, r=8)


@each_scheduled
def test_default_ratio(cls: type[MethodConfig]) -> None:
    assert cls() == cls(ratio=0.925)
    assert amounts(cls(), 3) == [0.925] * 3


def test_amounts_of_every_form() -> None:
    assert amounts(PiToMe(ratio=0.9), 3) == [0.9] * 3
    assert amounts(PiToMe(ratio=1), 3) == [1.0] * 3  # a share, not one token
    assert isinstance(amounts(PiToMe(ratio=1), 1)[0], float)
    assert amounts(PiToMe(ratio=[1.0, 0.9, 0.5]), 3) == [1.0, 0.9, 0.5]
    assert amounts(ToMe(r=8), 3) == [8] * 3
    assert amounts(ToMe(r=8.0), 3) == [8] * 3
    assert all(isinstance(v, int) for v in amounts(ToMe(r=8.0), 3))
    assert amounts(ToMe(r=[8, 4]), 4) == [8, 4, 0, 0]  # shorter lists are padded with 0
    assert amounts(ToMe(r=[8, 1]), 3) == [8, 1, 0]  # two whole numbers are a list, not a line
    assert amounts(ToMe(r=[8.0, 0.0]), 4) == [8, 0, 0, 0]  # of floats, too
    assert amounts(ToMe(r=[8.0, 1.0]), 3) == [8, 1, 0]
    assert amounts(ToMe(r=np.array([8.0, 0.0])), 3) == [8, 0, 0]
    assert amounts(ToMe(r=[3]), 2) == [3, 0]
    assert amounts(ToMe(r=0), 2) == [0, 0]


def line(r: int, slope: float, depth: int) -> list[int]:
    """docs/methods/pitome.md 3, as it stands there."""
    if depth == 1:
        return [r]
    lo = int(r * (1 - slope))
    hi = 2 * r - lo
    step = (hi - lo) / (depth - 1)
    return [int(lo + step * i) for i in range(depth)]


@pytest.mark.parametrize(
    ("r", "slope", "depth", "expected"),
    [
        (8, 0.0, 4, [8, 8, 8, 8]),
        (8, 1.0, 5, [0, 4, 8, 12, 16]),
        (8, -1.0, 5, [16, 12, 8, 4, 0]),
        (8, -1, 5, [16, 12, 8, 4, 0]),
        (8, 0.5, 3, [4, 8, 12]),
        (10, 1.0, 12, [0, 1, 3, 5, 7, 9, 10, 12, 14, 16, 18, 20]),
        (8, 1.0, 1, [8]),
        (8, -0.3, 1, [8]),
        (13, -0.5, 2, [19, 7]),
        (0, 1.0, 3, [0, 0, 0]),
    ],
)
def test_line(r: int, slope: float, depth: int, expected: list[int]) -> None:
    assert amounts(ToMe(r=(r, slope)), depth) == expected == line(r, slope, depth)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.floats(-1, 1), st.integers(1, 40))
def test_line_is_the_formula(r: int, slope: float, depth: int) -> None:
    assert amounts(ToMe(r=(r, slope)), depth) == line(r, slope, depth)


@pytest.mark.parametrize("depth", [1, 3])
def test_ratio_lists_have_one_value_per_block(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"ratio=\[2 values\].*the model has {depth} blocks; give one per block"):
        PiToMe(ratio=[0.9, 0.8]).build(depth)
    with pytest.raises(ConfigError, match=r"PiToMe\(ratio=\[0 values\]"):
        PiToMe(ratio=[]).build(depth)


def test_r_lists_are_at_most_as_long_as_the_model() -> None:
    with pytest.raises(ConfigError, match=r"r=\[3 values\].*the model has only 2 blocks"):
        ToMe(r=[1, 2, 3]).build(2)


# --- layers ---


def test_layers() -> None:
    assert amounts(ToMe(r=2), 4) == [2] * 4
    assert amounts(ToMe(r=2, layers=[1, 3]), 4) == [None, 2, None, 2]
    assert amounts(ToMe(r=2, layers=[-1, 0, 0]), 4) == [2, None, None, 2]
    assert amounts(ToMe(r=2, layers=range(1, 4)), 4) == [None, 2, 2, 2]
    assert amounts(ToMe(r=[1, 2, 3, 4], layers=(2,)), 4) == [None, None, 3, None]  # lists go by block, not by choice
    assert counts(ToMe(r=2, layers=[1, 3]), 4, 17).tokens == (17, 17, 15, 15, 13)
    assert counts(PiToMe(ratio=0.5, layers=[-4]), 4, 17).tokens == (17, 9, 9, 9, 9)
    assert counts(ToMe(r=2, layers=[]), 4, 17).tokens == (17,) * 5


@each_method
@pytest.mark.parametrize("layers", [[4], [-5], [0, 99]])
def test_layers_out_of_range(cls: type[MethodConfig], layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=rf"{cls.__name__}\(layers=.*the model has blocks 0\.\.3"):
        cls(layers=layers).build(4)


@each_method
@pytest.mark.parametrize("layers", ["all", [0.5], [True], {}], ids=repr)
def test_layers_must_be_whole_numbers(cls: type[MethodConfig], layers: Any) -> None:
    refuses(cls, "layers", layers=layers)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["layers", "protect"])
def test_whole_numbers_must_be_finite(name: str, value: float) -> None:
    refuses(PiToMe, "must be a whole number", **{name: [value]})


# --- margin, alpha, energy ---


def test_margin_falls_to_the_last_layer() -> None:
    assert layer_settings(PiToMe(), "margin", 12) == pytest.approx([0.9 * (1 - i / 12) for i in range(12)])
    assert layer_settings(PiToMe(), "margin", 12)[-1] == pytest.approx(0.9 / 12)
    assert layer_settings(PiToMe(margin=0.75), "margin", 4) == pytest.approx([0.75, 0.5625, 0.375, 0.1875])
    assert layer_settings(PiToMe(margin=-1), "margin", 2) == [-1.0, -0.5]


def test_margin_constant_and_per_layer() -> None:
    assert layer_settings(PiToMe(margin=0.6, margin_schedule="constant"), "margin", 3) == [0.6] * 3
    for schedule in ("linear", "constant"):
        config = PiToMe(margin=[0.9, 0.1, -0.5], margin_schedule=schedule)
        assert layer_settings(config, "margin", 3) == [0.9, 0.1, -0.5]
    with pytest.raises(ConfigError, match=r"PiToMe\(margin=\[3 values\]\): the model has 2 blocks; give one per block"):
        PiToMe(margin=[0.9, 0.1, -0.5]).build(2)


@pytest.mark.parametrize("margin", [1.01, -1.5, [0.5, 2.0], 90])
def test_margin_out_of_range(margin: Any) -> None:
    refuses(PiToMe, r"a cosine similarity, must be in \[-1, 1\]", margin=margin)


@pytest.mark.parametrize("margin", [math.nan, math.inf, "0.9", None, True, [0.5, "x"]], ids=repr)
def test_margin_must_be_a_finite_number(margin: Any) -> None:
    refuses(PiToMe, "margin", margin=margin)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf, "1", None, True, [1.0]], ids=repr)
def test_alpha_must_be_a_number_from_zero_on(alpha: Any) -> None:
    refuses(PiToMe, "must be a finite number from 0 on", alpha=alpha)


@pytest.mark.parametrize(
    ("name", "near", "meant"),
    [
        ("margin_schedule", "linaer", "linear"),
        ("energy", "elo", "elu"),
        ("variant", "pitome_pair", "pitome_pairs"),
        ("variant", "zzz", None),
        ("metric", "keys", "key"),
        ("reduction", "avg", "wavg"),
        ("place", "betwen", "between"),
        ("order", "rastr", "raster"),
    ],
)
def test_choices(name: str, near: str, meant: str | None) -> None:
    hint = re.escape(f"(did you mean {meant!r}?)") if meant else "must be one of"
    refuses(PiToMe, hint, **{name: near})


@pytest.mark.parametrize("value", [None, 3, True, "zzz"], ids=repr)
@pytest.mark.parametrize("name", ["margin_schedule", "energy", "variant", "metric", "reduction", "place", "order"])
def test_choices_must_be_known_words(name: str, value: Any) -> None:
    refuses(PiToMe, "must be one of|variant", **{name: value})


@pytest.mark.parametrize("value", ["yes", None, 2, "False"], ids=repr)
def test_prop_attn_must_be_a_truth_value(value: Any) -> None:
    # "False" is true; a command line or a JSON file may well hold it.
    refuses(PiToMe, "prop_attn", prop_attn=value)


# --- variants (docs/methods/pitome.md 10.3) ---


@pytest.mark.parametrize("depth", [1, 2, 3, 12, 13, 24])
def test_variant_presets(depth: int) -> None:
    pairs = "pitome_pairs"
    first, last = math.ceil(depth / 2), depth // 2
    assert layer_settings(PiToMe(), "variant", depth) == ["pitome"] * depth
    # DeiT: unprotected in the first ceil(L/2) layers. MAE: in the last floor(L/2).
    assert layer_settings(PiToMe(variant="deit_code"), "variant", depth) == [pairs] * first + ["pitome"] * (
        depth - first
    )
    assert layer_settings(PiToMe(variant="mae_code"), "variant", depth) == ["pitome"] * (depth - last) + [pairs] * last


def test_variant_preset_of_the_llava_tower() -> None:
    found = layer_settings(PiToMe(variant="clip_llava_code"), "variant", 24)
    assert found == ["tome"] * 13 + ["pitome"] * 11  # plain matching in layers 0..12 of 24


UNIFORM = {"margin": 0.9, "prop_attn": True, "metric": "key", "place": "between", "reduction": "wavg"}
#: docs/methods/pitome.md 10: what the published code does where it differs.
PUBLISHED = {
    "deit_code": UNIFORM | {"margin": 0.75, "prop_attn": False},
    "mae_code": UNIFORM | {"margin": 0.75, "prop_attn": False},
    "clip_llava_code": UNIFORM | {"prop_attn": False, "metric": "hidden", "place": "after", "reduction": "mean"},
    "pitome": UNIFORM,
    "tome": UNIFORM,
}


def shown(config: MethodConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in UNIFORM}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_presets_set_what_is_not_given(variant: str) -> None:
    assert shown(PiToMe(variant=variant)) == PUBLISHED[variant]
    given = {"margin": 0.5, "prop_attn": True, "metric": "key_concat", "place": "between", "reduction": "amax"}
    assert shown(PiToMe(variant=variant, **given)) == given
    for name, value in UNIFORM.items():  # also where it is the usual default that is given
        assert shown(PiToMe(variant=variant, **{name: value})) == PUBLISHED[variant] | {name: value}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_presets_follow_a_change_of_variant(variant: str) -> None:
    for before in PUBLISHED:
        assert PiToMe(variant=before).replace(variant=variant) == PiToMe(variant=variant)
        assert PiToMe(variant=before, margin=0.3).replace(variant=variant) == PiToMe(variant=variant, margin=0.3)
    assert PiToMe(variant="pitome").replace(variant=variant, margin=0.9) == PiToMe(variant=variant, margin=0.9)
    back = vtoken.config_from_dict(json.loads(json.dumps(PiToMe(variant=variant, ratio=0.8).to_dict())))
    assert back == PiToMe(variant=variant, ratio=0.8)
    assert back.replace(ratio=0.9) == PiToMe(variant=variant, ratio=0.9)


def test_presets_are_per_model_only() -> None:
    assert shown(PiToMe(variant=["pitome_pairs", "pitome"])) == UNIFORM  # the pattern by hand sets nothing else
    assert "0.9, or the preset's" in str(inspect.signature(PiToMe))


def test_variant_per_layer() -> None:
    names = ["tome", "pitome_pairs", "pitome"]
    assert layer_settings(PiToMe(variant=names), "variant", 3) == names
    with pytest.raises(ConfigError, match=r"variant=\[3 values\].*the model has 2 blocks"):
        PiToMe(variant=names).build(2)
    refuses(PiToMe, "must be one of pitome, pitome_pairs, tome", variant=["pitome", "deit_code"])
    refuses(PiToMe, "must be one of", variant=["pitome", 3])


# --- protect ---


def test_protect() -> None:
    assert PiToMe(protect=[5, 3, 5]).protect == (3, 5)
    assert PiToMe(protect=[5, 3]) == PiToMe(protect=(3, 5))
    refuses(PiToMe, "patch numbers start at 0", protect=[3, -1])
    for wrong in ("1", [0.5], [True], None):
        refuses(PiToMe, "protect", protect=wrong)
    for variant in ("tome", ["pitome", "tome"]):
        with pytest.raises(ConfigError, match='cannot be combined with the variant "tome"'):
            PiToMe(protect=[1], variant=variant).build(2)
    assert PiToMe(protect=[1], variant=["pitome", "pitome_pairs"]).build(2)


def test_protected_tokens_lower_the_cap() -> None:
    assert counts(PiToMe(r=9, protect=[0, 1, 2]), 3, 17).tokens == (17, 11, 8, 6)  # 13 of 16, 7 of 10, 4 of 7 may merge


# --- controls ---


@pytest.mark.parametrize("stride", [1, 0, -2, 2.0, "2", True, None], ids=repr)
def test_stride_must_be_from_two_on(stride: Any) -> None:
    refuses(StrideMerge, "must be a whole number from 2 on", stride=stride)


@pytest.mark.parametrize("cls", [RandomMerge, RandomPrune])
@pytest.mark.parametrize("seed", [-1, 0.5, "1", True, None], ids=repr)
def test_seed_must_be_from_zero_on(cls: type[MethodConfig], seed: Any) -> None:
    refuses(cls, "must be a whole number from 0 on", seed=seed)


def test_random_prune_only_prunes() -> None:
    assert RandomPrune().reduction == "prune"
    refuses(RandomPrune, "pruning is its only reduction; see RandomMerge", reduction="mean")


def test_stride_counts() -> None:
    assert counts(StrideMerge(stride=4), 3, 197).tokens == (197, 50, 50, 50)
    assert counts(StrideMerge(stride=3, layers=[0, 2]), 3, 18).tokens == (18, 7, 7, 3)
    assert counts(StrideMerge(stride=2, layers=None), 5, 6).tokens == (6, 4, 3, 2, 2, 2)


# --- value semantics ---

EXAMPLES: list[MethodConfig] = [
    *(cls() for cls in METHODS.values()),
    PiToMe(ratio=[0.9, 1, 0.8], margin=[0.1, 0.2, 0.3], variant=["tome", "pitome", "pitome_pairs"], alpha=0),
    PiToMe(r=(8, -1), margin=0.45, margin_schedule="constant", energy="eq4", protect=[4, 1], layers=[0, -1]),
    PiToMe(ratio=0.8, metric="hidden", prop_attn=False, reduction="mean", place="after", order="internal"),
    PiToMe(variant="mae_code", metric="key_concat", reduction="amax"),
    PiToMe(variant="clip_llava_code"),
    PiToMe(variant="clip_llava_code", margin=0.5, metric="key", place="between"),
    ToMe(r=[8, 1]),
    ToMe(r=(8, 1)),
    PiToMe(r=[8.0, 0.0]),
    PiToMe(r=(8.0, 0.0)),
    ToMe(r=[8, 4, 2]),
    ToMe(r=(8, 0.25), reduction="prune"),
    ToMe(r=0),
    RandomMerge(ratio=0.5, seed=7),
    RandomPrune(r=3, seed=2),
    StrideMerge(stride=5, layers=[1, 2]),
    StrideMerge(layers=None),
]
each_example = pytest.mark.parametrize("config", EXAMPLES, ids=str)


@each_example
def test_round_trip(config: MethodConfig) -> None:
    values = config.to_dict()
    assert values["method"] == config.method
    assert values["version"] == 1
    assert vtoken.config_from_dict(values) == config
    text = json.dumps(values)
    back = vtoken.config_from_dict(json.loads(text))
    assert back == config
    assert type(back) is type(config)
    assert hash(back) == hash(config)
    assert json.dumps(back.to_dict()) == text
    assert values == config.to_dict()  # reading changed nothing


@each_example
def test_configs_are_values(config: MethodConfig) -> None:
    assert config in {config}
    assert config == config.replace()
    assert hash(config) == hash(config.replace())
    assert eval(repr(config)) == config
    with pytest.raises(AttributeError):
        config.layers = (0,)  # type: ignore[attr-defined]
    assert [config == other for other in EXAMPLES].count(True) == 1


def test_lists_and_tuples_are_the_same_setting() -> None:
    one = PiToMe(ratio=[0.9, 0.8], margin=[0.5, 0.4], layers=[0, 1], variant=["pitome", "tome"])
    two = PiToMe(ratio=(0.9, 0.8), margin=(0.5, 0.4), layers=(0, 1), variant=("pitome", "tome"))
    assert one == two
    assert hash(one) == hash(two)
    given_list = [0.9, 0.8]
    config = PiToMe(ratio=given_list)
    given_list[0] = 0.1
    assert config == PiToMe(ratio=[0.9, 0.8])


def test_settings_are_by_name_only() -> None:
    for cls in METHODS.values():
        with pytest.raises(TypeError):
            cls(0.9)


@each_scheduled
def test_replace_switches_between_ratio_and_r(cls: Any) -> None:
    assert cls(r=8).replace(ratio=0.9) == cls(ratio=0.9)
    assert cls(ratio=0.9).replace(r=8) == cls(r=8)
    assert cls(r=(8, 0.5)).replace(ratio=[0.9]) == cls(ratio=[0.9])
    assert cls(ratio=0.9, layers=[1]).replace(ratio=0.8) == cls(ratio=0.8, layers=[1])
    assert cls(r=8).replace(prop_attn=False) == cls(r=8, prop_attn=False)
    assert cls(ratio=0.9).replace(r=0) == cls(r=0)
    with pytest.raises(ConfigError, match="ratio"):
        cls(r=8).replace(ratio=1.5)


def test_replace_validates() -> None:
    config = PiToMe(ratio=0.9)
    with pytest.raises(ConfigError, match="margin"):
        config.replace(margin=3.0)
    with pytest.raises(ConfigError, match=r"has no setting 'margins' \(did you mean 'margin'\?\)"):
        config.replace(margins=0.5)
    assert config == PiToMe(ratio=0.9)


# --- names ---


def test_method_names() -> None:
    assert set(METHODS) <= set(vtoken.methods())
    assert vtoken.methods() == sorted(set(vtoken.methods()))
    for name, cls in METHODS.items():
        assert cls.method == name
        assert type(vtoken.config_from_dict({"method": name, "version": 1})) is cls


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "pitom", "version": 1},
            r"unknown method 'pitom' \(did you mean 'pitome'\?\); known methods:.*tome",
        ),
        ({"method": "zzz", "version": 1}, "unknown method 'zzz'; known methods"),
        ({"version": 1}, "unknown method"),
        ({"method": "pitome"}, "version None, this vtoken reads version 1"),
        ({"method": "pitome", "version": 2}, "version 2, this vtoken reads version 1"),
        ({"method": "pitome", "version": "1"}, "version '1'"),
        (
            {"method": "pitome", "version": 1, "ratoi": 0.9},
            r"PiToMe has no setting 'ratoi' \(did you mean 'ratio'\?\); it has: .*layers, .*margin",
        ),
        ({"method": "tome", "version": 1, "margin": 0.9}, "ToMe has no setting 'margin'"),
        ({"method": "stride", "version": 1, "strid": 3}, r"did you mean 'stride'\?"),
        ({"method": "pitome", "version": 1, "qqqqqq": 1}, "PiToMe has no setting 'qqqqqq'; it has"),
        ({"method": "pitome", "version": 1, "ratio": 2.0}, "must be in"),
    ],
)
def test_dicts_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vtoken.config_from_dict(values)


def test_taken_and_empty_names_cannot_be_registered() -> None:
    before = vtoken.methods()

    class Other(MethodConfig):
        method = "pitome"

    class Nameless(MethodConfig):
        pass

    for cls in (Other, Nameless):
        with pytest.raises(ConfigError, match="must be a new, non-empty name"):
            vtoken.register_method(cls)
    assert vtoken.register_method(PiToMe) is PiToMe  # a second import of the same class is fine
    assert vtoken.methods() == before


# --- token counts (docs/methods/pitome.md 12) ---

RATIOS = [0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8]


@pytest.mark.parametrize("cls", [PiToMe, ToMe, RandomMerge, RandomPrune])
@pytest.mark.parametrize(
    ("depth", "tokens", "left"),
    [
        (12, 197, [151, 111, 82, 60, 44, 30, 17]),
        (12, 577, [430, 316, 230, 167, 120, 86, 43]),
        (24, 197, [116, 65, 37, 21, 13, 8, 5]),
        (24, 577, [323, 175, 95, 50, 28, 16, 6]),
        (32, 257, [126, 58, 27, 15, 8, 7, 5]),
    ],
)
def test_tokens_after_the_last_block(cls: Any, depth: int, tokens: int, left: list[int]) -> None:
    assert [counts(cls(ratio=ratio), depth, tokens).tokens[-1] for ratio in RATIOS] == left


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.9, [178, 161, 145, 131, 118, 107, 97, 88, 80, 73, 66, 60]),
        (0.925, [183, 170, 158, 147, 137, 127, 118, 110, 102, 95, 88, 82]),
        (0.95, [188, 179, 171, 163, 155, 148, 141, 134, 128, 122, 116, 111]),
    ],
)
def test_tokens_after_each_block(ratio: float, expected: list[int]) -> None:
    plan = counts(PiToMe(ratio=ratio), 12, 197)
    assert plan.tokens == (197, *expected)
    assert plan.removed == tuple(a - b for a, b in zip(plan.tokens, expected, strict=False))
    assert plan.num_prefix == 1


@pytest.mark.parametrize(
    ("depth", "tokens", "r", "left"),
    [(12, 197, 8, 101), (12, 197, 13, 41), (12, 197, 16, 11), (24, 577, 23, 25), (24, 197, 8, 7), (32, 257, 7, 33)],
)
def test_tome_tokens_left(depth: int, tokens: int, r: int, left: int) -> None:
    assert counts(ToMe(r=r), depth, tokens).tokens[-1] == left


def test_llava_tower_tokens() -> None:
    # docs/methods/pitome.md 11: 576 patches, 23 of 24 blocks; the class token is dropped.
    config = PiToMe(layers=range(23))
    left = [counts(config.replace(ratio=ratio), 24, 577).tokens[-1] - 1 for ratio in RATIOS[:5]]
    assert left == [330, 183, 101, 54, 30]


@each_method
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
def test_prefix_tokens_never_count(cls: Any, num_prefix: int) -> None:
    one = counts(cls(), 6, 196 + num_prefix, num_prefix).tokens
    assert [t - num_prefix for t in one] == list(counts(cls(), 6, 196, 0).tokens)


@each_scheduled
@pytest.mark.parametrize("amount", [{"ratio": 1.0}, {"r": 0}, {"ratio": 0.5}, {"ratio": 0.01}, {"r": 10**6}], ids=str)
def test_at_most_half_goes(cls: Any, amount: dict[str, Any]) -> None:
    tokens = counts(cls(**amount), 8, 98).tokens
    nothing = amount in ({"ratio": 1.0}, {"r": 0})
    assert tokens == ((98,) * 9 if nothing else (98, 50, 26, 14, 8, 5, 3, 2, 2))
    for mergeable in (0, 1):
        assert counts(cls(**amount), 3, 1 + mergeable).tokens == (1 + mergeable,) * 4


@pytest.mark.parametrize(
    ("r", "removed"),
    [
        ((4, 0), [4] * 6),
        ((4, -1), [8, 6, 4, 3, 1, 0]),
        ({"r": 4, "slope": -1}, [8, 6, 4, 3, 1, 0]),
        ([4, 1], [4, 1, 0, 0, 0, 0]),
        ([4.0, 0.0], [4, 0, 0, 0, 0, 0]),
        ([4.0, 1.0], [4, 1, 0, 0, 0, 0]),
        (range(4, 2, -1), [4, 3, 0, 0, 0, 0]),
        (np.array([4, 1]), [4, 1, 0, 0, 0, 0]),
    ],
    ids=repr,
)
@each_scheduled
def test_a_pair_is_a_line_as_a_tuple_and_numbers_per_block_as_a_list(cls: Any, r: Any, removed: list[int]) -> None:
    config = cls(r=r)
    model = timm.create_model("test_vit", depth=6, img_size=480, num_classes=2)  # 900 patches
    for same in (
        config,
        vtoken.config_from_dict(config.to_dict()),
        vtoken.config_from_dict(json.loads(json.dumps(config.to_dict()))),
        config.replace(),
        dataclasses.replace(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        eval(repr(config)),
        make_config(cls.method, key_values([f"r={json.dumps(config.to_dict()['r'])}"])),  # of the command line
    ):
        assert same == config
        assert vtoken.plan(model, same).removed == tuple(removed)
    vtoken.apply(model, config)
    vtoken.configure(model, prop_attn=False)
    assert vtoken.plan(model).removed == tuple(removed)
    vtoken.configure(model, r=r)
    assert vtoken.plan(model).removed == tuple(removed)


def test_a_line_and_numbers_per_block_are_not_equal() -> None:
    line, listed = ToMe(r=(8, 1)), ToMe(r=[8, 1])
    assert line != listed
    assert listed != line
    assert line.r != listed.r
    assert listed.r != line.r
    assert listed == ToMe(r=[8.0, 1.0])
    assert repr(listed).count("[8, 1]") == 1


@pytest.mark.parametrize(
    "r", [{}, {"r": 8}, {"r": 8, "slope": 2}, {"r": 8, "slope": 0, "depth": 3}, {"r": 0.5, "slope": 0}]
)
def test_dicts_that_are_no_line(r: Any) -> None:
    refuses(ToMe, "slope", r=r)
