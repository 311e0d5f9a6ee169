"""What schedules cost, as `vtoken.report` counts it, without a report for each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from vtoken.accounting.report import LayerCost, Report, report
from vtoken.core.host import host_of
from vtoken.methods.merging.base import ScheduledMergeConfig
from vtoken.methods.merging.schedule import chosen_layers


class Costs:
    """Multiply-adds of one method on one model and image size, by the tokens that each block removes.

    The products of a block are a quadratic of the tokens in its attention and of those in its MLP. The coefficients
    come out of a few reports; what choosing costs the method tells itself.

    Args:
        model: carries no method.
        config: settings of the method; their ratio or r does not matter.
        size: channels, height, width of one image.
    """

    def __init__(self, model: nn.Module, config: ScheduledMergeConfig, size: tuple[int, int, int]) -> None:
        self.config, self.size, self._model = config, size, model
        self.spec = host_of(model).spec
        self.layers = sorted(chosen_layers(type(config).__name__, config.layers, self.spec.depth))
        self._channels = self.spec.head_dim if config.metric == "key" else self.spec.width
        depth = self.spec.depth
        probes = [self.report(config.replace(ratio=ratio)) for ratio in (0.9, 0.7, 0.5)]
        probes += [self.report(config.replace(r=(pattern * depth)[:depth])) for pattern in ([1], [3, 0, 1])]
        self.before, self.embedded = probes[0].macs_before, probes[0].tokens[0]
        self._weights = [self._fitted([probe.layers[layer] for probe in probes]) for layer in range(depth)]
        least = probes[2]
        gone, saved = self.embedded - least.tokens[-1], least.other_macs_before - least.other_macs_after
        self._other, self._per_token = least.other_macs_before, saved / gone if gone else 0.0

    def report(self, config: ScheduledMergeConfig) -> Report:
        """What these settings cost, counted."""
        return report(self._model, config, input_size=self.size)

    def most(self, tokens: int) -> int:
        """How many of `tokens`, prefix included, a block can remove."""
        mergeable = tokens - self.spec.num_prefix
        return self.config.removed(mergeable, mergeable)

    def removed(self, config: ScheduledMergeConfig) -> list[int]:
        """Tokens that each block removes under these settings."""
        amounts, tokens, found = config.amounts(self.spec.depth), self.embedded, []
        for layer, amount in enumerate(amounts):
            found.append(config.removed(amount, tokens - self.spec.num_prefix) if layer in self.layers else 0)
            tokens -= found[-1]
        return found

    def block(self, layer: int, tokens: int, removed: int) -> int:
        """Multiply-adds of block `layer` into which `tokens` go, what lies outside all blocks counted to the last."""
        own = sum(w * term for w, term in zip(self._weights[layer], _terms(tokens, tokens - removed), strict=True))
        if layer == self.spec.depth - 1:
            own += self._other - self._per_token * (self.embedded - tokens + removed)
        return round(own) + self._choosing(layer, tokens, removed)

    def of(self, removed: Sequence[int]) -> int:
        """Multiply-adds of the model where its blocks remove so many tokens."""
        tokens = itertools.accumulate(removed, lambda t, r: t - r, initial=self.embedded)
        return sum(self.block(layer, t, r) for layer, (t, r) in enumerate(zip(tokens, removed, strict=False)))

    def _fitted(self, counted: Sequence[LayerCost]) -> list[float]:
        """Coefficients of one block's products, from its costs in several reports."""
        pairs = [(c.tokens_in, c.tokens_out, c.macs_after) for c in counted]
        rows = [_terms(t, left) for t, left, _ in pairs] + [_terms(self.embedded, self.embedded)]
        found = [macs - self._choosing(counted[0].layer, t, t - left) for t, left, macs in pairs]
        terms = torch.tensor(rows, dtype=torch.float64)
        values = torch.tensor([*found, counted[0].macs_before], dtype=torch.float64)
        scale = terms.amax(0)
        return [float(w) for w in torch.linalg.lstsq(terms / scale, values[:, None]).solution[:, 0] / scale]

    def _choosing(self, layer: int, tokens: int, removed: int) -> int:
        """Multiply-adds that the method spends on choosing."""
        mergeable, depth = tokens - self.spec.num_prefix, self.spec.depth
        return self.config.macs(layer, depth, mergeable, removed, self._channels) if removed else 0


def _terms(tokens: int, left: int) -> list[int]:
    return [1, tokens, tokens * tokens, left]
