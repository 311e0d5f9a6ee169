"""Where a method that is slower than the model itself begins to be faster: measured, at growing batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vtoken.accounting.compare import Row, runner
from vtoken.accounting.timing import interleaved
from vtoken.core.config import MethodConfig

#: Batches are doubled so many times at most, and no more once the unpatched model takes so many seconds for one.
DOUBLINGS, SECONDS = 4, 1.0


@dataclass(frozen=True)
class BreakEven:
    """What larger batches gave.

    Args:
        tried: batches, each with the speed-up over the unpatched model there, by medians.
        batch: the first of them that was faster, by medians and by minima; None if none was.
    """

    tried: tuple[tuple[int, float], ...]
    batch: int | None


def is_slower(row: Row) -> bool:
    """Whether a setting that saves multiply-adds took longer than the model itself, by medians and by minima."""
    return row.flops_factor > 1 and row.speedup < 1 and row.speedup_min < 1


def break_even(model: nn.Module, config: MethodConfig, images: Tensor, *, rounds: int = 5) -> BreakEven:
    """Time a setting against the model itself at twice the batch, four times, and so on, until it is faster.

    Args:
        model: a supported model in eval mode that carries nothing.
        config: the setting.
        images: a batch at which it was slower, [B, C, H, W]; repeated for larger ones.
        rounds: timing samples at each batch.
    """
    tried: list[tuple[int, float]] = []
    for doubling in range(1, DOUBLINGS + 1):
        batch = images.repeat(2**doubling, 1, 1, 1)
        runs = {"plain": runner(model, None, batch), "patched": runner(model, config, batch)}
        times = interleaved(runs, rounds=rounds, device=images.device)
        plain, patched = times["plain"], times["patched"]
        tried.append((len(batch), plain.median / patched.median))
        if patched.median < plain.median and patched.minimum < plain.minimum:
            return BreakEven(tuple(tried), len(batch))
        if plain.median > SECONDS:
            break
    return BreakEven(tuple(tried), None)


def told(row: Row, batch: int, found: BreakEven) -> str:
    """One sentence or two about a row that is slower at `batch`, and what larger batches gave."""
    narrowing = (
        "" if row.ideal_efficiency is None else f", plain narrowing x{row.ideal_efficiency * row.flops_factor:.2f}"
    )
    size, speed = found.tried[-1]
    start = (
        f"{row.name} is slower than the model itself at batch {batch} (x{row.speedup:.2f}{narrowing}): there is too "
        "little arithmetic to save there for what the method costs."
    )
    if found.batch is not None:
        return f"{start} Measured: first faster at batch {size} (x{speed:.2f})"
    return f"{start} Measured: not faster up to batch {size} (x{speed:.2f}); use a larger model or more tokens"
