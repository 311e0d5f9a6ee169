"""VTC-CLS: keep the image tokens that the tower's class token looks at (arXiv 2412.05819)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Needs, Seen, TowerFacts
from vtoken.errors import ConfigError
from vtoken.methods.sharing import ShareConfig, Sharing
from vtoken.ops import ENSEMBLES, ensemble, scored_layers, select_tokens

SCORERS = ("auto", "cls", "received")


@register_method
@dataclass(frozen=True, kw_only=True)
class VTCCLS(ShareConfig):
    """Class-attention pruning of the image tokens in a multimodal prompt; nothing is trained.

    Exactly one of the first two must be given. Both count the tokens that leave the image tower: where a method merges
    tokens inside the tower, a merged token counts once.

    Args:
        num_tokens: image tokens to keep of one image, from 1 on. Where an image is cut into crops, of its overview, and
            of a video, of its first frame; every other grid keeps the same share.
        keep_ratio: share of them to keep, in (0, 1]; rounded up.
        start_layer: first block whose class attention is read; negative ones count from the end. The last one is always
            the block that makes the features. None: ceil(2/3 depth) at most (16 of 24), the published default; the last
            block only where scores are "received".
        ensemble: how the blocks' scores become one: "mean", "sum" (as published, same order), "max" or "min".
        scorer: "cls" (the method), "received" (attention that a patch gets from all, for towers without a class token;
            not part of the published method) or "auto" ("cls" if there is a class token).
        newline: of the newline tokens between rows of a detail grid, keep those of rows with a kept patch ("row"),
            "all" or "none". They come on top of the budget.
        positions: "compact" (kept tokens and text are numbered anew, as published), "original" (everything keeps the
            position it has in the full prompt) or "auto": "compact" in models that number tokens along one axis, else
            "original".

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

    start_layer: int | None = None
    ensemble: str = "mean"
    scorer: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_layer is not None:
            object.__setattr__(self, "start_layer", checks.whole("VTCCLS", "start_layer", self.start_layer))
        checks.choice("VTCCLS", "ensemble", self.ensemble, ENSEMBLES)
        checks.choice("VTCCLS", "scorer", self.scorer, SCORERS)

    def build(self, depth: int) -> PromptMethod:
        """The pruning; it learns of the tower when it is asked what it needs."""
        return ClassAttentionPruning(self)


class ClassAttentionPruning(Sharing):
    """The best of every cell by attention in the tower."""

    config: VTCCLS

    def needs(self, tower: TowerFacts) -> Needs:
        """Class or received attention, from the start layer to the one that makes the features."""
        if tower.last < 0:
            raise ConfigError("the features are the embeddings themselves: no block is there to read attention from")
        kind, start = self.config.scorer, self.config.start_layer
        if kind == "cls" and not tower.class_token:
            raise ConfigError(
                'VTCCLS(scorer="cls"): this tower has no class token; scorer="received" ranks patches by the attention '
                "that they receive"
            )
        kind = {"cls": "class", "auto": "class" if tower.class_token else "received"}.get(kind, kind)
        start = tower.last if start is None and kind == "received" else start
        return Needs(attention=kind, layers=tuple(scored_layers(tower.depth, start, tower.last)))

    def choose(self, seen: Seen) -> Tensor:
        """The highest scores of every cell, ties to the lower index."""
        scores = self.scores(seen)
        return self.each(seen, lambda part, k: select_tokens(scores[part.to(scores.device)], k))

    def scores(self, seen: Seen) -> Tensor:
        """The layers' attention as one number a token."""
        assert seen.attention is not None
        return ensemble([row.unsqueeze(0) for row in seen.attention], self.config.ensemble)[0]
