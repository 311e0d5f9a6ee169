"""How relevant every frame is to a clue: what a scorer is, and the two that need no model (docs/methods/quota.md 5)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vtoken.errors import InputError
from vtoken.video.decouple import Clue


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores frames; the library's own and yours."""

    def score(self, frames: Sequence[Any], clue: Clue) -> Tensor:
        """Relevance of every frame to the clue.

        Args:
            frames: T pillow images, arrays [h, w, 3] or tensors [3, h, w] (`vtoken.video.to_image` reads all of them).
            clue: what to look for.

        Returns:
            Float32 [T] on the CPU, finite, at least 0; any scale.
        """
        ...


def scoring_flops(scorer: Scorer, frames: Sequence[Any], clue: Clue) -> int | None:
    """FLOPs of scoring these frames, by the scorer's own method `flops(frames, clue)`; None if it does not tell.

    Example:
        >>> import vtoken
        >>> clue = vtoken.video.IdentityDecoupler().decouple("Where?")
        >>> vtoken.video.scoring_flops(vtoken.video.UniformScorer(), ["frame"], clue)
        0
    """
    count = getattr(scorer, "flops", None)
    found: int | None = None if count is None else count(frames, clue)
    return found


def score_frames(scorer: Scorer, frames: Sequence[Any], clue: Clue) -> Tensor:
    """The scores of a scorer, checked.

    Raises:
        InputError: if there is not one score per frame, or one is negative or not finite.

    Example:
        >>> import vtoken
        >>> clue = vtoken.video.IdentityDecoupler().decouple("Where?")
        >>> vtoken.video.score_frames(vtoken.video.UniformScorer(), ["frame"] * 3, clue)
        tensor([0.5000, 0.5000, 0.5000])
    """
    return checked(scorer.score(frames, clue), len(frames), type(scorer).__name__)


def checked(scores: Any, num_frames: int, source: str) -> Tensor:
    """Scores as float32 [T] on the CPU, or an InputError that says what is wrong with those from `source`."""
    found = torch.as_tensor(scores).detach().cpu().to(torch.float32)
    if found.is_inference():  # not to be handed on: autograd cannot save it
        found = found.clone()
    if tuple(found.shape) != (num_frames,):
        raise InputError(
            f"{source} gave scores of shape {tuple(found.shape)} for {num_frames} frames; expected one each"
        )
    wrong = ((~found.isfinite()) | (found < 0)).nonzero().flatten()
    if wrong.numel():
        at = int(wrong[0])
        raise InputError(
            f"{source} gave {float(found[at])} for frame {at} ({wrong.numel()} such of {num_frames}); scores must be "
            "finite and at least 0"
        )
    return found


class PrecomputedScorer:
    """Scores that are known already, for these frames in this order, whatever is asked.

    Raises:
        InputError: if they are not numbers [T], finite and at least 0; from `score`, if there is not one per frame.

    Example:
        >>> import vtoken
        >>> clue = vtoken.video.IdentityDecoupler().decouple("Where?")
        >>> vtoken.video.PrecomputedScorer([0.5, 1.0]).score(["frame", "frame"], clue)
        tensor([0.5000, 1.0000])
    """

    def __init__(self, scores: Sequence[float] | Tensor) -> None:
        try:
            count = len(scores)
            checked(scores, count, "PrecomputedScorer")
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"PrecomputedScorer({scores!r}): must be one number per frame: {error}") from None
        self.scores = scores

    def score(self, frames: Sequence[Any], clue: Clue) -> Tensor:
        """The scores."""
        return checked(self.scores, len(frames), "PrecomputedScorer")

    def flops(self, frames: Sequence[Any], clue: Clue) -> int:
        """None are spent."""
        return 0


class UniformScorer:
    """0.5 for every frame: the budget is spread evenly.

    Example:
        >>> import vtoken
        >>> vtoken.video.UniformScorer().score(["frame", "frame"], vtoken.video.IdentityDecoupler().decouple("Where?"))
        tensor([0.5000, 0.5000])
    """

    def score(self, frames: Sequence[Any], clue: Clue) -> Tensor:
        """0.5 each."""
        return torch.full((len(frames),), 0.5)

    def flops(self, frames: Sequence[Any], clue: Clue) -> int:
        """None are spent."""
        return 0


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode without gradients; the train or eval flag of every part is put back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules() if module.training]
    try:
        for module, _ in flags:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
