"""Prompt methods that keep a number of tokens of an image, and the same share of every further grid.

Source: docs/methods/vtc_cls.md 3 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vtoken import checks
from vtoken.core.config import MethodConfig
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Seen, Visual
from vtoken.errors import ConfigError

NEWLINES = ("row", "all", "none")
POSITIONS = ("auto", "compact", "original")


@dataclass(frozen=True, kw_only=True)
class ShareConfig(MethodConfig):
    """Settings of every prompt method that keeps a share; exactly one of the first two must be given.

    Args:
        num_tokens: tokens to keep of one image, from 1 on. Where an image is cut into crops, of its overview, and of a
            video, of its first frame; every other grid keeps the same share.
        keep_ratio: share of them to keep, in (0, 1]; rounded up.
        newline: of the newline tokens between rows of a detail grid, keep those of rows with a kept patch ("row"),
            "all" or "none". They come on top of the budget.
        positions: "compact" (kept tokens and text are numbered anew), "original" (everything keeps the position it has
            in the full prompt) or "auto": "compact" in models that number tokens along one axis, else "original".
    """

    part: ClassVar[str] = "prompt"
    _either = ("num_tokens", "keep_ratio")

    num_tokens: int | None = None
    keep_ratio: float | None = None
    newline: str = "row"
    positions: str = "auto"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if (self.num_tokens is None) == (self.keep_ratio is None):
            raise ConfigError(
                f"{owner}(num_tokens={self.num_tokens!r}, keep_ratio={self.keep_ratio!r}): give exactly one of the two"
            )
        if self.num_tokens is not None:
            object.__setattr__(self, "num_tokens", checks.whole(owner, "num_tokens", self.num_tokens, 1))
        if self.keep_ratio is not None:
            ratio: Any = self.keep_ratio
            meant = isinstance(ratio, int) and ratio > 1
            what = f"the share of tokens kept{f' (did you mean num_tokens={ratio}?)' if meant else ''}, "
            object.__setattr__(self, "keep_ratio", checks.share(owner, "keep_ratio", ratio, what=what))
        checks.choice(owner, "newline", self.newline, NEWLINES)
        checks.choice(owner, "positions", self.positions, POSITIONS)

    @classmethod
    def example(cls) -> Self:
        """64 tokens."""
        return cls(num_tokens=64)


class Sharing(PromptMethod):
    """U tokens of the first cell, the same share of every other."""

    budgets = frozenset({"num_tokens", "keep_ratio"})

    def __init__(self, config: Any) -> None:
        self.config = config
        self.positions, self.newline = config.positions, config.newline

    def counts(self, visual: Visual) -> list[int]:
        """Tokens of every cell."""
        first = visual.cells[0].tokens
        if self.config.num_tokens is not None:
            u = min(self.config.num_tokens, first)
        else:
            u = checks.share_of(self.config.keep_ratio, first)
        others = [checks.share_of(u / first, cell.tokens) if cell.tokens else 0 for cell in visual.cells[1:]]
        return [u, *others]

    def count(self, visual: Visual, clues: Mapping[str, Any]) -> int:
        """Of all cells."""
        return sum(self.counts(visual))

    def each(self, seen: Seen, pick: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`pick(part, k)` gives k positions inside a cell's content indices `part`; together, for every cell."""
        parts = zip(seen.parts(), self.counts(seen.visual), strict=True)
        return torch.cat([part[pick(part, k).cpu()] for part, k in parts if k])
