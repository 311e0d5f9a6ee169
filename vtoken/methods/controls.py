"""What a prompt method must be better than: tokens at random, evenly spaced tokens, and plain pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Chosen, Needs, Seen, TowerFacts
from vtoken.methods.sharing import ShareConfig, Sharing
from vtoken.ops.frames.resample import assign


@register_method
@dataclass(frozen=True, kw_only=True)
class RandomTokens(ShareConfig):
    """Image tokens at random; the same ones for every image of a size.

    Args:
        num_tokens, keep_ratio, newline, positions: as in `vtoken.VTCCLS`.
        seed: of the draw.

    Raises:
        ConfigError: for values out of range.
    """

    method: ClassVar[str] = "random_tokens"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", checks.whole("RandomTokens", "seed", self.seed, 0))

    def build(self, depth: int) -> PromptMethod:
        """The draw."""
        return Drawn(self)


@register_method
@dataclass(frozen=True, kw_only=True)
class UniformTokens(ShareConfig):
    """Image tokens that are spread evenly over rows and columns; see `vtoken.ops.assign`.

    Args:
        num_tokens, keep_ratio, newline, positions: as in `vtoken.VTCCLS`.

    Raises:
        ConfigError: for values out of range.
    """

    method: ClassVar[str] = "uniform_tokens"

    def build(self, depth: int) -> PromptMethod:
        """The grid."""
        return Spread(self)


@register_method
@dataclass(frozen=True, kw_only=True)
class PooledTokens(ShareConfig):
    """Image tokens averaged to a smaller grid by adaptive pooling; see `vtoken.ops.assign`.

    Args:
        num_tokens, keep_ratio, newline, positions: as in `vtoken.VTCCLS`.

    Raises:
        ConfigError: for values out of range.
    """

    method: ClassVar[str] = "pooled_tokens"

    def build(self, depth: int) -> PromptMethod:
        """The pooling."""
        return Pooled(self)


class Drawn(Sharing):
    """A draw in every cell, the generator seeded anew for every image."""

    config: Any

    def choose(self, seen: Seen) -> Tensor:
        """Whatever the tokens are."""
        rng = torch.Generator().manual_seed(self.config.seed)
        return self.each(seen, lambda part, k: torch.randperm(len(part), generator=rng)[:k].sort().values)


class Spread(Sharing):
    """Middles of the cells of a coarser grid."""

    def choose(self, seen: Seen) -> Tensor:
        """Whatever the tokens are."""
        index, start = [], 0
        for cell, k in zip(seen.visual.cells, self.counts(seen.visual), strict=True):
            if k:
                coords = assign(torch.zeros(1).expand(*cell.grid, cell.grid[0]), k, "pool").coords
                index.append(start + coords[:, 0] * cell.grid[1] + coords[:, 1])
            start += cell.tokens
        return torch.cat(index)


class Pooled(Sharing):
    """Means over the cells of a coarser grid, at their middles."""

    replaces = True

    def needs(self, tower: TowerFacts) -> Needs:
        """The rows."""
        return Needs(features=frozenset({"stack"}))

    def choose(self, seen: Seen) -> Chosen:
        """Cell by cell."""
        assert seen.stack is not None
        index, rows, start = [], [], 0
        for cell, k in zip(seen.visual.cells, self.counts(seen.visual), strict=True):
            if k:
                found = assign(seen.stack[start : start + cell.tokens].unflatten(0, cell.grid), k, "pool")
                coords = found.coords.cpu()
                index.append(start + coords[:, 0] * cell.grid[1] + coords[:, 1])
                rows.append(found.tokens)
            start += cell.tokens
        return Chosen(torch.cat(index), torch.cat(rows))
