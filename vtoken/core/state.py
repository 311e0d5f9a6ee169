"""All that travels with the tokens of one forward pass.

A TokenState is made by the model's entry method, handed to the blocks as an argument and dropped on return. Block i
reads slot i and writes slot i + 1; nothing is popped, counted or reset, so a block that runs again (activation
checkpointing recomputes it during backward) reads what it read the first time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtoken.ops import MergePlan, size_bias
from vtoken.ops.rows import take_rows

if TYPE_CHECKING:
    from vtoken.core.method import BlockMethod


@dataclass(frozen=True, eq=False)
class Slot:
    """What is known of the tokens at one depth; None means "as embedded" and costs nothing.

    Args:
        size: patches per token, [B, T] float32.
        anchor: original row that each token keeps, [B, T] int64 (prefix rows included).
        dest: current row of every original row, [B, T0] int64; only kept when somebody will read it.
        protect: rows that must not merge, [B, p] int64, counted without the prefix.
        track_anchor, track_dest: whether merges keep those two up to date.
    """

    size: Tensor | None = None
    anchor: Tensor | None = None
    dest: Tensor | None = None
    protect: Tensor | None = None
    track_anchor: bool = False
    track_dest: bool = False

    def advance(self, plan: MergePlan, size: Tensor | None, num_prefix: int) -> Slot:
        """What is known after `plan` was applied and left the given sizes."""
        anchor, dest, protect = self.anchor, self.dest, self.protect
        if self.track_anchor:
            anchor = plan.keep if anchor is None else anchor.gather(1, plan.keep)
        if self.track_dest:
            dest = plan.dest if dest is None else plan.dest.gather(1, dest)
        if protect is not None:
            protect = plan.dest.gather(1, protect + num_prefix) - num_prefix
        return Slot(size, anchor, dest, protect, self.track_anchor, self.track_dest)

    def in_raster_order(self, x: Tensor) -> tuple[Tensor, Slot]:
        """Rows [B, T, C] and this slot with the rows ordered by the position they came from."""
        if self.anchor is None:
            return x, self
        anchor, order = self.anchor.sort(dim=1)
        dest = None if self.dest is None else order.argsort(dim=1).gather(1, self.dest)
        size = None if self.size is None else self.size.gather(1, order)
        return take_rows(x, order), replace(self, anchor=anchor, dest=dest, size=size)


class TokenState:
    """The slots of one forward and the method that fills them.

    Args:
        method: what removes tokens.
        num_prefix: class, register and distillation tokens; rows 0..P-1 in every layer.
        track_anchor, track_dest: see Slot.
    """

    __slots__ = ("embedded", "first", "method", "num_prefix", "slots")

    def __init__(self, method: BlockMethod, num_prefix: int, *, track_anchor: bool, track_dest: bool) -> None:
        self.method = method
        self.num_prefix = num_prefix
        #: Batch, tokens and device of what entered the first block.
        self.embedded: tuple[int, int, torch.device] | None = None
        self.first = Slot(track_anchor=track_anchor, track_dest=track_dest)
        self.slots: dict[int, Slot] = {0: self.first}

    @property
    def last(self) -> Slot:
        """What is known after the last block that ran."""
        return self.slots[max(self.slots)]

    def enter(self, layer: int, x: Tensor) -> None:
        """Block `layer` is about to read its slot; the first block to do so is given the embedded tokens [B, T, C]."""
        if self.embedded is None:
            self.embedded = (x.shape[0], x.shape[1], x.device)
            self.slots = {layer: self.first}  # not 0 if the blocks before it were cut off

    def removes(self, layer: int, num_tokens: int) -> bool:
        """Whether block `layer` takes anything away from `num_tokens` tokens."""
        return self.method.num_removed(layer, num_tokens - self.num_prefix) > 0

    def bias(self, layer: int, dtype: torch.dtype) -> Tensor | None:
        """The size term of block `layer`'s attention, [B, 1, 1, T]; None (not zeros) before the first merge."""
        size = self.slots[layer].size
        return None if size is None or not self.method.has_bias() else size_bias(size, dtype)

    def skip(self, layer: int) -> None:
        """Block `layer` removes nothing: what was known before it is known after it."""
        self.slots[layer + 1] = self.slots[layer]

    def on_block(self, layer: int, x: Tensor, metric: Tensor) -> Tensor:
        """Remove tokens [B, T, C] at block `layer`, comparing them by `metric` [B, T, d]."""
        x, self.slots[layer + 1] = self.method.on_block(layer, x, metric, self.slots[layer], self.num_prefix)
        return x
