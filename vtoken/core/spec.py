"""Plain data: a host's measures, token counts per layer, what an image costs in tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostSpec:
    """What a method may know of a host.

    Args:
        name: class name of the model, for messages.
        depth: number of blocks L.
        width: channels C.
        num_heads: attention heads H of the first block.
        head_dim: channels per head D.
        num_prefix: class, register and distillation tokens P.
        grid: patch rows and columns at the model's own image size.
        pooling: the model's own word for its pooling ("token", "avg", "map", ...).
        position: "absolute" or "rotary".
        fixed_size: whether the model takes images of one size only.
        class_token: whether the first prefix token is a class token.
    """

    name: str
    depth: int
    width: int
    num_heads: int
    head_dim: int
    num_prefix: int
    grid: tuple[int, int]
    pooling: str
    position: str
    fixed_size: bool = True
    class_token: bool = True


@dataclass(frozen=True)
class ImageTokens:
    """One image on its way to a language model.

    Args:
        crops: images that the tower sees for it, at its own size.
        rows: tokens of one of them that go through the projector.
        full: tokens of all, newlines included, without pruning of the prompt.
        kept: tokens with it; newlines that depend on the image all count.
        exact: whether `kept` is the same for every image.
    """

    crops: int
    rows: int
    full: int
    kept: int
    exact: bool = True


@dataclass(frozen=True)
class Plan:
    """How many tokens enter and leave every block.

    Args:
        tokens: T before block 0 and after every block, prefix tokens included; length L + 1.
        num_prefix: class, register and distillation tokens among them.
        exact: False if the counts are upper bounds that depend on the image.
    """

    tokens: tuple[int, ...]
    num_prefix: int
    exact: bool = True

    @property
    def removed(self) -> tuple[int, ...]:
        """Tokens that each block removes, r per layer."""
        return tuple(a - b for a, b in zip(self.tokens, self.tokens[1:], strict=False))

    def __str__(self) -> str:
        rows = [f"{'layer':>5} {'in':>6} {'removed':>8} {'out':>6}"]
        for layer, r in enumerate(self.removed):
            rows.append(f"{layer:>5} {self.tokens[layer]:>6} {r:>8} {self.tokens[layer + 1]:>6}")
        return "\n".join(rows)
