"""The table of the contract suite: hosts x methods. A new host or method adds a row here, not a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.helpers import ALL_HOSTS, Host


@dataclass(frozen=True)
class MethodRow:
    """One method.

    Args:
        name: of the row.
        reduces: settings under which every host of the table loses tokens.
        noops: settings under which none does.
        bad: a change of settings that `vtoken.configure` must refuse.
        keeps_mass: whether sizes still sum to the embedded tokens.
    """

    name: str
    reduces: vtoken.MethodConfig
    noops: tuple[vtoken.MethodConfig, ...]
    bad: dict[str, Any]
    keeps_mass: bool = True


HOSTS: list[Host] = ALL_HOSTS
METHODS: list[MethodRow] = [
    MethodRow(
        "pitome",
        vtoken.PiToMe(ratio=0.75),
        (vtoken.PiToMe(ratio=1.0), vtoken.PiToMe(layers=())),
        {"margin": (0.5, 0.5)},
    ),
    MethodRow("tome", vtoken.ToMe(r=9), (vtoken.ToMe(r=0), vtoken.ToMe(r=9, layers=())), {"r": -1}),
    MethodRow(
        "random_merge",
        vtoken.RandomMerge(ratio=0.75, seed=3),
        (vtoken.RandomMerge(ratio=1.0), vtoken.RandomMerge(layers=())),
        {"seed": -1},
    ),
    MethodRow(
        "random_prune",
        vtoken.RandomPrune(ratio=0.75, seed=1),
        (vtoken.RandomPrune(r=0), vtoken.RandomPrune(layers=())),
        {"reduction": "wavg"},
        keeps_mass=False,
    ),
    MethodRow("stride", vtoken.StrideMerge(stride=2, layers=(0, 2)), (vtoken.StrideMerge(layers=()),), {"stride": 1}),
]
PITOME = METHODS[0]
_BY_HOST = {host.name: host for host in HOSTS}
_BY_METHOD = {method.name: method for method in METHODS}

# Structures that differ in what merging touches: prefix, pooling, block, rotation, input handling.
_DISTINCT = ("vit_token", "vit_avg_prefix", "vit_map", "distilled", "eva02", "eva_mixed", "eva_dinov3", "naflex_rope")


def host(name: str) -> Host:
    """The host row called `name`."""
    return _BY_HOST[name]


def method(name: str) -> MethodRow:
    """The method row called `name`."""
    return _BY_METHOD[name]


def full_table() -> pytest.MarkDecorator:
    """All hosts x all methods."""
    return _cases([(h, m) for h in HOSTS for m in METHODS])


def every_case() -> pytest.MarkDecorator:
    """All hosts with PiToMe, and the other methods on hosts that differ in everything that matters."""
    return _cases([(h, m) for h in HOSTS for m in METHODS if m is PITOME or h.name in _DISTINCT])


def every_host() -> pytest.MarkDecorator:
    """All hosts with PiToMe, and every other method on one host with average pooling and prefix."""
    return _cases([(h, PITOME) for h in HOSTS] + [(host("vit_avg_prefix"), m) for m in METHODS[1:]])


def distinct_hosts() -> pytest.MarkDecorator:
    """A few hosts that differ in everything that matters with PiToMe, and every other method on one."""
    return _cases([(host(n), PITOME) for n in _DISTINCT] + [(host("vit_avg_prefix"), m) for m in METHODS[1:]])


def _cases(pairs: list[tuple[Host, MethodRow]]) -> pytest.MarkDecorator:
    ids = [f"{h.name}-{m.name}" for h, m in pairs]
    return pytest.mark.parametrize(("host", "method"), pairs, ids=ids)


def run(model: nn.Module, x: Any) -> Any:
    """The model's output without gradients."""
    with torch.no_grad():
        return model(x)


def traced(model: nn.Module, x: Tensor, entry: str = "forward", **options: Any) -> tuple[Any, vtoken.Trace]:
    """Output of one of the model's entry methods, and its trace, without gradients."""
    with torch.no_grad(), vtoken.tracing(model) as trace:
        out = getattr(model, entry)(x, **options)
    return out, trace


def features(model: nn.Module, x: Tensor) -> tuple[Tensor, vtoken.Trace]:
    """`forward_features` and its trace."""
    return traced(model, x, "forward_features")


def dense(rows: Tensor, dest: Tensor) -> Tensor:
    """Merged rows [B, T', C] at every embedded row [B, T0]; a plain loop, on purpose not vtoken's."""
    return torch.stack([torch.stack([rows[b, int(g)] for g in dest[b]]) for b in range(rows.shape[0])])


def snapshot(model: nn.Module) -> list[tuple[str, int, dict[str, int]]]:
    """Identity of everything that patching could touch: class and instance attributes of every module."""
    return [(name, id(type(m)), {k: id(v) for k, v in m.__dict__.items()}) for name, m in model.named_modules()]
