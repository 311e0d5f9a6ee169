"""Averaged copies of a model (timm's ModelEmaV3, torch's AveragedModel) and automatic mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vtoken
from tests.ecosystem.towers import PITOME, Tower, every_tower, gradients, loss_of
from tests.helpers import assert_close, assert_same


@pytest.mark.parametrize("kind", ["ModelEmaV3", "AveragedModel"])
@every_tower
def test_an_average_follows_and_merges(tower: Tower, kind: str) -> None:
    x = tower.images()
    model = vtoken.apply(tower.model(), PITOME).train()
    average = (
        ModelEmaV3(model, decay=0.5)
        if kind == "ModelEmaV3"
        else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    )
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    if kind == "AveragedModel":
        average.update_parameters(model)  # its first update copies
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
        average.update(model) if kind == "ModelEmaV3" else average.update_parameters(model)
        expected = {n: 0.5 * expected[n] + 0.5 * p.detach() for n, p in model.named_parameters()}
    assert not any(torch.equal(expected[n], p) for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1)

    inner = average.module.eval()
    by_hand = tower.model()
    by_hand.load_state_dict(model.state_dict() | expected)
    with torch.no_grad():
        for name, value in expected.items():
            assert_close(name, value, inner.get_parameter(name), 1e-6)
        out, trace = vtoken.trace(inner, x)
        assert trace.tokens == tower.tokens
        assert_close("average, merged", vtoken.apply(by_hand, PITOME)(x), out, 1e-5)
        assert_same("through the wrapper", out, average(x))
        # The copy has settings of its own, and the model keeps its own when the copy is unpatched.
        vtoken.configure(average, ratio=0.9)
        assert vtoken.config_of(model) == PITOME
        vtoken.remove(average)
        assert vtoken.is_applied(model)
        assert_close("average, whole", vtoken.remove(by_hand)(x), average(x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_tower
def test_an_amp_step_is_close_to_a_float32_step(tower: Tower, dtype: torch.dtype) -> None:
    x = tower.images(batch=8)
    model = vtoken.apply(tower.model(), PITOME).train()
    stock = tower.model().train()
    exact, expected = loss_of(model(x)), loss_of(stock(x))
    exact.backward()
    plain = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        out, trace = vtoken.trace(model, x)
        loss, low = loss_of(out.float()), loss_of(stock(x).float())
    assert out.dtype == dtype
    assert trace.tokens == tower.tokens
    assert trace.size.dtype == torch.float32
    assert trace.size.sum(1).tolist() == [float(tower.tokens[0])] * 8
    # Low precision may match other tokens now and then, which costs more than rounding alone.
    rounding = float(((low - expected).abs() / expected.abs()).detach())
    assert float(((loss - exact).abs() / exact.abs()).detach()) < max(4 * rounding, 0.05)
    loss.backward()
    found = gradients(model)
    assert found.keys() == plain.keys()
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in found.values())
    dot = sum((plain[n] * found[n]).sum() for n in plain)
    norms = [sum(g.square().sum() for g in side.values()) ** 0.5 for side in (plain, found)]
    assert float(dot / (norms[0] * norms[1])) > 0.9


@every_tower
def test_grad_scaler(tower: Tower) -> None:
    x = tower.images()
    model = vtoken.apply(tower.model(), PITOME).train()
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model(x).float())
    loss.backward()
    expected = gradients(model)
    before = copy.deepcopy(model.state_dict())

    def step(scale: float) -> float:
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model(x).float())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return float(scaler.get_scale())

    assert step(2.0**30) == 2.0**29, "an overflow halves the scale"
    assert_same("and skips the step", before, model.state_dict())
    assert step(8.0) == 8.0
    for name, grad in gradients(model).items():
        if float(grad.abs().max()) > 1e-3:
            assert_close(name, expected[name], grad, 0.02)
    assert not torch.equal(before["conv1.weight" if tower.name == "open_clip" else "cls_token"], model.state_dict()[
        "conv1.weight" if tower.name == "open_clip" else "cls_token"])  # fmt: skip
