"""A video along time: thumbnails, what is left of them, the score and the tokens of every frame."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtoken.errors import ShapeError
from vtoken.ops.frames.resample import assign
from vtoken.visualize.figure import new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#3b6fb5", "#d9792b", "#9a9a9a"


def plot_frames(
    frames: Tensor | Any,
    scores: Sequence[float] | Tensor,
    tokens: Sequence[int],
    path: Path | str,
    *,
    times: Sequence[float] | None = None,
    grid: tuple[int, int] = (27, 27),
    title: str = "",
    columns: int = 9,
) -> Path:
    """Write a PNG of a video's budget: thumbnails, mosaics of their tokens, scores and tokens of all frames.

    Args:
        frames: uint8 [T, h, w, 3], as `vtoken.video.read_frames` gives.
        scores: of every frame, [T].
        tokens: of every frame, [T].
        path: of the PNG; returned.
        times: of the frames in seconds; None numbers them.
        grid: rows and columns of a frame's native features; a mosaic has as many cells as the frame has tokens.
        title: above.
        columns: thumbnails at most. Each shows the frame with the most tokens in its stretch of time.

    Raises:
        ShapeError: if the lengths differ, there is no frame, or a frame has more tokens than the grid.
        ImportError: if matplotlib is missing.
    """
    figure = frames_figure(frames, scores, tokens, times=times, grid=grid, title=title, columns=columns)
    return save(figure, Path(path))


def frames_figure(
    frames: Tensor | Any,
    scores: Sequence[float] | Tensor,
    tokens: Sequence[int],
    *,
    times: Sequence[float] | None,
    grid: tuple[int, int],
    title: str,
    columns: int,
) -> Figure:
    """The figure of `plot_frames`."""
    pictures = torch.as_tensor(frames)
    count = len(tokens)
    places = list(range(count)) if times is None else [float(time) for time in times]
    if pictures.dim() != 4 or pictures.shape[-1] != 3 or pictures.dtype != torch.uint8:
        raise ShapeError(f"frames must be uint8 [T, h, w, 3], got {pictures.dtype} {tuple(pictures.shape)}")
    if not count or not len(pictures) == len(scores) == count == len(places):
        raise ShapeError(
            f"{len(pictures)} frames, {len(scores)} scores, {count} token counts, {len(places)} times: one each needed"
        )
    if max(tokens) > grid[0] * grid[1]:
        raise ShapeError(f"a frame has {max(tokens)} tokens, its grid {grid[0]} x {grid[1]}")
    shown = _chosen(tokens, min(columns, count))
    aspect = pictures.shape[1] / pictures.shape[2]
    figure, axes = _layout(len(shown), aspect, title)
    for column, index in enumerate(shown):
        label = f"{index}" if times is None else f"{places[index]:.1f} s"
        _thumbnail(axes[0][column], pictures[index], label)
        _thumbnail(axes[1][column], mosaic(pictures[index], tokens[index], grid), f"{tokens[index]} tokens")
    _bars(axes[2], places, [float(score) for score in scores], _BLUE, "score", shown)
    _bars(axes[3], places, list(tokens), _ORANGE, "tokens", shown)
    even = sum(tokens) / count
    axes[3].axhline(even, color="black", linewidth=0.8, linestyle="--")
    axes[3].text(1.005, even, f"even: {even:.0f}", transform=axes[3].get_yaxis_transform(), va="center", fontsize=8)
    axes[0][0].set_ylabel("frame")
    axes[1][0].set_ylabel("as tokens")
    axes[2].tick_params(labelbottom=False)
    axes[3].set_xlabel("frame" if times is None else "seconds")
    return figure


def mosaic(picture: Tensor, tokens: int, grid: tuple[int, int]) -> Tensor:
    """A frame uint8 [h, w, 3] painted with one colour per token, rows and columns as resampled; hatched if it has none.

    The colours are those of its grid of `grid` cells, pooled.
    """
    height, width = picture.shape[:2]
    if tokens == 0:
        lines = (torch.arange(height)[:, None] + torch.arange(width)) % max(4, height // 8) == 0
        return torch.where(lines, 200, 240).to(torch.uint8)[..., None].expand(-1, -1, 3)
    native = F.adaptive_avg_pool2d(rearrange(picture, "h w c -> c h w").float(), grid)
    out = assign(rearrange(native, "c rows columns -> rows columns c"), tokens, "pool")
    colours = out.tokens.round().clamp(0, 255).to(torch.uint8).split(out.rows)
    row = torch.arange(height) * len(out.rows) // height
    lines = torch.stack([line[torch.arange(width) * len(line) // width] for line in colours])
    return lines[row]


def _chosen(tokens: Sequence[int], columns: int) -> list[int]:
    """Of each of `columns` equal stretches the frame with the most tokens."""
    edges = [round(i * len(tokens) / columns) for i in range(columns + 1)]
    return [max(range(a, b), key=lambda i: tokens[i]) for a, b in itertools.pairwise(edges)]


def _layout(columns: int, aspect: float, title: str) -> tuple[Figure, Any]:
    width = 12.0
    thumbnail = (width - 1.2) / max(columns, 4) * aspect + 0.3
    figure = new_figure((width, 2 * thumbnail + 4.2), dpi=110)
    if title:
        figure.suptitle(title, fontsize=11)
    spec = figure.add_gridspec(4, columns, height_ratios=[thumbnail, thumbnail, 1.6, 1.9])
    rows = [[figure.add_subplot(spec[row, column]) for column in range(columns)] for row in range(2)]
    score = figure.add_subplot(spec[2, :])
    return figure, [*rows, score, figure.add_subplot(spec[3, :], sharex=score)]


def _thumbnail(axes: Any, picture: Tensor, label: str) -> None:
    axes.imshow(picture.numpy(), interpolation="nearest", aspect="equal")
    axes.set_title(label, fontsize=8, pad=3)
    axes.set_xticks([])
    axes.set_yticks([])


def _bars(
    axes: Any, places: Sequence[float], values: Sequence[float], colour: str, name: str, shown: Sequence[int]
) -> None:
    """One bar per frame; those with a thumbnail above are dark."""
    step = (places[-1] - places[0]) / max(len(places) - 1, 1) or 1.0
    bars = axes.bar(places, values, width=0.86 * step, color=colour, alpha=0.55)
    for index in shown:
        bars[index].set_alpha(1.0)
    axes.set_ylabel(name)
    axes.set_xlim(places[0] - step / 2, places[-1] + step / 2)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
