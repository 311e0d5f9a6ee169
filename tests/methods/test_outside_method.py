"""Methods that were written outside this package, against `BlockMethod` and `Merging` as they have been since 0.1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor

import vtoken
from vtoken.core import config
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.methods.merging.base import MergeConfig, Merging


@dataclass(frozen=True, kw_only=True)
class FirstRows(config.MethodConfig):
    """Keeps the first rows and drops `r` at the end of every block; shares no code with the merging methods."""

    method: ClassVar[str] = "first_rows"
    r: int = 3

    def build(self, depth: int) -> BlockMethod:
        return _FirstRows(self.r)


class _FirstRows(BlockMethod):
    metric, insert, order = "hidden", "between", "raster"

    def __init__(self, r: int) -> None:
        self.r = r

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        return min(self.r, mergeable)

    def has_bias(self) -> bool:
        return False

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        return 0

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        left = x.shape[1] - self.num_removed(layer, x.shape[1] - num_prefix)
        return x[:, :left], slot.keep(torch.arange(left).expand(x.shape[0], -1))


class _Counting(Merging):
    """A merging that looks on."""

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        x, slot = super().on_block(layer, x, metric, slot, num_prefix)
        return x, replace(slot)


@dataclass(frozen=True, kw_only=True)
class CountingToMe(vtoken.ToMe):
    """ToMe with a method class of its own."""

    method: ClassVar[str] = "counting_tome"

    def build(self, depth: int) -> BlockMethod:
        return _Counting(self, depth)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(config, "_registry", dict(config._registry))
    torch.manual_seed(0)
    return timm.create_model("test_vit").eval()


def test_a_registered_method_with_five_arguments(model: Any) -> None:
    vtoken.register_method(FirstRows)
    x = torch.randn(2, 3, 160, 160)
    expected = model.patch_embed(x)
    expected = model.norm_pre(model._pos_embed(expected))
    for block in model.blocks:
        expected = expected + block.attn(block.norm1(expected))
        expected = expected[:, :-5]
        expected = expected + block.mlp(block.norm2(expected))
    expected = model.forward_head(model.norm(expected))
    vtoken.apply(model, "first_rows", r=5)
    assert vtoken.plan(model).removed == (5,) * len(model.blocks)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_merging_that_calls_the_one_it_extends(model: Any, batch: int) -> None:
    vtoken.register_method(CountingToMe)
    x = torch.randn(batch, 3, 160, 160)
    vtoken.apply(model, "tome", r=6)
    with torch.no_grad():
        expected = model(x)
        vtoken.remove(model)
        vtoken.apply(model, "counting_tome", r=6)
        assert torch.equal(model(x), expected)
    vtoken.remove(model)
    layer = vtoken.nn.MergeTokens(CountingToMe(r=6))
    assert isinstance(layer.config, MergeConfig)
    assert layer(torch.randn(batch, 20, 8), torch.randn(batch, 20, 4))[0].shape == (batch, 14, 8)


@dataclass(frozen=True, kw_only=True)
class OfBefore(vtoken.PiToMe):
    """A matching written when `match` was given neither margin nor alpha by name."""

    method: ClassVar[str] = "of_before"

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> vtoken.MergePlan:
        return super().match(layer, depth, metric, r, num_prefix, protect)


@dataclass(frozen=True, kw_only=True)
class OfLastWeek(vtoken.PiToMe):
    """One that takes the margin and the variant, not alpha."""

    method: ClassVar[str] = "of_last_week"

    def match(self, *args: Any, margin: Any = None, variant: Any = None) -> vtoken.MergePlan:
        return super().match(*args, margin=margin, variant=variant)


@dataclass(frozen=True, kw_only=True)
class OfAnyKeyword(vtoken.PiToMe):
    """One that passes on whatever there is."""

    method: ClassVar[str] = "of_any_keyword"

    def match(self, *args: Any, **settings: Any) -> vtoken.MergePlan:
        assert set(settings) == {"margin", "alpha", "variant"}
        return super().match(*args, **settings)


@pytest.mark.parametrize("cls", [OfBefore, OfLastWeek, OfAnyKeyword])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_pitome_whose_match_takes_fewer_settings(cls: Any, compiled: bool) -> None:
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    model = timm.create_model("test_vit").eval()
    with torch.no_grad():
        vtoken.apply(model, vtoken.PiToMe(ratio=0.8, alpha=0.5))
        expected = model(x)
        vtoken.remove(model)
        vtoken.apply(model, cls(ratio=0.8, alpha=0.5))
        if compiled:
            vtoken.compile(model, backend="eager")
        torch.testing.assert_close(model(x), expected, atol=0 if not compiled else 1e-5, rtol=0)


@dataclass(frozen=True, kw_only=True)
class OneSided(vtoken.ToMe):
    """A setting may have any name."""

    method: ClassVar[str] = "one_sided"
    either: str = "left"


def test_a_setting_called_either() -> None:
    assert OneSided(r=3).replace(either="right") == OneSided(r=3, either="right")
    assert OneSided(r=3).replace(ratio=0.5) == OneSided(ratio=0.5)
