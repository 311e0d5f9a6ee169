"""Interleaved timing (docs/performance.md 10): every round runs every variant once, in a rotating order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

#: A wall-clock sample is dropped if the process waited for a core for a larger share of it.
MAX_DELAY = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant.

    Args:
        minimum, median: over the samples; over the dropped ones if there are no others.
        samples: how many were undisturbed; 0 means that the machine was too busy for a figure worth quoting.
        dropped: how many more were taken while the process had to wait for a core.
    """

    minimum: float
    median: float
    samples: int
    dropped: int = 0


@dataclass(frozen=True)
class _Sample:
    seconds: float
    disturbed: bool = False


def _cpu_time(run: Callable[[], object]) -> _Sample:
    """CPU time of this thread: what other processes do does not count."""
    start = time.thread_time()
    run()
    return _Sample(time.thread_time() - start)


def _wall_time(run: Callable[[], object]) -> _Sample:
    delay, start = run_delay(), time.perf_counter()
    run()
    spent = time.perf_counter() - start
    return _Sample(spent, run_delay() - delay > MAX_DELAY * spent)


def _device_time(run: Callable[[], object]) -> _Sample:
    """Between two events on the device, so the host's way to the clock does not count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return _Sample(start.elapsed_time(end) / 1e3)


def _synchronised_time(run: Callable[[], object]) -> _Sample:
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return _Sample(time.perf_counter() - start)


def stopwatch_for(device: torch.device) -> Callable[[Callable[[], object]], _Sample]:
    """CPU time for one CPU thread, wall time for several; events on CUDA, synchronised wall time elsewhere."""
    if device.type == "cpu":
        return _cpu_time if torch.get_num_threads() == 1 else _wall_time
    return _device_time if device.type == "cuda" else _synchronised_time


def run_delay() -> float:
    """Seconds that the threads of this process have been ready to run without a core; 0 where Linux does not tell."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel keeps no such figures
            continue
    return total / 1e9


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    calls: int = 1,
    device: torch.device | None = None,
    tick: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several variants side by side.

    Args:
        variants: what to run, by name.
        rounds: samples of each, after `warmup` rounds that do not count. Wall-clock rounds are repeated, up to as many
            again, while a variant has fewer undisturbed samples than that.
        calls: calls that make one sample; more than one for runs that are short against the clock.
        device: where they compute; decides the clock.
        tick: called after each run, for a progress bar.
    """
    measure = stopwatch_for(device or torch.device("cpu"))
    names = list(variants)
    samples: dict[str, list[_Sample]] = {name: [] for name in names}

    def repeat(run: Callable[[], object]) -> None:
        for _ in range(calls):
            run()

    for number in range(-warmup, 2 * rounds):
        if number >= rounds and all(sum(not s.disturbed for s in taken) >= rounds for taken in samples.values()):
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            sample = measure(lambda name=name: repeat(variants[name]))  # type: ignore[misc]
            if number >= 0:
                samples[name].append(_Sample(sample.seconds / calls, sample.disturbed))
            if tick is not None:
                tick()
    return {name: _summary(taken) for name, taken in samples.items()}


def _summary(taken: list[_Sample]) -> Timing:
    clean = [s.seconds for s in taken if not s.disturbed]
    seconds = clean or [s.seconds for s in taken]
    return Timing(min(seconds), statistics.median(seconds), len(clean), len(taken) - len(clean))
