"""How much a model's output changes under a setting: of its own outputs on images, or as a user's function scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.apply import applied
from vtoken.core.config import MethodConfig
from vtoken.core.host import host_of
from vtoken.core.trace import tracing
from vtoken.errors import ConfigError, InputError, VTokenError


class OutputChange:
    """The squared change of the model's outputs in parts of their squares, for every image, the mean over outputs.

    Outputs are the tensors that have the same shape whatever merges: logits, pooled features, embeddings, dense maps.
    Rows of tokens are none.

    Args:
        model: carries no method; in eval mode.
        images: [N, C, H, W], on its device.
        batch: how many images run at once.
        most: the setting that removes the most.

    Raises:
        ConfigError: if the model has no such output. InputError: if one is not finite.
    """

    def __init__(self, model: nn.Module, images: Tensor, batch: int, most: MethodConfig) -> None:
        self.model, self.images, self.batch = model, images, batch
        self._run = host_of(model).adapter.run_image
        full, least = self._outputs(images[:1]), self._outputs(images[:1], most)
        self._names = [name for name, value in full.items() if name in least and value.shape == least[name].shape]
        if not self._names:
            shapes = ", ".join(f"{name or 'output'} {tuple(value.shape)}" for name, value in full.items())
            raise ConfigError(
                f"tune cannot compare the outputs of this {type(model).__name__}: their shapes follow the tokens "
                f"({shapes}). Give a function instead of images: it is called with the model and returns a score, "
                "higher is better"
            )
        self._full = self._outputs(images)
        if not all(bool(self._full[name].isfinite().all()) for name in self._names):
            raise InputError("tune: the model's output on these images is not finite, there is nothing to compare with")

    def __call__(self, config: MethodConfig, rows: Tensor | None = None) -> Tensor:
        """The change of every image, [N] float64, or of those of `rows`."""
        images = self.images if rows is None else self.images[rows]
        found, total = self._outputs(images, config), torch.zeros(len(images), dtype=torch.float64)
        for name in self._names:
            full = self._full[name] if rows is None else self._full[name][rows]
            moved = (found[name] - full).flatten(1).square().sum(1)
            total += moved / full.flatten(1).square().sum(1).clamp(min=1e-30)
        return total / len(self._names)

    @torch.inference_mode()
    def _outputs(self, images: Tensor, config: MethodConfig | None = None) -> dict[str, Tensor]:
        """Floating tensors with a row an image, by their place in the output, float64 on the CPU."""
        if config is not None:
            with applied(self.model, config):
                return self._outputs(images)
        parts = [dict(_tensors(self._run(self.model, part), len(part))) for part in images.split(self.batch)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class ScoreChange:
    """What a setting takes from a user's score.

    Args:
        model: carries no method; in eval mode.
        score: called with the model, as a setting has patched it; returns a number, higher is better.

    Raises:
        InputError: if it returns no finite number. VTokenError: if it does not run the model it is given.
    """

    def __init__(self, model: nn.Module, score: Callable[[Any], Any], most: MethodConfig) -> None:
        self.model, self._score = model, score
        self._full = self._number()
        with applied(model, most):
            try:
                with tracing(model):
                    self._number()
            except VTokenError as error:
                if "nothing was recorded" not in str(error):
                    raise
                raise VTokenError(
                    "tune: the function did not run the model that it was called with, so that no setting can change "
                    "its score; take the model from its argument"
                ) from error

    def __call__(self, config: MethodConfig, rows: Tensor | None = None) -> Tensor:
        """The score without the method less that with it, [1] float64."""
        with applied(self.model, config):
            return torch.tensor([self._full - self._number()], dtype=torch.float64)

    @torch.no_grad()
    def _number(self) -> float:
        value = self._score(self.model)
        try:
            found = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"tune: the function must return one number, higher is better; it returned a {type(value).__name__}"
            ) from error
        if not abs(found) < float("inf"):
            raise InputError(f"tune: the function must return a finite number, it returned {found}")
        return found


def _tensors(output: Any, batch: int, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim() and len(output) == batch:
            yield place, output.double().cpu()
    elif isinstance(output, Mapping):
        for name, value in output.items():
            yield from _tensors(value, batch, f"{place}.{name}".strip("."))
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from _tensors(value, batch, f"{place}[{i}]")
