"""How kernels are started, and for which device."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
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


def launch(kernel: Any, programs: int, *args: Any, **settings: Any) -> None:
    """Run `programs` instances of a kernel; an empty grid is an error on a GPU, so nothing is started for none.

    All grids have one axis: the other two end at 65535.
    """
    if programs:
        kernel[(programs,)](*args, **settings)


def on_device(like: Tensor) -> AbstractContextManager[object]:
    """Triton compiles for and launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, triton.next_power_of_2(n))


def tiles(n: int, block: int) -> int:
    """Blocks that n items fill."""
    return -(-n // block)
