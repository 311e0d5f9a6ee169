"""Optimiser steps that nobody announces: weights that changed after gradients had come."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_SAMPLED, _VALUES = 16, 256  # parameters of which, and values that, a sample holds


class StepWatch:
    """Notices the optimiser steps of a module that no hook on the optimiser reports.

    A step is a change of trained parameters after a backward pass. Forwards are not counted: several may go into one
    step (accumulation), a gradient scaler may skip it, checkpointing repeats them. Neither does a change without
    gradients count, such as loading weights.

    Args:
        module: that is trained; held weakly.
        before: called with the module when gradients come, which also happens where forwards are compiled.
    """

    def __init__(self, module: nn.Module, before: Callable[[Any], None]) -> None:
        self._module = weakref.ref(module)
        self._before = before
        self._watched: Tensor | None = None
        self._handle: RemovableHandle | None = None
        self._release: Any = None
        self._seen: tuple[list[int], list[Tensor]] | None = None

    def arm(self) -> None:
        """See to it that a parameter that is trained tells when gradients come."""
        if self._watched is not None and self._watched.requires_grad:
            return
        self.stop()
        module = self._module()
        self._watched = None if module is None else next(iter(_trained(module)), None)
        if self._watched is not None:
            self._handle = self._watched.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
            # The parameter is the user's and outlives the wrapper.
            self._release = weakref.finalize(module, self._handle.remove)
            self._release.atexit = False

    def stop(self) -> None:
        """Take the hook back."""
        self.forget()
        self._watched = None
        if self._release is not None:
            self._release()
            self._release = None

    def forget(self) -> None:
        """What has changed until now was no step."""
        self._seen = None

    def stepped(self) -> bool:
        """Whether there was a step since gradients came; says so once."""
        module = self._module()
        if self._seen is None or module is None:
            return False
        trained = _trained(module)
        versions, values = self._seen
        # Fused optimisers do not count a tensor's version up, and looking at values waits for the device.
        if versions == [p._version for p in trained] and not _differ(values, _sample(trained)):
            return False
        self._seen = None
        return True

    def _on_gradient(self, parameter: Tensor) -> None:
        module = self._module()
        if module is None:
            return
        self._before(module)
        trained = _trained(module)
        if self._seen is None:
            self._seen = [p._version for p in trained], [x.clone() for x in _sample(trained)]


def _trained(module: nn.Module) -> list[Tensor]:
    """All but scalars: loops clamp the logit scale in every step, also in one that was skipped."""
    return [p for p in module.parameters() if p.requires_grad and p.numel() > 1]


def _sample(parameters: list[Tensor]) -> list[Tensor]:
    some = parameters[:: max(1, len(parameters) // _SAMPLED)]
    return [p.detach().flatten()[:_VALUES] for p in some if not p.is_meta]


def _differ(before: list[Tensor], now: list[Tensor]) -> bool:
    moved = len(before) != len(now) or any(
        a.device != b.device or a.dtype != b.dtype for a, b in zip(before, now, strict=True)
    )
    return not moved and any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
