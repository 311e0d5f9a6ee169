"""Thresholds from sample images, and weights published under other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtoken
from tests.contract.table import run
from tests.helpers import assert_same
from tests.methods.sparse_hosts import HOSTS, blocks, sparse
from vtoken.train import load_published_state_dict

PARTS = ("reduce_q.weight", "reduce_q.bias", "reduce_k.weight", "reduce_k.bias", "w_down", "w_up")


@pytest.mark.parametrize("name", ["cls", "registers", "no prefix", "open_clip"])
@pytest.mark.parametrize("density", [0.05, 0.25, 0.6])
def test_calibration_reaches_the_density(name: str, density: float) -> None:
    model = sparse(HOSTS[name].model(), keep_ratio=0.9, basis_threshold=0.0, coef_topk=20)
    x = HOSTS[name].images(batch=16)
    reached = vtoken.calibrate_threshold(model, x, density)
    assert list(reached) == [0, 1, 2]
    assert reached[0] == pytest.approx(density, rel=0.02)  # later blocks see what sparse ones left
    assert all(found == pytest.approx(density, rel=0.1) for found in reached.values())
    config = vtoken.config_of(model)
    assert (config.mode, config.keep_ratio, config.phase) == ("threshold", density, "sparse")
    with torch.no_grad(), vtoken.tracing(model, maps=("mask",)) as trace:
        model(x)
    prefix = trace.num_prefix
    by_head = trace.attention[0].mask[:, :, prefix:].double().mean((0, 2, 3))
    assert by_head.tolist() == pytest.approx([density] * 2, rel=0.02)  # every head has its own threshold
    assert len(set(blocks(model)[0].attn.predictor.threshold.tolist())) == 2
    assert [r.density for r in trace.attention] == list(reached.values())
    other = sparse(HOSTS[name].model(), config)
    other.load_state_dict(model.state_dict())
    assert_same("thresholds travel with the state dict", run(model, x), run(other, x))


def test_chosen_layers_only() -> None:
    model = sparse(HOSTS["cls"].model(), layers=(0, 2))
    assert list(vtoken.calibrate_threshold(model, HOSTS["cls"].images(), 0.2)) == [0, 2]


class Failing(RuntimeError):
    pass


@pytest.mark.parametrize("forward", [1, 2])
def test_a_failure_restores_settings_and_thresholds(forward: int) -> None:
    model, x = sparse(HOSTS["cls"].model(), keep_ratio=(0.3, 0.4, 0.5), mode="threshold"), HOSTS["cls"].images()
    out, config, calls = run(model, x), vtoken.config_of(model), [0]
    thresholds = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("threshold")}

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == forward:
            raise Failing

    handle = model.norm.register_forward_hook(fail)
    with pytest.raises(Failing):
        vtoken.calibrate_threshold(model, x, 0.2)
    handle.remove()
    assert vtoken.config_of(model) == config
    assert_same("thresholds", thresholds, {k: v for k, v in model.state_dict().items() if k.endswith("threshold")})
    assert_same("output", out, run(model, x))


def test_calibration_errors() -> None:
    model, x = HOSTS["cls"].model(), HOSTS["cls"].images()
    with pytest.raises(vtoken.VTokenError, match="Sparsifiner"):
        vtoken.calibrate_threshold(model, x, 0.2)
    vtoken.apply(model, [vtoken.PiToMe(), vtoken.Sparsifiner()])
    with pytest.raises(vtoken.VTokenError, match="nothing else"):
        vtoken.calibrate_threshold(model, x, 0.2)
    for density in (0, 1, 1.5, -0.1):
        with pytest.raises(vtoken.ConfigError, match="density"):
            vtoken.calibrate_threshold(model, x, density)


NAMES = {"reduce_q.weight": "small_q.w", "reduce_q.bias": "small_q.b", "reduce_k.weight": "small_k.w",
         "reduce_k.bias": "small_k.b", "w_down": "mix", "w_up": "basis"}  # fmt: skip


def published(model: Any, turned: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """The model's weights under other names, some of them transposed; without what others do not have."""
    out = {}
    for key, value in model.state_dict().items():
        part = key.partition(".predictor.")[2]
        if part == "threshold":
            continue
        name = key.replace(f"predictor.{part}", NAMES[part]) if part else key
        out[name] = value.T.contiguous() if part in turned else value.clone()
    return out


@pytest.mark.parametrize("turned", [(), ("w_down", "w_up"), ("reduce_q.weight",)])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_renamed_and_transposed_parameters(turned: tuple[str, ...], layers: Any) -> None:
    config, x = vtoken.Sparsifiner(keep_ratio=0.4, layers=layers), HOSTS["registers"].images()
    model, other = sparse(HOSTS["registers"].model(), config), HOSTS["registers"].model(seed=4)
    vtoken.apply(other, config)
    load_published_state_dict(other, published(model, turned), NAMES)
    assert_same("output", run(model, x), run(other, x))
    keys = [k for k in model.state_dict() if not k.endswith("threshold")]
    assert_same("state", {k: model.state_dict()[k] for k in keys}, {k: other.state_dict()[k] for k in keys})


def test_a_shared_projection_under_either_name() -> None:
    config, x = vtoken.Sparsifiner(keep_ratio=0.4, share_proj=True), HOSTS["cls"].images()
    model = sparse(HOSTS["cls"].model(), config)
    for left_out in ("mix", "basis"):
        other = vtoken.apply(HOSTS["cls"].model(seed=4), config)
        state = {k: v for k, v in published(model).items() if not k.endswith("." + left_out)}
        load_published_state_dict(other, state, NAMES)
        assert_same("output", run(model, x), run(other, x))


def test_a_shared_projection_under_both_names() -> None:
    """The same numbers, with the second name given or not; two different matrices are no shared one."""
    config, x = vtoken.Sparsifiner(keep_ratio=0.4, share_proj=True), HOSTS["cls"].images()
    model = sparse(HOSTS["cls"].model(), config)
    one_name = {part: name for part, name in NAMES.items() if part != "w_down"}
    for turned in ((), ("w_down",), ("w_down", "w_up")):
        for names in (NAMES, one_name):
            other = vtoken.apply(HOSTS["cls"].model(seed=4), config)
            load_published_state_dict(other, published(model, turned), names)
            assert_same("output", run(model, x), run(other, x))
    apart = sparse(HOSTS["cls"].model(), vtoken.Sparsifiner(keep_ratio=0.4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(vtoken.ConfigError, match=r"mix' and .*basis' differ.*share_proj=False"):
        load_published_state_dict(model, published(apart), NAMES)
    with pytest.raises(vtoken.ConfigError, match=r"mix'.*no place"):
        load_published_state_dict(model, published(apart), one_name)
    assert_same("untouched", before, dict(model.state_dict()))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("place", ["bare", "inside"])
def test_an_attention_of_a_network_of_ones_own(place: str, share: bool) -> None:
    def build(seed: int) -> Any:
        config = vtoken.Sparsifiner(keep_ratio=0.4, share_proj=share, seed=seed)
        torch.manual_seed(seed)
        made = [vtoken.nn.SparseAttention(16, 2, grid=(4, 4), config=config) for _ in range(2)]
        return made[0] if place == "bare" else torch.nn.Sequential(*made)

    model, other, x = build(0), build(1), torch.randn(2, 17, 16)
    state = {}
    for key, value in model.state_dict().items():
        before, _, part = key.rpartition("predictor.")
        if part != "threshold":
            state[before + NAMES.get(part, part)] = value
    assert not torch.equal(model(x), other(x))
    load_published_state_dict(other, state, NAMES)
    assert torch.equal(model(x), other(x))


def test_two_keys_for_one_parameter_and_values_that_are_no_tensors() -> None:
    model = sparse(HOSTS["cls"].model(), keep_ratio=0.4)
    state, before = published(model), {k: v.clone() for k, v in model.state_dict().items()}
    key = "blocks.0.attn.predictor.w_up"  # the library's own name beside the given one
    load_published_state_dict(model, state | {key: before[key]}, NAMES)
    with pytest.raises(vtoken.ConfigError, match=r"basis' and 'blocks\.0\.attn\.predictor\.w_up' differ"):
        load_published_state_dict(model, state | {key: before[key] + 1}, NAMES)
    with pytest.raises(vtoken.ConfigError, match="'epoch' is no tensor but a int"):
        load_published_state_dict(model, state | {"epoch": 3}, NAMES)
    assert_same("untouched", before, dict(model.state_dict()))


def test_of_two_ends_that_fit_the_longer_is_meant() -> None:
    model = sparse(HOSTS["cls"].model(), keep_ratio=0.4)
    other = vtoken.apply(HOSTS["cls"].model(seed=4), vtoken.Sparsifiner(keep_ratio=0.4))
    names = NAMES | {"w_down": "basis", "w_up": "up.basis"}
    state = {k.replace("attn.basis", "attn.up.basis").replace("attn.mix", "attn.basis"): v
             for k, v in published(model).items()}  # fmt: skip
    load_published_state_dict(other, state, names)
    assert_same("output", run(model, HOSTS["cls"].images()), run(other, HOSTS["cls"].images()))


def test_what_does_not_fit_is_refused_and_nothing_is_loaded() -> None:
    model = sparse(HOSTS["cls"].model(), keep_ratio=0.4)
    state, before = published(model), {k: v.clone() for k, v in model.state_dict().items()}
    good = {k: v + 1 for k, v in state.items()}
    first = "blocks.0.attn."
    cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
        (good, NAMES | {"w_middle": "middle"}, "w_middle"),
        (good, {k: v for k, v in NAMES.items() if k != "w_up"}, "basis"),
        (good | {"blocks.0.attn.extra": torch.zeros(1)}, NAMES, "extra"),
        ({k: v for k, v in good.items() if k != first + "mix"}, NAMES, r"lacks 1 .*w_down"),
        ({k: v for k, v in good.items() if k != "norm.weight"}, NAMES, r"lacks 1 .*norm\.weight"),
        (good | {first + "mix": torch.zeros(26, 4)}, NAMES, "num_basis"),
        (good | {first + "small_q.b": torch.zeros(9)}, NAMES, "small_q.b"),
    ]
    for bad, names, match in cases:
        with pytest.raises(vtoken.ConfigError, match=match):
            load_published_state_dict(model, bad, names)
        assert_same("untouched", before, dict(model.state_dict()))


@pytest.mark.parametrize("mode", ["grouped", "exact", "threshold", "random"])
@pytest.mark.parametrize("backend", ["auto", "grouped", "sparse", "masked", "dense_masked"])
def test_any_mode_and_backend_can_be_calibrated(mode: str, backend: str) -> None:
    if (mode == "grouped") != (backend == "grouped") and backend in ("grouped", "sparse"):
        pytest.skip("no such settings")
    x, given = HOSTS["cls"].images(), {"keep_ratio": 0.5, "mode": mode, "backend": backend, "query_group": 4}
    model = sparse(HOSTS["cls"].model(), **given)
    reached = vtoken.calibrate_threshold(model, x, 0.3)
    plain = sparse(HOSTS["cls"].model(), keep_ratio=0.5)
    assert reached == vtoken.calibrate_threshold(plain, x, 0.3)
    config = vtoken.config_of(model)
    assert (config.mode, config.backend) == ("threshold", "auto" if backend == "grouped" else backend)
    torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-5, atol=1e-5)


def test_a_failure_restores_the_backend() -> None:
    model, x = sparse(HOSTS["cls"].model(), mode="grouped", backend="grouped"), HOSTS["cls"].images()
    config, out = vtoken.config_of(model), run(model, x)

    def fail(*_: Any) -> None:
        raise Failing

    handle = model.norm.register_forward_hook(fail)
    with pytest.raises(Failing):
        vtoken.calibrate_threshold(model, x, 0.2)
    handle.remove()
    assert vtoken.config_of(model) == config
    assert_same("output", out, run(model, x))


@pytest.mark.parametrize("density", [0, 1, -0.1, 1.5, "no", True, None, float("nan")])
def test_the_density_is_a_share(density: Any) -> None:
    model, x = sparse(HOSTS["cls"].model()), HOSTS["cls"].images()
    with pytest.raises(vtoken.ConfigError, match="density"):
        vtoken.calibrate_threshold(model, x, density)
    for images in (x[:0], x[0], "no", None):
        with pytest.raises(vtoken.InputError, match="image"):
            vtoken.calibrate_threshold(model, images, 0.5)
