"""What must hold before a time is worth printing: the patched model computes what it says."""

from __future__ import annotations

import copy
from typing import Any

import torch
from plain import plain_form
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import vtoken
from vtoken.accounting.shadow import shared_copy
from vtoken.core.config import MethodConfig
from vtoken.core.host import find_adapter
from vtoken.methods.merging.base import ScheduledMergeConfig

#: Relative RMS error allowed between the fast and the plain form of a model in float64.
TOLERANCE = 1e-6


class Checks:
    """Checks of one model.

    Three of them, for every setting:
    no-op: with a setting that removes nothing, the outputs are bit-equal to the untouched model's (where the model
        itself repeats its bits; else within its own scatter), for the very batch that is timed;
    tokens: a forward of that batch leaves as many tokens as `vtoken.plan` says, and no patch is lost;
    plain: in float64 the model agrees with its plain form (`Plain`) run with explicit softmax attention, on one image;
        for PiToMe and ToMe with default settings on models with absolute positions.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.adapter = find_adapter(model)
        self._agreements: dict[MethodConfig, str | None] = {}

    def problem(self, config: MethodConfig, images: Tensor) -> str | None:
        """The first check that fails for images [B, C, H, W], in words; None if all pass."""
        if config not in self._agreements:
            self._agreements[config] = self._plain(config, images[:1])
        return self._no_op(config, images) or self._tokens(config, images) or self._agreements[config]

    def _run(self, model: Any, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            leaves = pytree.tree_leaves(self.adapter.run_image(model, images))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _no_op(self, config: MethodConfig, images: Tensor) -> str | None:
        nothing = {"ratio": 1.0} if isinstance(config, ScheduledMergeConfig) else {"layers": ()}
        stock = self._run(self.model, images)
        scatter = relative_error(stock, self._run(self.model, images))
        error = relative_error(stock, self._run(_patched(self.model, config.replace(**nothing)), images))
        if error > 2 * scatter:
            return f"no-op: with {nothing} the output is off by {error:.2g} (relative RMS), it must be bit-equal"
        return None

    def _tokens(self, config: MethodConfig, images: Tensor) -> str | None:
        network = _patched(self.model, config)
        with vtoken.tracing(network) as record:
            self._run(network, images)
        planned = list(vtoken.plan(self.model, config, img_size=(images.shape[2], images.shape[3])).tokens)
        if record.tokens != planned:
            return f"tokens: {record.tokens} in the model, {planned} in its plan"
        patches = record.size.sum(1)  # type: ignore[union-attr]
        if getattr(config, "reduction", "") != "prune" and not bool((patches == planned[0]).all()):
            return f"tokens: the rows left stand for {patches.tolist()} of {planned[0]} embedded ones"
        return None

    def _plain(self, config: MethodConfig, image: Tensor) -> str | None:
        plain = plain_form(config)
        if plain is None or self.adapter.spec(self.model).position != "absolute":
            return None
        double = copy.deepcopy(self.model).double()
        fast_model = _patched(double, config)
        with vtoken.tracing(fast_model) as record:
            fast = self._run(fast_model, image.double())
        with sdpa_kernel(SDPBackend.MATH):
            slow = self._run(_patched(double, plain), image.double())
        # Where the model hands out token rows, the plain form has one for every patch.
        error = relative_error(slow, [_spread(leaf, record) for leaf in fast])
        return None if error < TOLERANCE else f"plain: off by {error:.2g} (relative RMS) from the plain form in float64"


def relative_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest relative RMS error of any tensor; infinite if shapes differ or a value is not a number."""
    if [e.shape for e in expected] != [f.shape for f in found] or not expected:
        return float("inf")
    errors = [0.0]
    for ref, got in zip(expected, found, strict=True):
        scale = ref.double().square().mean().sqrt().clamp_min(1e-30)
        errors.append(float((got.double() - ref.double()).square().mean().sqrt() / scale))
    return float("inf") if any(e != e for e in errors) else max(errors)


def _spread(leaf: Tensor, record: vtoken.Trace) -> Tensor:
    is_rows = leaf.dim() == 3 and leaf.shape[1] == record.tokens[-1]
    return vtoken.unmerge(leaf, record) if is_rows else leaf


def _patched(model: Any, config: MethodConfig) -> Any:
    return vtoken.apply(shared_copy(model), config)
