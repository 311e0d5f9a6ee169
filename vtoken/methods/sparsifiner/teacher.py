"""The frozen dense model that a sparse student learns from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vtoken.core.apply import is_applied, remove
from vtoken.core.host import HostAdapter, find_adapter


@dataclass(frozen=True, eq=False)
class TeacherOutput:
    """Logits [B, classes] and patch tokens after the final norm [B, N, C], without gradient."""

    logits: Tensor
    tokens: Tensor


def logits_and_tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the losses of the second phase compare, of a student or a teacher, by one forward.

    Args:
        model: a timm model, or an image classifier of transformers; patched or not.
        images: [B, C, H, W].

    Returns:
        Logits [B, classes], and patch tokens behind the final norm [B, N, C], in raster order, with gradient.

    Raises:
        UnsupportedModelError: if it is no classifier that vtoken knows.

    Example:
        >>> import timm, torch, vtoken
        >>> student = vtoken.apply(timm.create_model("test_vit"), vtoken.Sparsifiner())
        >>> logits, tokens = vtoken.train.logits_and_tokens(student, torch.randn(1, 3, 160, 160))
        >>> logits.shape, tokens.shape
        (torch.Size([1, 1000]), torch.Size([1, 100, 64]))
    """
    if _is_timms(model):
        features = model.forward_features(images)
        return model.forward_head(features), features[:, model.num_prefix_tokens :]
    return find_adapter(model).logits_and_tokens(model, images)


def _is_timms(model: Any) -> bool:
    """Whether it has what timm's classifiers have."""
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_prefix_tokens"))


class Teacher(nn.Module):
    """A frozen copy of a model without any method, always in eval mode.

    Args:
        model: the model that the student is made from, patched or not; it is not changed. One that
            `logits_and_tokens` takes; for another one make `TeacherOutput` yourself.

    Raises:
        UnsupportedModelError: if it is none.

    Example:
        >>> import timm, torch, vtoken
        >>> teacher = vtoken.train.Teacher(timm.create_model("test_vit"))
        >>> out = teacher(torch.randn(1, 3, 160, 160))
        >>> out.logits.shape, out.tokens.shape
        (torch.Size([1, 1000]), torch.Size([1, 100, 64]))
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        adapter = None if _is_timms(model) else find_adapter(model)
        if adapter is not None and type(adapter).logits_and_tokens is HostAdapter.logits_and_tokens:
            adapter.logits_and_tokens(model, None)  # says what it takes
        self.model: Any = copy.deepcopy(model)
        if is_applied(self.model):
            remove(self.model)
        self.model.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a teacher with dropout would be another teacher in every step."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """What the student is held to, for images [B, C, H, W]."""
        return TeacherOutput(*logits_and_tokens(self.model, images))
