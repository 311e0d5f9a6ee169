"""Merging by a similarity threshold: how many tokens go, the images decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.methods.merging import schedule
from vtoken.methods.merging.base import ScheduledMergeConfig
from vtoken.ops import MergePlan, plan_threshold


@register_method
@dataclass(frozen=True, kw_only=True)
class ThresholdMerge(ScheduledMergeConfig):
    """Tokens merge while they are alike enough; an image with nothing to spare keeps all.

    Pairs are those of `ToMe`: even rows propose to odd rows, prefix tokens take no part. A block merges the pairs whose
    cosine is above `threshold`. A batch has one number of tokens, so every block takes the largest number that all its
    images allow, which is the least over the batch, and merges so many of the best pairs of each. Nothing is padded:
    padded rows would have to be masked in every attention, pooling and trace behind, cost what they were to save, and
    not be what the model computes for the image alone. So **the result for an image depends on the others in its
    batch**; with a batch of one it does not. Batches of alike images, or of one, save the most.

    Where no pair is above the threshold the outputs are those of the model without the method, bit for bit.

    Counts are known only when the images are seen. `vtoken.plan` and `vtoken.report` give bounds, `vtoken.num_tokens`
    raises, `vtoken.trace` says what a forward did. Each merging block reads one number from the device. No one graph
    can hold it: `vtoken.compile`, `torch.compile(fullgraph=True)` and export refuse. Nor can the prompt of a LLaVA be
    sized, which is refused.

    Args (beside those of ScheduledMergeConfig):
        threshold: cosine of the metric above which two tokens merge, in [-1, 1]; one number or one per block. At 1
            nothing merges.
        ratio, r: the most that a block removes, in the same forms as there. ratio=0.5 if neither is given, which is as
            much as the pairs allow.

    Source: docs/methods/threshold.md.

    Example:
        >>> import timm, torch, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit").eval(), vtoken.ThresholdMerge(threshold=0.95))
        >>> bounds = vtoken.plan(model)
        >>> _, trace = vtoken.trace(model, torch.zeros(1, 3, 160, 160))
        >>> all(low <= t <= high for low, t, high in zip(bounds.least, trace.tokens, bounds.tokens))
        True
    """

    method: ClassVar[str] = "threshold_merge"
    exact: ClassVar[bool] = False

    threshold: float | Sequence[float] = 0.9

    def __post_init__(self) -> None:
        if self.ratio is None and self.r is None:
            object.__setattr__(self, "ratio", 0.5)
        super().__post_init__()
        check, what = checks.number, "a cosine similarity, "
        threshold = checks.one_or_several("ThresholdMerge", "threshold", self.threshold, check, -1, 1, what=what)
        object.__setattr__(self, "threshold", threshold)

    def amounts(self, depth: int) -> tuple[Any, ...]:
        """The most of every block: an int is r, a float a ratio; r=0 where nothing is above the threshold."""
        most = super().amounts(depth)
        return tuple([0 if t >= 1 else amount for t, amount in zip(self._thresholds(depth), most, strict=True)])

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> MergePlan:
        """The pairs above this block's threshold, at most r."""
        return plan_threshold(metric, r, threshold=self._thresholds(depth)[layer], num_prefix=num_prefix)

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        """Similarities of every even row with every odd row."""
        return (mergeable // 2) * (mergeable - mergeable // 2) * channels

    def _thresholds(self, depth: int) -> tuple[float, ...]:
        return schedule.per_layer("ThresholdMerge", "threshold", self.threshold, depth)
