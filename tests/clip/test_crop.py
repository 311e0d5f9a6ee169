"""Crops: the teacher's always contains the views, boxes say where they are, nothing is flipped."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import resized_crop

import vtoken
from tests.clip.models import batch, wrap
from vtoken.clip.crop import teacher_box


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
     {"size": 0}, {"size": 2.5}, {"size": (1, 2, 3)}, {"size": "8"}, {"teacher_size": (4, -1)}],
)  # fmt: skip
def test_bad_values(options: dict[str, object]) -> None:
    with pytest.raises(vtoken.ConfigError, match="size" if "size" in next(iter(options)) else next(iter(options))):
        vtoken.MultiViewCrop(**{"size": 8} | options)  # type: ignore[arg-type]
