"""How a merged model may be called: masks, other sizes, tracing, functional calls, and what stays in memory."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import vtoken
from tests.contract.table import (
    PITOME,
    MethodRow,
    arguments,
    call,
    distinct_hosts,
    every_host,
    installed,
    layer_maps,
    main,
    outputs,
    run,
    snapshot,
    traced,
)
from tests.contract.table import host as host_row
from tests.helpers import Host, assert_close, assert_same, images
from vtoken.core.state import TokenState


def test_attention_masks_are_refused_by_name_and_reason() -> None:
    for name in ("vit_token", "eva02"):
        host = host_row(name)
        model, x = host.model(), host.images()
        vtoken.apply(model, PITOME.reduces)
        out, mask = run(model, x), torch.zeros(65, 65)
        for entry in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=r"mask.*(merged|removed)"):
                entry(x, attn_mask=mask)
            with pytest.raises(ValueError, match=r"is_causal.*(merged|removed)"):
                entry(x, is_causal=True)
        assert_same("the next forward", out, run(model, x))


@pytest.mark.parametrize("name", ["vit_token", "eva02"])
def test_masks_are_served_where_nothing_is_removed(name: str) -> None:
    """docs/methods/pitome.md 9: a mask is an error where a merge would happen; else the no-op promise holds."""
    host = host_row(name)
    model, x = host.model(), host.images()
    mask = torch.randn(65, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model(x, attn_mask=mask), model(x, is_causal=True)
        with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
            assert_same("with a mask", stock, (model(x, attn_mask=mask), model(x, is_causal=True)))


def test_padded_naflex_batches_are_refused() -> None:
    host = host_row("naflex_avg")
    model = vtoken.apply(host.model(), PITOME.reduces)
    rows, cols = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    batch = {
        "patches": torch.randn(2, 16, 48),
        "patch_coord": torch.stack([rows.flatten(), cols.flatten()], -1).expand(2, -1, -1),
        "patch_valid": torch.arange(16).expand(2, -1) < torch.tensor([[16], [12]]),
    }
    with pytest.raises(ValueError, match="mask"):
        model(batch)
    with pytest.raises(ValueError, match="mask"):
        model.forward_intermediates(batch, output_fmt="NLC")
    assert run(model, host.images()).shape == (2, 10)


def test_blocks_called_by_themselves_run_as_they_are() -> None:
    for name in ("vit_token", "eva02", "eva_postnorm", "vit_respost"):
        host = host_row(name)
        model, x = host.model(), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
        mask = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            stock = [model.blocks[1](x), model.blocks[1](x, attn_mask=mask), model.blocks[1](x, is_causal=True)]
            vtoken.apply(model, PITOME.reduces)
            assert_same(name, stock, [model.blocks[1](x), model.blocks[1](x, attn_mask=mask),
                                      model.blocks[1](x, is_causal=True)])  # fmt: skip


@pytest.mark.parametrize("name", ["vit_token", "vit_avg_prefix", "distilled", "eva02", "eva_mixed", "vit_map"])
def test_set_input_size_and_reset_classifier_after_apply(name: str) -> None:
    host = host_row(name)
    model, late = host.model(), host.model()
    vtoken.apply(model, PITOME.reduces)
    small = traced(model, host.images())[1].tokens
    for m in (model, late):
        m.set_input_size(img_size=(48, 40))
        m.reset_classifier(7)
    late.load_state_dict(model.state_dict())
    stock = late.num_prefix_tokens + 12 * 10
    vtoken.apply(late, PITOME.reduces)
    x = images((3, 48, 40))
    out, trace = traced(model, x)
    assert out.shape == (2, 7)
    assert trace.tokens[0] == stock > small[0]
    assert tuple(trace.tokens) == vtoken.plan(model).tokens == vtoken.report(model).tokens
    assert_same("as when applied last", run(late, x), out)
    with torch.no_grad():
        assert model.forward_intermediates(x, intermediates_only=True)[0].shape == (2, 32, 12, 10)
        assert_close("head", out, model.forward_head(model.forward_features(x)), 1e-5)


@pytest.mark.parametrize("name", ["vit_dynamic", "eva_dinov3", "eva_rope", "naflex_avg", "naflex_rope", "naflex_map"])
def test_one_patched_model_serves_images_of_any_size(name: str) -> None:
    host = host_row(name)
    model = vtoken.apply(host.model(), PITOME.reduces)
    for size in ((32, 32), (48, 20), (16, 64), (32, 32)):
        x = images((3, *size))
        fresh = vtoken.apply(host.model(), PITOME.reduces)
        out, trace = traced(model, x)
        assert tuple(trace.tokens) == vtoken.plan(model, img_size=size).tokens
        assert_same(f"{size}", run(fresh, x), out)
        with torch.no_grad():
            assert_close("head", out, model.forward_head(model.forward_features(x)), 1e-5)
            assert model.forward_intermediates(x, intermediates_only=True)[-1].shape[2:] == (size[0] // 4, size[1] // 4)


@pytest.mark.parametrize("name", installed("hf_clip", "hf_siglip2", "hf_vit", "hf_deit", "hf_dino_reg", "hf_dino_maps"))
def test_one_patched_transformers_model_serves_images_of_any_size(name: str) -> None:
    host = host_row(name)
    model = vtoken.apply(host.model(), PITOME.reduces)
    for size in ((32, 32), (48, 20), (16, 64), (32, 32)):
        x = images((3, *size))
        fresh = vtoken.apply(host.model(), PITOME.reduces)
        out, trace = traced(model, x)
        assert tuple(trace.tokens) == vtoken.plan(model, img_size=size).tokens
        assert trace.grid == (size[0] // 4, size[1] // 4)
        assert_same(f"{size}", run(fresh, x), out)
        assert all(m.shape[2:] == trace.grid for m in layer_maps(model, x)[0])


def test_naflex_built_by_its_constructor() -> None:
    """Without timm's registry there is no pretrained_cfg to read an image size from."""
    model = timm.models.naflexvit.NaFlexVit(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=10, global_pool="avg"
    ).eval()
    x = images((3, 32, 32))
    vtoken.apply(model, PITOME.reduces)
    _, trace = traced(model, x)
    assert trace.tokens[-1] < trace.tokens[0]
    assert tuple(trace.tokens) == vtoken.plan(model, img_size=32).tokens


@every_host()
def test_functional_call(host: Host, method: MethodRow) -> None:
    model, other, x = host.model(), host.model(seed=3), host.images()
    vtoken.apply(model, method.reduces)
    vtoken.apply(other, method.reduces)
    out, before = run(model, x), snapshot(model)
    # They want gradients as before: nn.MultiheadAttention, patched or not, runs otherwise with weights that want none.
    tensors = (*other.named_parameters(), *other.named_buffers())
    state = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in tensors}
    args, kwargs = arguments(model, x)
    with torch.no_grad():
        found = main(torch.func.functional_call(model, state, args, kwargs))
        assert_same("with other weights", run(other, x), found)
    assert snapshot(model) == before
    assert_same("with its own weights again", out, run(model, x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@distinct_hosts(exact=True)
def test_vmap_over_stacked_parameters(host: Host, method: MethodRow) -> None:
    if not method.removes:
        pytest.skip("selection on the CPU looks at values, which vmap does not show")
    models = [host.model(seed=s, dtype=torch.float64) for s in (0, 1)]
    x = host.images(dtype=torch.float64)

    def ensemble() -> Tensor:
        params, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0])
        args, kwargs = arguments(base, x)

        def one(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            return main(torch.func.functional_call(base, (p, b), args, kwargs))

        return torch.func.vmap(one, randomness="error")(params, buffers)

    with torch.no_grad():
        try:
            ensemble()
        except RuntimeError as error:
            pytest.skip(f"the unpatched model cannot: {error}")
        for model in models:
            vtoken.apply(model, method.reduces)
        assert_close("ensemble", torch.stack([call(m, x) for m in models]), ensemble(), 1e-9)


@every_host()
def test_no_tensor_survives_a_forward_with_the_collector_off(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)

    def use() -> None:
        outputs(model, x)
        traced(model, x)
        if host.library == "timm":
            with torch.no_grad():
                model.forward_head(model.forward_features(x))
                model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=model.num_prefix_tokens > 0)
                vtoken.trace(model, x)

    use()  # rotary tables and the like are made once
    gc.disable()
    gc.freeze()  # what there is so far is not listed any more
    try:
        use()
        found = gc.get_objects()
        left = [o for o in found if issubclass(type(o), Tensor)]
        states = [o for o in found if type(o) is TokenState]
    finally:
        gc.unfreeze()
        gc.enable()
    assert not left, f"{len(left)} tensors alive, the first of shape {tuple(left[0].shape)}"
    assert not states


def test_nothing_is_recorded_unless_asked_for() -> None:
    host = host_row("vit_token")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    before = snapshot(model)
    out, record = vtoken.trace(model, x)
    assert snapshot(model) == before
    assert record.num_forwards == 1
    first = record.dest
    assert_same("traced and untraced", run(model, x), out.detach())
    assert record.num_forwards == 1, "recorded after tracing ended"
    assert record.dest is first
    with vtoken.tracing(model) as record:
        run(model, x)
        run(model, x[:1])
        model.forward_features(x[:1])
        with vtoken.tracing(model) as inner:
            run(model, x)
        assert inner.num_forwards == 1
    assert record.num_forwards == 3
    assert record.dest is not None
    assert record.dest.shape == (1, 65)


def test_tracing_errors() -> None:
    host = host_row("vit_token")
    model, x = host.model(), host.images()
    with pytest.raises(vtoken.VTokenError, match="no method is applied"), vtoken.tracing(model):
        pass
    vtoken.apply(model, PITOME.reduces)
    with pytest.raises(vtoken.VTokenError, match="nothing was recorded"), vtoken.tracing(model):
        pass
    with pytest.raises(KeyError), vtoken.tracing(model) as record:  # the caller's own error comes through
        raise KeyError
    run(model, x)
    assert record.num_forwards == 0
    with vtoken.tracing(torch.nn.Sequential(model)) as record:  # a module that holds a patched one
        run(model, x)
    assert record.num_forwards == 1


def test_tracing_sees_only_its_own_thread() -> None:
    host = host_row("vit_token")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    failures: list[BaseException] = []

    def other() -> None:
        try:
            for batch in (1, 3):
                _, record = traced(model, host.images(batch=batch))
                assert record.num_forwards == 1
                assert record.dest is not None
                assert record.dest.shape[0] == batch
            run(model, host.images(batch=4))
        except BaseException as error:
            failures.append(error)

    with vtoken.tracing(model) as record:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert record.num_forwards == 0
        run(model, x)
    assert not failures, failures
    assert record.num_forwards == 1
    assert record.dest is not None
    assert record.dest.shape[0] == 2


def test_trace_of_a_forward_that_removes_nothing() -> None:
    host = host_row("vit_reg")
    model, x = host.model(), host.images()
    vtoken.apply(model, vtoken.PiToMe(ratio=1.0))
    _, record = traced(model, x)
    assert record.tokens == [68, 68, 68, 68]
    everything = torch.arange(68).expand(2, -1)
    for found in (record.dest, record.anchor, *record.layer_dest):
        assert torch.equal(found, everything)
    assert torch.equal(record.size, torch.ones(2, 68))


def test_positional_and_keyword_calls() -> None:
    host = host_row("vit_token")
    model, x = host.model(), host.images()
    vtoken.apply(model, PITOME.reduces)
    arguments: list[dict[str, Any]] = [{"x": x}, {"x": x, "attn_mask": None}]
    for kwargs in arguments:
        with torch.no_grad(), vtoken.tracing(model) as record:
            assert_same(str(list(kwargs)), run(model, x), model(**kwargs))
        assert record.grid == (8, 8)
