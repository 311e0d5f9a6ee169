"""Plain data: a host's measures, token counts per layer, what an image costs in tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vtoken.errors import ConfigError


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
        tokens: T before block 0 and after every block, prefix tokens included; length L + 1. The most that there can
            be where the images decide.
        num_prefix: class, register and distillation tokens among them.
        exact: False if the images decide how many tokens are left: then counts lie between `least` and `tokens`.
        least: the fewest tokens that can be left, length L + 1; `tokens` again if counts are exact.
    """

    tokens: tuple[int, ...]
    num_prefix: int
    exact: bool = True
    least: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.least:
            object.__setattr__(self, "least", self.tokens)

    @property
    def removed(self) -> tuple[int, ...]:
        """Tokens that each block removes, r per layer; where the images decide, what it removes if all do the most."""
        return tuple(a - b for a, b in zip(self.least, self.least[1:], strict=False))

    def settled(self, asked: str) -> tuple[int, ...]:
        """`tokens`, for who needs one number of them, which is called `asked` in the error.

        Raises:
            ConfigError: if the images decide.
        """
        if not self.exact:
            raise ConfigError(
                f"{asked} cannot be told before the images are seen: the method lets them decide, and {self.least[-1]} "
                f"to {self.tokens[-1]} tokens leave the last block. vtoken.plan gives both bounds of every block, "
                "vtoken.trace what a forward did"
            )
        return self.tokens

    def __str__(self) -> str:
        if not self.exact:
            return self._bounds()
        rows = [f"{'layer':>5} {'in':>6} {'removed':>8} {'out':>6}"]
        for layer, r in enumerate(self.removed):
            rows.append(f"{layer:>5} {self.tokens[layer]:>6} {r:>8} {self.tokens[layer + 1]:>6}")
        return "\n".join(rows)

    def _bounds(self) -> str:
        ends = zip(self.least, self.tokens, strict=True)
        between = [f"{low} to {high}" if low < high else f"{high}" for low, high in ends]
        rows = ["bounds: the images decide how many tokens are left", f"{'layer':>5} {'in':>12} {'out':>12}"]
        rows += [f"{i:>5} {a:>12} {b:>12}" for i, (a, b) in enumerate(itertools.pairwise(between))]
        return "\n".join(rows)


@dataclass(frozen=True)
class PatchSpec:
    """What a method that leaves out patches may know of a tower.

    Args:
        embed: name of the module that turns pixels into patch tokens.
        size: height and width of a patch in pixels.
        image_size: height and width of the images that the tower takes; None: any.
        features: width of the pooled features, before the projection.
        pool_query: whether there is no class token and an attention pool behind the blocks asks with a learned query. A
            `Watch` reads it as the block behind the last one.
    """

    embed: str
    size: tuple[int, int]
    image_size: tuple[int, int] | None
    features: int
    pool_query: bool = False


@dataclass(frozen=True)
class Pair:
    """Where a model that compares images with texts keeps its parts, by name.

    Args:
        tower: of the images; what `HostAdapter.patch_spec` and `masked` are given.
        text: the text tower; "" where it is no module of its own.
        projection: the module behind the image tower, "" where there is none or the tower holds it.
    """

    tower: str
    text: str = ""
    projection: str = ""

    @property
    def image_parts(self) -> tuple[str, ...]:
        """Names of all that makes image features."""
        return (self.tower, self.projection) if self.projection else (self.tower,)
