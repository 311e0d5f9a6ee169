"""All that travels with the tokens of one forward pass.

A TokenState is made by the model's entry method, handed to the blocks as an argument and dropped on return. Block i
reads slot i and writes slot i + 1; nothing is popped, counted or reset, so a block that runs again (activation
checkpointing recomputes it during backward) reads what it read the first time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken.ops import MergePlan, size_bias
from vtoken.ops.rows import take_rows

if TYPE_CHECKING:  # annotations only: methods are handed the state
    from vtoken.core.compiled import CompiledBlocks
    from vtoken.core.method import AttentionMethod, BlockMethod


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


@dataclass(eq=False)
class AttentionRecord:
    """What one attention did in a traced forward; the maps only where the caller asked for them by name.

    Args:
        layer: the block.
        density: share of the query-key pairs of patch queries that were kept, over batch and heads.
        kept: number of kept pairs, prefix queries included, over batch and heads.
        mask: kept pairs, [B, H, T, T] bool.
        scores: what the connectivity predictor says of patch queries, [B, H, T - P, T] float32.
        attention: softmax over the kept keys, [B, H, T, T].
    """

    layer: int
    density: float = 1.0
    kept: int = 0
    mask: Tensor | None = None
    scores: Tensor | None = None
    attention: Tensor | None = None
    wants: frozenset[str] = frozenset()


class TokenState:
    """The slots of one forward and the methods that act in it.

    Args:
        method: what removes tokens.
        num_prefix: class, register and distillation tokens; rows 0..P-1 in every layer.
        track_anchor, track_dest: see Slot.
        attention: what stands in for the attention core, if anything does.
        maps: names of the attention maps that a trace asked for; None if there is no trace.
        compiled: the blocks' graphs, if they are to run by them.
    """

    __slots__ = (
        "attention",
        "compiled",
        "embedded",
        "first",
        "grid",
        "maps",
        "method",
        "num_prefix",
        "records",
        "slots",
        "watch",
    )

    def __init__(
        self,
        method: BlockMethod,
        num_prefix: int,
        *,
        track_anchor: bool,
        track_dest: bool,
        attention: AttentionMethod | None = None,
        maps: frozenset[str] | None = None,
        compiled: CompiledBlocks | None = None,
    ) -> None:
        self.method = method
        self.compiled = compiled
        self.attention = attention
        self.num_prefix = num_prefix
        #: Batch, tokens and device of what entered the first block.
        self.embedded: tuple[int, int, torch.device] | None = None
        #: Patch rows and columns of the images, where the host knows them.
        self.grid: tuple[int, int] | None = None
        self.first = Slot(track_anchor=track_anchor, track_dest=track_dest)
        self.slots: dict[int, Slot] = {0: self.first}
        #: What reads the attention of chosen blocks, if anything does; see hosts/class_rows.py.
        self.watch: Any = None
        self.maps = maps
        self.records: list[AttentionRecord] = []

    @property
    def last(self) -> Slot:
        """What is known after the last block that ran."""
        return self.slots[max(self.slots)]

    def enter(self, layer: int, x: Tensor) -> None:
        """Block `layer` is about to read its slot; the first block to do so is given the embedded tokens [B, T, C]."""
        if self.embedded is None:
            self.embedded = (x.shape[0], x.shape[1], x.device)
            self.first = replace(self.first, embedded=x.shape[1])
            if self.compiled is not None:
                self.first = self._written_out(x)
            self.slots = {layer: self.first}  # not 0 if the blocks before it were cut off

    def _written_out(self, x: Tensor) -> Slot:
        """What is known of embedded tokens as tensors, so that the first block runs the same graph as the others."""
        batch, tokens, _ = x.shape
        first = self.first
        size = torch.ones(batch, tokens, device=x.device) if self.method.has_bias() else None
        anchor, dest = (
            torch.arange(tokens, device=x.device).repeat(batch, 1) if tracked else None
            for tracked in (first.track_anchor, first.track_dest)
        )
        return replace(first, size=size, anchor=anchor, dest=dest)

    def reads(self, layer: int) -> bool:
        """Whether somebody reads the attention of block `layer` on the way."""
        return self.watch is not None and layer in self.watch.layers

    def removes(self, layer: int, num_tokens: int) -> bool:
        """Whether block `layer` takes anything away from `num_tokens` tokens."""
        return self.method.num_removed(layer, num_tokens - self.num_prefix, self.first.embedded - self.num_prefix) > 0

    def bias(self, layer: int, dtype: torch.dtype) -> Tensor | None:
        """The size term of block `layer`'s attention, [B, 1, 1, T]; None (not zeros) before the first merge."""
        size = self.slots[layer].size
        return None if size is None or not self.method.has_bias() else size_bias(size, dtype)

    def call(self, layer: int, *, scale: float, mask: Tensor | None, dropout: float, wants_cls: bool) -> AttentionCall:
        """What block `layer`'s attention method is told; opens its record if a trace wants one."""
        record = None if self.maps is None else AttentionRecord(layer, wants=self.maps)
        if record is not None:
            self.records.append(record)
        slot = self.slots[layer]
        return AttentionCall(
            layer, self.num_prefix, slot, self.grid, scale, mask, dropout, wants_cls=wants_cls, record=record
        )

    def skip(self, layer: int) -> None:
        """Block `layer` removes nothing: what was known before it is known after it."""
        self.slots[layer + 1] = self.slots[layer]

    def on_block(self, layer: int, x: Tensor, metric: Tensor) -> Tensor:
        """Remove tokens [B, T, C] at block `layer`, choosing by `metric` [B, T, d]."""
        x, self.slots[layer + 1] = self.method.on_block(layer, x, metric, self.slots[layer], self.num_prefix)
        return x
