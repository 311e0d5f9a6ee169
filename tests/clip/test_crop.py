"""Crops: the teacher's always contains the views, boxes say where they are, nothing is flipped."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import _convert_to_rgb
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import resized_crop

import vtoken
from tests.clip.models import batch, wrap
from tests.helpers import assert_same
from vtoken.methods.attentive_clip.crop import teacher_box


def coordinates(height: int, width: int) -> Tensor:
    """An image whose channels are row, column and nothing."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, torch.zeros_like(x)]).float()


@given(
    height=st.integers(1, 400), width=st.integers(1, 400), views=st.integers(1, 4), seed=st.integers(0, 2**31),
    low=st.floats(0.05, 1.0), teacher=st.sampled_from([None, 8, (12, 4)]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_teachers_crop_contains_every_view(
    height: int, width: int, views: int, seed: int, low: float, teacher: int | tuple[int, int] | None
) -> None:
    torch.manual_seed(seed)
    crop = vtoken.MultiViewCrop(8, views, scale=(low, 1.0), teacher_size=teacher)
    out = crop(torch.zeros(3, height, width))
    assert [x.shape for x in out["views"]] == [(3, 8, 8)] * views
    assert out["teacher"].shape[1:] == {None: (8, 8), 8: (8, 8), (12, 4): (12, 4)}[teacher]
    boxes, (top, left, tall, wide) = out["view_boxes"], out["teacher_box"].tolist()
    assert boxes.dtype == out["teacher_box"].dtype == torch.int64
    assert boxes.shape == (views, 4)
    assert 0 <= top <= int(boxes[:, 0].min())
    assert 0 <= left <= int(boxes[:, 1].min())
    assert int((boxes[:, 0] + boxes[:, 2]).max()) <= top + tall <= height
    assert int((boxes[:, 1] + boxes[:, 3]).max()) <= left + wide <= width
    assert bool((boxes[:, 2:] > 0).all())


def test_each_side_moves_uniformly_up_to_the_border() -> None:
    torch.manual_seed(0)
    found = np.array([teacher_box([(2, 3, 4, 5), (3, 2, 4, 4)], 10, 11) for _ in range(3000)])
    edges = np.stack([found[:, 0], found[:, 1], found[:, 0] + found[:, 2], found[:, 1] + found[:, 3]], 1)
    for side, allowed in enumerate(([0, 1, 2], [0, 1, 2], [7, 8, 9, 10], [8, 9, 10, 11])):
        values, counts = np.unique(edges[:, side], return_counts=True)
        assert values.tolist() == allowed
        assert abs(counts / 3000 - 1 / len(allowed)).max() < 0.05


@pytest.mark.parametrize("kind", ["tensor", "pil"])
def test_boxes_say_what_was_cut(kind: str) -> None:
    torch.manual_seed(3)
    image = coordinates(90, 120)
    source = image if kind == "tensor" else Image.fromarray(image.permute(1, 2, 0).byte().numpy())
    out = vtoken.MultiViewCrop((16, 24), teacher_size=32)(source)
    scale = 1 if kind == "tensor" else 255
    crops, boxes = [*out["views"], out["teacher"]], [*out["view_boxes"].tolist(), out["teacher_box"].tolist()]
    for crop, box in zip(crops, boxes, strict=True):
        assert crop.dtype == torch.float32
        assert torch.allclose(crop * scale, resized_crop(image, *box, crop.shape[1:], antialias=True), atol=1.0)
        middle = crop[:2].mean((1, 2)) * scale
        assert torch.allclose(middle, torch.tensor([box[0] + box[2] / 2, box[1] + box[3] / 2]) - 0.5, atol=1.0)
        assert bool((crop[0, -1] > crop[0, 0]).all()), "rows run down: not flipped"
        assert bool((crop[1, :, -1] > crop[1, :, 0]).all()), "columns run right: not flipped"


def test_transforms_and_pil_images() -> None:
    torch.manual_seed(0)
    image = Image.fromarray(np.full((40, 50, 3), 100, dtype=np.uint8))
    crop = vtoken.MultiViewCrop(8, 3, student_transform=ColorJitter(brightness=(2.0, 2.0)))
    out = crop(image)
    assert all(torch.allclose(x, torch.tensor(200 / 255)) for x in out["views"])
    assert torch.allclose(out["teacher"], torch.tensor(100 / 255))
    dark = vtoken.MultiViewCrop(8, 1, teacher_transform=lambda x: x.point(lambda v: v // 2))(image)
    assert torch.allclose(dark["teacher"], torch.tensor(50 / 255))
    assert torch.allclose(dark["views"][0], torch.tensor(100 / 255))


def photo(height: int = 40, width: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "LA",
    "PA",
    "I",
    "F",
    "I;16",
    "I;16B",
)


def in_mode(mode: str) -> Image.Image:
    source = photo() if mode not in ("I", "F", "I;16", "I;16B") else photo().convert("L")
    return source.convert("LA").convert("PA") if mode == "PA" else source.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_are_made_rgb_first(mode: str) -> None:
    """The crops of a picture and of what open_clip's transform makes of it are the same; transforms see RGB."""
    picture, seen = in_mode(mode), []
    assert picture.mode == mode
    crop = vtoken.MultiViewCrop(16, student_transform=lambda x: seen.append(x.mode) or x)
    found = []
    for source in (picture, _convert_to_rgb(picture)):
        torch.manual_seed(0)
        found.append(crop(source))
    assert_same("crops", *found)
    assert [x.shape for x in (*found[0]["views"], found[0]["teacher"])] == [(3, 16, 16)] * 3
    assert set(seen) == {"RGB"}
    assert picture.mode == mode
    default_collate([crop(picture), crop(photo())])


def test_a_palette_is_colours_not_indices(tmp_path: Path) -> None:
    """With its transparency too, from a file, where Pillow keeps the transparent colours beside the palette."""
    blue = Image.new("RGB", (20, 20), (0, 0, 255)).convert("P", palette=Image.Palette.ADAPTIVE)
    blue.save(tmp_path / "blue.png", transparency=bytes([0]))
    for picture in (blue, Image.open(tmp_path / "blue.png")):
        assert picture.mode == "P"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            teacher = vtoken.MultiViewCrop(8)(picture)["teacher"]
        assert teacher.flatten(1).mean(1).tolist() == [0.0, 0.0, 1.0]


def test_tensors_keep_their_dtype() -> None:
    for dtype in (torch.uint8, torch.float32, torch.float64, torch.bfloat16):
        assert vtoken.MultiViewCrop(8)(torch.ones(3, 20, 20, dtype=dtype))["teacher"].dtype == dtype


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [(np.zeros((20, 20, 3), np.uint8), vtoken.InputError, "numpy.ndarray.*Image.fromarray"),
     ("photo.png", vtoken.InputError, "builtins.str"), (None, vtoken.InputError, "NoneType"),
     ([torch.zeros(3, 8, 8)], vtoken.InputError, "builtins.list"),
     (torch.zeros(20, 20), vtoken.ShapeError, r"\(20, 20\)"),
     (torch.zeros(1, 20, 20), vtoken.ShapeError, r"\(1, 20, 20\)"),
     (torch.zeros(20, 20, 3), vtoken.ShapeError, r"\(20, 20, 3\)"),
     (torch.zeros(4, 20, 20), vtoken.ShapeError, "4, 20"),
     (torch.zeros(2, 3, 20, 20), vtoken.ShapeError, "one image"), (torch.zeros(3, 0, 20), vtoken.ShapeError, "3, 0"),
     (Image.new("RGB", (0, 4)), vtoken.ShapeError, "0 x 4 pixels")],
)  # fmt: skip
def test_what_is_no_picture_is_refused_by_name(image: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        vtoken.MultiViewCrop(8)(image)


def test_a_mode_that_pillow_cannot_make_rgb() -> None:
    with pytest.raises(vtoken.InputError, match="mode 'La' RGB"):
        vtoken.MultiViewCrop(8)(photo().convert("LA").convert("La"))


def test_batches_go_into_the_wrapper() -> None:
    """From a DataLoader with worker processes, collated, into a training forward."""
    torch.manual_seed(0)
    crop = vtoken.MultiViewCrop(32, teacher_size=64)
    crop = pickle.loads(pickle.dumps(crop))
    source, text = batch(4, 90)

    class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
            return crop(source[index]), text[index]

    ((images, text),) = DataLoader(Pairs(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    out = wrap()(
        images["views"], text, teacher_image=images["teacher"], view_boxes=images["view_boxes"],
        teacher_boxes=images["teacher_box"],
    )  # fmt: skip
    assert out["image_features"].shape == (4, 2, 16)
    assert not torch.equal(images["view_boxes"][0], images["view_boxes"][1])


@pytest.mark.parametrize(
    "options",
    [{"views": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.6, 0.5)}, {"scale": (0.5, 1.5)}, {"ratio": (0.0, 1.0)},
     {"views": 1.5}, {"views": True}, {"views": "2"}, {"scale": 0.5}, {"scale": (0.5, float("nan"))}, {"ratio": "ab"},
     {"ratio": (1, 2, 3)}, {"ratio": (1.0, float("inf"))}, {"student_transform": 3}, {"teacher_transform": "flip"},
     {"size": True}, {"size": 0}, {"size": 2.5}, {"size": (1, 2, 3)}, {"size": "8"}, {"teacher_size": (4, -1)}],
)  # fmt: skip
def test_bad_values(options: dict[str, object]) -> None:
    with pytest.raises(vtoken.ConfigError, match="size" if "size" in next(iter(options)) else next(iter(options))):
        vtoken.MultiViewCrop(**{"size": 8} | options)  # type: ignore[arg-type]
