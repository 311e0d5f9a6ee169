"""VisionZip: keep the tokens that attention dwells on, and merge the rest into a few (arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Chosen, Needs, Seen, TowerFacts
from vtoken.errors import ConfigError
from vtoken.methods.sharing import ShareConfig, Sharing
from vtoken.ops import select_tokens
from vtoken.ops.rows import full_precision


@register_method
@dataclass(frozen=True, kw_only=True)
class VisionZip(ShareConfig):
    """Dominant tokens by attention, and contextual ones that are means of the rest; nothing is trained.

    Dominant are those that the class token attends to most in the block that makes the features (without a class token:
    those that get most attention). Of the rest, evenly spaced tokens become targets, every other one joins the target
    whose key is most like its own, and a contextual token is the mean of a target and what joined it. Means are taken
    in front of the projector where it works token by token, else behind it. The paper's body could not be read: that a
    target weighs as much as any other, the share of 10 in 64, and that merged tokens take their target's place, are
    this library's own choice.

    Args:
        num_tokens, keep_ratio, newline, positions: as in `vtoken.VTCCLS`; contextual tokens are among them.
        contextual: contextual tokens of an image (of every cell); None: 10 of 64, rounded.

    Raises:
        ConfigError: for values out of range.

    Example:
        >>> import vtoken
        >>> vtoken.VisionZip(num_tokens=64).contextual_of(64)
        10

    Source: arXiv 2412.04467; docs/methods/prompt_methods.md 3.
    """

    method: ClassVar[str] = "visionzip"

    contextual: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is None:
            return
        object.__setattr__(self, "contextual", checks.whole("VisionZip", "contextual", self.contextual, 0))
        if self.num_tokens is not None and self.contextual >= self.num_tokens:
            raise ConfigError(
                f"VisionZip(contextual={self.contextual}): must be less than num_tokens={self.num_tokens}, of which "
                "they are a part"
            )

    def build(self, depth: int) -> PromptMethod:
        """The choice."""
        return DominantContextual(self)

    def contextual_of(self, k: int) -> int:
        """Contextual ones among k tokens of a cell; at least one is dominant."""
        return min(k - 1, round(k * 10 / 64) if self.contextual is None else self.contextual)


class DominantContextual(Sharing):
    """The best of every cell, and means over the rest."""

    replaces = True
    config: VisionZip

    def needs(self, tower: TowerFacts) -> Needs:
        """Attention and keys of the block that makes the features, and the rows to merge."""
        if tower.last < 0:
            raise ConfigError("the features are the embeddings themselves: no block is there to read attention from")
        kind = "class" if tower.class_token else "received"
        rows = "before" if tower.per_token else "stack"
        return Needs(attention=kind, layers=(tower.last,), features=frozenset({"keys", rows}))

    def choose(self, seen: Seen) -> Chosen:
        """Cell by cell, in raster order."""
        before = seen.before is not None
        x = seen.before if seen.before is not None else seen.stack
        assert x is not None
        assert seen.attention is not None
        assert seen.keys is not None
        index, rows = [], []
        for part, k in zip(seen.parts(), self.counts(seen.visual), strict=True):
            if not k:
                continue
            scores, at = seen.attention[0], part.to(x.device)
            context = 0 if k >= len(part) else self.config.contextual_of(k)
            top = select_tokens(scores[part.to(scores.device)], k - context).to(x.device)
            places, merged = merge_rest(x[at], seen.keys[part.to(seen.keys.device)].to(x.device), top, context)
            index.append(part[places.cpu()])
            rows.append(merged)
        return Chosen(torch.cat(index), torch.cat(rows), before)

    def scores(self, seen: Seen) -> Tensor | None:
        """What the dominant ones are chosen by."""
        return None if seen.attention is None else seen.attention[0]


def merge_rest(x: Tensor, keys: Tensor, top: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Rows [n, C] -> places [k] ascending and rows [k, C]: those of `top`, and `context` means over the rest.

    Args:
        keys: [n, D], by which the rest finds its target.
        top: ascending indices of what stays as it is.
    """
    rest = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, top, False).nonzero()[:, 0]
    if context == 0:
        return top, x[top]
    at = torch.arange(context, device=x.device) * len(rest) // context
    is_target = torch.zeros_like(rest, dtype=torch.bool).index_fill(0, at, True)
    target, others = rest[is_target], rest[~is_target]
    with torch.no_grad(), full_precision(x):
        unit = F.normalize(keys.detach().float(), dim=-1, eps=1e-12).nan_to_num()
        to = (unit[others] @ unit[target].T).argmax(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x[target].to(wide).index_add(0, to, x[others].to(wide))
    size = torch.ones(context, device=x.device, dtype=wide)
    size = size.index_add(0, to, torch.ones(len(to), device=x.device, dtype=wide))
    places, rows = torch.cat([top, target]), torch.cat([x[top], (total / size.unsqueeze(1)).to(x.dtype)])
    order = places.argsort()
    return places[order], rows[order]
