"""Crops for attentive-mask training: several views, one larger crop around them for the teacher, and their boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vtoken.core.errors import ConfigError

Box = tuple[int, int, int, int]


class MultiViewCrop:
    """Cuts an image into random views and a teacher's crop that contains all of them.

    Args:
        size: height and width of the views in pixels, or one number for both.
        views: how many, V.
        scale: range of the share of the image's area that a view covers.
        ratio: range of its aspect ratio, width to height.
        teacher_size: as `size`, of the teacher's crop; None: the same.
        student_transform, teacher_transform: applied to each crop, for example colour jitter; they must not move
            pixels: a flip belongs before this transform, where it turns views and teacher alike.

    Returns of a call, for a PIL image or a tensor [3, H, W]:
        dict(views=list of V tensors, teacher=tensor, view_boxes=[V, 4], teacher_box=[4]); boxes are (top, left, height,
        width) in pixels of the image, int64. PIL images become float tensors in [0, 1] after their transform. The
        random numbers are torch's global ones, so that the workers of a DataLoader differ.

    Raises:
        ConfigError: for values out of range.
        ImportError: without torchvision.

    Source: arXiv 2212.08653; the teacher's crop always contains the views, which the released code does not ensure.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        views: int = 2,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        teacher_size: int | tuple[int, int] | None = None,
        student_transform: Callable[[Any], Any] | None = None,
        teacher_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if views < 1:
            raise ConfigError(f"views={views} must be at least 1")
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"scale={scale} must be a range in (0, 1] and ratio={ratio} a range of positive numbers")
        self.size = _pair(size)
        self.views = views
        self.scale = scale
        self.ratio = ratio
        self.teacher_size = self.size if teacher_size is None else _pair(teacher_size)
        self.student_transform = student_transform
        self.teacher_transform = teacher_transform

    def __call__(self, image: Any) -> dict[str, Any]:
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.functional import get_dimensions

        _, height, width = get_dimensions(image)
        boxes = [RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio)) for _ in range(self.views)]
        around = teacher_box(boxes, height, width)
        return {
            "views": [_crop(image, box, self.size, self.student_transform) for box in boxes],
            "teacher": _crop(image, around, self.teacher_size, self.teacher_transform),
            "view_boxes": torch.tensor(boxes),
            "teacher_box": torch.tensor(around),
        }


def teacher_box(boxes: Sequence[Box], height: int, width: int) -> Box:
    """The bounding box of all boxes with each side moved outwards by a uniform number of pixels, up to the border."""
    top, left = _up_to(min(b[0] for b in boxes)), _up_to(min(b[1] for b in boxes))
    bottom = height - _up_to(height - max(b[0] + b[2] for b in boxes))
    right = width - _up_to(width - max(b[1] + b[3] for b in boxes))
    return top, left, bottom - top, right - left


def _up_to(last: int) -> int:
    return int(torch.randint(last + 1, ()))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, Integral) and side >= 1 for side in sides):
        raise ConfigError(f"size={size!r} must be positive: pixels of both sides, or (height, width)")
    return int(sides[0]), int(sides[1])


def _crop(image: Any, box: Box, size: tuple[int, int], transform: Callable[[Any], Any] | None) -> Tensor:
    from torchvision.transforms.functional import resized_crop, to_tensor

    crop = resized_crop(image, *box, list(size), antialias=True)
    crop = crop if transform is None else transform(crop)
    return crop if isinstance(crop, Tensor) else to_tensor(crop)
