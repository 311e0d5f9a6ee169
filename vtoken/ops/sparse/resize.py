"""Parameters that have a row per token, for another patch grid than they were made for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ShapeError


def resize_rows(rows: Tensor, old: tuple[int, int], new: tuple[int, int], *, num_prefix: int, mean: bool) -> Tensor:
    """Rows [P + T, K] that belong to the tokens of one grid, for another: bicubic per column, prefix rows as they are.

    Args:
        rows: prefix rows first, then one per patch of `old`, row by row.
        old, new: rows and columns of the patch grids.
        num_prefix: P.
        mean: multiply patch rows by T_old / T_new (w_down), so that a mixture of all tokens keeps its magnitude.

    Raises:
        ShapeError: if `rows` does not fit `old`. InputError, ConfigError: if it is no tensor, if a grid or `num_prefix`
            is none.

    Source: docs/methods/sparsifiner.md 10.
    """
    checks.tensor("resize_rows", "rows", rows, 2, shape="[P + T, K]")
    old, new = checks.grid("resize_rows", "old", old), checks.grid("resize_rows", "new", new)
    num_prefix = checks.whole("resize_rows", "num_prefix", num_prefix, 0)
    checks.flag("resize_rows", "mean", mean)
    patches, count = rows[num_prefix:], old[0] * old[1]
    if patches.shape[0] != count:
        raise ShapeError(f"{rows.shape[0]} rows are not {num_prefix} prefix tokens and a grid of {old[0]} x {old[1]}")
    image = patches.to(torch.promote_types(patches.dtype, torch.float32)).t().reshape(1, -1, *old)
    resized = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=False)
    resized = resized.flatten(2)[0].t()
    if mean:
        resized = resized * (count / (new[0] * new[1]))
    return torch.cat([rows[:num_prefix], resized.to(rows.dtype)])
