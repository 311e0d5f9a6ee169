"""Rows in which the tokens of one frame are laid out: any count, near the frame's own shape.

Source: docs/methods/quota.md 7.1.
"""

from __future__ import annotations

from math import isqrt

from vtoken import checks
from vtoken.errors import InputError

SHAPES = ("exact", "floor")


def row_widths(t: int, height: int, width: int, *, shape: str = "exact") -> list[int]:
    """Tokens in each row of a frame of `t` tokens taken from a grid of `height` x `width`.

    Args:
        t: tokens, 0 to height * width.
        height, width: of the native grid.
        shape: "exact": the widths add up to `t`, differ by at most 1, none exceeds `width`, and there are at most
            `height` rows. "floor": the published code's shape, s columns and s or s + 1 rows with s = floor(sqrt(t)):
            at most `t` tokens, whatever the grid (for comparisons).

    Raises:
        InputError: if `t` does not fit the grid. ConfigError: if the shape is unknown.

    Example:
        >>> from vtoken.ops import row_widths
        >>> row_widths(23, 9, 9)
        [4, 5, 4, 5, 5]
    """
    checks.choice("row_widths", "shape", shape, SHAPES)
    height = checks.whole("row_widths", "height", height, 1, error=InputError)
    width = checks.whole("row_widths", "width", width, 1, error=InputError)
    t = checks.whole("row_widths", "t", t, error=InputError)
    if t < 0 or (t > height * width and shape == "exact"):
        raise InputError(f"t={t}: a grid of {height} x {width} gives 0 to {height * width} tokens")
    if t == 0:
        return []
    if shape == "floor":
        side = isqrt(t)
        return [side] * (side + 1 if side * (side + 1) <= t else side)
    rows = (isqrt(4 * t * height // width) + 1) // 2  # floor(sqrt(t * height / width) + 1/2), in whole numbers
    rows = max(1, min(rows, height, t), -(-t // width))
    base, extra = divmod(t, rows)
    return [base + (r + 1) * extra // rows - r * extra // rows for r in range(rows)]
