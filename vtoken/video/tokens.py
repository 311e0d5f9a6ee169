"""The tokens of videos after resampling, and the placeholders that they take (docs/methods/quota.md 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.hosts.video.adapter import VideoFeatures, VideoLayout
from vtoken.ops.frames.resample import Assigned, assign


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """One video as it enters the language model, before separators.

    Args:
        levels: tokens [N, C] of every level of features.
        counts: tokens of every cell.
        rows: of every cell the tokens in each row.
        places: of every cell the grid position row * W + column that each token stands for, [t] int64.
    """

    levels: tuple[Tensor, ...]
    counts: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    places: tuple[Tensor, ...]


def resample(
    features: VideoFeatures, counts: Sequence[int], mode: str, pooling: str, shape: str = "exact"
) -> VideoTokens:
    """The grids of a video as so many tokens per cell; all levels in one go, so that they stay aligned.

    Args:
        pooling: how the model itself comes to its default grid, from which "merge" starts.
        shape: of the rows of a cell; "floor" gives fewer tokens than counted.
    """
    widths = [level.shape[-1] for level in (features.grid, *features.extra)]
    grids = torch.cat([features.grid, *features.extra], dim=-1) if features.extra else features.grid
    found: list[Assigned] = []
    for grid, t in zip(grids, counts, strict=True):
        if mode == "merge" and tuple(grid.shape[:2]) != features.layout.default:
            grid = assign(grid, features.layout.default_tokens, pooling, size=grid.shape[:2]).tokens.unflatten(
                0, features.layout.default
            )
        found.append(assign(grid, t, mode, shape=shape, size=grid.shape[:2]))
    columns = features.layout.default[1] if mode == "merge" else features.layout.grid[1]
    return VideoTokens(
        levels=torch.cat([a.tokens for a in found]).split(widths, dim=-1),
        counts=tuple(len(a.tokens) for a in found),
        rows=tuple(tuple(a.rows) for a in found),
        places=tuple(a.coords[:, 0] * columns + a.coords[:, 1] for a in found),
    )


def with_separators(tokens: Tensor, rows: Sequence[Sequence[int]], newline: str, separator: Tensor | None) -> Tensor:
    """Tokens [N, C] of a video with its separators [C]: none, one at its end, or one after each row of each cell."""
    if newline == "none":
        return tokens
    if separator is None:
        raise ConfigError(f"newline={newline!r}, but the adapter's features hold no newline embedding")
    every = torch.cat([tokens, separator.to(tokens).unsqueeze(0)])
    if newline == "video":
        return every
    order, start = [], 0
    for width in [width for cell in rows for width in cell]:
        order += [*range(start, start + width), len(tokens)]
        start += width
    return every[torch.tensor(order, dtype=torch.int64, device=tokens.device)]


def placeholders(tokens: VideoTokens, layout: VideoLayout, newline: str) -> Tensor:
    """For every token of a video, separators included, the placeholder of the full prompt that it takes.

    Ascending; a cell with more tokens than placeholders takes some of them several times. Where a cell has a
    placeholder for every position of its grid, a token takes that of the position it stands for.
    """
    found, start = [], 0
    for count, rows, places, old in zip(tokens.counts, tokens.rows, tokens.places, layout.placeholders, strict=True):
        new = count + (len(rows) if newline == "row" else 0)
        if new and not old:
            raise ConfigError("a frame without placeholders in the prompt cannot be given tokens")
        if layout.grid == layout.default and old == layout.default_tokens and new == count:
            found.append(start + places)
        else:  # evenly spread
            found.append(start + (2 * torch.arange(new, device=places.device) + 1) * old // (2 * max(new, 1)))
        start += old
    found.append(torch.arange(start, start + layout.trailing, device=found[0].device))
    return torch.cat(found)
