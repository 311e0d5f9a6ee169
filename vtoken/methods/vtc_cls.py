"""VTC-CLS: keep the image tokens that the tower's class token looks at (arXiv 2412.05819)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken import checks
from vtoken.core.config import MethodConfig, register_method
from vtoken.core.method import FeatureMethod
from vtoken.errors import ConfigError
from vtoken.ops import ENSEMBLES, scored_layers, select_tokens

SCORERS = ("auto", "cls", "received")
NEWLINES = ("row", "all", "none")
POSITIONS = ("compact", "original")


@register_method
@dataclass(frozen=True, kw_only=True)
class VTCCLS(MethodConfig):
    """Class-attention pruning of the image tokens in a multimodal prompt; nothing is trained.

    Exactly one of the first two must be given. Both count the tokens that leave the image tower: where a method merges
    tokens inside the tower, a merged token counts once.

    Args:
        num_tokens: image tokens to keep of one image, from 1 on. Where an image is cut into crops, of its overview; the
            detail grid keeps the same share.
        keep_ratio: share of them to keep, in (0, 1]; rounded up.
        start_layer: first block whose class attention is read; negative ones count from the end. The last one is always
            the block that makes the features. None: ceil(2/3 depth) at most (16 of 24), the published default; the last
            block only where scores are "received".
        ensemble: how the blocks' scores become one: "mean", "sum" (as published, same order), "max" or "min".
        scorer: "cls" (the method), "received" (attention that a patch gets from all, for towers without a class token;
            not part of the published method) or "auto" ("cls" if there is a class token).
        newline: of the newline tokens between rows of a detail grid, keep those of rows with a kept patch ("row"),
            "all" or "none". They come on top of the budget.
        positions: "compact" (kept tokens and text are numbered anew, as published) or "original" (everything keeps the
            position it has in the full prompt).

    Raises:
        ConfigError: for values out of range.

    Example:
        >>> import torch, transformers, vtoken
        >>> with torch.device("meta"):  # no weights are needed to count
        ...     model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig())
        >>> vtoken.num_tokens(model), vtoken.num_tokens(vtoken.apply(model, vtoken.VTCCLS(num_tokens=64)))
        (576, 64)

    Source: arXiv 2412.05819; docs/methods/vtc_cls.md 2 to 4 and 8.
    """

    method: ClassVar[str] = "vtc_cls"
    part: ClassVar[str] = "prompt"

    num_tokens: int | None = None
    keep_ratio: float | None = None
    start_layer: int | None = None
    ensemble: str = "mean"
    scorer: str = "auto"
    newline: str = "row"
    positions: str = "compact"

    def __post_init__(self) -> None:
        if (self.num_tokens is None) == (self.keep_ratio is None):
            raise ConfigError(
                f"VTCCLS(num_tokens={self.num_tokens!r}, keep_ratio={self.keep_ratio!r}): give exactly one of the two"
            )
        if self.num_tokens is not None:
            object.__setattr__(self, "num_tokens", checks.whole("VTCCLS", "num_tokens", self.num_tokens, 1))
        if self.keep_ratio is not None:
            ratio: Any = self.keep_ratio
            meant = isinstance(ratio, int) and ratio > 1
            what = f"the share of tokens kept{f' (did you mean num_tokens={ratio}?)' if meant else ''}, "
            object.__setattr__(self, "keep_ratio", checks.share("VTCCLS", "keep_ratio", ratio, what=what))
        if self.start_layer is not None:
            object.__setattr__(self, "start_layer", checks.whole("VTCCLS", "start_layer", self.start_layer))
        checks.choice("VTCCLS", "ensemble", self.ensemble, ENSEMBLES)
        checks.choice("VTCCLS", "scorer", self.scorer, SCORERS)
        checks.choice("VTCCLS", "newline", self.newline, NEWLINES)
        checks.choice("VTCCLS", "positions", self.positions, POSITIONS)

    @classmethod
    def example(cls) -> VTCCLS:
        """64 tokens, the smallest published budget."""
        return cls(num_tokens=64)

    def build(self, depth: int) -> FeatureMethod:
        """The pruning behind a tower with `depth` blocks."""
        return ClassAttentionPruning(self, depth)

    def replace(self, **changes: object) -> VTCCLS:
        """A copy with some settings changed; num_tokens replaces keep_ratio and the other way round."""
        if changes.get("num_tokens") is not None:
            changes.setdefault("keep_ratio", None)
        elif changes.get("keep_ratio") is not None:
            changes.setdefault("num_tokens", None)
        return super().replace(**changes)


class ClassAttentionPruning(FeatureMethod):
    """VTCCLS settings resolved for a tower with `depth` blocks."""

    def __init__(self, config: VTCCLS, depth: int) -> None:
        self.config = config
        self.depth = depth
        self.ensemble = config.ensemble
        self.positions = config.positions
        self.newline = config.newline

    def scorer(self, has_class: bool) -> str:
        """As chosen; "auto" by the tower."""
        if self.config.scorer == "cls" and not has_class:
            raise ConfigError(
                'VTCCLS(scorer="cls"): this tower has no class token; scorer="received" ranks patches by the attention '
                "that they receive"
            )
        chosen = self.config.scorer
        return ("cls" if has_class else "received") if chosen == "auto" else chosen

    def layers(self, last: int, scorer: str) -> range:
        """From the start layer to the one that makes the features."""
        if last < 0:
            raise ConfigError("the features are the embeddings themselves: no block is there to read attention from")
        start = self.config.start_layer
        return scored_layers(self.depth, last if start is None and scorer == "received" else start, last)

    def num_kept(self, num_tokens: int) -> int:
        """U, between 1 and N."""
        if self.config.num_tokens is not None:
            return min(self.config.num_tokens, num_tokens)
        return checks.share_of(self.config.keep_ratio or 1.0, num_tokens)

    def choose(self, scores: Tensor, num_tokens: int) -> Tensor:
        """The best of the overview, the same share of the detail grid, and newlines by choice."""
        budget = self.num_kept(num_tokens)
        if budget >= num_tokens:
            return torch.arange(scores.shape[0], device=scores.device)
        newline = scores < 0  # false for NaN: a broken score is still a patch
        keep = torch.zeros_like(newline)
        keep[select_tokens(scores[:num_tokens], budget)] = True
        detail = (~newline[num_tokens:]).nonzero()[:, 0] + num_tokens
        if len(detail):
            best = select_tokens(scores[detail], checks.share_of(budget / num_tokens, len(detail)))
            keep[detail[best]] = True
        if self.config.newline == "all":
            keep |= newline
        elif self.config.newline == "row":
            keep |= newline & _row_has_one(keep, newline, num_tokens)
        return keep.nonzero()[:, 0]

    def most(self, scores: Tensor, num_tokens: int) -> int:
        """As `choose` would return, if a patch of every row were kept."""
        budget = self.num_kept(num_tokens)
        newlines = int((scores < 0).sum())
        detail = len(scores) - num_tokens - newlines
        if budget >= num_tokens:
            return len(scores)
        kept = budget + (checks.share_of(budget / num_tokens, detail) if detail else 0)
        return kept + (newlines if self.config.newline != "none" else 0)


def _row_has_one(keep: Tensor, newline: Tensor, overview: int) -> Tensor:
    """For every feature, whether a patch of its row is kept; a row ends with its newline, the overview has none."""
    row = newline.long().cumsum(0) - newline.long()
    # An overview in front of a grid is not part of the grid's first row; an image of one crop is the row itself.
    if len(newline) > overview + 1:
        row = row + 1
        row[:overview] = 0
    kept = torch.zeros(int(row.max()) + 1, dtype=torch.long, device=keep.device).scatter_add(0, row, keep.long())
    return kept[row] > 0
