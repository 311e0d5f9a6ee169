"""Two tokens that are equal, and one that counts as both: what reads the tokens afterwards cannot tell them apart."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtoken.core.apply import applied
from vtoken.core.config import MethodConfig
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.ops import MergePlan
from vtoken.testing.models import images_for
from vtoken.testing.promises import broken, close, outputs


@dataclass(frozen=True, kw_only=True)
class Twins(MethodConfig):
    """Makes some neighbouring patches equal behind the last block.

    Args:
        merge: whether they become one token of size 2 each.
    """

    method: ClassVar[str] = "twins"

    merge: bool

    def build(self, depth: int) -> BlockMethod:
        """For a model with `depth` blocks."""
        return _Twinning(depth - 1, self.merge)


class _Twinning(BlockMethod):
    metric, insert, order = "hidden", "after", "raster"

    def __init__(self, layer: int, merge: bool) -> None:
        self.layer, self.merge = layer, merge

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        return mergeable // 4 if layer == self.layer else 0

    def has_bias(self) -> bool:
        return True

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        r = self.num_removed(layer, x.shape[1] - num_prefix)
        rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        pairs, stay = rows[:, num_prefix : num_prefix + 2 * r], rows[:, num_prefix + 2 * r :]
        x = x.clone()
        x[:, pairs[0, 1::2]] = x[:, pairs[0, 0::2]]
        if not self.merge:
            return x, slot
        partner = torch.arange(r, device=x.device).expand(x.shape[0], -1)
        plan = MergePlan.of([rows[:, :num_prefix], stay, pairs[:, 0::2]], pairs[:, 1::2], partner)
        x, size = plan.apply(x, slot.size)
        return x, slot.advance(plan, size, num_prefix)


def pooling(model: nn.Module) -> None:
    """What a model makes of its last tokens counts a token as often as the patches that it stands for.

    Patches that are equal, and one token of size 2 in place of each two of them, give the same. Outputs that are rows
    of tokens are not compared: there are fewer.
    """
    network, x, found = copy.deepcopy(model).double(), images_for(model, 2, dtype=torch.float64), []
    for merge in (False, True):
        with applied(network, Twins(merge=merge)), torch.no_grad():
            found.append(outputs(network, x))
    for apart, merged in zip(*found, strict=True):
        if apart.shape == merged.shape and not close(merged, apart):
            broken(
                "sizes enter pooling",
                f"an output {tuple(apart.shape)} is another where two equal patches are one token of size 2: a mean "
                "over tokens must weigh them by `state.last.size`, an attention pool must add its logarithm to logits",
            )
