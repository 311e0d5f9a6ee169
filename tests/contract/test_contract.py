"""Promises that hold for every host and every method (docs/mechanism.md 1 and 2)."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch

import vtoken
from tests.contract.table import (
    MethodRow,
    assert_planned,
    dimensions,
    every_case,
    every_host,
    features,
    forward,
    full_table,
    outputs,
    run,
    snapshot,
    traced,
)
from tests.helpers import Host, assert_close, assert_same, counted
from vtoken.core.patch import PREDICTOR


@full_table()
def test_settings_that_remove_nothing_change_no_bit(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    stock = outputs(model, x)
    for config in method.noops:
        with vtoken.applied(model, config):
            assert_same(f"{host.name} with {config}", stock, outputs(model, x))


@every_case()
def test_fewer_tokens_and_another_output(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    stock = run(model, x)
    vtoken.apply(model, method.reduces)
    out, trace = traced(model, x)
    plan = vtoken.plan(model, img_size=host.shape[1:])
    assert plan.exact is method.exact
    assert_planned(plan, trace)
    assert (trace.tokens[-1] < trace.tokens[0]) is method.removes
    assert trace.num_prefix == plan.num_prefix == host.num_prefix(model)
    assert trace.grid is not None
    assert trace.grid[0] * trace.grid[1] + trace.num_prefix == trace.tokens[0]
    assert out.shape[0] == stock.shape[0]
    assert bool(out.isfinite().all())
    if out.shape == stock.shape:
        assert not torch.allclose(out, stock, rtol=1e-3, atol=1e-3), "the reduced model computes what the full one does"


@every_case()
def test_group_map_sizes_and_anchors_describe_one_partition(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    _, trace = traced(model, x)
    dest, size, anchor = trace.dest, trace.size, trace.anchor
    assert dest is not None
    assert size is not None
    assert anchor is not None
    count, prefix = trace.tokens[-1], trace.num_prefix
    assert torch.equal(dest[:, :prefix], torch.arange(prefix).expand(dest.shape[0], -1)), "prefix rows must not move"
    assert torch.equal(dest.gather(1, anchor), torch.arange(count).expand(dest.shape[0], -1)), (
        "an anchor lies in its group"
    )
    assert bool((anchor.diff(dim=1) > 0).all()), "rows must come in raster order"
    counted = torch.stack([torch.bincount(d, minlength=count) for d in dest]).float()
    assert size.dtype == torch.float32
    assert torch.equal(size, counted if method.keeps_mass else torch.ones_like(counted))
    assert [d.shape[1] for d in trace.layer_dest] == [trace.tokens[0]] * (len(trace.tokens) - 1)
    for layer, d in enumerate(trace.layer_dest):
        assert int(d.max()) + 1 == trace.tokens[layer + 1]
        assert len(d[0].unique()) == trace.tokens[layer + 1]
    for earlier, later in zip(trace.layer_dest, trace.layer_dest[1:], strict=False):
        for b in range(dest.shape[0]):  # groups only grow: one earlier group never splits
            pairs = {(int(e), int(g)) for e, g in zip(earlier[b], later[b], strict=True)}
            assert len(pairs) == int(earlier[b].max()) + 1


@every_host()
def test_report_agrees_with_torchs_counter(host: Host, method: MethodRow) -> None:
    # timm without gradients: the counter's module hooks stumble over latent parameters otherwise. The others with:
    # without, nn.MultiheadAttention takes a fast path that no counter sees.
    model, x = host.model().requires_grad_(host.library != "timm"), host.images(batch=1)
    gradients = torch.no_grad if host.library == "timm" else contextlib.nullcontext
    cost = vtoken.report(model, method.reduces, input_size=host.shape)
    counts = []
    for config in (None, method.reduces):
        if config is not None:
            vtoken.apply(model, config)
        with counted() as counter, gradients():
            forward(model, x)
        counts.append(counter.get_total_flops())
    before, after = counts
    if not method.removes:  # so few tokens run under a dense mask here; tests/accounting has the formulas
        after = cost.flops_after
    assert abs(cost.flops_before - before) <= 0.01 * before, (cost.flops_before, before)
    # The report counts averaging as the product with a one-hot matrix that accelerators run; the CPU adds rows instead.
    pairs = zip(cost.tokens, cost.tokens[1:], strict=False)
    width, prefix = dimensions(model)
    averaging = sum(2 * (a - b) * (b - prefix) * width for a, b in pairs)
    if method.exact:
        assert 0.99 * after <= cost.flops_after <= 1.01 * after + averaging, (cost.flops_after, after, averaging)
    else:
        assert cost.macs_most is not None
        assert cost.flops_after < after < 2 * cost.macs_most
    assert cost.flops_after < cost.flops_before or not method.removes  # a predictor costs more than so few tokens
    assert cost.exact is method.exact
    assert cost.tokens == vtoken.plan(model, img_size=host.shape[1:]).least
    again = vtoken.report(model, input_size=host.shape).flops_after  # also of the patched model
    # Before there are predictors, none of their entries is known to be 0.
    assert again == cost.flops_after if method.removes else again < cost.flops_after


@every_case()
def test_state_dict_class_and_structure_are_kept(host: Host, method: MethodRow) -> None:
    model = host.model()
    classes = [type(m) for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = [(p.dtype, p.device, p.requires_grad, id(p)) for p in model.parameters()]
    assert vtoken.apply(model, method.reduces) is model
    after = model.state_dict()
    assert [k for k in after if method.removes or PREDICTOR not in k] == list(before)
    assert (len(after) == len(before)) is method.removes
    assert all(torch.equal(after[k], v) for k, v in before.items())
    kept = [p for n, p in model.named_parameters() if PREDICTOR not in n]
    assert [(p.dtype, p.device, p.requires_grad, id(p)) for p in kept] == settings
    modules = [m for n, m in model.named_modules() if PREDICTOR not in n]
    for module, cls in zip(modules, classes, strict=True):
        assert isinstance(module, cls)
        assert (type(module).__name__, type(module).__qualname__, type(module).__module__) == (
            cls.__name__, cls.__qualname__, cls.__module__,
        )  # fmt: skip
    other = host.model(seed=5)
    model.load_state_dict(other.state_dict(), strict=method.removes)
    vtoken.apply(other, method.reduces)
    model.load_state_dict(other.state_dict(), strict=True)
    x = host.images()
    assert_same("after loading another checkpoint", run(other, x), run(model, x))
    assert vtoken.config_of(model) == method.reduces
    assert vtoken.is_applied(model)


@every_case()
def test_remove_leaves_no_residue(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    stock = outputs(model, x)
    before = snapshot(model)
    vtoken.apply(model, method.reduces)
    run(model, x)
    traced(model, x)
    assert vtoken.remove(model) is model
    assert snapshot(model) == before
    assert not vtoken.is_applied(model)
    assert vtoken.config_of(model) is None
    assert_same("after removal", stock, outputs(model, x))


@every_host()
def test_deepcopy_works_and_is_independent(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    out = run(model, x)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert_same("the copy", out, run(twin, x))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    vtoken.configure(twin, **({"layers": ()} if method.removes else {"keep_ratio": 1.0}))
    assert_same("the original after its copy changed", out, run(model, x))
    assert vtoken.config_of(model) == method.reduces
    vtoken.remove(twin)
    assert vtoken.is_applied(model)
    assert_same("the original after its copy was unpatched", out, run(model, x))


@every_host()
def test_pickle_and_torch_save_round_trips(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    try:
        pickle.dumps(model)
    except AttributeError as error:
        pytest.skip(f"the unpatched model cannot: {error}")
    vtoken.apply(model, method.reduces)
    fresh = _round_trips(model)
    out = run(model, x)
    for when, twins in (("before the first run", fresh), ("after it", _round_trips(model))):
        for name, twin in twins.items():
            assert type(twin) is type(model), (name, when)
            assert vtoken.config_of(twin) == method.reduces, (name, when)
            assert_same(f"{name} {when}", out, run(twin, x))
            vtoken.remove(twin)
            assert not vtoken.is_applied(twin), (name, when)


def _round_trips(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {"pickle": pickle.loads(pickle.dumps(model)), "torch.save": torch.load(file, weights_only=False)}


@every_host(exact=True)
def test_an_image_does_not_depend_on_its_batch(host: Host, method: MethodRow) -> None:
    model, x = host.model(dtype=torch.float64), host.images(batch=4, dtype=torch.float64)
    vtoken.apply(model, method.reduces)
    whole, trace = features(model, x)
    assert trace.dest is not None
    logits = run(model, x)
    order = torch.tensor([2, 0, 3, 1])
    assert_close("logits of the permuted batch", logits[order], run(model, x[order]), 1e-10)
    for index in range(4):
        alone, single = features(model, x[index : index + 1])
        assert single.dest is not None
        assert torch.equal(single.dest[0], trace.dest[index]), f"image {index} merges differently alone"
        assert_close(f"features of image {index}", whole[index], alone[0], 1e-10)
        assert_close(f"logits of image {index}", logits[index], run(model, x[index : index + 1])[0], 1e-10)
    if method.removes:
        assert not torch.equal(trace.dest[0], trace.dest[1]), "the images were to be merged differently"


@every_host()
def test_an_empty_batch_gives_an_empty_result_where_the_model_itself_can(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images(batch=2)
    try:
        run(model, x[:0])
    except RuntimeError:
        pytest.skip("the unpatched model cannot run an empty batch")
    vtoken.apply(model, method.reduces)
    assert run(model, x[:0]).shape == (0, *run(model, x).shape[1:])


@every_case()
def test_repeatable_and_random_generators_untouched(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    vtoken.apply(model, method.reduces)
    assert_same("second forward", run(model, x), run(model, x))
    vtoken.plan(model, img_size=host.shape[1:])
    vtoken.report(model, input_size=host.shape)
    vtoken.remove(model)
    assert torch.equal(torch.get_rng_state(), states[0]), "torch's generator was used"
    assert random.getstate() == states[1], "Python's generator was used"
    assert np.random.get_state()[1].tolist() == states[2], "NumPy's generator was used"  # noqa: NPY002
