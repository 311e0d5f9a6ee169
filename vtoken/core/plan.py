"""Token counts per layer, known before any pixel is seen."""

from __future__ import annotations

from dataclasses import dataclass

from vtoken.core.method import BlockMethod


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


def count_tokens(method: BlockMethod, depth: int, num_tokens: int, num_prefix: int) -> Plan:
    """The plan of `method` for `num_tokens` embedded tokens (prefix included)."""
    tokens, embedded = [num_tokens], num_tokens - num_prefix
    for layer in range(depth):
        tokens.append(tokens[-1] - method.num_removed(layer, tokens[-1] - num_prefix, embedded))
    return Plan(tuple(tokens), num_prefix)
