"""Pictures are checked by their pixels: mean colours, borders, what is dimmed and what is not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import vtoken
from vtoken.core.trace import Trace
from vtoken.visualize import draw_groups, draw_heat, draw_image, draw_kept, side_by_side

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")

WHITE, DARK = (255, 255, 255), (26, 26, 26)


def made_trace(*groups: list[list[int]], layers: int = 1) -> Trace:
    """A record of images with the given group maps and one prefix token."""
    dest = torch.stack([torch.tensor([0, *(name + 1 for row in rows for name in row)]) for rows in groups])
    untouched = torch.arange(dest.shape[1]).expand_as(dest)
    grid = (len(groups[0]), len(groups[0][0]))
    return Trace(1, 1, [5, 3], dest, [untouched] * (layers - 1) + [dest], grid=grid)


def pixels(picture: object) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).long()


def at(picture: object, y: int, x: int) -> tuple[int, ...]:
    return tuple(pixels(picture)[y, x].tolist())


def test_groups_have_their_mean_colour_and_a_border() -> None:
    image = torch.zeros(3, 8, 8)
    image[0, :, :4] = 1.0  # left half red
    image[2, :4, 4:] = 0.6  # upper right quarter blue
    picture = draw_groups(image, made_trace([[0, 1], [0, 1]]))
    assert at(picture, 1, 1) == (255, 0, 0)
    assert at(picture, 1, 6) == at(picture, 6, 6) == (0, 0, 76), "one group, one colour: the mean of blue 0.6 and black"
    assert at(picture, 1, 3) == WHITE, "border between the columns"
    assert at(picture, 3, 1) == (255, 0, 0), "no border inside a group"


def test_groups_at_scale_are_the_same_means_and_borders_stay() -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.6
    trace = made_trace([[0, 1], [2, 1]])
    small, large = draw_groups(image, trace), draw_groups(image, trace, scale=5)
    assert large.size == (40, 40)
    assert at(small, 1, 1) == at(large, 8, 8)
    assert at(small, 6, 6) == at(large, 33, 33)
    assert at(large, 8, 19) == at(large, 19, 8) == WHITE
    assert at(large, 19, 30) != WHITE


def test_border_is_dark_on_light_ground() -> None:
    assert at(draw_groups(torch.ones(3, 8, 8), made_trace([[0, 1], [0, 1]])), 1, 3) == DARK
    assert at(draw_kept(torch.ones(3, 8, 8), torch.tensor([0, 2]), (2, 2)), 1, 3) == DARK


def test_groups_of_a_wide_grid_and_of_a_size_that_is_no_multiple() -> None:
    picture = draw_groups(torch.zeros(3, 7, 11), made_trace([[0, 0, 1], [2, 2, 1]]))
    assert picture.size == (11, 7)
    edge = (pixels(picture) == 255).all(-1)
    assert edge[:, 7].all(), "columns of 11 pixels: 4, 4 and 3; the border is the last pixel of its cell"
    assert edge[3, :8].all(), "rows of 7 pixels: 4 and 3"
    assert int(edge.sum()) == 7 + 7


def test_groups_of_one_image_and_one_layer_of_a_batch() -> None:
    trace = made_trace([[0, 0], [0, 0]], [[0, 1], [0, 1]], layers=2)
    image = torch.zeros(3, 8, 8)
    assert int((pixels(draw_groups(image, trace)) == 255).sum()) == 0, "one group, no border"
    assert at(draw_groups(image, trace, index=1), 0, 3) == WHITE
    assert at(draw_groups(image, trace, layer=0), 3, 0) == WHITE, "block 0 merged nothing: every patch has a border"


def test_kept_patches_are_untouched_and_pruned_ones_darkened_and_hatched() -> None:
    image = torch.full((3, 24, 36), 0.5)
    image[1] = 0.4
    kept = torch.tensor([True, False, True, True, True, False])
    picture = pixels(draw_kept(image, kept, (2, 3)))
    assert at(picture, 5, 5) == at(picture, 20, 20) == (128, 102, 128)
    pruned = picture[:12, 12:23].reshape(-1, 3)  # without the border at its right
    pruned = pruned[(pruned != 255).all(-1)]
    values, counts = pruned.unique(dim=0, return_counts=True)
    assert values.tolist() == [[51, 41, 51], [122, 116, 122]], "0.4 times as bright; hatch with 0.35 white"
    assert counts[0] > 2 * counts[1], "most of it is not hatch"
    assert at(picture, 3, 11) == at(picture, 3, 23) == at(picture, 11, 15) == WHITE, "border around what is pruned"
    assert at(picture, 11, 5) == (128, 102, 128), "no border between kept patches"


def test_kept_as_indices_is_kept_as_mask() -> None:
    image = torch.rand(3, 20, 33)
    mask = torch.tensor([False, True, True, False, False, True])
    first, second = (draw_kept(image, kept, (2, 3), scale=2) for kept in (mask, mask.nonzero()[:, 0]))
    assert first.size == (66, 40)
    assert torch.equal(pixels(first), pixels(second))
    everything = draw_kept(image, torch.arange(6), (2, 3))
    assert torch.equal(pixels(everything), pixels(draw_image(image)))
    nothing = draw_kept(image, torch.tensor([], dtype=torch.int64), (2, 3))
    assert pixels(nothing).float().mean() < 0.75 * pixels(everything).float().mean()


def test_scores_tint_from_dark_blue_to_yellow() -> None:
    image = torch.full((3, 8, 24), 0.5)
    picture, without = (
        draw_kept(image, torch.arange(3), (1, 3), scores=torch.tensor([3.0, 1.0, float(odd)]))
        for odd in ("-inf", "nan")
    )
    tinted = [tuple(round(0.6 * c + 0.4 * 127.5) for c in colour) for colour in ((253, 231, 37), (68, 1, 84))]
    assert at(picture, 4, 4) == tinted[0]
    assert at(picture, 4, 12) == at(picture, 4, 20) == tinted[1], "the lowest score and what is masked out"
    assert torch.equal(pixels(picture), pixels(without))


def test_heat_has_a_scale_of_its_own_or_the_given_one() -> None:
    values = torch.tensor([[0.2, 0.4, 0.6]])
    assert pixels(draw_heat(values))[0].tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37]]
    assert at(draw_heat(values, low=0.4, high=0.8, scale=2), 1, 5) == (33, 145, 140)
    assert at(draw_heat(torch.zeros(2, 2)), 0, 0) == (68, 1, 84), "a flat map is no division by zero"


def test_image_is_drawn_as_it_is() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert torch.equal(pixels(draw_image(image)), image.permute(1, 2, 0).long())
    assert torch.equal(pixels(draw_image(image / 255)), image.permute(1, 2, 0).long())
    assert draw_image(image, scale=3).size == (21, 15)


def test_side_by_side_has_every_picture_and_its_own_caption() -> None:
    parts = [draw_image(torch.full((3, 20, width), value)) for width, value in ((60, 0.2), (80, 0.6))]
    sheet = pixels(side_by_side(parts, ["a caption that is far too long for its picture", "right"]))
    top = sheet.shape[0] - 20
    assert sheet.shape[1] == 60 + 8 + 80
    assert (sheet[top:, :60] == 51).all()
    assert (sheet[top:, 60:68] == 255).all()
    assert (sheet[top:, 68:] == 153).all()
    ink = (sheet[:top] < 128).any(-1)
    assert ink[:, :60].any()
    assert ink[:, 68:].any()
    assert not ink[:, 60:68].any(), "captions keep to their pictures"
    with pytest.raises(vtoken.ShapeError, match="one caption per picture"):
        side_by_side(parts, ["one"])


def test_groups_and_kept_of_a_real_forward() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    images = torch.rand(2, 3, 160, 160)
    vtoken.apply(model, vtoken.RandomPrune(r=[4, 0, 8]))
    with torch.inference_mode():
        _, trace = vtoken.trace(model, images)
    assert [trace.kept(1, layer).shape[0] for layer in range(len(trace.layer_dest))][:3] == [96, 96, 88]
    assert set(trace.kept(1).tolist()) < set(trace.kept(1, 0).tolist())
    assert trace.kept(1).tolist() == sorted(trace.kept(1).tolist())
    # A patch that is kept is a group's anchor: one per group, each in the group that it names.
    assert trace.dest[1, trace.num_prefix :][trace.kept(1)].unique().shape[0] == 88
    picture = pixels(draw_kept(images[1], trace.kept(1), trace.grid)).permute(2, 0, 1)
    same = (picture == pixels(draw_image(images[1])).permute(2, 0, 1)).all(0)
    inner = same.view(10, 16, 10, 16)[:, :-1, :, :-1].all(3).all(1).flatten()  # each patch without its border
    assert inner.nonzero()[:, 0].tolist() == trace.kept(1).tolist()
    with pytest.raises(vtoken.ShapeError, match="holds no forward"):
        Trace().kept()


def test_wrong_arguments_are_named() -> None:
    image, trace = torch.rand(3, 8, 8), made_trace([[0, 1], [2, 1]])
    wrong = [
        (lambda: draw_groups(image[None], trace), r"one image \[3, H, W\], got \(1, 3, 8, 8\)"),
        (lambda: draw_groups(image, Trace()), "no group map"),
        (lambda: draw_groups(image, trace, index=1), r"index=1: the trace has 1 image"),
        (lambda: draw_groups(image, trace, layer=1), r"layer=1: the trace has blocks 0 to 0"),
        (lambda: draw_groups(image[:, :1], trace), "1 x 8 pixels has no 2 x 2 patches"),
        (lambda: draw_kept(image, torch.ones(5, dtype=torch.bool), (2, 3)), "kept has 5 patches, the grid 6"),
        (lambda: draw_kept(image, torch.tensor([0, 6]), (2, 3)), "names patch 6, the grid has patches 0 to 5"),
        (lambda: draw_kept(image, torch.tensor([-1]), (2, 3)), "names patch -1"),
        (lambda: draw_kept(image, torch.ones(1, 6, dtype=torch.bool), (2, 3)), "one image"),
        (lambda: draw_kept(image, torch.arange(6), (2, 3), scores=torch.rand(2, 3)), r"scores must be \[6\]"),
        (lambda: draw_heat(torch.rand(1, 2, 3)), r"one map \[H, W\]"),
    ]
    for call, message in wrong:
        with pytest.raises(vtoken.ShapeError, match=message):
            call()
    for normalised in (image - 1, image * 4, image * float("nan")):
        with pytest.raises(vtoken.InputError, match="before normalisation"):
            draw_image(normalised)
    with pytest.raises(vtoken.InputError, match="bool"):
        draw_kept(image, torch.rand(6), (2, 3))
    with pytest.raises(vtoken.InputError, match="whole number"):
        draw_image(image, scale=1.5)


def test_viz_is_the_same_package() -> None:
    assert vtoken.viz is vtoken.visualize


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        ("PIL", "draw_image(torch.rand(3, 4, 4))", "pictures need pillow"),
        ("matplotlib", "plot_tokens(vtoken.Plan((3, 2), 1), '/nowhere/x.png')", "plots need matplotlib"),
    ],
)
def test_a_missing_package_is_named_when_it_is_needed(missing: str, call: str, message: str) -> None:
    code = f"""
import sys, torch
sys.modules[{missing!r}] = None
import vtoken, vtoken.visualize
try:
    vtoken.visualize.{call}
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f'{message}; install "vtoken[viz]"\n'
