"""Whether settings of `AttentiveMasks`, and what one call brings, fit a tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.methods.attentive_clip.mapping import check_boxes

Image = Tensor | Sequence[Tensor]


def chosen_layers(layers: str | tuple[int, ...], depth: int, pool_query: bool) -> tuple[int, ...]:
    """Block indices, ascending, of what the setting names in a tower of `depth` blocks.

    Args:
        pool_query: whether only the pool behind the blocks, which counts as block `depth`, has a class query.

    Raises:
        ConfigError: for blocks that the tower does not have, or that have no class query.
    """
    if pool_query:
        if not isinstance(layers, str):
            raise ConfigError(
                f"layers={list(layers)}: this tower has no class token, so the query of its attention pool says what "
                'matters, not its blocks; leave layers at "all"'
            )
        return (depth,)
    if isinstance(layers, str):
        return tuple(range(depth)) if layers == "all" else (depth - 1,)
    if any(not -depth <= index < depth for index in layers):
        raise ConfigError(f"layers={list(layers)} must name blocks of a tower that has {-depth} to {depth - 1}")
    return tuple(sorted({index % depth for index in layers}))


def check_scale(scale: float, size: tuple[int, int] | None, patch_size: tuple[int, int]) -> None:
    """Raise ConfigError unless `teacher_scale` shrinks images of `size` (None: of any) to a whole number of patches."""
    seen = size if size is None else tuple(round(side * scale) for side in size)
    if seen != size and seen and any(side < 1 or side % patch for side, patch in zip(seen, patch_size, strict=True)):
        raise ConfigError(
            f"teacher_scale={scale} makes images of {seen} pixels for the teacher; both sides must be multiples of the "
            f"patch size {patch_size}"
        )


def single(image: Image | None) -> Tensor | None:
    """The one image batch of a call that masks nothing.

    Raises:
        InputError: for several views.
    """
    if image is None or isinstance(image, Tensor):
        return image
    if len(image) != 1:
        raise InputError(f"{len(image)} views in eval mode, where nothing is masked; give one tensor [B, 3, H, W]")
    return image[0]


def check_views(views: Sequence[Tensor], size: tuple[int, int] | None, patch_size: tuple[int, int]) -> None:
    """Raise ShapeError unless all views are [B, 3, H, W] of one shape, and of the size that the tower takes.

    Args:
        size: None if it takes any whole number of patches.
    """
    if not views or any(x.dim() != 4 or x.shape != views[0].shape for x in views):
        raise ShapeError(f"expected views [B, 3, H, W] of one shape, got {[tuple(x.shape) for x in views]}")
    if size is not None and tuple(views[0].shape[2:]) != size:
        raise ShapeError(f"views are {tuple(views[0].shape[2:])} pixels, the image tower takes {size}")
    if size is None and any(side % patch for side, patch in zip(views[0].shape[2:], patch_size, strict=True)):
        raise ShapeError(f"views are {tuple(views[0].shape[2:])} pixels; both sides must be multiples of {patch_size}")


def check_teacher(
    views: Sequence[Tensor], teacher_image: Tensor | None, view_boxes: Tensor | None, teacher_boxes: Tensor | None
) -> None:
    """Raise unless the teacher's image and the boxes fit the views."""
    batch = views[0].shape[0]
    check_boxes(view_boxes, teacher_boxes, batch, len(views))
    if teacher_image is None:
        return
    if teacher_image.dim() != 4 or teacher_image.shape[0] != batch:
        raise ShapeError(f"expected teacher_image [{batch}, 3, H, W], got {tuple(teacher_image.shape)}")
    if view_boxes is None and teacher_image.shape[2:] != views[0].shape[2:]:
        raise ShapeError(
            f"views of {tuple(views[0].shape[2:])} pixels and a teacher_image of {tuple(teacher_image.shape[2:])} "
            "cannot be the same crop: give view_boxes and teacher_boxes (MultiViewCrop makes them)"
        )
