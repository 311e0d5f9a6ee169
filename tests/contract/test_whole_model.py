"""The patched model against the slow one: every option that changes what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtoken
from tests.contract.slow_model import Settings, run_slowly
from tests.contract.table import traced
from tests.helpers import Host, assert_close, eva, vit

_SMALL: dict[str, Any] = {"img_size": 24, "depth": 4}
_ROPE: dict[str, Any] = {"use_rot_pos_emb": True}
HOSTS = {
    "cls": Host("cls", lambda: vit(**_SMALL, init_values=1e-5), (3, 24, 24)),
    "avg": Host("avg", lambda: vit(**_SMALL, global_pool="avg", qk_norm=True), (3, 24, 24)),
    "prefix": Host("prefix", lambda: vit(**_SMALL, global_pool="avg", class_token=True, reg_tokens=2), (3, 24, 24)),
    "eva": Host(
        "eva", lambda: eva(**_SMALL, **_ROPE, ref_feat_shape=(6, 6), swiglu_mlp=True, init_values=1e-5),
        (3, 24, 24),
    ),
    "eva_mixed": Host(
        "eva_mixed",
        lambda: eva(**_SMALL, **_ROPE, rope_type="mixed", attn_type="rope", qk_norm=True, num_reg_tokens=1),
        (3, 24, 24),
    ),
}  # fmt: skip
_PRESETS = {
    "deit_code": ("pitome_pairs", "pitome_pairs", "pitome", "pitome"),
    "mae_code": ("pitome", "pitome", "pitome_pairs", "pitome_pairs"),
    "clip_llava_code": ("tome", "tome", "tome", "pitome"),
}
#: What else the published code does.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "deit_code": {"margin": 0.75, "prop_attn": False},
    "mae_code": {"margin": 0.75, "prop_attn": False},
    "clip_llava_code": {"prop_attn": False, "metric": "hidden", "place": "after", "reduction": "mean"},
}


UNLIKE_PUBLISHED: dict[str, Any] = {
    "margin": 0.6, "prop_attn": True, "metric": "key_concat", "place": "between", "reduction": "wavg",
}  # fmt: skip


def check(name: str, config: vtoken.MethodConfig, settings: Settings) -> None:
    """Logits, features in raster order, sizes, anchors and groups agree."""
    host = HOSTS[name]
    model, x = host.model(dtype=torch.float64), host.images(dtype=torch.float64)
    with torch.no_grad():
        logits, left = run_slowly(model, x, settings)
        vtoken.apply(model, config)
        assert_close("logits", logits, model(x), 1e-9)
    rows, trace = traced(model, x, "forward_features")
    assert trace.size is not None
    assert trace.anchor is not None
    assert trace.dest is not None
    for b, t in enumerate(left):
        order = sorted(range(len(t.anchor)), key=t.anchor.__getitem__)
        assert trace.anchor[b].tolist() == [t.anchor[i] for i in order]
        assert trace.size[b].tolist() == [t.size[i] for i in order]
        for row, i in enumerate(order):
            assert (trace.dest[b] == row).nonzero().flatten().tolist() == sorted(t.members[i]), (
                f"group {row} of image {b}"
            )
        assert_close("features", model.norm(t.x[order]), rows[b], 1e-9)


def both(name: str, method: str = "pitome", variants: tuple[str, ...] = (), **options: Any) -> None:
    """The same options in both worlds."""
    amount = {} if "r" in options or "ratio" in options else {"ratio": 0.75}
    config = {"pitome": vtoken.PiToMe, "tome": vtoken.ToMe}[method](**options, **amount)
    options.pop("variant", None)
    if options.get("r") is not None:
        options["ratio"] = None
    check(name, config, Settings(method=method, variants=variants, **options, **({} if "r" in options else amount)))


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", ["pitome", "tome"])
def test_defaults(name: str, method: str) -> None:
    both(name, method)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("metric", ["key_concat", "hidden"])
@pytest.mark.parametrize("method", ["pitome", "tome"])
def test_metrics(name: str, metric: str, method: str) -> None:
    both(name, method, metric=metric)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", ["pitome", "tome"])
def test_merging_after_the_mlp(name: str, method: str) -> None:
    both(name, method, place="after")
    both(name, method, place="after", metric="hidden")


@pytest.mark.parametrize("name", HOSTS)
def test_no_proportional_attention(name: str) -> None:
    both(name, prop_attn=False)


@pytest.mark.parametrize("name", ["cls", "prefix", "eva"])
@pytest.mark.parametrize("reduction", ["mean", "amax", "prune"])
@pytest.mark.parametrize("method", ["pitome", "tome"])
def test_reductions(name: str, reduction: str, method: str) -> None:
    both(name, method, reduction=reduction)


@pytest.mark.parametrize("name", ["cls", "prefix", "eva_mixed"])
@pytest.mark.parametrize("variant", ["pitome_pairs", "tome", *_PRESETS])
def test_variants(name: str, variant: str) -> None:
    layers = _PRESETS.get(variant, (variant,) * 4)
    check(name, vtoken.PiToMe(ratio=0.75, variant=variant), Settings(variants=layers, **_PUBLISHED.get(variant, {})))
    both(name, variants=layers, variant=variant, **UNLIKE_PUBLISHED)


@pytest.mark.parametrize("name", ["cls", "avg", "eva"])
def test_energy_margin_and_alpha(name: str) -> None:
    both(name, energy="eq4")
    both(name, energy="eq4", margin=0.3, alpha=0.4)
    both(name, margin=0.2, alpha=0.5, ratio=0.6)
    both(name, margin=-0.5, alpha=0.0)


@pytest.mark.parametrize("name", ["cls", "prefix", "eva_mixed"])
@pytest.mark.parametrize("method", ["pitome", "tome"])
def test_amounts_and_layers(name: str, method: str) -> None:
    both(name, method, r=5)
    both(name, method, r=40)  # more than can go
    both(name, method, layers=(1, 3))
    both(name, method, ratio=0.3)


def test_the_settings_of_this_file_do_differ() -> None:
    """Were two options to give the same logits, the checks above could not tell them apart."""
    host = HOSTS["prefix"]
    model, x = host.model(dtype=torch.float64), host.images(dtype=torch.float64)
    changes: list[dict[str, Any]] = [
        {}, {"method": "tome"}, {"metric": "key_concat"}, {"metric": "hidden"}, {"place": "after"},
        {"prop_attn": False}, {"reduction": "mean"}, {"reduction": "amax"}, {"reduction": "prune"},
        {"energy": "eq4", "margin": 0.3}, {"margin": 0.2, "alpha": 0.5}, *({"variants": v} for v in _PRESETS.values()),
    ]  # fmt: skip
    with torch.no_grad():
        found = [run_slowly(model, x, Settings(**change))[0] for change in changes]
    for i, a in enumerate(found):
        for j in range(i):
            assert float((a - found[j]).abs().max()) > 1e-6, f"{changes[i]} and {changes[j]} agree"
