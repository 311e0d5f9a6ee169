"""DivPrune: keep the image tokens that are farthest from each other (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Needs, Seen, TowerFacts
from vtoken.methods.sharing import ShareConfig, Sharing
from vtoken.ops.rows import full_precision

SPACES = ("after", "before")


@register_method
@dataclass(frozen=True, kw_only=True)
class DivPrune(ShareConfig):
    """Image tokens whose least distance is as large as a greedy choice makes it; nothing is trained.

    Distance is 1 - cosine. The first token is the one farthest from its nearest other, every further one the one
    farthest from those chosen; equal distances go to the lower index. The text and the tower's attention are not looked
    at. The paper's body could not be read: where the greedy choice starts, and that rows behind the projector are
    compared, is this library's own choice.

    Args:
        num_tokens, keep_ratio, newline, positions: as in `vtoken.VTCCLS`.
        space: rows that are compared, "after" or "before" the projector (narrower, so cheaper).

    Raises:
        ConfigError: for values out of range.

    Example:
        >>> import vtoken
        >>> vtoken.DivPrune(num_tokens=64).space
        'after'

    Source: arXiv 2503.02175; docs/methods/prompt_methods.md 2.
    """

    method: ClassVar[str] = "divprune"

    space: str = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("DivPrune", "space", self.space, SPACES)

    def build(self, depth: int) -> PromptMethod:
        """The choice."""
        return MaxMin(self)


class MaxMin(Sharing):
    """A greedy max-min choice in every cell."""

    config: DivPrune

    def needs(self, tower: TowerFacts) -> Needs:
        """Features alone."""
        return Needs(features=frozenset({self.config.space}))

    def choose(self, seen: Seen) -> Tensor:
        """Cell by cell."""
        x: Tensor = getattr(seen, self.config.space)
        return self.each(seen, lambda part, k: max_min(x[part.to(x.device)].unsqueeze(0), k)[0])


def max_min(x: Tensor, k: int) -> Tensor:
    """Ascending indices [B, k] of k of the rows [B, N, C] that lie far apart; a larger k keeps what a smaller one did.

    Rows that are not numbers count as the most distant.
    """
    batch, n = x.shape[:2]
    if k >= n:
        return torch.arange(n, device=x.device).expand(batch, n)
    with torch.no_grad(), full_precision(x):
        x = F.normalize(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), dim=-1, eps=1e-12)
        d = (1 - x @ x.mT).nan_to_num(nan=2.0)
    near = d.masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), torch.inf).amin(-1)
    row, picked = torch.arange(batch, device=x.device), x.new_empty(batch, k, dtype=torch.int64)
    for i in range(k):
        j = near.argmax(-1)  # the first of equals
        picked[:, i] = j
        near = d[row, j] if i == 0 else torch.minimum(near, d[row, j])
        near = near.scatter(1, picked[:, : i + 1], -torch.inf)
    return picked.sort(-1).values
