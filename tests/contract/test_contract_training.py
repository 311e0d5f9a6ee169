"""Gradients, checkpointing, train and eval mode, threads, low precision."""

from __future__ import annotations

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
    assert_planned,
    call,
    checkpointing_,
    distinct_hosts,
    every_host,
    outputs,
    run,
    traced,
)
from tests.contract.table import host as host_row
from tests.helpers import Host, assert_close, assert_same, eva, leaves, randomise_, vit
from vtoken.core.patch import PREDICTOR


def _two_forwards_one_backward(model: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss over the outputs of two forwards that ran before the one backward."""
    model.zero_grad()
    rng = torch.Generator().manual_seed(9)
    results = [call(model, x) for x in inputs]
    loss = sum((out * torch.randn(out.shape, generator=rng, dtype=out.dtype)).sum() for out in results)
    loss.backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_host()
def test_checkpointed_gradients_with_two_forwards_before_one_backward(host: Host, method: MethodRow) -> None:
    model = host.model(dtype=torch.float64).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # running statistics would move between the two runs
    inputs = [host.images(dtype=torch.float64), host.images(batch=3, seed=1, dtype=torch.float64)]
    reached: set[str] = set()
    if host.library != "timm":  # parts of a model may be idle: a text tower, mask tokens
        reached = set(_two_forwards_one_backward(model, inputs))
    vtoken.apply(model, method.reduces)
    plain = {k: g.clone() for k, g in _two_forwards_one_backward(model, inputs).items()}
    checkpointing_(model)
    again = _two_forwards_one_backward(model, inputs)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert float(grad.abs().max()) < float("inf")
        if float(grad.abs().max()) > 1e-9:
            assert_close(f"gradient of {name}", grad, again[name], 1e-9)
    if host.library == "timm":
        assert len(plain) > 0.9 * len([n for n, _ in model.named_parameters() if PREDICTOR not in n])
    else:
        assert plain.keys() == reached
    stem = ("patch_embed", "embeds.proj", "conv1")
    assert float(next(g for n, g in plain.items() if any(word in n for word in stem)).abs().max()) > 1e-6


def test_reentrant_checkpointing() -> None:
    host = host_row("vit_token")
    model = vtoken.apply(host.model(dtype=torch.float64), PITOME.reduces)
    inputs = [
        host.images(dtype=torch.float64).requires_grad_(),
        host.images(seed=1, dtype=torch.float64).requires_grad_(),
    ]
    plain = {k: g.clone() for k, g in _two_forwards_one_backward(model, inputs).items()}
    model.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(True)
    try:
        again = _two_forwards_one_backward(model, inputs)
    finally:
        timm.layers.set_reentrant_ckpt(False)
    for name, grad in plain.items():
        assert_close(f"gradient of {name}", grad, again[name], 1e-9)


@distinct_hosts()
def test_gradient_is_that_of_finite_differences(host: Host, method: MethodRow) -> None:
    """The matching is a constant of the gradient: a step too small to change it must change the output as predicted."""
    model, x = host.model(dtype=torch.float64), host.images(dtype=torch.float64)
    vtoken.apply(model, method.reduces)
    x.requires_grad_()
    out, trace = call(model, x), None
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weight).sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    predicted = float((x.grad * direction).sum())
    step, sides, maps = 1e-6, [], []
    for sign in (1, -1):
        y, trace = traced(model, (x.detach() + sign * step * direction))
        sides.append(float((y * weight).sum()))
        maps.append(trace.dest)
    assert torch.equal(maps[0], maps[1]), "the step was to leave the matching alone"
    assert abs((sides[0] - sides[1]) / (2 * step) - predicted) < 1e-5 * max(1.0, abs(predicted))


_DROPS = {"pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.3, "drop_rate": 0.2}
_TRAINED = {
    "vit": lambda: vit(global_pool="avg", **_DROPS),
    "vit patch drop": lambda: vit(global_pool="avg", class_token=True, patch_drop_rate=0.3, **_DROPS),
    "eva patch drop": lambda: eva(use_rot_pos_emb=True, ref_feat_shape=(8, 8), patch_drop_rate=0.3, **_DROPS),
    "eva mixed patch drop": lambda: eva(
        use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", patch_drop_rate=0.3, **_DROPS
    ),
}


@pytest.mark.parametrize("name", _TRAINED)
def test_train_and_eval_mode(name: str) -> None:
    host = Host(name, _TRAINED[name])
    model, x = host.model(), host.images()
    stock = run(model, x)
    model.train()
    torch.manual_seed(4)
    random = run(model, x)
    vtoken.apply(model, vtoken.PiToMe(ratio=1.0))
    assert model.training
    assert all(m.training for m in model.modules()), "apply must not leave training mode"
    torch.manual_seed(4)
    assert_same("training, nothing removed, same draws", random, run(model, x))
    with torch.no_grad():
        torch.manual_seed(4)
        assert_same("features then head", random, model.forward_head(model.forward_features(x)))
    model.eval()
    assert_same("eval, nothing removed", stock, run(model, x))
    vtoken.configure(model, ratio=0.75)
    merged = run(model, x)
    model.train()
    first, second = run(model, x), run(model, x)
    assert not torch.equal(first, second), "dropout is off"
    model.eval()
    assert_same("eval after training", merged, run(model, x))
    model.train()
    vtoken.remove(model)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["vit patch drop", "eva patch drop", "eva mixed patch drop"])
def test_patch_dropout_leaves_no_dense_map(name: str) -> None:
    host = Host(name, _TRAINED[name])
    model, x = vtoken.apply(host.model(), PITOME.reduces).train(), host.images()
    with pytest.raises(vtoken.ShapeError, match="drop"):
        model.forward_intermediates(x)
    rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert rows[0].shape[1] == 44 - 11
    model(x).sum().backward()
    assert bool(next(model.parameters()).grad.isfinite().all())
    model.eval()
    assert model.forward_intermediates(x, intermediates_only=True)[0].shape == (2, 32, 8, 8)


@distinct_hosts()
def test_threads_with_different_batch_sizes(host: Host, method: MethodRow) -> None:
    model = host.model(dtype=torch.float64)
    vtoken.apply(model, method.reduces)
    cases = [host.images(batch=n, seed=n, dtype=torch.float64) for n in (1, 2, 3, 5)]
    serial = [run(model, x) for x in cases]
    wrong: list[str] = []
    start = threading.Barrier(len(cases))

    def work(index: int) -> None:
        start.wait()
        try:
            for _ in range(12):
                out, record = traced(model, cases[index])
                assert record.dest is not None
                assert record.dest.shape[0] == len(cases[index])
                assert_close(f"thread {index}", serial[index], out, 1e-12)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_host()
def test_half_precision_models(host: Host, method: MethodRow, dtype: torch.dtype) -> None:
    model, x = host.model(dtype=dtype), host.images(dtype=dtype)
    vtoken.apply(model, method.reduces)
    out, trace = traced(model, x)
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    assert trace.size is not None
    assert trace.size.dtype == torch.float32
    if method.keeps_mass:
        assert torch.equal(trace.size.sum(1), torch.full((2,), float(trace.tokens[0])))
    model.train()
    loss = call(model, x).float().square().mean()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    found = [leaf for _, leaf in leaves(outputs(model, x)) if isinstance(leaf, Tensor)]
    assert all(leaf.dtype == dtype for leaf in found)
    if host.library == "timm":
        with torch.no_grad():
            model.forward_head(model.forward_features(x))


@every_host()
def test_autocast(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    with torch.autocast("cpu", torch.bfloat16):
        stock = run(model, x)
        with vtoken.applied(model, method.noops[0]):
            assert_same("nothing removed", stock, run(model, x))
        vtoken.apply(model, method.reduces)
        out, trace = traced(model, x)
        assert out.dtype == stock.dtype
        assert bool(out.isfinite().all())
        assert_planned(vtoken.plan(model, img_size=host.shape[1:]), trace)
        if host.library == "timm":
            with torch.no_grad():
                assert bool(model.forward_head(model.forward_features(x)).isfinite().all())
        call(model.train(), x).float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert trace.size is not None
    assert trace.size.dtype == torch.float32


def test_many_patches_in_one_token_are_counted_exactly_in_bfloat16() -> None:
    """bfloat16 cannot count past 256: sizes must stay float32 through the whole forward."""
    host = Host("wide", lambda: vit(img_size=144, global_pool="avg"), (3, 144, 144))
    model = randomise_(host.build(), 0).to(torch.bfloat16).eval()
    x = host.images(batch=1, dtype=torch.bfloat16)
    vtoken.apply(model, vtoken.StrideMerge(stride=24, layers=(0, 1)))
    _, trace = traced(model, x)
    assert trace.size is not None
    assert int(trace.size.sum()) == 36 * 36
    assert int(trace.size.max()) > 256
    assert bool((trace.size == trace.size.round()).all())
