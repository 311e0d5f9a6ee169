"""The frozen dense model that a sparse student learns from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vtoken.core.apply import is_applied, remove
from vtoken.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class TeacherOutput:
    """Logits [B, classes] and patch tokens after the final norm [B, N, C], without gradient."""

    logits: Tensor
    tokens: Tensor


class Teacher(nn.Module):
    """A frozen copy of a timm model without any method, always in eval mode.

    Args:
        model: the model that the student is made from, patched or not; it is not changed.

    Raises:
        UnsupportedModelError: if it has no `forward_features` and `forward_head`.

    Example:
        >>> import timm, torch, vtoken
        >>> teacher = vtoken.train.Teacher(timm.create_model("test_vit"))
        >>> out = teacher(torch.randn(1, 3, 160, 160))
        >>> out.logits.shape, out.tokens.shape
        (torch.Size([1, 1000]), torch.Size([1, 100, 64]))
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_prefix_tokens")):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no forward_features and forward_head, as timm's models have; make "
                "TeacherOutput from your own frozen model instead"
            )
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
        features = self.model.forward_features(images)
        return TeacherOutput(self.model.forward_head(features), features[:, self.model.num_prefix_tokens :])
