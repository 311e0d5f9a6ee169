"""What PiToMe and its baselines share: settings, token counts, the step from metric to fewer tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken import checks
from vtoken.core.config import MethodConfig
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.errors import ConfigError, VTokenError
from vtoken.methods.merging import schedule
from vtoken.ops import REDUCTIONS, MergePlan

METRICS = ("key", "key_concat", "hidden")
INSERTS = ("between", "after")
ORDERS = ("raster", "internal")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(MethodConfig):
    """Settings of every merging method.

    Args:
        layers: blocks that merge; None means all. Negative indices count from the end.
        metric: what tokens are compared by: "key" (keys averaged over heads, before rotation), "key_concat" (heads
            side by side) or "hidden" (the tokens themselves).
        prop_attn: proportional attention, log(size) on the key logits.
        reduction: "wavg" (weighted by size), "mean", "amax" or "prune".
        place: where tokens merge: "between" attention and MLP, or "after" both.
        order: "raster" (tokens leave the model in the order of their positions) or "internal".

    Raises:
        ConfigError: for values out of range; for lists that do not fit the model when it is applied.

    A merging method of your own is a frozen dataclass derived from this class, or from `ScheduledMergeConfig`, whose
    `ratio` or `r` tells `amounts` and `removed`. It must say which rows go together, `match`; how much each block
    removes, `amounts`; and how many tokens that is, `removed`. What else there is has a default. The whole page is
    docs/extend/method.md, and `vtoken.testing.check_method` tries the promises on small models.

    Example:
        >>> import dataclasses, vtoken
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class EveryOther(vtoken.ScheduledMergeConfig):
        ...     method = "every_other"  # register_method makes the name known to apply(model, "every_other", r=4)
        ...     def match(self, layer, depth, metric, r, num_prefix, protect):
        ...         return vtoken.ops.plan_tome(metric, r, num_prefix=num_prefix)
        >>> import timm
        >>> vtoken.plan(timm.create_model("test_vit"), EveryOther(r=4)).removed
        (4, 4, 4, 4, 4, 4)

    Source: arXiv 2405.16148; docs/methods/pitome.md 3 to 8.
    """

    #: Whether `removed` is what a merge takes. If False it is the most, and the plan of `match` may remove fewer: as
    #: many as its tokens tell, the same number in all images of a batch.
    exact: ClassVar[bool] = True
    #: Patches that never merge, ascending. No setting here, hence no annotation.
    protect = tuple[int, ...]()

    layers: tuple[int, ...] | None = None
    metric: str = "key"
    prop_attn: bool = True
    reduction: str = "wavg"
    place: str = "between"
    order: str = "raster"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.layers is not None:
            object.__setattr__(self, "layers", checks.wholes(owner, "layers", self.layers))
        checks.flag(owner, "prop_attn", self.prop_attn)
        checks.choice(owner, "metric", self.metric, METRICS)
        checks.choice(owner, "reduction", self.reduction, REDUCTIONS)
        checks.choice(owner, "place", self.place, INSERTS)
        checks.choice(owner, "order", self.order, ORDERS)

    def build(self, depth: int) -> BlockMethod:
        """The merging of a model with `depth` blocks."""
        return Merging(self, depth)

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> MergePlan:
        """The plan of one merge: which r tokens of every image go where; make it with `vtoken.ops.plan_*`.

        Args:
            layer, depth: number of the block, and how many there are.
            metric: what tokens are compared by, [B, T, d], float32 or float64; prefix rows first.
            r: how many the plan must remove, from 1 on; at most so many if the method is not `exact`.
            num_prefix: prefix rows P, which must stay in the first rows.
            protect: patches that must not merge, [B, p], counted without the prefix; None unless
                the settings have a field `protect` that names some.
        """
        raise NotImplementedError

    def check_depth(self, depth: int) -> None:
        """Raise ConfigError for settings that do not fit `depth` blocks."""

    def amounts(self, depth: int) -> tuple[Any, ...]:
        """How much each of `depth` blocks removes, one entry per block, in whatever form `removed` takes."""
        raise NotImplementedError

    def removed(self, amount: Any, mergeable: int) -> int:
        """How many of `mergeable` non-prefix tokens a block with this entry of `amounts` removes, or at most.

        Whole, from 0 on, known from these two alone; of more tokens at least as many are left.
        """
        raise NotImplementedError

    def macs(self, layer: int, depth: int, mergeable: int, r: int, channels: int) -> int:
        """Multiply-adds of choosing r among `mergeable` tokens compared over `channels`."""
        return r * r * channels

    def layer_settings(self, layer: int, depth: int) -> dict[str, Any]:
        """Settings that differ from layer to layer; `match` takes them by name from who has asked for them."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ScheduledMergeConfig(MergeConfig):
    """Settings of the methods whose layers remove a chosen number of tokens.

    Args (beside those of MergeConfig):
        ratio: share of the non-prefix tokens that each layer keeps, in (0, 1]; one number or one per block.
            0.925 if neither ratio nor r is given.
        r: instead of ratio, tokens that each layer removes: one number; one per block (missing ones are 0); or
            a tuple (r, slope) with a slope in [-1, 1], linear over the layers (-1: from 2r down to 0). A list is always
            one number per block: [8, 1] removes 8 and 1, (8, 1) is a line. In JSON a line is {"r": 8, "slope": 1.0},
            which may be given as well.
    """

    _either = ("ratio", "r")

    ratio: Any = None
    r: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio, r = schedule.check_amount(type(self).__name__, self.ratio, self.r)
        object.__setattr__(self, "ratio", ratio)
        object.__setattr__(self, "r", r)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; see `MethodConfig.to_dict`."""
        return super().to_dict() | {"r": schedule.as_json(self.r)}

    def amounts(self, depth: int) -> tuple[Any, ...]:
        """One entry per layer: a float is a ratio, an int is r."""
        return schedule.amounts(type(self).__name__, self.ratio, self.r, depth)

    def removed(self, amount: Any, mergeable: int) -> int:
        """By ratio or by number, at most half of the tokens that may merge."""
        wanted = removed_by_ratio(mergeable, amount) if isinstance(amount, float) else int(amount)
        return max(0, min(wanted, (mergeable - len(self.protect)) // 2))


def removed_by_ratio(mergeable: int, ratio: float) -> int:
    """Tokens to remove so that the share `ratio` of `mergeable` stays.

    The 1e-6 undoes float accidents: 100 - 100 * 0.55 is 44.99..., not 45. Written out, because a graph whose sizes are
    symbols would make an argument of a global number.
    """
    return math.floor(mergeable - mergeable * ratio + 1e-6)


class Merging(BlockMethod):
    """A merging config resolved for `depth` blocks."""

    def __init__(self, config: MergeConfig, depth: int) -> None:
        owner = type(config).__name__
        config.check_depth(depth)
        self.config = config
        self.depth = depth
        self.metric = config.metric
        self.insert = config.place
        self.order = config.order
        self.exact = config.exact
        self._layers = schedule.chosen_layers(owner, config.layers, depth)
        self._amounts = config.amounts(depth)
        self._settings = tuple([config.layer_settings(layer, depth) for layer in range(depth)])
        self._removed: dict[tuple[int, int], int] = {}
        self._protects = bool(config.protect)
        # Compiled graphs take words as constants. A float that another one replaces (configure) becomes a symbol there,
        # and torch cannot make sizes of such symbols.
        self._worded = tuple(repr(amount) if isinstance(amount, float) else amount for amount in self._amounts)

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        """Tokens that block `layer` removes from `mergeable` ones; 0 if it is not among the chosen layers."""
        if layer not in self._layers:
            return 0
        if torch.compiler.is_compiling():  # where the count may be a symbol
            amount = self._worded[layer]
            return self.config.removed(float(amount) if isinstance(amount, str) else amount, mergeable)
        found = self._removed.get((layer, mergeable))
        if found is None:
            found = self._removed[layer, mergeable] = self.config.removed(self._amounts[layer], mergeable)
        return found

    def check_patches(self, num_patches: int) -> None:
        """Protected patches must exist."""
        rows = self.config.protect
        if rows and rows[-1] >= num_patches:
            raise ConfigError(f"protect names patch {rows[-1]}, but images have only patches 0 to {num_patches - 1}")

    def has_bias(self) -> bool:
        """Pruned models keep size 1, so only merging with prop_attn has a bias."""
        return self.config.prop_attn and self.config.reduction != "prune"

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        """Multiply-adds of the matching; the averaging adds rows and multiplies by a share, r * C each."""
        r = self.num_removed(layer, mergeable)
        channels = head_dim if self.metric == "key" else width
        return self.config.macs(layer, self.depth, mergeable, r, channels) if r else 0

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        """Merge tokens [B, T, C] by metric [B, T, d]."""
        r = self.num_removed(layer, x.shape[1] - num_prefix)
        return self.reduce(layer, r, x, metric, slot, num_prefix, **self._settings[layer])

    def layer_settings(self, layer: int) -> dict[str, Any]:
        """Those that differ from layer to layer."""
        return self._settings[layer]

    def reduce(
        self, layer: int, r: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int, **settings: Any
    ) -> tuple[Tensor, Slot]:
        """Merge r tokens of [B, T, C] by metric [B, T, d]."""
        if not self.exact and (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None):
            raise ConfigError(
                f"{type(self.config).__name__} lets the images decide how many tokens merge, which no single graph can "
                "hold: leave the model eager, or take torch.compile without fullgraph"
            )
        if self._protects and slot.protect is None:
            slot = replace(slot, protect=self._first_protect(x, num_prefix))
        plan = self.config.match(layer, self.depth, metric, r, num_prefix, slot.protect, **settings)
        if not torch.compiler.is_compiling() and (plan.removed != r or plan.num_tokens_in != x.shape[1]):
            self._check_plan(plan, layer, r, x)
            if plan.removed == 0:
                return x, slot  # as if the block were not among the chosen ones
        x, size = plan.merged(x, slot.size, self.config.reduction)
        # Pruning leaves every token at size 1: keep None, which keeps attention free of a mask.
        new_size = None if self.config.reduction == "prune" and slot.size is None else size
        return x, slot.advance(plan, new_size, num_prefix)

    def _check_plan(self, plan: MergePlan, layer: int, r: int, x: Tensor) -> None:
        """Raise VTokenError unless a plan is one for x [B, T, C] that removes r tokens, or at most r if not exact."""
        owner, gone = type(self.config).__name__, plan.removed
        if plan.num_tokens_in != x.shape[1]:
            raise VTokenError(f"{owner}.match made a plan for {plan.num_tokens_in} rows in block {layer}, not "
                              f"{x.shape[1]}")  # fmt: skip
        if gone != r and not (0 <= gone < r and not self.exact):
            raise VTokenError(
                f"{owner}.match removed {gone} tokens in block {layer}, `removed` said "
                f"{r if self.exact else f'at most {r}'}: vtoken.plan would be wrong"
                + (". Where the tokens decide how many merge, the class must say `exact = False`" if self.exact else "")
            )

    def _first_protect(self, x: Tensor, num_prefix: int) -> Tensor:
        self.check_patches(x.shape[1] - num_prefix)
        return torch.tensor(self.config.protect, dtype=torch.int64, device=x.device).expand(x.shape[0], -1)
