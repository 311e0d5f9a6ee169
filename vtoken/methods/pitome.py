"""PiToMe: merge the tokens with many near neighbours, protect the isolated ones (arXiv 2405.16148)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from vtoken.core.config import check_choice, register_method
from vtoken.core.errors import ConfigError
from vtoken.methods import schedule
from vtoken.methods.merging import ScheduledMergeConfig
from vtoken.ops import MergePlan, plan_pitome
from vtoken.ops.matching import ENERGIES, VARIANTS

# Which matching the published code runs in which layer (pitome.md 11.4).
_PRESETS = {
    "deit_code": lambda layer, depth: "pitome_pairs" if layer < math.ceil(depth / 2) else "pitome",
    "mae_code": lambda layer, depth: "pitome_pairs" if layer >= depth - depth // 2 else "pitome",
    "clip_llava_code": lambda layer, depth: "tome" if layer <= depth // 2 else "pitome",
}


@register_method
@dataclass(frozen=True, kw_only=True)
class PiToMe(ScheduledMergeConfig):
    """Energy-based token merging.

    Args (beside those of ScheduledMergeConfig):
        margin: similarity above which tokens count as close, in [-1, 1]; one number or one per block.
        margin_schedule: for one number, "linear" (margin * (1 - layer / L), the paper's) or "constant".
        alpha: weight of similarities below the margin, at least 0.
        variant: "pitome", "pitome_pairs" or "tome" (see `vtoken.ops.plan_pitome`), one or one per block; or the layer
            patterns of the published code, "deit_code", "mae_code", "clip_llava_code".
        energy: "elu" or "eq4".
        protect: patches (row-major numbers in the embedded grid) that never merge.
    """

    method: ClassVar[str] = "pitome"

    margin: float | Sequence[float] = 0.9
    margin_schedule: str = "linear"
    alpha: float = 1.0
    variant: str | Sequence[str] = "pitome"
    energy: str = "elu"
    protect: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        margin = schedule.numbers("PiToMe", "margin", self.margin, float)
        for value in margin if isinstance(margin, tuple) else (margin,):
            if not -1.0 <= value <= 1.0:
                raise ConfigError(f"PiToMe(margin={value!r}): a cosine similarity, must be in [-1, 1]")
        object.__setattr__(self, "margin", margin)
        check_choice("PiToMe", "margin_schedule", self.margin_schedule, ("linear", "constant"))
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real) or not 0 <= self.alpha < math.inf:
            raise ConfigError(f"PiToMe(alpha={self.alpha!r}): must be a finite number from 0 on")
        object.__setattr__(self, "alpha", float(self.alpha))
        if isinstance(self.variant, str):
            check_choice("PiToMe", "variant", self.variant, (*VARIANTS, *_PRESETS))
        elif not isinstance(self.variant, Sequence):
            raise ConfigError(f"PiToMe(variant={self.variant!r}): expected a name or one name per block")
        else:
            object.__setattr__(self, "variant", tuple(self.variant))
            for name in self.variant:
                check_choice("PiToMe", "variant", name, VARIANTS)
        check_choice("PiToMe", "energy", self.energy, ENERGIES)
        protect = schedule.whole_numbers("PiToMe", "protect", self.protect)
        if any(row < 0 for row in protect):
            raise ConfigError(f"PiToMe(protect={list(protect)}): patch numbers start at 0")
        object.__setattr__(self, "protect", tuple(sorted(set(protect))))

    def check_depth(self, depth: int) -> None:
        """Lists must have one value per block; protected patches cannot be combined with plain matching."""
        schedule.per_layer("PiToMe", "margin", self.margin, depth)
        variants = {self._variant(layer, depth) for layer in range(depth)}
        if self.protect and "tome" in variants:
            raise ConfigError('PiToMe(protect=...) cannot be combined with the variant "tome", which protects nothing')

    def protected_patches(self) -> tuple[int, ...]:
        """The patches that `protect` names."""
        return self.protect

    def match(
        self,
        layer: int,
        depth: int,
        metric: Tensor,
        r: int,
        num_prefix: int,
        protect: Tensor | None,
        margin: Tensor | None = None,
        variant: str | None = None,
    ) -> MergePlan:
        """The energy matching with this layer's margin and variant."""
        return plan_pitome(
            metric,
            r,
            margin=self._margin(layer, depth) if margin is None else margin,
            alpha=self.alpha,
            num_prefix=num_prefix,
            variant=self._variant(layer, depth) if variant is None else variant,
            energy=self.energy,
            protect=protect,
        )

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        """N^2 d for the energies and the pairs' similarities."""
        variant, half = self._variant(layer, depth), mergeable // 2
        if variant == "tome":
            return half * (mergeable - half) * channels
        pairs = r * r if variant == "pitome" else half * (mergeable - half)
        return (mergeable * mergeable + pairs) * channels

    def layer_settings(self, layer: int, depth: int) -> dict[str, Any]:
        """Margin and variant of one layer."""
        return {"margin": self._margin(layer, depth), "variant": self._variant(layer, depth)}

    def _margin(self, layer: int, depth: int) -> float:
        if isinstance(self.margin, tuple):
            return float(self.margin[layer])
        margin = float(self.margin)  # type: ignore[arg-type]
        return margin * (1.0 - layer / depth) if self.margin_schedule == "linear" else margin

    def _variant(self, layer: int, depth: int) -> str:
        if isinstance(self.variant, tuple):
            return str(schedule.per_layer("PiToMe", "variant", self.variant, depth)[layer])
        preset = _PRESETS.get(str(self.variant))
        return preset(layer, depth) if preset else str(self.variant)
