"""The ideal variant: the same token counts by plainly narrowing the sequence, with no matching and no size bias.

Its efficiency is what smaller matrices cost; what a method loses beyond that is its own overhead (docs/performance.md
1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.methods.merging.base import Merging, ScheduledMergeConfig


@dataclass(frozen=True, kw_only=True)
class Ideal(ScheduledMergeConfig):
    """For timing only: outputs are wrong by design, so it is not among `vtoken.methods()`."""

    method: ClassVar[str] = "ideal"

    metric: str = "hidden"

    def build(self, depth: int) -> BlockMethod:
        """The narrowing of a model with `depth` blocks."""
        return _Narrowing(self, depth)

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        """Nothing is matched."""
        return 0


class _Narrowing(Merging):
    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        return x[:, : x.shape[1] - self.num_removed(layer, x.shape[1] - num_prefix)], slot
