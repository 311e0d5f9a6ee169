"""How kernels are started: on the device of their tensors, not at all for an empty grid."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

#: Whether the kernels run in Triton's interpreter, on CPU tensors. Decided when they are imported, by TRITON_INTERPRET.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@functools.cache
def _target_of(device: int) -> tuple[str, int]:
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch if isinstance(target.arch, int) else 0


def target() -> tuple[str, int]:
    """Backend and architecture that a launch would compile for: ("cuda", 90), ("hip", 0), ("interpreter", 0)."""
    if INTERPRETED:
        return "interpreter", 0
    return _target_of(triton.runtime.driver.active.get_current_device())


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **settings: Any) -> None:
    """Run `programs` instances of a kernel on the device of `like`; all grids have one axis, which has no limit."""
    if programs == 0:
        return
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[(programs,)](*args, **settings)
    else:
        kernel[(programs,)](*args, **settings)


def on_device(like: Tensor) -> Any:
    """Context in which `target()` is that of `like`: the device of the tensors need not be the current one."""
    return torch.cuda.device(like.device if like.is_cuda else -1)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, triton.next_power_of_2(n))


def tiles(n: int, block: int) -> int:
    """Blocks that n items fill."""
    return -(-n // block)
