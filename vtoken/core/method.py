"""What a host may ask of a method. A method never sees a model; a host never sees which method it serves."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vtoken.core.state import Slot


class Method:
    """A method built for one depth from its settings; immutable, so any number of forwards may share it."""

    #: Where it acts: "on_tokens", "on_attention", "on_block" or "on_features". One method per hook.
    hook: ClassVar[str] = ""


class BlockMethod(Method):
    """A method that removes tokens inside the blocks .

    Args:
        metric: what tokens are compared by: "key", "key_concat" or "hidden".
        insert: "between" attention and MLP, or "after" both.
        order: "raster" (features leave the model ordered by position) or "internal".
    """

    hook: ClassVar[str] = "on_block"
    metric: str
    insert: str
    order: str

    def check_patches(self, num_patches: int) -> None:
        """Raise ConfigError if the settings name patches that a grid of `num_patches` does not have."""

    def num_removed(self, layer: int, mergeable: int) -> int:
        """How many of `mergeable` non-prefix tokens block `layer` removes; needs no data."""
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

    def describe(self, layer: int) -> dict[str, Any]:
        """The settings that block `layer` runs with."""
        raise NotImplementedError


class FeatureMethod(Method):
    """A method that takes image features away between the tower and the language model.

    Args:
        ensemble: how the scores of several blocks become one.
        positions: "compact" (text and kept tokens are renumbered) or "original" (they keep their places).
        newline: which newlines of a detail grid stay, "row" (by content), "all" or "none".
    """

    hook: ClassVar[str] = "on_features"
    ensemble: str
    positions: str
    newline: str

    def scorer(self, has_class: bool) -> str:
        """ "cls" or "received", for a tower with or without a class token; raises ConfigError if it must be "cls"."""
        raise NotImplementedError

    def layers(self, last: int, scorer: str) -> range:
        """Blocks whose attention is read when block `last` makes the features; raises ConfigError if there is none."""
        raise NotImplementedError

    def num_kept(self, num_tokens: int) -> int:
        """How many of the `num_tokens` patch tokens of one image or crop stay; needs no data."""
        raise NotImplementedError

    def choose(self, scores: Tensor, num_tokens: int) -> Tensor:
        """Ascending indices of what stays of one image.

        Args:
            scores: of its features [n]: first `num_tokens` of the image or of its overview crop, then those of the
                detail grid, row by row; -1 marks a newline.
        """
        raise NotImplementedError

    def most(self, scores: Tensor, num_tokens: int) -> int:
        """How many `choose` keeps at most, whatever the scores are; only their -1 are read."""
        raise NotImplementedError


class KeepAll(BlockMethod):
    """Removes nothing: what the blocks run where no method acts between them."""

    metric, insert, order = "hidden", "between", "raster"

    def num_removed(self, layer: int, mergeable: int) -> int:
        """None."""
        return 0

    def has_bias(self) -> bool:
        """There are no sizes."""
        return False

    def matching_macs(self, layer: int, mergeable: int, head_dim: int, width: int) -> int:
        """Nothing is matched."""
        return 0
