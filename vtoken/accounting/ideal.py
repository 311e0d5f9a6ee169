"""The ideal variant: the same token counts by plainly narrowing the sequence, with no matching and no size bias.

Its efficiency is what smaller matrices cost; what a method loses beyond that is its own overhead (docs/performance.md
1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtoken.core.config import MethodConfig
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.ops import MergePlan


@dataclass(frozen=True, kw_only=True)
class Ideal(MethodConfig):
    """For timing only: outputs are wrong by design, so it is not among `vtoken.methods()`.

    Args:
        removed: tokens that each block removes, as `vtoken.plan(...).removed` gives them.
        place: "between" attention and MLP, or "after" both.
    """

    method: ClassVar[str] = "ideal"

    removed: tuple[int, ...]
    place: str = "between"

    def build(self, depth: int) -> BlockMethod:
        """The narrowing of a model with `depth` blocks."""
        return Narrowing(self.removed, self.place)


class Narrowing(BlockMethod):
    """Drops the last rows.

    Args:
        removed: how many, per block.
        insert: see BlockMethod.
    """

    metric, order = "hidden", "internal"

    def __init__(self, removed: Sequence[int], insert: str = "between") -> None:
        self.removed = tuple(removed)
        self.insert = insert

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        """What was given for the block."""
        return min(self.removed[layer], mergeable)

    def has_bias(self) -> bool:
        """There are no sizes."""
        return False

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        """Nothing is matched."""
        return 0

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        """The first rows; hosts that ask where rows went are told that the others went into the last of them."""
        left = x.shape[1] - self.num_removed(layer, x.shape[1] - num_prefix)
        if slot.track_anchor or slot.track_dest:
            rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            src = rows[:, left:]
            plan = MergePlan(rows[:, :left], src, torch.full_like(src, left - 1), x.shape[1], 1)
            slot = slot.advance(plan, None, num_prefix)
        return x[:, :left], slot
