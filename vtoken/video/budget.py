"""From scores and a budget to tokens per cell of a video, separators included (quota.md sections 6, 8 and 9.2)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtoken.core.errors import ConfigError, InputError
from vtoken.hosts.video import VideoLayout
from vtoken.ops.allocate import allocate_tokens, checked_scores
from vtoken.ops.resample import MODES
from vtoken.ops.row_plan import row_widths

Budget = int | float | None
#: Cells' worth of default tokens that a video gets if no budget is named.
DEFAULT_CELLS = 64


@dataclass(frozen=True)
class Spending:
    """How budgets are spent; see `QuotaVideoModel` for the fields of the same names.

    Args:
        newline: separators of the model, "none", "video" or "row".
    """

    mode: str
    min_tokens: int
    max_tokens: int | None
    power: float
    count_separators: bool
    newline: str

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
            return sum(len(row_widths(t, *self.grid(layout))) for t in counts)
        return int(self.newline == "video")

    def _allocated(self, scores: Sequence[float], content: int, budget: int, layout: VideoLayout) -> list[int]:
        if content < 1 or content < self.min_tokens * layout.cells:
            raise ConfigError(
                f"a budget of {budget} tokens leaves {max(content, 0)} beside the separators, too few for "
                f"{layout.cells} frames with min_tokens={self.min_tokens}: use fewer frames, min_tokens=0 or a larger "
                "budget"
            )
        height, width = self.grid(layout)
        most = height * width if self.max_tokens is None else min(self.max_tokens, height * width)
        return allocate_tokens(
            scores, content, min_tokens=self.min_tokens, max_tokens=most, power=self.power, rounding="exact"
        )


def check_settings(
    mode: str, min_tokens: int | None, max_tokens: int | None, count_separators: bool, vision_chunk: int | None
) -> None:
    """Raise ConfigError for settings that no model could serve."""
    if mode not in MODES:
        raise ConfigError(f"QuotaVideoModel(mode={mode!r}): unknown; supported: {', '.join(MODES)}")
    for name, value, least in (
        ("min_tokens", min_tokens, 0), ("max_tokens", max_tokens, 1), ("vision_chunk", vision_chunk, 1),
    ):  # fmt: skip
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"QuotaVideoModel({name}={value!r}): must be None or a whole number from {least} on")
    if not isinstance(count_separators, bool):
        raise ConfigError(f"QuotaVideoModel(count_separators={count_separators!r}): must be True or False")


def check_budget(budget: Budget | Sequence[Budget]) -> None:
    """Raise ConfigError unless it is tokens, a share, None, or a list of those."""
    each = budget if isinstance(budget, (list, tuple)) else [budget]
    for value in each:
        if value is None:
            continue
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if not number or (isinstance(value, float) and not 0 < value <= 1) or (isinstance(value, int) and value < 1):
            raise ConfigError(
                f"budget={value!r}: must be tokens of a video (a whole number from 1 on), a share of its default "
                f"tokens (a float in (0, 1]), or None for {DEFAULT_CELLS} frames' worth of default tokens"
            )


def budgets(budget: Budget | Sequence[Budget], layouts: Sequence[VideoLayout]) -> list[int]:
    """Tokens of every video.

    Raises:
        InputError: if a list does not have one budget per video.
    """
    check_budget(budget)
    if budget is None or isinstance(budget, (int, float)):
        return [_tokens(budget, layout) for layout in layouts]
    if len(budget) != len(layouts):
        raise InputError(f"{len(budget)} budgets for {len(layouts)} video(s); give one each, or one for all")
    return [_tokens(each, layout) for each, layout in zip(budget, layouts, strict=True)]


def _tokens(budget: Budget, layout: VideoLayout) -> int:
    if budget is None:
        return DEFAULT_CELLS * layout.default_tokens
    if isinstance(budget, float):
        return max(1, math.floor(budget * layout.cells * layout.default_tokens + 0.5))
    return operator.index(budget)


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
    raise InputError(f"{len(scores)} scores for video {video}, which has {frames}")
