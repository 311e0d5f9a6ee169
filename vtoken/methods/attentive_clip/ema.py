"""The teacher: a moving average of the student's weights, always float32, frozen and in eval mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtoken.errors import ConfigError, VTokenError


def momentum_after(n: int, start: float, total_steps: float | None) -> float:
    """Weight of the old average after optimiser step n: from `start` to 1 by a half cosine, constant without a total.

    Source: docs/methods/attentive_clip.md 8.
    """
    if total_steps is None:
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * min(n, total_steps) / total_steps)) / 2


class EmaTeacher(nn.Module):
    """Averages of parts of a student.

    Args:
        parts: modules or parameters of the student by name; copied.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, _frozen(part))
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stays frozen."""
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Devices change, the precision does not: in bfloat16 an update of weight 0.004 rounds to nothing.
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, student: dict[str, Any], momentum: float) -> None:
        """average <- momentum * average + (1 - momentum) * student, over all parameters at once."""
        pairs = list(self.pairs(student))
        averages = [average.detach() for average, _ in pairs]
        values = [value.detach().to(average.dtype) for average, value in pairs]
        torch._foreach_lerp_(averages, values, 1 - momentum)

    @torch.no_grad()
    def copy_to(self, student: dict[str, Any]) -> None:
        """Write the averages into the parts of a student."""
        for average, value in self.pairs(student):
            value.copy_(average)

    def pairs(self, student: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Every average of the parts that are given, with the student's parameter.

        Raises:
            VTokenError: if the student's parameters are no longer those that were copied.
        """
        theirs = dict(_parameters(student))
        ours = {n: p for n, p in self.named_parameters() if n.partition(".")[0] in student}
        if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
            changed = sorted(n for n in ours.keys() | theirs.keys() if _shape(ours, n) != _shape(theirs, n))
            raise VTokenError(f"the student's parameters were replaced, {changed[0]} among them; wrap the model again")
        for name, average in ours.items():
            yield average, theirs[name]


def _shape(parameters: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return parameters[name].shape if name in parameters else None


def _parameters(parts: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            yield from ((f"{name}.{inner}", p) for inner, p in part.named_parameters())
        else:
            yield name, part


def _frozen(part: Any) -> Any:
    if not isinstance(part, nn.Module):
        return nn.Parameter(part.detach().float().clone(), requires_grad=False)
    copied = copy.deepcopy(part).float().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.BatchNorm1d):  # of a head: batch statistics always, running ones are not averaged
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return copied


def attach(
    optimizer: torch.optim.Optimizer, module: nn.Module, after_step: Callable[[torch.optim.Optimizer, Any, Any], None]
) -> RemovableHandle:
    """Call a method of `module` after each step of the optimizer that trains it.

    Raises:
        ConfigError: if it does not train it, or does so already.
    """
    mine = {id(p) for p in module.parameters() if p.requires_grad}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError("the optimizer holds no trainable parameter of this model, so its steps are not this model's")
    hooks = optimizer._optimizer_step_post_hooks.values()
    if any(getattr(hook, "__self__", None) is module for hook in hooks):
        raise ConfigError("attach_ema was called twice with one optimizer, which would update the teacher twice")
    return optimizer.register_step_post_hook(after_step)
