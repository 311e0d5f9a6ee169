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
