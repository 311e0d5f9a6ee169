"""Counts against the formula of docs/methods/pitome.md 12, its tables, and torch's own counter."""

from __future__ import annotations

import itertools
import json

import pytest
import timm
import torch

import vtoken
from tests.helpers import counted
from vtoken.methods.merging.base import Merging


def meta_model(name: str, **options: object) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def formula(tokens: list[int], width: int, patches: int, patch: int, classes: int) -> float:
    """Multiply-adds of a plain ViT: 4TC^2 + 2T^2C + 8T'C^2 per layer, patch embedding and head."""
    layers = sum(4 * t * width**2 + 2 * t * t * width + 8 * s * width**2 for t, s in itertools.pairwise(tokens))
    return layers + patches * width * 3 * patch**2 + width * classes


# docs/methods/pitome.md 12: model, width, ratio -> multiply-adds in G, without matching
TABLE = [
    ("vit_tiny_patch16_224", 192, {1.0: 1.25, 0.95: 0.93, 0.9: 0.70, 0.8: 0.43}),
    ("vit_small_patch16_224", 384, {1.0: 4.60, 0.925: 2.99, 0.9: 2.59, 0.85: 1.99}),
    ("vit_base_patch16_224", 768, {1.0: 17.56, 0.975: 15.34, 0.9: 9.97}),
    ("vit_large_patch16_384", 1024, {1.0: 191.07, 0.95: 107.59, 0.9: 67.45}),
]


@pytest.mark.parametrize(("name", "width", "costs"), TABLE)
def test_table_of_costs(name: str, width: int, costs: dict[float, float]) -> None:
    model = meta_model(name)
    for ratio, expected in costs.items():
        cost = vtoken.report(model, vtoken.PiToMe(ratio=ratio))
        assert (cost.macs_after - cost.matching_macs) / 1e9 == pytest.approx(expected, rel=0.004, abs=0.005)
        patches = cost.tokens[0] - 1
        assert cost.macs_after - cost.matching_macs == pytest.approx(
            formula(list(cost.tokens), width, patches, 16, 1000), rel=1e-6
        )


def test_tome_table() -> None:
    cost = vtoken.report(meta_model("vit_small_patch16_224"), "tome", r=13)
    assert (cost.macs_after - cost.matching_macs) / 1e9 == pytest.approx(2.70, abs=0.005)
    assert cost.tokens[-1] == 41


CONFIGS = [
    vtoken.PiToMe(ratio=0.9),
    vtoken.PiToMe(ratio=0.9, variant="pitome_pairs"),
    vtoken.PiToMe(ratio=0.9, variant="tome"),
    vtoken.PiToMe(ratio=0.9, metric="hidden", place="after"),
    vtoken.PiToMe(ratio=0.9, metric="key_concat"),
    vtoken.ToMe(r=8),
    vtoken.RandomMerge(ratio=0.9),
    vtoken.RandomPrune(ratio=0.9),
    vtoken.StrideMerge(stride=3, layers=(1,)),
    vtoken.PiToMe(ratio=0.9, layers=[0, -1], protect=[0, 5]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.metric}-{c.place}")
def test_matching_is_what_the_counter_sees_beyond_narrowing(config: vtoken.MethodConfig) -> None:
    """The closed form of the matching equals the counted FLOPs less those of the model at the same token counts."""
    model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
    cost = vtoken.report(model, config)
    with vtoken.applied(model, config), torch.no_grad(), counted() as counter:
        model(torch.randn(1, 3, 224, 224))
    flops = counter.get_total_flops()
    assert cost.flops_after == flops
    tokens = list(cost.tokens)
    if config.place == "after":
        plain = sum(12 * t * 192**2 + 2 * t * t * 192 for t in tokens[:-1]) + 196 * 192 * 768 + 192 * 1000
    else:
        plain = formula(tokens, 192, 196, 16, 1000)
    assert flops / 2 - plain == pytest.approx(cost.matching_macs, rel=1e-6)


def test_report_of_a_patched_model_and_as_dict() -> None:
    model = timm.create_model("test_vit").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vtoken.apply(model, vtoken.ToMe(r=4))
    patched, fresh = vtoken.report(model), vtoken.report(timm.create_model("test_vit"), vtoken.ToMe(r=4))
    assert patched == fresh
    assert vtoken.config_of(model) == vtoken.ToMe(r=4)
    values = json.loads(json.dumps(patched.to_dict()))
    assert values["flops_after"] == 2 * values["macs_after"] == patched.flops_after
    assert values["macs_before"] == sum(c["macs_before"] for c in values["layers"]) + values["other_macs_before"]
    assert "factor" in str(patched)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_input_size_and_its_errors() -> None:
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    assert vtoken.report(model, "pitome", ratio=0.9, input_size=(3, 96, 64)).tokens[0] == 1 + 6 * 4
    assert vtoken.plan(model, "pitome", ratio=0.9, img_size=(96, 64)).tokens[0] == 25
    with pytest.raises(vtoken.ShapeError, match="does not take images"):
        vtoken.report(timm.create_model("vit_tiny_patch16_224"), "pitome", input_size=(3, 96, 64))
    with pytest.raises(vtoken.ConfigError, match="no settings"):
        vtoken.report(model)


def test_hooks_of_the_user_do_not_run() -> None:
    model = timm.create_model("test_vit")
    calls: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    vtoken.report(model, "pitome")
    assert calls == []
    assert len(model.blocks[0]._forward_hooks) == 1


def test_a_method_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **settings: object) -> None:
        raise ValueError("the method's own words")

    monkeypatch.setattr(Merging, "reduce", fail)
    with pytest.raises(ValueError, match=r"^the method's own words$"):
        vtoken.report(timm.create_model("test_vit"), "pitome")


def test_sizes_of_numpy_and_sizes_that_do_not_fit() -> None:
    np = pytest.importorskip("numpy")
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
    assert vtoken.plan(model, "pitome", img_size=np.int64(96)) == vtoken.plan(model, "pitome", img_size=96)
    size = tuple(np.array([3, 96, 64]))
    assert vtoken.report(model, "pitome", input_size=size) == vtoken.report(model, "pitome", input_size=(3, 96, 64))
    for wrong in (True, 16.0, 0, (96,)):
        with pytest.raises(vtoken.ShapeError):
            vtoken.plan(model, "pitome", img_size=wrong)
    with pytest.raises(vtoken.ShapeError, match="does not take images"):
        vtoken.plan(timm.create_model("vit_tiny_patch16_224"), "pitome", img_size=32)
