"""Copies of a model that cost no memory: one without weights, one over the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.apply import patched_parts, remove


def meta_copy(model: nn.Module) -> Any:
    """The same modules, classes and settings with every tensor on the meta device; no weight is copied.

    Hooks and applied methods are left out.
    """
    memo: dict[int, Any] = {}
    for value in _tensors(model):
        memo.setdefault(id(value), _meta(value))
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
        # transformers notes on a module that it put its recording hooks there, which are gone now: it may anew.
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    if patched_parts(shadow):
        remove(shadow)
    return shadow.requires_grad_(False).eval()


def shared_copy(model: nn.Module) -> Any:
    """The same modules over the same tensors: a method applied to the copy leaves the model alone."""
    return copy.deepcopy(model, {id(value): value for value in _tensors(model)})


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]:
            if isinstance(value, Tensor):
                yield value


def _meta(value: Tensor) -> Tensor:
    # By shape and type: a quantised tensor is a subclass that need not know empty_like.
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
