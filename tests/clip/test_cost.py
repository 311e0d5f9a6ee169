"""Closed-form cost of a training step against the published table and against counted operations."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from tests.clip.models import clip, timm_clip, wrap
from vtoken.core.watch import Watch

SIZES = {
    "B": ({"width": 768, "layers": 12}, {"width": 512, "heads": 8, "layers": 12}),
    "L": ({"width": 1024, "layers": 24}, {"width": 512, "heads": 8, "layers": 12}),
    "S": ({"width": 384, "layers": 6}, {"width": 256, "heads": 4, "layers": 6}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"mode": "random"},  # of single patches: 98 instead of 100 are kept
    "1 full": {},
    "1 half": {"teacher_scale": 0.5},
    "2 full": {"views": 2},
    "2 half": {"views": 2, "teacher_scale": 0.5},
    "25": {"keep_ratio": 0.25},
    "three": {"views": 3, "keep_ratio": 1.0},
}
TABLE = {
    "B": [0.57, 0.86, 0.65, 1.29, 1.08, 0.66, 2.71],
    "L": [0.52, 0.85, 0.61, 1.33, 1.09, 0.62, 2.91],
    "S": [0.56, 0.86, 0.64, 1.29, 1.07, 0.66, 2.72],
}


def model_of(size: str) -> Any:
    """Without memory: on the meta device."""
    vision, text = SIZES[size]
    with torch.device("meta"):
        return open_clip.CLIP(
            512,
            vision | {"image_size": 224, "patch_size": 16, "head_width": 64},
            text | {"vocab_size": 1000, "context_length": 77},
            output_dict=True,
        )


@pytest.mark.parametrize("size", list(TABLE))
def test_published_ratios(size: str) -> None:
    wrapper = vtoken.AttentiveMaskCLIP(model_of(size))
    single = vtoken.AttentiveMaskCLIP(wrapper.model, block=1)
    plain = wrapper.step_macs(keep_ratio=1.0)
    for (name, setting), expected in zip(SETTINGS.items(), TABLE[size], strict=True):
        ratio = (single if name == "random" else wrapper).step_macs(**setting) / plain
        assert abs(ratio - expected) < 0.0051, (name, ratio)
    if size == "B":
        assert abs(plain / 1e9 - 61.5) < 0.05
        assert wrapper.step_macs(batch=3) == 3 * wrapper.step_macs()


def test_formula_written_out() -> None:
    wrapper = vtoken.AttentiveMaskCLIP(model_of("B"), teacher_scale=0.5)

    def forward(n: int, depth: int, width: int) -> int:
        return depth * (12 * n * width**2 + 2 * n**2 * width)

    embed = 3 * 16 * 16 * 768
    student = 2 * (3 * forward(1 + 100, 12, 768) + 2 * 196 * embed)
    teacher = forward(1 + 49, 12, 768) + 49 * embed
    assert wrapper.step_macs(5, 2) == 5 * (student + teacher + 3 * forward(77, 12, 512))
    wrapper.mode = "random"
    assert wrapper.step_macs(5, 2) == 5 * (student + 3 * forward(77, 12, 512))
    byol = vtoken.AttentiveMaskCLIP(model_of("B"), teacher_scale=0.5, byol_weight=1.0, mode="random")
    assert byol.step_macs(5, 2) == 5 * (student + teacher + 3 * forward(77, 12, 512))


@pytest.fixture
def _no_fast_path() -> Any:
    """nn.MultiheadAttention's native path hides its work from the counter."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def counted(wrapper: Any, views: int, batch: int = 2) -> int:
    """Multiply-adds of a forward and a backward."""
    images = [torch.empty(batch, 3, 224, 224, device="meta") for _ in range(views)]
    text = torch.zeros(batch, 77, dtype=torch.int64, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = wrapper.train()(images, text)
        (out["image_features"].sum() + out["text_features"].sum()).backward()
    return counter.get_total_flops() // 2 // batch


@pytest.mark.usefixtures("_no_fast_path")
@pytest.mark.parametrize("size", ["B", "S"])
def test_counted_operations(size: str) -> None:
    wrapper = vtoken.AttentiveMaskCLIP(model_of(size))
    wrapper.keep_ratio = 1.0
    plain = counted(wrapper, 1)
    assert abs(plain / wrapper.step_macs() - 1) < 0.01
    wrapper.keep_ratio = 0.5
    for name in ("1 full", "1 half") if size == "B" else ("random", "1 full", "1 half", "2 full", "2 half"):
        setting = dict(SETTINGS[name])
        views = setting.pop("views", 1)
        wrapper.mode = setting.pop("mode", "topk")
        wrapper.teacher_scale = setting.pop("teacher_scale", 1.0)
        found, formula = counted(wrapper, views), wrapper.step_macs(views=views)
        assert abs(found / formula - 1) < 0.01, (name, found / formula)
        assert name != "1 half" or found / plain < 0.70


@pytest.mark.usefixtures("_no_fast_path")
def test_reading_the_class_row_costs_next_to_nothing() -> None:
    """What scoring adds is 2 D^2 + H N D per block, to the operation."""
    x = torch.empty(2, 3, 224, 224, device="meta")
    wrapper = vtoken.AttentiveMaskCLIP(model_of("S"))
    totals = []
    for read in (False, True):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if read:
                wrapper._host.masked(wrapper.teacher.visual, x, None, Watch(wrapper.layers))
            else:
                wrapper.teacher.visual(x)
        totals.append(counter.get_total_flops() // 2)
    assert totals[1] - totals[0] == 2 * 6 * (2 * 384**2 + 6 * 197 * 384)
    assert (totals[1] - totals[0]) / totals[0] < 0.01


def test_other_towers() -> None:
    assert wrap(clip(custom=True)).step_macs() == wrap(clip()).step_macs()
    assert wrap(clip(qk_norm=True)).step_macs() == wrap(clip()).step_macs()
    assert wrap(timm_clip()).step_macs() > 0
    model = clip(custom=True)
    model.text = torch.nn.Linear(2, 2)
    with pytest.raises(vtoken.UnsupportedModelError, match="cannot count the text tower Linear"):
        wrap(model).step_macs()
