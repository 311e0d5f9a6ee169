"""Which patches of an image the student sees: units of neighbouring patches ranked by their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError
from vtoken.ops import select_tokens

MODES = ("topk", "random", "sample", "mix", "lowest")
_UNIT_PIXELS = 32  # the published unit: 2 x 2 patches of 16 pixels


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How patches are chosen: the first of the settings of `AttentiveMasks`, which says what they are.

    Raises:
        ConfigError: for values out of range.
    """

    keep_ratio: float = 0.5
    mode: str = "topk"
    block: int | str = "auto"
    top_fraction: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        what = "the share of patches kept, "
        object.__setattr__(self, "keep_ratio", checks.share(owner, "keep_ratio", self.keep_ratio, what=what))
        checks.choice(owner, "mode", self.mode, MODES)
        if not (isinstance(self.block, str) and self.block == "auto"):
            what = 'the side of a unit in patches (or "auto"), '
            object.__setattr__(self, "block", checks.whole(owner, "block", self.block, 1, what=what))
        what = 'the share of the best units among those kept (mode="random" keeps any), '
        object.__setattr__(self, "top_fraction", checks.share(owner, "top_fraction", self.top_fraction, what=what))
        object.__setattr__(self, "temperature", checks.number(owner, "temperature", self.temperature, above=0))

    def block_of(self, grid: tuple[int, int], patch_size: int) -> int:
        """Side of the units on a patch grid.

        Raises:
            ConfigError: if it does not divide the grid, or leaves a single unit, so that nothing could be masked.
        """
        block = max(1, _UNIT_PIXELS // patch_size) if self.block == "auto" else int(self.block)
        if grid[0] % block or grid[1] % block:
            if self.block != "auto":
                raise ConfigError(f"block={block} does not divide the grid of {grid[0]} x {grid[1]} patches")
            block = 1
        if self.keep_ratio < 1 and grid == (block, block):
            raise ConfigError(
                f"block={self.block!r} makes one unit of all {grid[0]} x {grid[1]} patches, so nothing can be masked; "
                "set a smaller block, for example block=1"
            )
        return block

    def num_kept(self, grid: tuple[int, int], patch_size: int) -> int:
        """Patches that are kept of a grid."""
        block = self.block_of(grid, patch_size)
        return checks.share_of(self.keep_ratio, grid[0] * grid[1] // block**2) * block**2

    def choose(self, scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Kept units of each row, ascending, [B, k] int64.

        Args:
            scores: of n units, [B, n]; with mode "random" only their shape and device count.
            generator: for the random modes; None is torch's own.
        """
        n = scores.shape[1]
        k = checks.share_of(self.keep_ratio, n)
        if self.mode == "topk":
            return select_tokens(scores, k)
        if self.mode == "lowest":
            return select_tokens(-scores, k)
        noise = _uniform(scores, generator)
        if self.mode == "sample":  # Gumbel top-k: without replacement, probability ~ score^(1/temperature)
            gumbel = -(-noise.clamp(1e-12, 1 - 2**-24).log()).log()
            return select_tokens(scores.clamp_min(1e-30).log() / self.temperature + gumbel, k)
        best = int(k * self.top_fraction + 1e-6) if self.mode == "mix" else 0
        if best:
            noise = noise.scatter(1, select_tokens(scores, best), 2.0)
        return select_tokens(noise, k)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.rand(like.shape, dtype=torch.float32, device=like.device)
    return torch.rand(like.shape, generator=generator, dtype=torch.float32, device=generator.device).to(like.device)


def unit_scores(scores: Tensor, block: int) -> Tensor:
    """Patch scores [B, h, w] -> scores of units of block x block patches, [B, h/block * w/block]: their means."""
    if block > 1:
        scores = F.avg_pool2d(scores.unsqueeze(1), block).squeeze(1)
    return scores.flatten(1)


def patches_of(units: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """Units [B, k] -> the patches in them, ascending, [B, k * block^2] int64."""
    if block == 1:
        return units
    columns = grid[1] // block
    corner = units // columns * (block * grid[1]) + units % columns * block  # first patch of every unit
    inside = torch.arange(block, device=units.device)
    inside = (inside.unsqueeze(1) * grid[1] + inside).flatten()
    return (corner.unsqueeze(2) + inside).flatten(1).sort(dim=1).values
