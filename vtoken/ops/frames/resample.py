"""One frame's grid of features as any number of tokens: resampled, pooled, merged or thinned out.

Source: docs/methods/quota.md 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.ops.frames.row_plan import row_widths
from vtoken.ops.merging.matching import plan_tome

MODES = ("bilinear", "pool", "merge", "stride")


class Assigned(NamedTuple):
    """The tokens of one frame, in raster order.

    tokens: [t, C]. coords: row and column of the native grid that each stands for, [t, 2] int64. rows: tokens in each
    row; for "merge" and "stride" in each row of the native grid that has some.
    """

    tokens: Tensor
    coords: Tensor
    rows: list[int]


def assign(
    grid: Tensor, t: int, mode: str = "bilinear", *, shape: str = "exact", size: Sequence[int] | None = None
) -> Assigned:
    """The grid of one frame as `t` tokens; dtype and device stay, and gradients reach the grid.

    Args:
        grid: features [H, W, C].
        t: tokens, 0 to H * W.
        mode: "bilinear" (no antialias; the best published), "pool" (adaptive average), "merge" (rounds of bipartite
            merging, a size-weighted mean of similar tokens), "stride" (evenly spaced tokens, a control).
        shape: of the rows for "bilinear" and "pool", as in `row_widths`; "floor" gives at most `t` tokens.
        size: (H, W), where they are known: the grid must have them. Three numbers do not tell where channels are;
            without `size`, grids whose H is more than twice W and C are refused, as channels come first there.

    Raises:
        ShapeError: if `grid` is not [H, W, C] with H and W at least 1 and of that size. InputError: if it is no tensor
            of floating numbers, or if `t` is no whole number that fits it.
        ConfigError: if mode or shape is unknown, or the mode has no rows to shape.

    Source: arXiv 2503.08689 section 3.4; exact counts and sizes kept over rounds are docs/methods/quota.md 7.

    Example:
        >>> import torch
        >>> from vtoken.ops import assign
        >>> out = assign(torch.randn(27, 27, 8), 101)
        >>> out.tokens.shape, len(out.rows), set(out.rows)
        (torch.Size([101, 8]), 10, {10, 11})
    """
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; supported: {', '.join(MODES)}")
    if not isinstance(grid, Tensor):
        raise InputError(
            f"grid must be a tensor [H, W, C], got {type(grid).__name__}; of an array: torch.as_tensor(it)"
        )
    if not grid.is_floating_point():
        raise InputError(f"grid holds features, floating numbers, got {grid.dtype}")
    t = checks.whole("assign", "t", t, error=InputError)
    if grid.dim() != 3 or min(grid.shape[:2]) < 1:
        raise ShapeError(f"grid must be [H, W, C], the features of one frame, got {tuple(grid.shape)}")
    _check_size(grid, size)
    if mode in ("merge", "stride") and shape != "exact":
        raise ConfigError(f'shape={shape!r} lays out rows, which mode={mode!r} does not have; use "bilinear" or "pool"')
    height, width, _ = grid.shape
    widths = row_widths(t, height, width, shape=shape)
    if t == 0:
        empty = torch.empty(0, 2, dtype=torch.int64, device=grid.device)
        return Assigned(grid.flatten(0, 1)[:0], empty, [])
    if mode == "bilinear":
        return Assigned(_resized(grid, widths, _bilinear), _centres(widths, grid), widths)
    if mode == "pool":
        return Assigned(_resized(grid, widths, F.adaptive_avg_pool2d), _centres(widths, grid), widths)
    tokens, position = _merged(grid.flatten(0, 1), t) if mode == "merge" else _spaced(grid.flatten(0, 1), t)
    coords = torch.stack([position // width, position % width], dim=1)
    return Assigned(tokens, coords, [n for _, n in sorted(Counter(coords[:, 0].tolist()).items())])


def _check_size(grid: Tensor, size: Sequence[int] | None) -> None:
    """That channels come last."""
    found = tuple(grid.shape)
    hint = f"of {found} looks like [C, H, W], channels first; it must be [H, W, C]: grid.permute(1, 2, 0)"
    if size is not None:
        given = checks.whole_numbers(size) if isinstance(size, Sequence) else None
        if given is None or len(given) != 2:
            raise InputError(f"size={size!r}: must be two whole numbers, rows and columns of the grid")
        if found[:2] != given:
            raise ShapeError(f"grid {hint}" if found[1:] == given else f"grid of {found} has not the size {given}")
    elif found[0] > 2 * max(found[1:]):  # frames are not that tall, and features not that thin
        raise ShapeError(f"grid {hint}; if it is one, say so by size={found[:2]}")


def _bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def _resized(grid: Tensor, widths: Sequence[int], resize: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """Row r is row r of the grid resized to (number of rows, widths[r])."""
    image = grid.permute(2, 0, 1).unsqueeze(0).contiguous()
    made = {w: resize(image, (len(widths), w))[0].permute(1, 2, 0) for w in set(widths)}
    if len(made) == 1:
        return made[widths[0]].flatten(0, 1)
    return torch.cat([made[w][r] for r, w in enumerate(widths)])


def _centres(widths: Sequence[int], grid: Tensor) -> Tensor:
    """The cell of the native grid in which the middle of every token lies, [t, 2]."""
    (height, width, _), rows = grid.shape, len(widths)
    found = [
        ((2 * r + 1) * height // (2 * rows), (2 * c + 1) * width // (2 * w))
        for r, w in enumerate(widths)
        for c in range(w)
    ]
    return torch.tensor(found, dtype=torch.int64, device=grid.device)


def _merged(rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Rows [N, C] merged down to `t`, at most halved in a round, and the row numbers that they keep."""
    tokens, size = rows.unsqueeze(0), torch.ones(1, rows.shape[0], dtype=torch.float32, device=rows.device)
    position = torch.arange(rows.shape[0], device=rows.device).unsqueeze(0)
    while tokens.shape[1] > t:
        plan = plan_tome(tokens, min(tokens.shape[1] - t, tokens.shape[1] // 2))
        tokens, size = plan.apply(tokens, size)
        position, order = position.gather(1, plan.keep).sort(dim=1)
        tokens, size = tokens[:, order[0]], size.gather(1, order)
    return tokens[0], position[0]


def _spaced(rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
    index = torch.tensor([j * (rows.shape[0] - 1) // max(t - 1, 1) for j in range(t)], device=rows.device)
    return rows[index], index
