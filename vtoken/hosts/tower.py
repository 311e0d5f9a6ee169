"""What the towers of all families share: what is patched in them, rotary tables and dense maps of fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from vtoken.core.bound import ContainerMixin, Patched
from vtoken.core.method import AttentionMethod, BlockMethod, Methods
from vtoken.core.patch import PREDICTOR, base_of, is_patched
from vtoken.core.slots import Slot
from vtoken.errors import ShapeError, UnsupportedModelError


def block_targets(
    methods: Methods,
    container: Any,
    parts: Callable[[Any], tuple[type, Any, type]],
    *,
    num_prefix: int,
    sparse: Collection[type] = (),
) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """What `patch` needs for the blocks of a tower, their container and their attentions.

    Args:
        container: holds the blocks.
        parts: of a block its mixin, its attention and the mixin of that.
        num_prefix: class, register and distillation tokens.
        sparse: the classes of attention whose core an attention method may replace.

    Raises:
        UnsupportedModelError: if an attention that an attention method chose is not among `sparse`.
    """
    found: list[tuple[nn.Module, type, dict[str, Any]]] = []
    if isinstance(container, nn.Sequential):  # a list is never called
        found.append((container, ContainerMixin, {}))
    blocks, method = list(container), methods.get(AttentionMethod)
    shared = {"_vtoken_shared": Patched()} if BlockMethod in methods else {}
    for index, block in enumerate(blocks):
        mixin, attn, attention_mixin = parts(block)
        found.append((block, mixin, {"_vtoken_index": index, "_vtoken_depth": len(blocks), **shared}))
        chosen = method is not None and method.acts_on(index)
        attributes: dict[str, Any] = {}
        if chosen:
            _check_attention(index, _child_with(block, attn), sparse)
            attributes = {"_vtoken_index": index, "_vtoken_method": method, "_vtoken_prefix": num_prefix}
        found.append((attn, attention_mixin, attributes))
    return found


class Mixins(dict[type, type]):
    """The mixin of every known class; of another, patched or not, that of the first known one among its bases."""

    def __missing__(self, kind: type) -> type:
        return self[next(base for base in base_of(kind).__mro__ if base in self)]


def _child_with(block: nn.Module, attn: nn.Module) -> nn.Module:
    """The attention, or what wraps it inside the block (peft's LoRA layer), whose forward is the one that runs."""
    return next((child for child in block.children() if any(m is attn for m in child.modules())), attn)


def _check_attention(index: int, attn: Any, sparse: Collection[type]) -> None:
    """Whether an attention method can serve the attention of block `index`."""
    kind: Any = base_of(type(attn))
    if not any(cls in sparse and kind.forward is cls.forward for cls in kind.__mro__) or PREDICTOR in attn._modules:
        known = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in sparse)
        raise UnsupportedModelError(
            f"cannot put connectivity masks into this model: the attention of block {index} is a "
            f"{kind.__module__}.{kind.__qualname__}; supported: {known}. The model was left as it was."
        )


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that differ from their default (None or False); older hosts do not know all of them."""
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


def pair(value: Any) -> tuple[int, int]:
    """One side or (height, width), as a list in some settings, as a pair."""
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


PATCHED = (
    "it carries a method of vtoken.apply, which would be bypassed; call vtoken.remove(model) while training, methods "
    "work in eval mode"
)


def patched_inside(tower: nn.Module) -> str | None:
    """Why no patches are left out of a tower that carries a method; None if it does not."""
    return PATCHED if any(is_patched(module) for module in tower.modules()) else None


def gather_rope(rope: Tensor, slot: Slot, num_prefix: int) -> Tensor:
    """Rows of a rotary table for the tokens that are left: each keeps the rotation of its anchor.

    Args:
        rope: (N0, 2D) shared, (H, N0, 2D) per head, or with a batch, (B, 1 or H, N0, 2D).

    Returns:
        The table itself before the first merge, else (B, 1 or H, N, 2D).
    """
    if slot.anchor is None:
        return rope
    rows = slot.anchor[:, num_prefix:] - num_prefix  # [B, N]
    if rope.dim() == 2:
        return rope[rows].unsqueeze(1)
    if rope.dim() == 3:
        return rope[:, rows].transpose(0, 1)
    return rope.gather(2, rows[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))


def spread(rows: Tensor, slot: Slot, num_prefix: int, grid: tuple[int, int]) -> Tensor:
    """Patch rows [B, N, C] of one layer as the dense map [B, C, H, W]: every patch shows its group's value.

    Raises:
        ShapeError: if patches were dropped before the first block, so that no dense map exists.
    """
    rows = slot.spread(rows, num_prefix)
    height, width = grid
    if rows.shape[1] != height * width:
        raise ShapeError(
            f"no dense map: {rows.shape[1]} patch tokens entered the blocks, the grid has {height} x {width} (patch "
            "dropout drops them while training); use output_fmt='NLC' or model.eval()"
        )
    # Contiguous as the hosts hand it out: a caller may `view` it, and convolutions add in another order otherwise.
    return rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], height, width).contiguous()
