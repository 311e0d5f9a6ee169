"""Scores brought from the teacher's crop to the views' crops, against slow loops and known maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtoken
from tests.clip.models import batch, wrap
from vtoken.methods.attentive_clip.mapping import _places, check_boxes, map_scores


def slow(scores: Tensor, grid: tuple[int, int], view: list[int], teacher: list[int]) -> Tensor:
    """One sample, one view: the formula of docs/methods/attentive_clip.md 4, patch by patch."""
    ht, wt = scores.shape
    out = torch.empty(grid, dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = (view[0] + (i + 0.5) / grid[0] * view[2] - teacher[0]) / teacher[2] * ht - 0.5
            x = (view[1] + (j + 0.5) / grid[1] * view[3] - teacher[1]) / teacher[3] * wt - 0.5
            y, x = min(max(y, 0.0), ht - 1.0), min(max(x, 0.0), wt - 1.0)
            top, left = min(int(y), ht - 2), min(int(x), wt - 2)
            dy, dx = y - top, x - left
            upper = (1 - dx) * scores[top, left] + dx * scores[top, left + 1]
            lower = (1 - dx) * scores[top + 1, left] + dx * scores[top + 1, left + 1]
            out[i, j] = (1 - dy) * upper + dy * lower
    return out


def test_against_the_formula() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 5, 7, generator=rng)
    teacher = [[0, 0, 200, 300], [10, 30, 100, 90], [3, 5, 77, 141]]
    views = [
        [[0, 0, 200, 300], [20, 30, 111, 222]],
        [[10, 30, 50, 40], [0, 0, 130, 150]],  # the second sticks out on all sides: nearest scores
        [[3, 5, 77, 141], [40, 70, 13, 17]],
    ]
    found = map_scores(scores, (4, 6), torch.tensor(views), torch.tensor(teacher))
    assert found.shape == (3, 2, 4, 6)
    assert found.dtype == torch.float32
    for b in range(3):
        for v in range(2):
            expected = slow(scores[b], (4, 6), views[b][v], teacher[b])
            assert float((found[b, v] - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_zeros_outside_are_the_published_way(seed: int) -> None:
    """The map of the teacher's crop pasted on black, cut at the view and read at the patches' centres."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 4, 4, generator=rng) + 0.5
    teacher, view = [16, 24, 64, 64], [16 * seed, 8, 64, 64]  # centres of patches are 4 + 8 * n: never on a border
    inside = torch.zeros(1, 8, 8)
    for i in range(8):
        for j in range(8):
            y, x = view[0] + 8 * i + 4, view[1] + 8 * j + 4
            inside[0, i, j] = teacher[0] < y < teacher[0] + teacher[2] and teacher[1] < x < teacher[1] + teacher[3]
    boxes = (torch.tensor([[view]]), torch.tensor([teacher]))
    border, zeros = (map_scores(scores, (8, 8), *boxes, outside=how)[0] for how in ("border", "zeros"))
    assert torch.equal(zeros, border * inside)
    assert bool((border > 0.4).all())
    assert 0 < int(inside.sum()) < 64
    covered = map_scores(scores, (8, 8), boxes[1].unsqueeze(1), boxes[1], outside="zeros")
    assert torch.equal(covered, map_scores(scores, (8, 8), boxes[1].unsqueeze(1), boxes[1]))


def test_the_wrapper_keeps_no_patch_that_the_teacher_did_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """With zeros, as long as there are others; the setting changes between steps."""
    x, t = batch()
    seen: list[Tensor] = []
    wrapper = wrap(outside="zeros", keep_ratio=0.25)
    stock = vtoken.AttentiveMasks.choose
    monkeypatch.setattr(vtoken.AttentiveMasks, "choose", lambda *args: seen.append(stock(*args)) or seen[-1])
    boxes = {"view_boxes": torch.tensor([[[0, 0, 32, 32]]] * 4), "teacher_boxes": torch.tensor([[0, 16, 32, 16]] * 4)}
    wrapper(x, t, teacher_image=x, **boxes)
    assert bool((seen[0] % 8 >= 4).all())
    wrapper.outside = "border"
    wrapper(x, t, teacher_image=x, **boxes)
    assert bool((seen[1] % 8 < 4).any())
    for bad in ("zero", None, 0):
        with pytest.raises(vtoken.ConfigError, match="outside="):
            wrapper.outside = bad
        with pytest.raises(vtoken.ConfigError, match="outside="):
            wrap(outside=bad)


def test_identical_boxes_are_the_identity() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 14, 14, generator=rng)
    boxes = torch.tensor([[0, 0, 375, 500], [17, 3, 224, 224], [100, 200, 33, 55], [1, 1, 1, 1]])
    found = map_scores(scores, (14, 14), boxes.unsqueeze(1), boxes)
    assert float((found[:, 0] - scores).abs().max()) < 1e-6
    assert map_scores(scores, (14, 14)).squeeze(1) is not None
    assert torch.equal(map_scores(scores, (14, 14))[:, 0], scores)


def test_a_linear_ramp_stays_the_right_ramp() -> None:
    """A map that is linear in source pixels is linear in source pixels in every view inside the teacher's crop."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        top, left = torch.randint(0, 100, (2,), generator=rng).tolist()
        height, width = torch.randint(140, 300, (2,), generator=rng).tolist()
        ht, wt, h, w = torch.randint(6, 15, (4,), generator=rng).tolist()
        y = top + (torch.arange(ht) + 0.5) / ht * height
        x = left + (torch.arange(wt) + 0.5) / wt * width
        ramp = (0.3 * y.unsqueeze(1) - 0.7 * x)[None]
        view = [top + height // 4, left + width // 4, height // 3, width // 3]  # away from the border half cell
        found = map_scores(ramp, (h, w), torch.tensor([[view]]), torch.tensor([[top, left, height, width]]))
        y = view[0] + (torch.arange(h) + 0.5) / h * view[2]
        x = view[1] + (torch.arange(w) + 0.5) / w * view[3]
        assert float((found[0, 0] - (0.3 * y.unsqueeze(1) - 0.7 * x)).abs().max()) < 1e-3  # values up to 300


def test_another_grid_without_boxes_is_the_whole_box() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 7, 9, generator=rng)
    whole = torch.tensor([[0, 0, 10, 10]] * 2)
    found = map_scores(scores, (12, 5))
    assert float((found - map_scores(scores, (12, 5), whole.unsqueeze(1), whole)).abs().max()) < 1e-6


def test_boxes_come_in_pairs_and_shapes() -> None:
    with pytest.raises(vtoken.ConfigError, match="view_boxes without teacher_boxes"):
        check_boxes(torch.zeros(2, 1, 4), None, 2, 1)
    with pytest.raises(vtoken.ConfigError, match="teacher_boxes without view_boxes"):
        check_boxes(None, torch.zeros(2, 4), 2, 1)
    with pytest.raises(vtoken.ShapeError, match=r"view_boxes \[2, 3, 4\]"):
        check_boxes(torch.zeros(2, 1, 4), torch.zeros(2, 4), 2, 3)
    with pytest.raises(vtoken.ShapeError, match=r"teacher_boxes \[2, 4\]"):
        check_boxes(torch.zeros(2, 1, 4), torch.zeros(1, 4), 2, 1)


def test_boxes_of_no_height_or_width_have_places() -> None:
    """Not NaN, of which grid_sample makes something else on every device."""
    scores = torch.rand(1, 4, 4)
    for size in ([0, 8], [8, 0], [0, 0]):
        teacher = torch.tensor([[2, 2, *size]])
        for view in ([2, 2, 8, 8], [2, 2, 0, 0], [0, 0, 4, 4]):
            boxes = torch.tensor([[view]])
            for axis in (0, 1):
                assert bool(_places(boxes, teacher, axis, 8).isfinite().all())
            found = map_scores(scores, (8, 8), boxes, teacher)
            assert bool(((found >= scores.min() - 1e-6) & (found <= scores.max() + 1e-6)).all())
