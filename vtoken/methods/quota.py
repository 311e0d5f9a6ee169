"""QuoTA: a token budget for every video, spent on its frames by their relevance (arXiv 2503.08689)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken import checks
from vtoken.core.config import MethodConfig, register_method
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Chosen, Needs, Seen, TowerFacts, Visual
from vtoken.errors import ConfigError, InputError
from vtoken.ops.frames.allocate import ROUNDINGS, allocate_tokens, checked_scores
from vtoken.ops.frames.resample import MODES, assign
from vtoken.ops.frames.row_plan import SHAPES, row_widths

Budget = int | float | None
#: Cells' worth of default tokens that a video gets if no budget is named.
DEFAULT_CELLS = 64


@register_method
@dataclass(frozen=True, kw_only=True)
class QuoTA(MethodConfig):
    """Frames of a video get tokens by their relevance, within one budget per video; images stay whole.

    Relevance comes with the call, `vtoken.budget(model, frame_scores=...)`: one number for every frame (any scale, at
    least 0), a list of those for several videos; where the model merges frames in time, one per frame or per merged
    cell. Without it a budget is spread evenly. `vtoken.QuotaVideoModel` scores frames by a question, too.

    Args:
        budget: tokens of each video: a whole number, a share of what the unmodified model would spend (a float in
            (0, 1]), None for 64 frames' worth of that, or a list with one of these per video.
        mode: how a frame becomes so many tokens: "bilinear", "pool", "merge" or "stride", see `vtoken.ops.assign`.
        min_tokens, max_tokens: bounds per frame. By default 0 (1 where frames have runs of their own in the prompt) and
            all of the frame's features (for "merge" the model's own tokens per frame).
        power: of the scores; see `vtoken.ops.allocate_tokens`.
        count_separators: whether newlines count towards the budget.
        vision_chunk: frames in one run of the tower; None means all of a call. Where a call needs several runs, the
            last bits of features may differ from the model's own.
        rounding: "exact", or "floor" as the published code: shares of the budget rounded down, without bounds.
        shape: of a frame's rows for "bilinear" and "pool": "exact", or "floor" as the published code: at most the
            frame's tokens, in nearly square grids.

    Raises:
        ConfigError: for values out of range.

    Example:
        >>> import vtoken
        >>> scores = {"frame_scores": [0.9, 0.1, 0.5, 0.0]}
        >>> vtoken.retained_count(vtoken.QuoTA(budget=0.25), (4, 24, 24), merge=2, clues=scores)
        144

    Source: arXiv 2503.08689; exact budgets are docs/methods/quota.md 6.
    """

    method: ClassVar[str] = "quota"
    part: ClassVar[str] = "prompt"

    budget: Budget | Sequence[Budget] = None
    mode: str = "bilinear"
    min_tokens: int | None = None
    max_tokens: int | None = None
    power: float = 2.0
    count_separators: bool = False
    vision_chunk: int | None = 32
    rounding: str = "exact"
    shape: str = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", _checked_budget(self.budget))
        for name, least in {"min_tokens": 0, "max_tokens": 1, "vision_chunk": 1}.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checks.whole("QuoTA", name, getattr(self, name), least))
        object.__setattr__(self, "power", checks.number("QuoTA", "power", self.power, 0))
        checks.flag("QuoTA", "count_separators", self.count_separators)
        for name, choices in {"mode": MODES, "rounding": ROUNDINGS, "shape": SHAPES}.items():
            checks.choice("QuoTA", name, getattr(self, name), choices)
        if self.rounding == "floor" and (self.min_tokens or self.max_tokens is not None):
            raise ConfigError("rounding='floor' is the published code's and has no bounds; leave out min_tokens and "
                              "max_tokens")  # fmt: skip
        if self.shape == "floor" and not self.in_lines:
            raise ConfigError(f"shape='floor' lays out rows, which mode={self.mode!r} does not have")
        if self.max_tokens is not None and self.max_tokens < (self.min_tokens or 0):
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least min_tokens={self.min_tokens}")

    @property
    def in_lines(self) -> bool:
        """Whether the tokens of a frame lie in rows."""
        return self.mode in ("bilinear", "pool")

    def build(self, depth: int) -> PromptMethod:
        """The budget."""
        return FrameBudget(self)

    def tokens(self, visual: Visual) -> int:
        """The budget of one video in tokens."""
        if self.budget is None:
            return DEFAULT_CELLS * default_tokens(visual)
        if isinstance(self.budget, int):
            return self.budget
        assert isinstance(self.budget, float)
        return max(1, math.floor(self.budget * len(visual.cells) * default_tokens(visual) + 0.5))

    def grid(self, visual: Visual) -> tuple[int, int]:
        """What of every cell is resampled: merging starts from the model's own grid."""
        return _largest(visual) if self.mode == "merge" else visual.cells[0].native or _largest(visual)

    def least(self, visual: Visual) -> int:
        """Tokens that every cell gets."""
        if self.rounding == "floor":
            return 0
        return int(visual.apart) if self.min_tokens is None else self.min_tokens


@dataclass(frozen=True)
class Spent:
    """What the cells of one video are given.

    Args:
        scores: of every cell.
        budget: tokens that were asked for.
        counts: tokens of every cell; with shape "floor" what it allows of them is taken.
        lines: of every cell the tokens in each row; nothing for modes without rows.
        separators: beside those tokens.
    """

    scores: tuple[float, ...]
    budget: int
    counts: tuple[int, ...]
    lines: tuple[tuple[int, ...], ...]
    separators: int

    @property
    def taken(self) -> tuple[int, ...]:
        """Tokens that every cell ends with."""
        return tuple(map(sum, self.lines)) if self.lines else self.counts


class FrameBudget(PromptMethod):
    """The frames of every video resampled to their shares of the budget."""

    budgets = frozenset({"budget"})
    clues = frozenset({"frame_scores"})
    kinds = frozenset({"video"})
    replaces = True
    newline = "all"

    def __init__(self, config: QuoTA) -> None:
        self.config = config
        self.in_lines = config.in_lines

    def needs(self, tower: TowerFacts) -> Needs:
        """The grids of the frames, so many at a time."""
        return Needs(features=frozenset({"native"}), chunk=self.config.vision_chunk)

    def spent(self, visual: Visual, clues: Mapping[str, Any]) -> Spent:
        """Tokens of every cell.

        Raises:
            ConfigError: if the budget cannot be spent within the bounds. InputError: for scores that are none.
        """
        told = clues.get("frame_scores")
        scores = [1.0] * len(visual.cells) if told is None else per_cell(told, visual)
        return _spent(self.config, visual, tuple(scores), self.config.tokens(visual))

    def count(self, visual: Visual, clues: Mapping[str, Any]) -> int:
        """Of all cells."""
        total = sum(self.spent(visual, clues).taken)
        if not total:
            raise ConfigError(
                f"rounding='floor' gives no frame a whole token of a budget of {self.config.tokens(visual)}; take a "
                "larger one, or rounding='exact'"
            )
        return total

    def choose(self, seen: Seen) -> Chosen:
        """Cell by cell; a token keeps the place that it stands for, where a cell has one for each."""
        assert seen.native is not None
        config, visual, spent = self.config, seen.visual, self.spent(seen.visual, seen.clues)
        size, own = config.grid(visual), _largest(visual)
        index, rows, lines, start = [], [], list[int](), 0
        for cell, grid, t in zip(visual.cells, seen.native, spent.counts, strict=True):
            if config.mode == "merge" and grid.shape[:2] != own:
                grid = assign(grid, own[0] * own[1], visual.pooling, size=grid.shape[:2]).tokens.unflatten(0, own)
            found = assign(grid, t, config.mode, shape=config.shape, size=size)
            k = len(found.tokens)
            if k and not cell.tokens:
                raise ConfigError("a frame without placeholders in the prompt cannot be given tokens")
            if cell.native in (None, cell.grid):
                places = found.coords[:, 0].cpu() * cell.grid[1] + found.coords[:, 1].cpu()
            else:  # evenly spread
                places = (2 * torch.arange(k) + 1) * cell.tokens // (2 * max(k, 1))
            index.append(start + places.sort().values)  # an enlarged grid has several rows for one of the model's own
            rows.append(found.tokens)
            lines += found.rows
            start += cell.tokens
        ends = torch.tensor(lines, dtype=torch.int64).cumsum(0) - 1 if self.in_lines else None
        return Chosen(torch.cat(index), torch.cat(rows), ends=ends)


@functools.lru_cache(maxsize=64)
def _spent(config: QuoTA, visual: Visual, scores: tuple[float, ...], budget: int) -> Spent:
    """Remembered, since counting and choosing ask for the same, and exact fractions of long videos take their time."""
    content = budget
    grid = config.grid(visual)
    while True:
        counts = tuple(_allocated(config, scores, content, budget, visual))
        lines = tuple(tuple(row_widths(t, *grid, shape=config.shape)) for t in counts) if config.in_lines else ()
        separators = len(visual.separators)
        if separators > 1:  # one behind each row
            separators = sum(map(len, lines))
        if not config.count_separators or sum(counts) <= budget - separators:
            return Spent(scores, budget, counts, lines, separators)
        content = budget - separators  # less than before, so this ends


def _allocated(config: QuoTA, scores: Sequence[float], content: int, budget: int, visual: Visual) -> list[int]:
    least, (height, width) = config.least(visual), config.grid(visual)
    if content < 1 or content < least * len(scores):
        left = f"leaves {max(content, 0)} beside the separators," if config.count_separators else "is"
        raise ConfigError(
            f"a budget of {budget} tokens {left} too few for {len(scores)} frames with min_tokens={least}: "
            "use fewer frames, min_tokens=0 or a larger budget"
        )
    if least > height * width:
        raise ConfigError(
            f"min_tokens={least} is more than the {height} x {width} features of a frame with mode={config.mode!r}; "
            f"the most is {height * width}"
        )
    if config.rounding == "floor":
        counts = allocate_tokens(scores, content, power=config.power, rounding="floor")
        if config.shape == "exact" and max(counts) > height * width:
            raise ConfigError(
                f"rounding='floor' gives a frame {max(counts)} tokens, its grid of {height} x {width} has "
                f"{height * width}; use shape='floor', which enlarges grids, or rounding='exact'"
            )
        return counts
    most = height * width if config.max_tokens is None else min(config.max_tokens, height * width)
    return allocate_tokens(scores, content, min_tokens=least, max_tokens=most, power=config.power)


def _largest(visual: Visual) -> tuple[int, int]:
    """The model's own grid of a cell; processors may have taken tokens out of some."""
    return max(visual.cells, key=lambda cell: cell.tokens).grid


def default_tokens(visual: Visual) -> int:
    """n, tokens of one cell in the unmodified model."""
    height, width = _largest(visual)
    return height * width


def per_cell(scores: Any, visual: Visual, which: str = "a video") -> list[float]:
    """Scores of cells as floats; of those given per frame, the highest of a cell's frames.

    Raises:
        InputError: if there is neither one per cell nor one per frame, or one is negative or not finite.
    """
    given = checked_scores(scores.detach() if isinstance(scores, Tensor) else scores)
    each, cells = visual.frames_per_cell, len(visual.cells)
    if len(given) == cells:
        return given
    if (cells - 1) * each < len(given) <= cells * each:  # the last cell may have been filled up
        return [max(given[i * each : (i + 1) * each]) for i in range(cells)]
    frames = f"{cells} frames" if each == 1 else f"{cells} cells of {each} frames ({cells} or {cells * each} scores)"
    raise InputError(
        f"{len(given)} scores for {which}, which has {frames}. Video processors take frames of their own choice "
        "from what they are given (their own sampling): pass do_sample_frames=False with video_metadata, or "
        "score the frames that they kept"
    )


def _checked_budget(budget: Any) -> Any:
    """Tokens, a share, None, or a tuple of those, as plain numbers; raises ConfigError for anything else."""
    several = checks.several(budget)
    if several is not None:
        return tuple(_checked_budget(each) for each in several)
    if budget is None:
        return None
    number: Any = None if isinstance(budget, bool) else budget
    if isinstance(number, Integral) and int(number) >= 1:  # type: ignore[call-overload]
        return int(number)  # type: ignore[call-overload]
    if isinstance(number, Real) and not isinstance(number, Integral) and 0 < float(number) <= 1:
        return float(number)
    raise ConfigError(
        f"QuoTA(budget={budget!r}): must be tokens of a video (a whole number from 1 on), a share of its default "
        f"tokens (a float in (0, 1]), or None for {DEFAULT_CELLS} frames' worth of default tokens"
    )
