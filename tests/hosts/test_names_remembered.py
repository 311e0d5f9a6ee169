"""`supported` remembers a verdict as long as what it depends on stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch

import vtoken
from vtoken.core import host
from vtoken.hosts import names


@pytest.fixture
def registry() -> Iterator[None]:
    before = list(host._registered)
    yield
    host._registered[:] = before


def test_a_second_call_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = vtoken.supported("test_vit*")
    monkeypatch.setattr(names, "build_weightless", None)
    assert vtoken.supported("test_vit*") == found


@pytest.mark.usefixtures("registry")
def test_a_registered_adapter_is_asked() -> None:
    assert names.why_not("resnet18") is not None
    from vtoken.hosts.timm.adapter import TimmAdapter

    class Willing(TimmAdapter):
        def spec(self, model: torch.nn.Module) -> vtoken.HostSpec:
            return vtoken.HostSpec("any", 1, 1, 1, 1, 0, (1, 1), "", "absolute")

    vtoken.register_adapter(Willing)
    assert names.why_not("resnet18") is None


def test_weights_are_left_alone_on_meta_only() -> None:
    with names._WithoutInitialisation():
        assert bool((torch.empty(3).fill_(2.0) == 2).all())
        assert torch.nn.Linear(4, 4).weight.abs().sum() > 0
        assert torch.empty(3, device="meta").fill_(2.0).is_meta
    plain = timm.create_model("test_vit")
    built = names.build_weightless("test_vit")
    assert [(n, p.shape, p.dtype) for n, p in built.state_dict().items()] == [
        (n, p.shape, p.dtype) for n, p in plain.state_dict().items()
    ]


@pytest.mark.usefixtures("registry")
def test_only_adapters_and_settings_are_registered() -> None:
    before = list(host._registered)
    for wrong in (vtoken.PiToMe, 3, vtoken.HostAdapter, type("Bare", (vtoken.HostAdapter,), {"package": "x"})):
        with pytest.raises(vtoken.ConfigError):
            vtoken.register_adapter(wrong)
    for wrong in (vtoken.HostAdapter, "pitome", type("NoBuild", (vtoken.MethodConfig,), {"method": "new"})):
        with pytest.raises(vtoken.ConfigError):
            vtoken.register_method(wrong)
    assert host._registered == before
    assert "new" not in vtoken.methods()
