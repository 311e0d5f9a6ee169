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
        attn = next(getattr(block, name) for name in ("attn", "self_attn", "attention") if hasattr(block, name))
        total += tokens * weights + 2 * tokens * tokens * attn.num_heads * attn.head_dim
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


def text_macs(text: Any) -> int:
    """A forward of a text tower (or of a CLIP that has its text tower's parts) at its full context length.

    Raises:
        UnsupportedModelError: if it is neither one of open_clip's own nor one of transformers' CLIPs.
    """
    if hasattr(getattr(text, "transformer", None), "resblocks"):
        return blocks_macs(text.transformer.resblocks, text.positional_embedding.shape[0])
    if hasattr(getattr(text, "encoder", None), "layers") and hasattr(text.embeddings, "position_embedding"):
        return blocks_macs(text.encoder.layers, text.embeddings.position_embedding.weight.shape[0])
    raise UnsupportedModelError(
        f"cannot count the text tower {type(text).__qualname__}; known are open_clip's own and transformers' of a CLIP"
    )
