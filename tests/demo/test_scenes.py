"""Pictures with known contents: what is told of them against what lies in the pixels, found by slow search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtoken.demo.captions import read_digits
from vtoken.demo.clutter import DATA, PATCH, SIDE
from vtoken.demo.photos import photograph_names
from vtoken.demo.scenes import (
    COLOURS,
    FIRST_DIGIT,
    FIRST_KIND,
    LARGE,
    MOST,
    PATCH_CLASSES,
    PHOTOGRAPHS,
    SMALL,
    SMALL_KINDS,
    TAG,
    Material,
    Scenes,
)
from vtoken.errors import ConfigError

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the Debian package dataset-fashion-mnist")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def material() -> Material:
    return Material("test")


@pytest.fixture(scope="module", params=[(SIDE, (0, 0)), (72, (5, 1))], ids=["whole", "part"])
def scenes(material: Material, request: pytest.FixtureRequest) -> tuple[Scenes, tuple[int, int]]:
    side, corner = request.param
    return material.draw(120, seeded(3), side=side, corner=corner), corner


def pixels(scenes: Scenes, n: int, box: int) -> Tensor:
    """What lies in a box, [3, side, side] in 0..255."""
    row, column, side = scenes.boxes[n, box, :3].tolist()
    return ((scenes.pictures[n] + 1) * 127.5).round()[:, row : row + side, column : column + side]


def test_the_generator_decides_all(material: Material) -> None:
    first, again, other = (material.draw(8, seeded(seed)) for seed in (1, 1, 2))
    torch.manual_seed(99)  # which does not
    assert torch.equal(first.pictures, again.pictures)
    assert torch.equal(first.boxes, again.boxes)
    assert all(torch.equal(first.facts[name], again.facts[name]) for name in first.facts)
    assert not torch.equal(first.pictures, other.pictures)


def test_what_nobody_can_want_is_refused(material: Material) -> None:
    with pytest.raises(ConfigError, match="garmnet"):
        material.draw(2, seeded(0), wanted={"garmnet": torch.zeros(2, dtype=torch.long)})


def test_training_and_test_share_nothing(material: Material) -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    assert {*PHOTOGRAPHS["train"], *PHOTOGRAPHS["test"]} == set(photograph_names())
    train = Material("train")
    assert (len(train.labels), len(material.labels)) == (60_000, 10_000)  # two files
    assert len(train.photos) == len(PHOTOGRAPHS["train"])
    digits, values = read_digits()
    assert torch.equal(torch.cat([train.values, material.values]).bincount(), values.bincount())
    drawn = torch.cat([train.digits, material.digits]).unique(dim=0)
    assert len(drawn) == len(digits.unique(dim=0)), "every scan is there"
    assert len(train.digits) + len(material.digits) == len(digits), "and in one split alone"


def test_what_lies_where(material: Material, scenes: tuple[Scenes, tuple[int, int]]) -> None:
    """Boxes against each other, facts and patches against boxes, one picture after the other."""
    found, corner = scenes
    side, third = found.pictures.shape[-1], SIDE / 3
    assert found.pictures.abs().max() <= 1
    for n in range(len(found.pictures)):
        shown = torch.zeros(side, side, dtype=torch.long)
        counts = dict.fromkeys(SMALL_KINDS, 0)
        for box, (row, column, size, what) in enumerate(found.boxes[n].tolist()):
            if what == 0:
                continue
            assert size == (LARGE, TAG)[box] if box < 2 else size == SMALL
            assert 0 <= row <= side - size
            assert 0 <= column <= side - size
            assert not shown[row : row + size, column : column + size].any(), "nothing lies on anything"
            shown[row : row + size, column : column + size] = what
            if box >= 2:
                counts[list(SMALL_KINDS)[what - FIRST_KIND]] += 1
        for name, count in counts.items():
            assert found.facts[name][n] == count <= MOST
        half = PATCH // 2
        patches = [int(shown[r, c]) for r in range(half, side, PATCH) for c in range(half, side, PATCH)]
        assert found.patches[n].tolist() == patches
        assert max(patches) < PATCH_CLASSES
        assert found.facts["garment"][n] == found.boxes[n, 0, 3] - 1
        tag = int(found.boxes[n, 1, 3])
        assert found.facts["digit"][n] == (tag - FIRST_DIGIT if tag else -1)
        for box, name in ((0, "garment place"), (1, "tag place")):
            row, column, size, what = found.boxes[n, box].tolist()
            centre = [row + size / 2 + corner[0] * PATCH, column + size / 2 + corner[1] * PATCH]
            near = any(abs(at - line) < 4 for at in centre for line in (third, 2 * third))
            place = -1 if near or not what else int(centre[0] // third) * 3 + int(centre[1] // third)
            assert found.facts[name][n] == place
        if tag:
            row, column = found.boxes[n, 1, :2].tolist()
            assert min(row, column, side - TAG - row, side - TAG - column) == 0, "at the border"
            assert row % PATCH == column % PATCH == 0


def test_the_pixels_are_those_of_the_named_things(material: Material, scenes: tuple[Scenes, tuple[int, int]]) -> None:
    found, _ = scenes
    for n in range(40):
        shown = pixels(found, n, 0)
        same = (material.large == shown[0].to(torch.uint8)).flatten(1).all(1)
        assert torch.equal(shown[0], shown[1])
        assert found.facts["garment"][n] in material.labels[same]
        for box in range(2, found.boxes.shape[1]):
            if what := int(found.boxes[n, box, 3]):
                small = material.small[what - FIRST_KIND]
                assert (small == pixels(found, n, box)[0].to(torch.uint8)).flatten(1).all(1).any()
        if found.boxes[n, 1, 3]:
            tag = pixels(found, n, 1)
            assert (tag[:, 0] == 255).all(), "a white rim"
            paint = torch.tensor(list(COLOURS.values())[found.facts["colour"][n]])
            paper = tag[:, 1:-1, 1:-1].flatten(1).amax(1)  # where there is no ink
            assert torch.equal(paper, paint.float())
            scans = material.digits[material.values == found.facts["digit"][n]][:, None]
            assert ((paint[:, None, None] * (1 - scans / 255)).round() == tag[:, 1:-1, 1:-1]).flatten(1).all(1).any()


def test_backgrounds_are_photographs(material: Material, scenes: tuple[Scenes, tuple[int, int]]) -> None:
    """The uppermost row that nothing lies on is a stretch of a photograph, mirrored perhaps, in one of its colours."""
    found, _ = scenes
    lines = torch.cat([material.photos, material.photos.flip(-1)]).flatten(0, 2) - 127.5
    for n in range(10):
        boxes = found.boxes[n][found.boxes[n, :, 3] > 0]
        covered = {r for row, _, size, _ in boxes.tolist() for r in range(row, row + size)}
        free = [r for r in range(found.pictures.shape[-1]) if r not in covered]
        for row in free[:1]:
            line = found.pictures[n, 0, row] * 127.5
            stretches = lines.unfold(1, len(line), 1)
            off = [(stretches * fade / 10 - line).abs().amax(-1).min() for fade in range(3, 9)]
            assert min(off) <= 0.501, "up to rounding"


def test_answers_are_spread_evenly(material: Material) -> None:
    """Else a model that never looks would seem to see."""
    facts = material.draw(3000, seeded(0)).facts
    for name, choices in (("garment", 10), ("garment place", 9), ("colour", 4), ("digit", 10)):
        known = facts[name][facts[name] >= 0]
        shares = known.bincount(minlength=choices) / len(known)
        assert ((shares * choices - 1).abs() < 0.4).all(), (name, shares)
    assert (facts["garment place"] >= 0).all()
    for name in SMALL_KINDS:
        assert facts[name].bincount(minlength=MOST + 1).max() < 0.35 * 3000


def test_what_is_wanted_is_shown_and_the_rest_stays_chance(material: Material) -> None:
    wanted = {
        "garment": torch.arange(40) % 11 - 1,
        "colour": torch.arange(40) % 5 - 1,
        **{name: torch.arange(40) // (k + 1) % (MOST + 1) for k, name in enumerate(SMALL_KINDS)},
    }
    scenes = material.draw(40, seeded(0), wanted=wanted)
    for n in range(40):
        garment, tag = int(wanted["garment"][n]), int(wanted["colour"][n])
        assert scenes.boxes[n, 0, 3] == garment + 1
        assert scenes.facts["garment"][n] == garment
        assert (scenes.facts["garment place"][n] >= 0) == (garment >= 0)
        assert scenes.facts["colour"][n] == tag
        for name in ("digit", "tag place"):
            assert scenes.facts[name][n] >= 0 or tag < 0 or name == "tag place"
            assert scenes.facts[name][n] == -1 or tag >= 0
        if garment >= 0:
            same = (material.large == pixels(scenes, n, 0)[0].to(torch.uint8)).flatten(1).all(1)
            assert garment in material.labels[same]
        if tag >= 0:
            paper = pixels(scenes, n, 1)[:, 1:-1, 1:-1].flatten(1).amax(1)
            assert torch.equal(paper, torch.tensor(list(COLOURS.values())[tag]).float())
        for kind, name in enumerate(SMALL_KINDS):
            pasted = int((scenes.boxes[n, 2:, 3] == FIRST_KIND + kind).sum())
            assert scenes.facts[name][n] == pasted <= wanted[name][n]
    short = sum(int((wanted[name] - scenes.facts[name]).sum()) for name in SMALL_KINDS)
    assert short < 0.05 * sum(int(wanted[name].sum()) for name in SMALL_KINDS), "there was room for nearly all"
    assert len(scenes.facts["digit"].unique()) > 5
    nothing = dict.fromkeys(("garment", "colour"), torch.full((3,), -1)) | dict.fromkeys(
        SMALL_KINDS, torch.zeros(3).long()
    )
    bare = material.draw(3, seeded(0), wanted=nothing)
    assert not bare.boxes[..., 3].any()
    assert not bare.patches.any()
