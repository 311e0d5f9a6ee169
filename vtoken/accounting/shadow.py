"""A weightless copy of a model, to run it where it costs nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def meta_copy(model: nn.Module) -> Any:
    """The same modules, classes and settings with every tensor on the meta device and no hooks; no weight is copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]:
            if isinstance(value, Tensor):
                memo.setdefault(id(value), _meta(value))
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    return shadow.requires_grad_(False).eval()


def _meta(value: Tensor) -> Tensor:
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
