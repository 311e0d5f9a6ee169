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
    """K0: tokens per program so that a tile has about 2048 values."""
    block = power_of_two(width, 16)
    return {"BLOCK_T": max(1, min(64, 2048 // block)), "BLOCK_D": block, "num_warps": 4, "num_stages": 2}


def energy(width: int, mode: str) -> dict[str, Any]:
    """K1: three-pass tf32 holds its operands twice and takes narrower tiles."""
    narrow = mode == "tf32x3"
    return {"BLOCK_I": 64, "BLOCK_J": 32 if narrow else 64, "num_warps": 4, "num_stages": 2, "BLOCK_D": _step(width)}


def match(width: int) -> dict[str, Any]:
    """K3; in the loop over channels, smaller tiles or more stages spill a few bytes with one assembler or the other."""
    if width <= 64:
        return {"BLOCK_I": 32, "BLOCK_J": 32, "num_warps": 4, "num_stages": 2, "BLOCK_D": _step(width)}
    return {"BLOCK_I": 64, "BLOCK_J": 64, "num_warps": 8, "num_stages": 1, "BLOCK_D": _step(width)}


def _step(width: int) -> int:
    """Channels that are multiplied at a time: up to 64 in one go, above in a loop."""
    return power_of_two(width, 16) if width <= 64 else 32


#: K2: a tile of comparisons.
RANK = {"BLOCK_I": 32, "BLOCK_J": 128, "num_warps": 4, "num_stages": 1}
#: The groups of K3b compare twice per tile.
GROUPS = {"BLOCK_I": 32, "BLOCK_J": 64, "num_warps": 4, "num_stages": 1}
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


#: K5 by (backend, half precision, heads wider than 64): BLOCK_M queries, BLOCK_N keys, warps, stages.
_ATTENTION = {
    ("cuda", True, False): (128, 64, 8, 2),
    ("cuda", True, True): (128, 64, 8, 2),
    ("cuda", False, False): (64, 32, 4, 1),
    ("cuda", False, True): (32, 32, 8, 1),
    ("hip", True, False): (128, 64, 8, 2),
    ("hip", True, True): (128, 32, 8, 2),
    ("hip", False, False): (64, 32, 4, 1),
    ("hip", False, True): (64, 32, 8, 1),
}
#: Both kernels of the backward pass.
_ATTENTION_BWD = {
    ("cuda", True, False): (64, 64, 4, 1),
    ("cuda", True, True): (64, 64, 8, 1),
    ("cuda", False, False): (32, 32, 4, 1),
    ("cuda", False, True): (32, 16, 8, 1),
    ("hip", True, False): (64, 32, 4, 1),
    ("hip", True, True): (32, 32, 4, 1),
    ("hip", False, False): (32, 32, 4, 1),
    ("hip", False, True): (16, 16, 4, 1),
}


#: The sparse path, the same keys. Tiles share the list of a block of 64 rows: BLOCK_M divides 64, and so does BLOCK_N
#: in the backward pass.
_SPARSE = {
    ("cuda", True, False): (64, 64, 4, 2),
    ("cuda", True, True): (64, 64, 8, 1),
    ("cuda", False, False): (32, 32, 4, 1),
    ("cuda", False, True): (16, 32, 8, 1),
    ("hip", True, False): (64, 64, 4, 2),
    ("hip", True, True): (64, 32, 4, 2),
    ("hip", False, False): (64, 32, 4, 1),
    ("hip", False, True): (32, 32, 4, 1),
}
_SPARSE_BWD = {
    ("cuda", True, False): (32, 64, 4, 1),
    ("cuda", True, True): (16, 32, 8, 1),
    ("cuda", False, False): (32, 32, 8, 1),
    ("cuda", False, True): (16, 16, 8, 1),
    ("hip", True, False): (64, 64, 4, 1),
    ("hip", True, True): (32, 32, 4, 1),
    ("hip", False, False): (32, 32, 4, 1),
    ("hip", False, True): (16, 16, 4, 1),
}
#: Making and turning lists: a tile of 64 x 64 bits.
LISTS = {"num_warps": 8, "num_stages": 1}


def select(width: int) -> dict[str, Any]:
    """Selection from scores over `width` basis vectors: 64 queries and 64 keys at a time."""
    block = power_of_two(width, 16) if width <= 32 else 16
    return {"BLOCK_K": block, "num_warps": 4 if width <= 32 else 8, "num_stages": 1}


def sparse_attention(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The sparse forward."""
    return _attention_tiles(_SPARSE, head_dim, dtype)


def sparse_attention_bwd(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The sparse backward, both kernels."""
    return _attention_tiles(_SPARSE_BWD, head_dim, dtype)


def attention(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """K5 forward."""
    return _attention_tiles(_ATTENTION, head_dim, dtype)


def attention_bwd(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """K5 backward, both kernels."""
    return _attention_tiles(_ATTENTION_BWD, head_dim, dtype)


def _attention_tiles(
    table: dict[tuple[str, bool, bool], tuple[int, int, int, int]], head_dim: int, dtype: torch.dtype
) -> dict[str, Any]:
    backend = "hip" if target()[0] == "hip" else "cuda"
    block_m, block_n, warps, stages = table[backend, dtype in _HALF, head_dim > 64]
    block_d = power_of_two(head_dim, 16)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}
