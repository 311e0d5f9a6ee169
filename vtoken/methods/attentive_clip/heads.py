"""The heads of the two self-supervised losses, in the published sizes (docs/methods/attentive_clip.md 7)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import nn

NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def mlp(*widths: int, bias: bool, norm: str) -> nn.Sequential:
    """Linear layers between the widths, with a norm and a ReLU after all but the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=bias), NORMS[norm](after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))


def simclr_head(width: int, hidden: int, out: int, norm: str) -> nn.Sequential:
    """Of the loss between two student views."""
    return mlp(width, hidden, hidden, out, bias=True, norm=norm)


def byol_projector(width: int, hidden: int, out: int, norm: str) -> nn.Sequential:
    """Of student and teacher in the loss between the two."""
    return mlp(width, hidden, out, bias=False, norm=norm)


def byol_predictor(hidden: int, out: int, norm: str) -> nn.Sequential:
    """Behind the student's projector."""
    return mlp(out, hidden, out, bias=False, norm=norm)
