"""Tokens dropped for good by the class token's attention (arXiv 2303.13755; docs/methods/sparsifiner.md 5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vtoken import checks
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.ops.largest import largest_index
from vtoken.ops.rows import take_rows


class TokenPruning(BlockMethod):
    """After the j-th of some blocks, ceil(ratio ** j * T) of the T patches are left, by the class token's attention."""

    metric, insert, order = "cls", "after", "raster"

    def __init__(self, ratio: float, blocks: Iterable[int]) -> None:
        self._keep = {layer: ratio ** (j + 1) for j, layer in enumerate(sorted(blocks))}

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        """Down to ceil(share * embedded)."""
        if layer not in self._keep or embedded is None:
            return 0
        return max(0, mergeable - checks.share_of(self._keep[layer], embedded))

    def has_bias(self) -> bool:
        """Dropped tokens leave no sizes."""
        return False

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        """The class token's row is part of attention."""
        return 0

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        """Keep the best of tokens [B, T, C] by `metric` [B, T, 1]; they stay in their order."""
        patches = x.shape[1] - num_prefix
        kept = patches - self.num_removed(layer, patches, slot.embedded - num_prefix)
        rows = largest_index(metric[:, num_prefix:, 0], kept) + num_prefix
        prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], -1)
        rows = torch.cat([prefix, rows], dim=1)
        return take_rows(x, rows), slot.keep(rows)
