"""From scores and a budget to tokens per cell of a video, separators included (docs/methods/quota.md 6, 8 and 9.2)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError
from vtoken.hosts.video.adapter import VideoLayout
from vtoken.ops.frames.allocate import ROUNDINGS, allocate_tokens, checked_scores
from vtoken.ops.frames.resample import MODES
from vtoken.ops.frames.row_plan import SHAPES, row_widths

Budget = int | float | None
#: Cells' worth of default tokens that a video gets if no budget is named.
DEFAULT_CELLS = 64


@dataclass(frozen=True)
class Spending:
    """How budgets are spent; see `QuotaVideoModel` for the fields of the same names.

    Args:
        rounding, shape: see `vtoken.ops.allocate_tokens` and `vtoken.ops.row_widths`.
        newline: separators of the model, "none", "video" or "row".
        floor: what `min_tokens=None` stands for.

    Raises:
        ConfigError: for values that no model, or not this one, could serve.
    """

    mode: str
    min_tokens: int | None
    max_tokens: int | None
    power: float
    count_separators: bool
    newline: str
    floor: int = 0
    rounding: str = "exact"
    shape: str = "exact"

    def __post_init__(self) -> None:
        check_settings(self.mode, self.min_tokens, self.max_tokens, self.power, self.count_separators)
        checks.choice("QuotaVideoModel", "rounding", self.rounding, ROUNDINGS)
        checks.choice("QuotaVideoModel", "shape", self.shape, SHAPES)
        if self.rounding == "floor" and (self.min_tokens or self.max_tokens is not None):
            raise ConfigError("rounding='floor' is the published code's and has no bounds; leave out min_tokens and "
                              "max_tokens")  # fmt: skip
        if self.shape == "floor" and self.mode in ("merge", "stride"):
            raise ConfigError(f"shape='floor' lays out rows, which mode={self.mode!r} does not have")
        if self.max_tokens is not None and self.max_tokens < self.least:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least min_tokens={self.least}")
        if self.mode in ("merge", "stride") and self.newline == "row":
            raise ConfigError(
                f"mode={self.mode!r} has no rows, which the newlines of this model need; use bilinear or pool"
            )

    @property
    def least(self) -> int:
        """Tokens that every cell gets."""
        if self.rounding == "floor":
            return 0
        return self.floor if self.min_tokens is None else operator.index(self.min_tokens)

    def grid(self, layout: VideoLayout) -> tuple[int, int]:
        """What is resampled: merging starts from the model's own smaller grid."""
        return layout.default if self.mode == "merge" else layout.grid

    def counts(self, scores: Sequence[float], budget: int, layout: VideoLayout) -> list[int]:
        """Tokens of every cell; they add up to the budget, or to less where the bounds or the separators need it.

        Raises:
            ConfigError: if the budget cannot be spent within the bounds.
        """
        content = budget
        while True:
            counts = self._allocated(scores, content, budget, layout)
            if not self.count_separators:
                return counts
            left = budget - self.separators(counts, layout)
            if sum(counts) <= left:
                return counts
            content = left  # less than before, so this ends

    def separators(self, counts: Sequence[int], layout: VideoLayout) -> int:
        """Separators beside so many tokens per cell."""
        if self.newline == "row":
            return sum(len(row_widths(t, *self.grid(layout), shape=self.shape)) for t in counts)
        return int(self.newline == "video")

    def _allocated(self, scores: Sequence[float], content: int, budget: int, layout: VideoLayout) -> list[int]:
        least = self.least
        if content < 1 or content < least * layout.cells:
            left = f"leaves {max(content, 0)} beside the separators," if self.count_separators else "is"
            raise ConfigError(
                f"a budget of {budget} tokens {left} too few for {layout.cells} frames with min_tokens={least}: "
                "use fewer frames, min_tokens=0 or a larger budget"
            )
        height, width = self.grid(layout)
        if least > height * width:
            raise ConfigError(
                f"min_tokens={least} is more than the {height} x {width} features of a frame with mode={self.mode!r}; "
                f"the most is {height * width}"
            )
        if self.rounding == "floor":
            counts = allocate_tokens(scores, content, power=float(self.power), rounding="floor")
            if self.shape == "exact" and max(counts) > height * width:
                raise ConfigError(
                    f"rounding='floor' gives a frame {max(counts)} tokens, its grid of {height} x {width} has "
                    f"{height * width}; use shape='floor', which enlarges grids, or rounding='exact'"
                )
            return counts
        most = height * width if self.max_tokens is None else min(self.max_tokens, height * width)
        return allocate_tokens(
            scores, content, min_tokens=least, max_tokens=most, power=float(self.power), rounding="exact"
        )


def check_settings(
    mode: str, min_tokens: int | None, max_tokens: int | None, power: float, count_separators: bool
) -> None:
    """Raise ConfigError for settings that no model could serve."""
    if mode not in MODES:
        raise ConfigError(f"QuotaVideoModel(mode={mode!r}): unknown; supported: {', '.join(MODES)}")
    check_whole("min_tokens", min_tokens, 0)
    check_whole("max_tokens", max_tokens, 1)
    if not (_is_a(power, Real) and math.isfinite(power) and power >= 0):
        raise ConfigError(f"QuotaVideoModel(power={power!r}): scores are raised to a finite power of at least 0")
    if not isinstance(count_separators, bool):
        raise ConfigError(f"QuotaVideoModel(count_separators={count_separators!r}): must be True or False")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ConfigError unless it is None or a whole number from `least` on."""
    if value is not None and (not _is_a(value, Integral) or value < least):
        raise ConfigError(f"QuotaVideoModel({name}={value!r}): must be None or a whole number from {least} on")


def _is_a(value: Any, kind: type) -> bool:
    """Whether it is such a number, NumPy's too; not True or False, which are whole numbers to Python."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_budget(budget: Budget | Sequence[Budget]) -> None:
    """Raise ConfigError unless it is tokens, a share, None, or a list of those."""
    each: Sequence[Any] = budget if isinstance(budget, (list, tuple)) else [budget]
    for value in each:
        if value is None:
            continue
        whole = _is_a(value, Integral)
        if not _is_a(value, Real) or not (value >= 1 if whole else 0 < value <= 1):
            raise ConfigError(
                f"budget={value!r}: must be tokens of a video (a whole number from 1 on), a share of its default "
                f"tokens (a float in (0, 1]), or None for {DEFAULT_CELLS} frames' worth of default tokens"
            )


def budgets(budget: Any, layouts: Sequence[VideoLayout]) -> list[int]:
    """Tokens of every video, from one budget for each or one for all.

    Raises:
        InputError: if a list does not have one budget per video.
    """
    check_budget(budget)
    if not isinstance(budget, (list, tuple)):
        return [_tokens(budget, layout) for layout in layouts]
    if len(budget) != len(layouts):
        raise InputError(f"{len(budget)} budgets for {len(layouts)} video(s); give one each, or one for all")
    return [_tokens(each, layout) for each, layout in zip(budget, layouts, strict=True)]


def _tokens(budget: Budget, layout: VideoLayout) -> int:
    if budget is None:
        return DEFAULT_CELLS * layout.default_tokens
    if isinstance(budget, Integral):
        return operator.index(budget)
    return max(1, math.floor(float(budget) * layout.cells * layout.default_tokens + 0.5))


def scores_by_video(frame_scores: Any, count: int) -> list[list[float]]:
    """Scores as a list of floats for every video: from [T] or a list of T numbers for one, else from one entry each.

    Raises:
        InputError: if there is not one entry per video, or a score is negative or not finite.
    """
    plain = frame_scores.dim() == 1 if isinstance(frame_scores, Tensor) else _is_flat(frame_scores)
    each = [frame_scores] if plain else list(frame_scores)
    if len(each) != count:
        raise InputError(f"frame_scores for {len(each)} video(s), but there are {count}; give one list each")
    return [checked_scores(s.detach() if isinstance(s, Tensor) else s) for s in each]


def _is_flat(scores: Any) -> bool:
    first = next(iter(scores), None)
    return first is None or not hasattr(first, "__len__") or (isinstance(first, Tensor) and first.dim() == 0)


def per_cell(scores: Sequence[float], layout: VideoLayout, video: int) -> list[float]:
    """Scores of cells; of those given per frame, the highest of a cell's frames.

    Raises:
        InputError: if there is neither one per cell nor one per frame.
    """
    each, cells = layout.frames_per_cell, layout.cells
    if len(scores) == cells:
        return list(scores)
    if (cells - 1) * each < len(scores) <= cells * each:  # the last cell may have been filled up
        return [max(scores[i * each : (i + 1) * each]) for i in range(cells)]
    frames = f"{cells} frames" if each == 1 else f"{cells} cells of {each} frames ({cells} or {cells * each} scores)"
    raise InputError(
        f"{len(scores)} scores for video {video}, which has {frames}. Video processors take frames of their own choice "
        "from what they are given (their own sampling): pass do_sample_frames=False with video_metadata, or "
        "score the frames that they kept"
    )
