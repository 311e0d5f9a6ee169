"""Peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory grows at most while `run` runs; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return 0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed must not be there to be used again unseen
    reset.write_text("5")  # the peak starts anew
    before = _kilobytes(status, "VmRSS")
    run()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))
