"""PiToMe: merge the tokens with many near neighbours, protect the isolated ones (arXiv 2405.16148)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from vtoken import checks
from vtoken.core.config import register_method
from vtoken.errors import ConfigError
from vtoken.methods.merging import schedule
from vtoken.methods.merging.base import ScheduledMergeConfig
from vtoken.ops import MergePlan
from vtoken.ops.merging.matching import ENERGIES, VARIANTS, energy_matching

#: Matchings of image tokens; `plan_pitome` has one for text encoders besides.
_MATCHINGS = tuple(name for name in VARIANTS if name != "text")


class _Published(NamedTuple):
    """What the published code does for one model (docs/methods/pitome.md 10).

    Args:
        matching: which one block `layer` of `depth` runs.
        settings: those in which it differs from the paper's.
    """

    matching: Callable[[int, int], str]
    settings: dict[str, Any]


#: Sizes never reach its attention, whatever it is told.
_UNSIZED = {"prop_attn": False}
_PRESETS = {
    "deit_code": _Published(
        lambda layer, depth: "pitome_pairs" if layer < math.ceil(depth / 2) else "pitome", _UNSIZED | {"margin": 0.75}
    ),
    "mae_code": _Published(
        lambda layer, depth: "pitome_pairs" if layer >= depth - depth // 2 else "pitome", _UNSIZED | {"margin": 0.75}
    ),
    "clip_llava_code": _Published(
        lambda layer, depth: "tome" if layer <= depth // 2 else "pitome",
        _UNSIZED | {"metric": "hidden", "place": "after", "reduction": "mean"},
    ),
}
#: What the paper sets where a preset may set something else.
_PAPER: dict[str, Any] = {
    "margin": 0.9,
    "prop_attn": True,
    "metric": "key",
    "place": "between",
    "reduction": "wavg",
}


class _ByVariant:
    """Stands in a signature for a default that depends on `variant`; a config never holds it."""

    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def __repr__(self) -> str:
        return f"<{self._usual!r}, or the preset's>"


def _by_variant(name: str) -> Any:
    return _ByVariant(_PAPER[name])


@register_method
@dataclass(frozen=True, kw_only=True)
class PiToMe(ScheduledMergeConfig):
    """Energy-based token merging.

    Args (beside those of ScheduledMergeConfig):
        margin: similarity above which tokens count as close, in [-1, 1]; one number or one per block. 0.9 by default.
        margin_schedule: for one number, "linear" (margin * (1 - layer / L), the paper's) or "constant".
        alpha: weight of similarities below the margin, at least 0.
        variant: "pitome", "pitome_pairs" or "tome" (see `vtoken.ops.plan_pitome`), one or one per block; or a preset,
            what the published code does: "deit_code", "mae_code" (two variants, margin=0.75, prop_attn=False) or
            "clip_llava_code" (two variants, prop_attn=False, metric="hidden", place="after", reduction="mean"). A
            preset sets what is not given; what is given stays.
        energy: "elu" or "eq4".
        protect: patches (row-major numbers in the embedded grid) that never merge.

    Example:
        >>> import timm, vtoken
        >>> vtoken.plan(timm.create_model("test_vit"), vtoken.PiToMe(ratio=0.9)).tokens
        (101, 91, 82, 74, 67, 61, 55)
    """

    method: ClassVar[str] = "pitome"

    metric: str = _by_variant("metric")
    prop_attn: bool = _by_variant("prop_attn")
    reduction: str = _by_variant("reduction")
    place: str = _by_variant("place")
    margin: float | Sequence[float] = _by_variant("margin")
    margin_schedule: str = "linear"
    alpha: float = 1.0
    variant: str | Sequence[str] = "pitome"
    energy: str = "elu"
    protect: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.variant, str):
            checks.choice("PiToMe", "variant", self.variant, (*_MATCHINGS, *_PRESETS))
        else:
            names = checks.several(self.variant)
            if names is None:
                raise ConfigError(f"PiToMe(variant={self.variant!r}): expected a name or one name per block")
            object.__setattr__(
                self, "variant", tuple([checks.choice("PiToMe", "variant", n, _MATCHINGS) for n in names])
            )
        for name, value in _defaults(self.variant).items():
            if isinstance(getattr(self, name), _ByVariant):
                object.__setattr__(self, name, value)
        super().__post_init__()
        what = "a cosine similarity, "
        margin = checks.one_or_several("PiToMe", "margin", self.margin, checks.number, -1, 1, what=what)
        object.__setattr__(self, "margin", margin)
        checks.choice("PiToMe", "margin_schedule", self.margin_schedule, ("linear", "constant"))
        object.__setattr__(self, "alpha", checks.number("PiToMe", "alpha", self.alpha, 0))
        checks.choice("PiToMe", "energy", self.energy, ENERGIES)
        protect = checks.wholes("PiToMe", "protect", self.protect, 0, what="patch numbers start at 0; each ")
        object.__setattr__(self, "protect", tuple(sorted(set(protect))))

    def replace(self, **changes: Any) -> Any:
        """A copy with some settings changed; with a new variant, what still stands at the old one's follows."""
        if "variant" in changes:
            new = {f.name: f.default for f in fields(self)}
            for name, value in _defaults(self.variant).items():
                if getattr(self, name) == value:
                    changes.setdefault(name, new[name])
        return super().replace(**changes)

    def check_depth(self, depth: int) -> None:
        """Lists must have one value per block; protected patches cannot be combined with plain matching."""
        schedule.per_layer("PiToMe", "margin", self.margin, depth)
        variants = {self._variant(layer, depth) for layer in range(depth)}
        if self.protect and "tome" in variants:
            raise ConfigError('PiToMe(protect=...) cannot be combined with the variant "tome", which protects nothing')

    def match(
        self,
        layer: int,
        depth: int,
        metric: Tensor,
        r: int,
        num_prefix: int,
        protect: Tensor | None,
        margin: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        variant: str | None = None,
    ) -> MergePlan:
        """The energy matching with this layer's margin and variant."""
        return energy_matching(
            metric,
            r,
            num_prefix,
            margin=self._margin(layer, depth) if margin is None else margin,
            alpha=self.alpha if alpha is None else alpha,
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
        """Margin and variant of one layer, and alpha: a graph takes numbers among these as arguments.

        Those that `match` takes: a subclass may have written its own before there were so many.
        """
        settings = {
            "margin": self._margin(layer, depth), "alpha": self.alpha, "variant": self._variant(layer, depth)
        }  # fmt: skip
        taken = inspect.signature(self.match).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            return settings
        return {name: value for name, value in settings.items() if name in taken}

    def _margin(self, layer: int, depth: int) -> float:
        if isinstance(self.margin, tuple):
            return float(self.margin[layer])
        margin = float(self.margin)  # type: ignore[arg-type]
        return margin * (1.0 - layer / depth) if self.margin_schedule == "linear" else margin

    def _variant(self, layer: int, depth: int) -> str:
        if isinstance(self.variant, tuple):
            return str(schedule.per_layer("PiToMe", "variant", self.variant, depth)[layer])
        preset = _PRESETS.get(str(self.variant))
        return preset.matching(layer, depth) if preset else str(self.variant)


def _defaults(variant: str | Sequence[str]) -> dict[str, Any]:
    """What a variant sets where the user gives nothing."""
    preset = _PRESETS.get(variant) if isinstance(variant, str) else None
    return _PAPER | (preset.settings if preset else {})
