"""Multiply-adds of a training step by closed form (docs/methods/attentive_clip.md 12)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from vtoken.errors import UnsupportedModelError


def blocks_macs(blocks: Iterable[Any], tokens: int) -> int:
    """A forward of transformer blocks: n times their weight matrices, and 2 n^2 D of attention each."""
    total = 0
    for block in blocks:
        weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
        total += tokens * weights + 2 * tokens * tokens * block.attn.num_heads * block.attn.head_dim
    return total


def embed_macs(patch_embed: nn.Module, patches: int) -> int:
    """Pixels of `patches` patches to tokens."""
    return patches * sum(p.numel() for p in patch_embed.parameters() if p.dim() == 4)


def image_macs(
    blocks: Sequence[Any],
    patch_embed: nn.Module,
    grid: tuple[int, int],
    num_prefix: int,
    *,
    views: int,
    kept: int,
    teacher_scale: float | None,
) -> int:
    """Forward and backward of the student on `kept` patches of each view, and the teacher's forward (None: it rests).

    Backward costs twice the forward, but the patch embedding has no gradient towards its input.
    """
    student = 3 * blocks_macs(blocks, num_prefix + kept) + 2 * embed_macs(patch_embed, grid[0] * grid[1])
    if teacher_scale is None:
        return views * student
    seen = round(grid[0] * teacher_scale) * round(grid[1] * teacher_scale)
    return views * student + blocks_macs(blocks, num_prefix + seen) + embed_macs(patch_embed, seen)


def text_macs(model: Any) -> int:
    """A forward of the text tower at its full context length.

    Raises:
        UnsupportedModelError: if it is not one of open_clip's own.
    """
    text = getattr(model, "text", model)
    if not hasattr(getattr(text, "transformer", None), "resblocks"):
        raise UnsupportedModelError(f"cannot count the text tower {type(text).__qualname__}; open_clip's own are known")
    return blocks_macs(text.transformer.resblocks, text.positional_embedding.shape[0])
