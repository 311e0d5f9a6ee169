"""What a host may ask of a method. A method never sees a model; a host never sees which method it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vtoken.core.slots import AttentionCall, Slot
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Chosen, Needs, Seen, TowerFacts, Visual


class Method:
    """A method built for one depth from its settings; immutable, so any number of forwards may share it.

    What derives from it here are the kinds of methods: where a method acts is told by its kind and by nothing else. One
    of each kind may be applied.
    """

    @classmethod
    def kind(cls) -> type[Method]:
        """The kind it is of: what derives from Method itself."""
        return next(base for base in cls.__mro__ if Method in base.__bases__)


#: The methods of one part of a model by their kind.
Methods = Mapping[type[Method], Any]


class BlockMethod(Method):
    """A method that removes tokens inside the blocks.

    Args:
        metric: what it chooses by: "key", "key_concat" or "hidden" compare tokens; "cls" ranks by the class token.
        insert: "between" attention and MLP, or "after" both.
        order: "raster" (features leave the model ordered by position) or "internal".
        exact: whether `num_removed` is what a block removes; if False it is the most, and the tokens decide.
    """

    exact: bool = True
    metric: str
    insert: str
    order: str
    #: Whether `on_block` is `reduce` with the block's own amount and settings, so that who knows them calls `reduce`.
    reduces: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        last = next((c for c in cls.__mro__ if "reduce" in vars(c) or "on_block" in vars(c)), BlockMethod)
        cls.reduces = last is not BlockMethod and "reduce" in vars(last)

    def check_patches(self, num_patches: int) -> None:
        """Raise ConfigError if the settings name patches that a grid of `num_patches` does not have."""

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        """How many of `mergeable` non-prefix tokens block `layer` removes, or at most if not `exact`; needs no data.

        `embedded` is how many there were before the first block, for counts that depend on it. Of more tokens at least
        as many must be left.
        """
        raise NotImplementedError

    def has_bias(self) -> bool:
        """Whether sizes enter the attention logits."""
        raise NotImplementedError

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        """Multiply-adds that block `layer` spends on choosing and merging."""
        raise NotImplementedError

    def on_block(self, layer: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int) -> tuple[Tensor, Slot]:
        """Tokens [B, T, C] and what is known of them -> fewer tokens and what is known of those."""
        raise NotImplementedError

    def layer_settings(self, layer: int) -> dict[str, Any]:
        """The settings of block `layer` that `reduce` takes as arguments."""
        return {}

    def reduce(
        self, layer: int, r: int, x: Tensor, metric: Tensor, slot: Slot, num_prefix: int, **settings: Any
    ) -> tuple[Tensor, Slot]:
        """`on_block` with everything that differs between the blocks as an argument; `vtoken.compile` needs it.

        A class that overrides it overrides `on_block`, too, or it is not called. One compiled graph serves all blocks,
        in which `layer` and `r` are symbols and numbers among the settings float64 tensors []: none of them may decide
        which code runs.
        """
        raise NotImplementedError


class PromptMethod(Method):
    """A method that takes image or video tokens out of a multimodal prompt, between the tower and the language model.

    It never sees a model: `count` is told the grid of a visual, `choose` what it asked for by `needs`. Counts follow
    from grids and clues alone, so they are known before a pixel is encoded.

    Args:
        positions: "compact" (text and kept tokens are renumbered), "original" (they keep their places) or "auto":
            compact where a model counts along one axis, original where it counts along three.
        newline: which separators of a grid stay, "row" (by content), "all" or "none".
    """

    #: Names of settings that `vtoken.budget` may replace for one call.
    budgets: ClassVar[frozenset[str]] = frozenset()
    #: What a call may bring for it through `vtoken.budget`.
    clues: ClassVar[frozenset[str]] = frozenset()
    #: Whether rows may differ from the tokens' own.
    replaces: ClassVar[bool] = False
    #: What it shortens, of "image" and "video"; what it does not, stays whole.
    kinds: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    #: Whether what it keeps lies in lines, behind which separators can go.
    in_lines: bool = True
    positions: str = "auto"
    newline: str = "row"

    def needs(self, tower: TowerFacts) -> Needs:
        """What `choose` must be shown; raises ConfigError if such a tower cannot serve it."""
        return Needs()

    def count(self, visual: Visual, clues: Mapping[str, Any]) -> int:
        """How many content tokens stay, at least 1; needs no data."""
        raise NotImplementedError

    def choose(self, seen: Seen) -> Tensor | Chosen:
        """Content indices of what stays, exactly `seen.count` of them, ascending; or with rows in their place."""
        raise NotImplementedError

    def scores(self, seen: Seen) -> Tensor | None:
        """What the choice is made by, [n] float32, for the record of a trace; None if no number tells."""
        return None


class KeepVisuals(PromptMethod):
    """Keeps all: what stands for the kinds of visuals that no method shortens."""

    def count(self, visual: Visual, clues: Mapping[str, Any]) -> int:
        """All."""
        return visual.content


class AttentionMethod(Method):
    """A method that stands where attention multiplies queries, keys and values."""

    def acts_on(self, layer: int) -> bool:
        """Whether block `layer` is among the chosen ones."""
        raise NotImplementedError

    def predictor(self, layer: int, spec: HostSpec, like: Tensor) -> nn.Module:
        """The learned part of block `layer`, on the device and in the dtype of `like`; a child of its attention."""
        raise NotImplementedError

    def fits(self, layer: int, predictor: nn.Module) -> None:
        """Raise ConfigError unless the settings can go on with the `predictor` that is there."""
        raise NotImplementedError

    def tune(self, predictor: nn.Module) -> None:
        """Give a `predictor` that fits the settings that shape no parameter."""
        raise NotImplementedError

    def is_stock(self, layer: int) -> bool:
        """Whether block `layer` computes plain attention, so that the host's own code can."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, predictor: nn.Module, call: AttentionCall) -> Tensor:
        """Attention of [B, H, T, D] queries over keys and values, [B, H, T, D]."""
        raise NotImplementedError

    def macs(
        self, layer: int, tokens: int, embedded: int, spec: HostSpec, predictor: nn.Module | None
    ) -> AttentionMacs:
        """Multiply-adds of block `layer`'s attention core for one image.

        `tokens` of the `embedded` ones enter it, prefix included; `predictor` is its learned part, if there is one yet.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionMacs:
    """One attention core (no projections) in multiply-adds.

    Args:
        dense: plain attention.
        core: as the method runs it.
        predictor: its learned part, up to the coefficients.
        up: spreading those over the keys.
    """

    dense: int
    core: int
    predictor: int = 0
    up: int = 0


class KeepAll(BlockMethod):
    """Removes nothing: what the blocks run where no method acts between them."""

    metric, insert, order = "hidden", "between", "raster"

    def num_removed(self, layer: int, mergeable: int, embedded: int | None = None) -> int:
        """None."""
        return 0

    def has_bias(self) -> bool:
        """There are no sizes."""
        return False

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        """Nothing is matched."""
        return 0
