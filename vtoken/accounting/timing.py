"""Interleaved timing (performance.md 10): every round runs every variant once, in a rotating order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: the smallest and the median of `samples` rounds."""

    minimum: float
    median: float
    samples: int


def clock_for(device: torch.device) -> Callable[[], float]:
    """CPU time of this thread where one thread computes (other processes do not count), else wall time."""
    if device.type == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronised


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
    prepare: Callable[[str], object] | None = None,
    tick: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several variants side by side.

    Args:
        variants: what to run, by name.
        rounds: samples of each, after `warmup` rounds that do not count.
        device: where they compute; decides the clock.
        prepare: called with the name before each run, outside the clock.
        tick: called after each run, for a progress bar.
    """
    clock = clock_for(device or torch.device("cpu"))
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if prepare is not None:
                prepare(name)
            start = clock()
            variants[name]()
            spent = clock() - start
            if number >= 0:
                samples[name].append(spent)
            if tick is not None:
                tick()
    return {name: Timing(min(s), statistics.median(s), len(s)) for name, s in samples.items()}
