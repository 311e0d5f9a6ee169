"""What is known of the tokens at one depth, and what a method is told about one attention call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtoken.core.records import AttentionRecord
from vtoken.errors import ShapeError
from vtoken.ops import MergePlan
from vtoken.ops.rows import take_rows

DROPPED = (
    "some patches have no token any more: they were pruned, not merged, so there is no value to spread to them; "
    "trace.kept() tells which are left"
)


@dataclass(frozen=True, eq=False)
class Slot:
    """What is known of the tokens at one depth; None means "as embedded" and costs nothing.

    Args:
        size: patches per token, [B, T] float32.
        anchor: original row that each token keeps, [B, T] int64 (prefix rows included).
        dest: current row of every original row, [B, T0] int64; only kept when somebody will read it.
        protect: rows that must not merge, [B, p] int64, counted without the prefix.
        embedded: tokens T0 before the first block.
        dropped: whether tokens were dropped, whose rows in `dest` are -1.
        track_anchor, track_dest: whether merges keep those two up to date.
    """

    size: Tensor | None = None
    anchor: Tensor | None = None
    dest: Tensor | None = None
    protect: Tensor | None = None
    embedded: int = 0
    dropped: bool = False
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
        return Slot(
            size, anchor, dest, protect, self.embedded, self.dropped, self.track_anchor, self.track_dest
        )  # fmt: skip

    def keep(self, rows: Tensor) -> Slot:
        """What is known when only `rows` [B, T'] (ascending, with the prefix) go on and the others are dropped."""
        size = None if self.size is None else self.size.gather(1, rows)
        anchor, dest = self.anchor, self.dest
        if self.track_anchor:
            anchor = rows if anchor is None else anchor.gather(1, rows)
        if self.track_dest:
            everything = torch.arange(self.embedded, device=rows.device).expand(rows.shape[0], -1)
            new = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
            # Row by row old -> new, with -1 for what is dropped and one more -1 for what was dropped before.
            moved = torch.full((rows.shape[0], self.embedded + 1), -1, device=rows.device).scatter(1, rows, new)
            dest = moved.gather(1, (everything if dest is None else dest) % (self.embedded + 1))
        return replace(self, size=size, anchor=anchor, dest=dest, dropped=True)

    def in_raster_order(self, x: Tensor) -> tuple[Tensor, Slot]:
        """Rows [B, T, C] and this slot with the rows ordered by the position they came from."""
        if self.anchor is None:
            return x, self
        anchor, order = self.anchor.sort(dim=1)
        dest = None
        if self.dest is not None:
            dest = order.argsort(dim=1).gather(1, self.dest.clamp(min=0) if self.dropped else self.dest)
            dest = torch.where(self.dest < 0, self.dest, dest) if self.dropped else dest
        size = None if self.size is None else self.size.gather(1, order)
        return take_rows(x, order), replace(self, anchor=anchor, dest=dest, size=size)

    def raster(self) -> Slot:
        """This slot with its rows in that order."""
        return self if self.anchor is None else self.in_raster_order(self.anchor.new_empty(*self.anchor.shape, 0))[1]

    def spread(self, x: Tensor, first: int = 0) -> Tensor:
        """Rows [B, T, C] spread over all embedded ones [B, T0, C]: every one has its group's value.

        Args:
            first: how many rows of the prefix are left out in front of x.

        Raises:
            ShapeError: if tokens were dropped.
        """
        if self.dest is None:
            return x
        if self.dropped:
            raise ShapeError(DROPPED)
        return take_rows(x, self.dest[:, first:] - first)


@dataclass(eq=False)
class AttentionCall:
    """What an attention method is told about one call.

    Args:
        layer: the block.
        num_prefix: prefix tokens P.
        slot: what is known of the tokens.
        grid: patch rows and columns before the first block; None where the host does not know.
        scale: factor on the logits.
        mask: bias on the logits or bool mask, broadcastable to [B, H, T, T]; token sizes come as [B, 1, 1, T].
        dropout: probability.
        wants_cls: whether `cls` is to be left here.
        record: where to leave what a trace asked for.
        cls: attention of the first prefix row, [B, H, T].
    """

    layer: int
    num_prefix: int
    slot: Slot
    grid: tuple[int, int] | None
    scale: float
    mask: Tensor | None = None
    dropout: float = 0.0
    wants_cls: bool = False
    record: AttentionRecord | None = None
    cls: Tensor | None = None
