"""Crops for attentive-mask training: several views, one larger crop around them for the teacher, and their boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError, ShapeError

Box = tuple[int, int, int, int]
_OWNER = "MultiViewCrop"


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

    Returns of a call, for a PIL image of any mode or a tensor [3, H, W]:
        dict(views=list of V tensors, teacher=tensor, view_boxes=[V, 4], teacher_box=[4]); boxes are (top, left, height,
        width) in pixels of the image, int64. PIL images are made RGB first, by Pillow's own rules as open_clip does
        (transparency is dropped; values of 16-bit and float pictures above 255 are cut off there, so scale those
        yourself), and become float tensors in [0, 1] after their transform. Tensors keep their dtype. The random
        numbers are torch's global ones, so that the workers of a DataLoader differ.

    Raises:
        ConfigError: for values out of range.
        ShapeError: in a call, for a tensor that is not [3, H, W] or has no pixels.
        InputError: in a call, for anything else that is no picture, or a mode that Pillow cannot make RGB.
        ImportError: without torchvision.

    Example:
        >>> import torch, vtoken
        >>> batch = vtoken.MultiViewCrop(64)(torch.rand(3, 80, 100))
        >>> len(batch["views"]), batch["views"][0].shape
        (2, torch.Size([3, 64, 64]))

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
        self.views = checks.whole(_OWNER, "views", views, 1)
        self.scale = _range("scale", scale, most=1)
        self.ratio = _range("ratio", ratio)
        for name, transform in (("student_transform", student_transform), ("teacher_transform", teacher_transform)):
            if transform is not None and not callable(transform):
                raise ConfigError(f"{name}={transform!r} must be something to call with a crop, or None")
        self.size = _sides("size", size)
        self.teacher_size = self.size if teacher_size is None else _sides("teacher_size", teacher_size)
        self.student_transform = student_transform
        self.teacher_transform = teacher_transform

    def __call__(self, image: Any) -> dict[str, Any]:
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.functional import get_dimensions

        image = _picture(image)
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


def _picture(image: Any) -> Any:
    """A PIL image made RGB, or the tensor [3, H, W] that it is."""
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ShapeError(f"MultiViewCrop takes one image [3, H, W] at a time, got a tensor {tuple(image.shape)}")
        return image
    if not hasattr(image, "convert"):
        raise InputError(
            f"MultiViewCrop takes a PIL image or a tensor [3, H, W], got {type(image).__module__}."
            f"{type(image).__qualname__}; PIL.Image.fromarray makes a picture of an array [H, W, 3]"
        )
    if 0 in image.size:
        raise ShapeError(f"MultiViewCrop got a picture of {image.size[0]} x {image.size[1]} pixels")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"Pillow cannot make a picture of mode {image.mode!r} RGB: {error}") from error


def _range(name: str, value: Any, most: float | None = None) -> tuple[float, float]:
    """The ends of a range of positive numbers."""
    ends = [checks.number(_OWNER, name, end, above=0, most=most) for end in checks.several(value) or ()]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise ConfigError(f"{_OWNER}({name}={value!r}): must be a range, its smallest and its largest number")
    return ends[0], ends[1]


def _up_to(last: int) -> int:
    return int(torch.randint(last + 1, ()))


def _sides(name: str, value: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    sides = [checks.whole(_OWNER, name, side, 1) for side in checks.several(value) or (value, value)]
    if len(sides) != 2:
        raise ConfigError(f"{_OWNER}({name}={value!r}): must be pixels of both sides, or (height, width)")
    return sides[0], sides[1]


def _crop(image: Any, box: Box, size: tuple[int, int], transform: Callable[[Any], Any] | None) -> Tensor:
    from torchvision.transforms.functional import resized_crop, to_tensor

    crop = resized_crop(image, *box, list(size), antialias=True)
    crop = crop if transform is None else transform(crop)
    return crop if isinstance(crop, Tensor) else to_tensor(crop)
