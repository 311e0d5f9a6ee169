"""`vtoken.testing.check_method` passes what keeps the promises, and names the one that a broken method breaks."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.methods.merging.base import Merging
from vtoken.ops import MergePlan, plan_stride, plan_tome
from vtoken.testing import check_method
from vtoken.testing.models import small_models

settings = dataclasses.dataclass(frozen=True, kw_only=True)


@settings
class Sound(vtoken.ScheduledMergeConfig):
    """A merging method as a stranger writes it."""

    method = "sound"

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> MergePlan:
        return plan_tome(metric, r, num_prefix=num_prefix)

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        return (mergeable // 2) * (mergeable - mergeable // 2) * channels


@settings
class WrongCount(Sound):
    """Merges one token less than it says."""

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> MergePlan:
        return plan_tome(metric, r - 1, num_prefix=num_prefix)


@settings
class ForgetsPrefix(Sound):
    """Lets the class token merge."""

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> MergePlan:
        return plan_tome(metric, r)


@settings
class NamesTwice(Sound):
    """Lays a prefix row out a second time, among the kept ones, and forgets another row."""

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> MergePlan:
        rows = torch.arange(metric.shape[1]).expand(metric.shape[0], -1)
        first = torch.cat([rows[:, :1], rows[:, num_prefix + 1 : -r]], dim=1)
        return MergePlan.of([rows[:, :num_prefix], first[:, :0], first], rows[:, -r:], rows[:, :r] * 0)


@settings
class CountsPartnersAmongAll(Sound):
    """Numbers partners by output row, not among the destinations."""

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> MergePlan:
        rows = torch.arange(metric.shape[1]).expand(metric.shape[0], -1)
        stay = rows[:, num_prefix:-r]
        last = stay[:, -1:].expand(-1, r)
        return MergePlan.of([rows[:, :num_prefix], stay[:, :0], stay], rows[:, -r:], last)


@settings
class IgnoresProtect(Sound):
    """Has protected patches and merges them all the same."""

    protect: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "protect", tuple(self.protect))


@settings
class Free(Sound):
    """Says that its matching costs nothing."""

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        return 0


@settings
class Looks(Sound):
    """Asks its tokens for a number, and says that it does not."""

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> MergePlan:
        return plan_tome(metric, min(r, int(metric.abs().sum()) + r), num_prefix=num_prefix)


@settings
class AlwaysOne(Sound):
    """Removes a token where none is to go."""

    def removed(self, amount: Any, mergeable: int) -> int:
        return max(min(1, mergeable // 2), super().removed(amount, mergeable))


@settings
class Dropper(vtoken.MethodConfig):
    """Keeps the first rows; a method without anything of the merging ones. `wrong` says what it does wrong."""

    method = "dropper"
    r: int = 3
    wrong: str = ""

    def build(self, depth: int) -> BlockMethod:
        return _Dropper(self.r, self.wrong)


class _Dropper(BlockMethod):
    metric, insert, order = "hidden", "between", "raster"

    def __init__(self, r: int, wrong: str) -> None:
        self.r, self.wrong = r, wrong
        self.exact = wrong not in ("scales", "sizes")
        self.calls = 0
        self.seen: list[Tensor] = []

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        if self.wrong == "float":
            return min(self.r, mergeable) * 1.0  # type: ignore[return-value]
        return min(self.r, mergeable)

    def has_bias(self) -> bool:
        return self.wrong == "sizes"

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        return 0

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        r = self.num_removed(layer, x.shape[1] - num_prefix)
        left = x.shape[1] - r + (self.wrong == "count")
        if self.wrong == "memory":
            self.seen.append(x.mean())
        if self.wrong == "turns":  # takes other rows at every fourth call
            self.calls += 1
        if self.wrong == "scales":
            return torch.cat([x[:, :num_prefix], x[:, num_prefix:] * 1.0001], 1), slot
        if self.wrong == "sizes":
            return x, replace(slot, size=torch.ones(x.shape[:2]) * 2)
        if self.wrong == "writes":
            x[:, num_prefix:] += 1
        rows = torch.arange(left)
        if self.wrong == "turns" and self.calls % 4 == 1:
            rows = torch.cat([rows[:num_prefix], rows[num_prefix:] + r])
        if self.wrong == "random":
            drawn = num_prefix + torch.randperm(x.shape[1] - num_prefix)[: left - num_prefix]
            rows = torch.cat([rows[:num_prefix], drawn.sort()[0]])
        if self.wrong == "batch":  # what is kept depends on the size of the batch
            rows = torch.cat([rows[:num_prefix], rows[num_prefix:] + r * (x.shape[0] > 1)])
        if self.wrong == "detaches":
            x = x.detach()
        if self.wrong == "dtype":
            x = x.float()
        if self.wrong == "anchors":
            return x[:, rows], replace(slot, dropped=True)
        out = x[:, rows]
        if self.wrong == "prefix":
            out = torch.cat([out[:, :num_prefix] * 1.5, out[:, num_prefix:]], 1)
        return out, slot.keep(rows.expand(x.shape[0], -1))


class Unfrozen(Sound):
    """Its settings compare by value, but can be set."""

    __setattr__ = object.__setattr__  # type: ignore[assignment]


@settings
class HeavySizes(Sound):
    """Counts each destination twice."""

    def build(self, depth: int) -> BlockMethod:
        return _Heavy(self, depth)


class _Heavy(Merging):
    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        x, slot = super().on_block(layer, x, metric, slot, num_prefix)
        return x, replace(slot, size=None if slot.size is None else slot.size + 1)


@settings
class TornMap(Sound):
    """Its group map names rows that are not there any more."""

    def build(self, depth: int) -> BlockMethod:
        return _Torn(self, depth)


class _Torn(Merging):
    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        x, after = super().on_block(layer, x, metric, slot, num_prefix)
        return x, replace(after, dest=None if after.dest is None else after.dest.clamp(max=x.shape[1] - 2))


@settings
class Unpicklable(Sound):
    """Its method holds a function that was made in place."""

    def build(self, depth: int) -> BlockMethod:
        built = Merging(self, depth)
        built.helper = lambda x: x  # type: ignore[attr-defined]
        return built


@settings
class Rhythm(vtoken.MergeConfig):
    """Every third token stays; counts of its own."""

    method = "rhythm"

    def amounts(self, depth: int) -> tuple[int, ...]:
        return (3,) * depth

    def removed(self, amount: int, mergeable: int) -> int:
        return mergeable - -(-mergeable // amount)

    def match(self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Any) -> MergePlan:
        return plan_stride(metric, 3, num_prefix=num_prefix)

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        return r * (mergeable - r) * channels


@pytest.fixture(scope="module")
def one() -> dict[str, nn.Module]:
    """A model with five prefix tokens: enough to show what a method breaks."""
    return {name: model for name, model in small_models().items() if "five prefix" in name}


def test_models_of_every_library() -> None:
    names = " ".join(check_method(Sound(r=4)))
    for library in ("timm", "open_clip", "transformers"):
        assert (library in names) is (importlib.util.find_spec(library) is not None)


@pytest.mark.parametrize(
    "config",
    [
        Rhythm(layers=(1,)), Sound(ratio=0.8, place="after", metric="hidden"), vtoken.RandomPrune(r=5),
        vtoken.PiToMe(ratio=0.8, protect=(3, 4)), vtoken.ThresholdMerge(threshold=0.6),
    ],
    ids=lambda c: c.method,
)  # fmt: skip
def test_sound_methods_pass(config: vtoken.MethodConfig, one: dict[str, nn.Module]) -> None:
    before = [(id(m), type(m), dict(m.__dict__)) for model in one.values() for m in model.modules()]
    state = torch.get_rng_state()
    assert check_method(config, models=one) == tuple(one)
    assert [(id(m), type(m), dict(m.__dict__)) for model in one.values() for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_method_without_merging_passes(one: dict[str, nn.Module]) -> None:
    assert check_method(Dropper(), [Dropper(r=0)], models=one) == tuple(one)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (WrongCount(r=4), r"match removed 3 tokens in block 0, `removed` said 4"),
        (Dropper(wrong="count"), r"planned counts are kept: .*num_removed says 3, 2 were removed"),
        (Dropper(wrong="float"), r"counts are whole numbers of tokens .* is 3\.0"),
        (
            NamesTwice(r=4),
            r"a plan names every row once: block 0, 1 prefix and 64 other tokens: twice \[0\], never \[1\]",
        ),
        (
            CountsPartnersAmongAll(r=4),
            r"sources join destinations: block 0, 1 prefix .* count among the 60 destinations",
        ),
        (IgnoresProtect(r=4, protect=tuple(range(40))), r"protected patches never merge: .* of `protect` \(no prefix"),
        (ForgetsPrefix(r=4), r"prefix tokens keep their rows and take nothing in"),
        (Dropper(wrong="prefix"), r"prefix tokens keep their rows and take nothing in"),
        (AlwaysOne(r=4), r"no-op equality with AlwaysOne\(.*: these settings were to remove nothing, and vtoken.plan"),
        (Dropper(wrong="scales"), r"no-op equality with .*: the output is not bit-equal"),
        (Dropper(wrong="sizes"), r"no-op equality with .*: the output is not bit-equal"),
        (Dropper(wrong="turns"), r"a forward leaves nothing behind .*after a forward of other images"),
        (Dropper(wrong="random"), r"a forward leaves nothing behind"),
        (Dropper(wrong="memory"), r"no hidden memory with .*: \d+ tensor\(s\) of two forwards are alive"),
        (Dropper(wrong="batch"), r"rows of images are independent .* merges otherwise than alone"),
        (Dropper(wrong="writes"), r"inputs are never written to"),
        (Dropper(wrong="detaches"), r"gradients with .*none reach"),
        (Dropper(wrong="dtype"), r"dtype and device are kept: .*bfloat16 became torch.float32"),
        (Dropper(wrong="anchors"), r"what is known of the tokens fits them: .*anchors or group map were not advanced"),
        (HeavySizes(r=4), r"sizes sum to the tokens: .*of the 69 tokens"),
        (TornMap(r=4), r"the group map is a partition: behind block 0"),
        (Free(r=4), r"vtoken.report tells the cost .*choosing takes \d+ multiply-adds .* says 0"),
        (Looks(r=4), r"vtoken.report tells the cost .*on the meta device"),
        (Unpicklable(r=4), r"a patched model can be pickled: .*must stand at the top of a module"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{type(value).__name__}-{getattr(value, 'wrong', '')}",
)
def test_a_broken_promise_is_named(config: vtoken.MethodConfig, said: str, one: dict[str, nn.Module]) -> None:
    noops = [dataclasses.replace(config, r=0)] if isinstance(config, Dropper) else []
    if getattr(config, "wrong", "") in ("scales", "sizes"):
        noops = [config]  # their counts are bounds, and nothing is removed
    before = [(id(m), type(m), dict(m.__dict__)) for model in one.values() for m in model.modules()]
    with pytest.raises((AssertionError, vtoken.VTokenError), match=f"(?s){said}") as caught:
        check_method(config, noops, models=one)
    if isinstance(caught.value, AssertionError) and "block " not in str(caught.value):
        assert "five prefix tokens" in str(caught.value), "the model is named"
    assert [(id(m), type(m), dict(m.__dict__)) for model in one.values() for m in model.modules()] == before


def test_settings_that_are_no_data_are_named() -> None:
    @settings
    class Local(Sound):
        """Cannot be pickled: it stands in a function."""

    with pytest.raises(AssertionError, match=r"settings can be pickled: .*Let Local stand at the top of a module"):
        check_method(Local(r=4))
    with pytest.raises(AssertionError, match="settings are frozen: Unfrozen"):
        check_method(Unfrozen(r=4))


def test_what_cannot_be_checked() -> None:
    with pytest.raises(vtoken.ConfigError, match="removes nothing from 64 tokens"):
        check_method(Sound(r=0))
    with pytest.raises(vtoken.ConfigError, match=r"check_method\(config, noops=\[...\]\)"):
        check_method(Dropper())
    with pytest.raises(vtoken.ConfigError, match="does something else"):
        check_method(vtoken.Sparsifiner())
    with pytest.raises(vtoken.ConfigError, match="takes settings such as"):
        check_method("tome")  # type: ignore[arg-type]


def test_threads_that_meet_are_named(one: dict[str, nn.Module]) -> None:
    with pytest.raises(AssertionError, match="threads do not disturb one another"):
        check_method(Meeting(r=4), models=one)


@settings
class Meeting(Sound):
    """Keeps the tokens of a call on itself while it works, as if it were alone."""

    def build(self, depth: int) -> BlockMethod:
        return _Meeting(self, depth)


class _Meeting(Merging):
    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        import time

        self.mine = x.shape[0]
        time.sleep(0.001)  # another thread's turn
        if self.mine != x.shape[0]:
            raise RuntimeError("another call came in between")
        return super().on_block(layer, x, metric, slot, num_prefix)
