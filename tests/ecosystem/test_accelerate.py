"""accelerate: prepare, mixed precision, accumulation, saved state, offloading hooks."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vtoken
from tests.ecosystem.towers import OPEN_CLIP, PITOME, TIMM, Tower, either_order, every_tower, gradients, loss_of
from tests.helpers import Host, assert_close, assert_same, eva

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def accelerator(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **options)


@every_tower
def test_a_step_is_that_of_plain_torch_and_state_comes_back(tower: Tower, tmp_path: Path) -> None:
    x = tower.images()
    plain = vtoken.apply(tower.model(), PITOME).train()
    by_hand = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    loss_of(plain(x)).backward()
    by_hand.step()

    inner = vtoken.apply(tower.model(), PITOME).train()
    accel = accelerator()
    model, optimizer = accel.prepare(inner, torch.optim.AdamW(inner.parameters(), lr=1e-3))
    accel.backward(loss_of(model(x)))
    optimizer.step()
    assert accel.unwrap_model(model) is inner
    assert_same("weights after a step", dict(plain.named_parameters()), dict(inner.named_parameters()))

    accel.save_state(str(tmp_path))
    saved = {n: p.detach().clone() for n, p in inner.named_parameters()}
    optimizer.zero_grad()
    accel.backward(loss_of(model(x)))
    optimizer.step()
    assert any(not torch.equal(saved[n], p) for n, p in inner.named_parameters())
    accel.load_state(str(tmp_path))
    assert_same("loaded weights", saved, dict(inner.named_parameters()))
    assert vtoken.trace(model, x)[1].tokens == tower.tokens
    stock = tower.model().train()
    stock.load_state_dict(vtoken.remove(accel.unwrap_model(model)).state_dict())
    assert_same("removed", stock(x), inner(x))


@every_tower
def test_accumulated_gradients_are_those_of_the_whole_batch(tower: Tower) -> None:
    x = tower.images(batch=4, dtype=torch.float64)
    inner = vtoken.apply(tower.model(dtype=torch.float64), PITOME).train()
    loss_of(inner(x)).backward()
    expected = gradients(inner)
    inner.zero_grad()
    accel = accelerator(gradient_accumulation_steps=2)
    model, optimizer = accel.prepare(inner, torch.optim.SGD(inner.parameters(), lr=1.0))
    before = {n: p.detach().clone() for n, p in inner.named_parameters()}
    for half in x.chunk(2):
        with accel.accumulate(model):
            accel.backward(loss_of(model(half)))
            if accel.sync_gradients:
                for name, grad in expected.items():
                    if float(grad.abs().max()) > 1e-9:
                        assert_close(name, grad, inner.get_parameter(name).grad, 1e-9)
            optimizer.step()
            optimizer.zero_grad()
            if not accel.sync_gradients:
                assert_same("no step after the first half", before, dict(inner.named_parameters()))
    assert any(not torch.equal(before[n], p) for n, p in inner.named_parameters())


@every_tower
def test_mixed_precision_is_autocast_and_comes_off_before_remove(tower: Tower) -> None:
    x, plain = tower.images(), vtoken.apply(tower.model(), PITOME)
    accel = accelerator(mixed_precision="bf16")
    model = accel.prepare(vtoken.apply(tower.model(), PITOME))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain(x).float()
        out, trace = vtoken.trace(model, x)
        assert out.dtype == torch.float32
        assert_same("autocast", expected, out)
        assert trace.tokens == tower.tokens
        assert trace.size.dtype == torch.float32
        with pytest.raises(vtoken.VTokenError, match="keep_fp32_wrapper=False"):
            vtoken.remove(model)
        assert_same("still there", expected, model(x))
        bare = accel.unwrap_model(model, keep_fp32_wrapper=False)
        assert_close("without autocast", plain(x), bare(x), 0.0)
        vtoken.remove(bare)
        assert_same("removed", tower.model()(x), bare(x))
        vtoken.apply(bare, PITOME)
        assert_same("applied again", plain(x), bare(x))


def test_apply_after_mixed_precision_reduces_or_refuses() -> None:
    x = TIMM.images()
    accel = accelerator(mixed_precision="bf16")
    model = vtoken.apply(accel.prepare(TIMM.model()), PITOME)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = vtoken.apply(TIMM.model(), PITOME)(x).float()
    with torch.no_grad():
        assert_same("timm", expected, model(x))
    prepared = accel.prepare(OPEN_CLIP.model())
    with pytest.raises(vtoken.UnsupportedModelError, match="forward was replaced on the instance"):
        vtoken.apply(prepared, PITOME)
    assert not vtoken.is_applied(prepared)


def _dispatch(tower: Tower, model: Any, folder: Path) -> None:
    """Block 0 on disk, the rest in memory, with hooks on everything that the map names."""
    container = tower.blocks.partition(".")[0]
    places: dict[str, Any] = {name: "cpu" for name, _ in model.named_children() if name != container}
    places |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
    places |= {f"{tower.blocks}.{i}": "disk" if i == 0 else "cpu" for i in range(3)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
@either_order
@every_tower
def test_offloading_hooks(tower: Tower, first: str, how: str, tmp_path: Path) -> None:
    x, plain = tower.images(), vtoken.apply(tower.model(), PITOME)
    model = tower.model()
    if first == "vtoken first":
        vtoken.apply(model, PITOME)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        _dispatch(tower, model, tmp_path)
    assert any(p.is_meta for p in model.parameters()), "nothing was offloaded"
    if first == "tool first":
        vtoken.apply(model, PITOME)
    with torch.no_grad():
        assert_same("offloaded", plain(x), model(x))
        if how == "cpu_offload":  # what is on disk stays there without hooks
            hooks.remove_hook_from_submodules(model)
            assert_same("hooks removed", plain(x), model(x))
            vtoken.remove(model)
            assert_same("removed", tower.model()(x), model(x))
            vtoken.apply(model, PITOME)
            assert_same("applied to what the hooks left", plain(x), model(x))


@pytest.mark.slow
@every_tower
def test_mixed_precision_compiles(tower: Tower) -> None:
    x = tower.images()
    model = accelerator(mixed_precision="bf16").prepare(vtoken.apply(tower.model(), PITOME))
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close("compiled", model(x), torch.compile(model, fullgraph=True, backend="eager")(x), 1e-5)
    torch._dynamo.reset()


def test_remove_and_apply_under_offloading_hooks() -> None:
    x, model = TIMM.images(), vtoken.apply(TIMM.model(), PITOME)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        merged = model(x)
        vtoken.remove(model)
        assert_same("removed", TIMM.model()(x), model(x))
        vtoken.apply(model, PITOME)
        assert_same("applied under hooks", merged, model(x))


def test_a_hooked_attention_still_shows_its_keys() -> None:
    """Hooks on the attention itself: it has parameters of its own in Eva, and device maps may name it in any model."""
    for host in (Host("eva", lambda: eva(qkv_fused=True)), Host("vit", TIMM.build)):
        model, x = vtoken.apply(host.model(), PITOME), host.images()
        plain = copy.deepcopy(model)
        seen: list[str] = []

        class Count(hooks.ModelHook):
            def pre_forward(self, module: Any, *args: Any, seen: list[str] = seen, **kwargs: Any) -> Any:
                seen.append(type(module).__name__)
                return args, kwargs

        for block in model.blocks:
            hooks.add_hook_to_module(block.attn, Count())
            hooks.add_hook_to_module(block.attn.k_norm, Count())
            hooks.add_hook_to_module(block, Count())
        hooks.add_hook_to_module(model, Count())
        with torch.no_grad():
            assert_same(host.name, plain(x), model(x))
            assert len(seen) == 10
            vtoken.apply(vtoken.remove(model), PITOME)
            assert_same(f"{host.name} again", plain(x), model(x))


def test_views_of_hooked_modules_do_not_hold_themselves() -> None:
    from vtoken.core.patch import view

    model = vtoken.apply(TIMM.model(), PITOME)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    gc.collect()
    gc.disable()
    try:
        stand_in = view(model)
        alive = weakref.ref(stand_in)
        del stand_in
        assert alive() is None
    finally:
        gc.enable()
