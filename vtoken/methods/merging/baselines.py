"""Baselines behind PiToMe's interface: ToMe, random merging, random pruning, fixed stride.

Source: docs/methods/baselines.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.errors import ConfigError
from vtoken.methods.merging.base import MergeConfig, ScheduledMergeConfig
from vtoken.ops import MergePlan, plan_random, plan_stride
from vtoken.ops.merging.matching import bipartite_matching


@register_method
@dataclass(frozen=True, kw_only=True)
class ToMe(ScheduledMergeConfig):
    """Bipartite soft matching (arXiv 2210.09461): even rows propose to odd rows, the best r pairs merge.

    Example:
        >>> import timm, vtoken
        >>> vtoken.plan(timm.create_model("test_vit"), vtoken.ToMe(r=8)).tokens
        (101, 93, 85, 77, 69, 61, 53)
    """

    method: ClassVar[str] = "tome"

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> MergePlan:
        """The bipartite matching."""
        return bipartite_matching(metric, r, num_prefix)

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        """Similarities of every even row with every odd row."""
        return (mergeable // 2) * (mergeable - mergeable // 2) * channels


@register_method
@dataclass(frozen=True, kw_only=True)
class RandomMerge(ScheduledMergeConfig):
    """Control: sources and destinations drawn at random, partners by similarity.

    Args (beside those of ScheduledMergeConfig):
        seed: of the draw, which is the same for every image and every call; sweep it to see the spread.

    Example:
        >>> import timm, vtoken
        >>> vtoken.plan(timm.create_model("test_vit"), vtoken.RandomMerge(ratio=0.9)).tokens
        (101, 91, 82, 74, 67, 61, 55)
    """

    method: ClassVar[str] = "random_merge"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", checks.whole(type(self).__name__, "seed", self.seed, 0))

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> MergePlan:
        """A drawn plan; every layer draws anew."""
        return plan_random(metric, r, num_prefix=num_prefix, seed=self.seed * 1000 + layer)


@register_method
@dataclass(frozen=True, kw_only=True)
class RandomPrune(RandomMerge):
    """Control: tokens drawn at random are dropped. In dense maps each shows its most similar drawn destination.

    Example:
        >>> import timm, vtoken
        >>> vtoken.plan(timm.create_model("test_vit"), vtoken.RandomPrune(ratio=0.9)).tokens
        (101, 91, 82, 74, 67, 61, 55)
    """

    method: ClassVar[str] = "random_prune"

    reduction: str = "prune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction != "prune":
            raise ConfigError(
                f"RandomPrune(reduction={self.reduction!r}): pruning is its only reduction; see RandomMerge"
            )


@register_method
@dataclass(frozen=True, kw_only=True)
class StrideMerge(MergeConfig):
    """Control: in the chosen layers every `stride`-th token stays and the others join the most similar of those.

    Args (beside those of MergeConfig):
        stride: at least 2.
        layers: blocks that merge, by default the first one only.

    Example:
        >>> import timm, vtoken
        >>> vtoken.plan(timm.create_model("test_vit"), vtoken.StrideMerge(stride=2)).tokens
        (101, 51, 51, 51, 51, 51, 51)
    """

    method: ClassVar[str] = "stride"

    stride: int = 2
    layers: tuple[int, ...] | None = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stride", checks.whole("StrideMerge", "stride", self.stride, 2))

    def amounts(self, depth: int) -> tuple[int, ...]:
        """The stride, in every layer."""
        return (self.stride,) * depth

    def removed(self, amount: Any, mergeable: int) -> int:
        """All but every stride-th token."""
        return mergeable - -(-mergeable // int(amount))

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> MergePlan:
        """The fixed-stride matching."""
        return plan_stride(metric, self.stride, num_prefix=num_prefix)

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        """Similarities of every source with every destination."""
        return r * (mergeable - r) * channels
