"""Rounding at the store, also where Triton's interpreter would truncate."""

from __future__ import annotations

import triton
import triton.language as tl

from vtoken_kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 values in the dtype of the output, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the lower half off (and spoils tiny numbers): add just under half a step (half a step to
        # odd numbers) and cut it off here, so that nothing is left to convert.
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
