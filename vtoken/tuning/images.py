"""Images as users bring them, as one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import InputError, ShapeError

_FORMS = "a tensor [N, C, H, W], or batches of it: a list, or a DataLoader (its labels are left alone)"


def gathered(images: Any, limit: int) -> Tensor:
    """The first `limit` images as one tensor [N, C, H, W]; no more batches are asked for than that takes.

    Args:
        images: a tensor, or what gives batches: tensors, pairs whose first entry is one, or mappings with
            "pixel_values".

    Raises:
        InputError, ShapeError: for anything else.
    """
    if isinstance(images, Tensor):
        return _checked(images)[:limit]
    if isinstance(images, (str, Mapping)) or not isinstance(images, Iterable):
        raise InputError(f"tune(images=...): expected {_FORMS}; got {type(images).__name__}")
    found: list[Tensor] = []
    for batch in images:
        found.append(_checked(_pixels(batch)))
        if found[-1].shape[1:] != found[0].shape[1:]:
            raise ShapeError(
                f"tune: images of one size are needed, got {tuple(found[0].shape[1:])} and {tuple(found[-1].shape[1:])}"
            )
        if sum(map(len, found)) >= limit:
            break
    if not found:
        raise InputError(f"tune(images=...) gave no batch; expected {_FORMS}")
    return torch.cat(found)[:limit]


def _pixels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("pixel_values")
    return batch[0] if isinstance(batch, (list, tuple)) and batch else batch


def _checked(images: Any) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"tune(images=...): expected {_FORMS}, of floating point; got {kind}")
    if images.dim() != 4 or not len(images):
        raise ShapeError(f"tune(images=...): expected {_FORMS}; got shape {tuple(images.shape)}")
    return images
