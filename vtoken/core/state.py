"""All that travels with the tokens of one forward pass.

A TokenState is made by the model's entry method, handed to the blocks as an argument and dropped on return. Block i
reads slot i and writes slot i + 1; nothing is popped, counted or reset, so a block that runs again (activation
checkpointing recomputes it during backward) reads what it read the first time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtoken.core.compiled import CompiledBlocks
from vtoken.core.method import AttentionMethod, BlockMethod
from vtoken.core.records import AttentionRecord
from vtoken.core.slots import AttentionCall, Slot
from vtoken.errors import UnsupportedModelError
from vtoken.ops.merging.plan import log_sizes


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
        "biased",
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
        #: Whether sizes enter the attention logits.
        self.biased = method.has_bias()
        self.compiled = compiled
        self.attention = attention
        self.num_prefix = num_prefix
        #: Batch, tokens and device of what entered the first block.
        self.embedded: tuple[int, int, torch.device] | None = None
        #: Patch rows and columns of the images, where the host knows them.
        self.grid: tuple[int, int] | None = None
        self.first = Slot(track_anchor=track_anchor, track_dest=track_dest)
        self.slots: dict[int, Slot] = {0: self.first}
        #: What reads the attention of chosen blocks, if anything does; see core/watch.py.
        self.watch: Any = None
        self.maps = maps
        self.records: list[AttentionRecord] = []

    @property
    def last(self) -> Slot:
        """What is known after the last block that ran."""
        return self.slots[max(self.slots)]

    def enter(self, layer: int, x: Tensor) -> None:
        """Block `layer` is about to read its slot; the first block to do so is given the embedded tokens [B, T, C].

        Raises:
            UnsupportedModelError: if the slot is not that of these tokens: blocks run in another order, or again.
        """
        if self.embedded is None:
            self.embedded = (x.shape[0], x.shape[1], x.device)
            self.first = replace(self.first, embedded=x.shape[1])
            if self.compiled is not None:
                self.first = self._written_out(x)
            self.slots = {layer: self.first}  # not 0 if the blocks before it were cut off
            return
        if layer not in self.slots:
            # Blocks were left out: what was known in front of them is known behind.
            ran = [place for place in self.slots if place < layer]
            self.slots[layer] = self.slots[max(ran)] if ran else self.first
        if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
            self._check_order(layer, x.shape[1])

    def _check_order(self, layer: int, num_tokens: int) -> None:
        """Raise UnsupportedModelError unless slot `layer` can be that of `num_tokens` tokens."""
        slot = self.slots[layer]
        known = slot.anchor if slot.size is None else slot.size
        if known is not None:
            expected = known.shape[1]
        else:  # a method that drops tokens need not say so; in front of the first block none were
            expected = self.first.embedded if layer == min(self.slots) else num_tokens
        if num_tokens != expected:
            raise UnsupportedModelError(
                f"block {layer} was given {num_tokens} tokens in a place where there are {expected}: this forward runs "
                "blocks in another order than that of their list, or twice. Tokens can only be removed where each runs "
                "once, in order; some may be left out. Use vtoken.remove(model)"
            )

    def _written_out(self, x: Tensor) -> Slot:
        """What is known of embedded tokens as tensors, so that the first block runs the same graph as the others."""
        batch, tokens, _ = x.shape
        first = self.first
        size = torch.ones(batch, tokens, dtype=torch.float32, device=x.device) if self.biased else None
        anchor, dest = (
            torch.arange(tokens, device=x.device).repeat(batch, 1) if tracked else None
            for tracked in (first.track_anchor, first.track_dest)
        )
        return replace(first, size=size, anchor=anchor, dest=dest)

    def reads(self, layer: int) -> bool:
        """Whether somebody reads the attention of block `layer` on the way."""
        return self.watch is not None and layer in self.watch.layers

    def masks(self, layer: int) -> bool:
        """Whether block `layer` attends by the attention method rather than as the host does; if a trace looks on, so
        does a block that keeps every key.
        """
        attention = self.attention
        return attention is not None and attention.acts_on(layer) and not (
            attention.is_stock(layer) and self.maps is None
        )  # fmt: skip

    def bias(self, layer: int, dtype: torch.dtype) -> Tensor | None:
        """The size term of block `layer`'s attention, [B, 1, 1, T]; None (not zeros) before the first merge."""
        size = self.slots[layer].size
        return None if size is None or not self.biased else log_sizes(size, dtype)

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
