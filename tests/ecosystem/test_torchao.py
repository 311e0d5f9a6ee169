"""int8 weight-only quantisation through torchao, before and after."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import vtoken
from tests.ecosystem.towers import PITOME, Tower, either_order, every_tower
from tests.helpers import assert_close, assert_same

quantization = pytest.importorskip("torchao.quantization")


def quantise(model: nn.Module) -> Any:
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def dequantised(model: nn.Module) -> Any:
    """The same numbers in plain tensors."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model


@either_order
@every_tower
def test_int8_weights(tower: Tower, first: str) -> None:
    x = tower.images()
    with torch.no_grad():
        plain = quantise(tower.model())
        stock = plain(x)
        if first == "vtoken first":
            model = quantise(vtoken.apply(tower.model(), vtoken.PiToMe(ratio=1.0)))
        else:
            model = vtoken.apply(quantise(tower.model()), vtoken.PiToMe(ratio=1.0))
        weights = [type(m.weight).__name__ for m in model.modules() if isinstance(m, nn.Linear)]
        assert "Int8Tensor" in weights
        assert_same("nothing removed", stock, model(x))

        vtoken.configure(model, ratio=0.8)
        out, trace = vtoken.trace(model, x)
        assert trace.tokens == tower.tokens
        assert trace.size.dtype == torch.float32
        assert trace.size.sum(1).tolist() == [float(tower.tokens[0])] * 2
        same = vtoken.apply(dequantised(copy.deepcopy(plain)), PITOME)
        assert_close("the dequantised weights, merged", same(x), out, 1e-5)
        full = vtoken.apply(tower.model(), PITOME)(x)
        assert_close("the unquantised model, merged", full, out, 0.1)
        assert float((out - full).norm() / full.norm()) > 1e-4, "nothing was quantised"
        assert_same("a copy", out, copy.deepcopy(model)(x))
        assert_same("removed", stock, vtoken.remove(model)(x))


@every_tower
def test_reports_and_files_of_quantised_models(tower: Tower) -> None:
    model, x = vtoken.apply(quantise(tower.model()), PITOME), tower.images()
    expected = vtoken.report(tower.model(), PITOME, input_size=(3, 32, 32))
    assert vtoken.report(model, input_size=(3, 32, 32)).to_dict() == expected.to_dict()
    assert vtoken.plan(model).tokens == tuple(tower.tokens)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantise(vtoken.apply(tower.build().eval(), PITOME))
    other.load_state_dict(torch.load(file, weights_only=False), assign=True)
    with torch.no_grad():
        assert_same("loaded", model(x), other(x))
