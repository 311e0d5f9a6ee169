"""Launch settings: one table per kernel, by what is known before the first image (widths, dtype, architecture).

Token counts are no part of any key: they differ from layer to layer, and a kernel compiled or tuned per token count
would be compiled or tuned per layer. None of these was tuned on a device; they were chosen so that nothing spills on
sm_80, sm_90 and gfx942 (tests/kernels/test_compile.py).
"""

from __future__ import annotations

from typing import Any

import torch

from vtoken_kernels.launch import power_of_two, target

_HALF = (torch.float16, torch.bfloat16)


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: as exactly as float32 for float32 inputs, tf32 for rounded (half) ones."""
    if target()[0] != "cuda":
        return "ieee"
    return "tf32" if dtype in _HALF else "tf32x3"


def metric(width: int) -> dict[str, Any]:
    """K0: tokens per program so that a tile has about 4096 values."""
    block = power_of_two(width, 16)
    return {"BLOCK_T": max(1, min(64, 4096 // block)), "BLOCK_D": block, "num_warps": 4, "num_stages": 2}


def energy(width: int, mode: str) -> dict[str, Any]:
    """K1: three-pass tf32 holds its operands twice, so sm_80 takes narrower tiles."""
    narrow = mode == "tf32x3" and target()[1] < 90
    block_d = min(64, power_of_two(width, 16))
    return {"BLOCK_I": 64, "BLOCK_J": 32 if narrow else 64, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}


def match(width: int) -> dict[str, Any]:
    """K3."""
    block_d = min(64, power_of_two(width, 16))
    return {"BLOCK_I": 32, "BLOCK_J": 32, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}


#: K2 and the groups of K3b: a tile of comparisons.
RANK = {"BLOCK_I": 32, "BLOCK_J": 128, "num_warps": 4, "num_stages": 1}
#: K3b: tokens that one step of the running count takes.
LAYOUT = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
#: Widest row that a program of K4f can hold.
MAX_NORM_WIDTH = 8192


def rows(width: int) -> dict[str, Any]:
    """K4: one row per program; rows above 4096 channels take several."""
    block = min(4096, power_of_two(width, 16))
    return {"BLOCK_C": block, "num_warps": 1 if block <= 256 else 4 if block <= 2048 else 8, "num_stages": 1}


def norm(width: int) -> dict[str, Any]:
    """K4f: one whole row per program."""
    block = power_of_two(width, 16)
    return {"BLOCK_C": block, "num_warps": 1 if block <= 256 else 4 if block <= 2048 else 8, "num_stages": 1}


def attention(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """K5 forward."""
    block_d = power_of_two(head_dim, 16)
    if dtype not in _HALF:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 2}


def attention_bwd(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """K5 backward, both kernels: BLOCK_M queries, BLOCK_N keys."""
    block_d = power_of_two(head_dim, 16)
    if dtype not in _HALF:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1}
