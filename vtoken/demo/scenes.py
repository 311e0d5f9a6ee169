"""Pictures whose contents are known: garments and a tagged digit pasted on photographs.

Every picture shows, on a crop of a photograph: one large garment, which is what the picture is about; up to nine small
garments of three kinds; and at the border a small coloured tag with a handwritten digit, which a summary of the picture
has no reason to look at. The tag lies on whole patches, two by two. All of it is real: Fashion-MNIST (Debian's
dataset-fashion-mnist), scikit-image's photographs, scikit-learn's digits. Training and test pictures share no garment,
no digit and no photograph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.demo.captions import DIGITS, read_digits
from vtoken.demo.clutter import DATA, PATCH, SIDE, read_fashion_mnist
from vtoken.demo.photos import load_photographs

LARGE, SMALL, TAG = 40, 18, 16  # sides in pixels of the garment, the small garments, the tag
CLOTHES = ("tshirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SMALL_KINDS = {"bags": 8, "trousers": 1, "sneakers": 7}  # their classes in Fashion-MNIST
COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 255), "yellow": (250, 220, 40)}
PHOTOGRAPHS = {
    "train": ("astronaut", "chelsea", "motorcycle", "clock", "retina", "moon", "hubble"),
    "test": ("camera", "coffee", "coins", "rocket"),
}
MOST = 3  # small garments of a kind
FIRST_KIND, FIRST_DIGIT = 1 + len(CLOTHES), 1 + len(CLOTHES) + len(SMALL_KINDS)  # in `Scenes.patches`
PATCH_CLASSES = FIRST_DIGIT + len(DIGITS)

_PHOTO_SIDE = 224
_DIGITS_TRAIN = 1400
_TRIES = 48  # places looked at for a thing before it is left out
_STARTS, _SPAN = (0, 29, 59), 14  # upper left corners of the garment by place, along one side
_EDGE = 4  # pixels between a centre and the border of its place, so that no answer hangs on one pixel


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is true of them.

    Args:
        pictures: float32 [N, 3, side, side] in [-1, 1].
        boxes: what lies where, int64 [N, 11, 4]: row and column of the upper left corner in the picture, side in
            pixels, and what it is as in `patches`, 0 for nothing. The garment, the tag, the small garments.
        patches: what the middle of every patch shows, int64 [N, (side / 8)^2]: 0 photograph, from 1 the garment by
            class, from `FIRST_KIND` small ones by kind, from `FIRST_DIGIT` the tag by digit.
        facts: int64 [N] by name, -1 where a picture has none: "garment" (class), "garment place" and "tag place" (of
            nine, row by row; -1 too near to a border between two), "colour", "digit", and how many small garments of
            each of `SMALL_KINDS`. `Material.draw` takes some of them as what is wanted.
    """

    pictures: Tensor
    boxes: Tensor
    patches: Tensor
    facts: dict[str, Tensor]


class Material:
    """The things that scenes of one split are made of.

    Args:
        split: "train" or "test"; they have nothing in common.
        folder: of the Fashion-MNIST files.

    Raises:
        ConfigError, ImportError, VTokenError: if data are missing or damaged; see `read_fashion_mnist`,
            `load_photographs` and `read_digits`.
    """

    def __init__(self, split: Literal["train", "test"], folder: Path = DATA) -> None:
        images, self.labels = read_fashion_mnist(split, folder)
        self._of_class = [(self.labels == label).nonzero()[:, 0] for label in range(len(CLOTHES))]
        self.large = _resized(images, LARGE)
        self.small = [_resized(images[self.labels == label], SMALL) for label in SMALL_KINDS.values()]
        photos = load_photographs(_PHOTO_SIDE, PHOTOGRAPHS[split])[1]
        self.photos = (photos * 255).round().to(torch.uint8)
        digits, values = read_digits()
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        chosen = order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:]
        self.digits, self.values = _resized((digits[chosen] + 1) * 127.5, TAG - 2), values[chosen]

    def draw(
        self,
        count: int,
        generator: torch.Generator,
        side: int = SIDE,
        corner: tuple[int, int] = (0, 0),
        wanted: Mapping[str, Tensor] | None = None,
    ) -> Scenes:
        """Random scenes; the generator decides all that is not wanted.

        Args:
            count: how many.
            generator: on the CPU.
            side: of the pictures in pixels, a multiple of 8. Less than 112: a part of the canvas with all that there
                is on it, for quicker training.
            corner: where that part lies on the canvas, in patches (row, column).
            wanted: facts that the pictures shall have, int64 [count] by name: "garment" and "colour", -1 for no garment
                or no tag, and how many of each of `SMALL_KINDS`, at most `MOST`. What finds no room is left out.
        """
        wanted = {} if wanted is None else wanted
        for fact in wanted:
            checks.choice("Material.draw", "wanted", fact, ("garment", "colour", *SMALL_KINDS))

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (count, *shape), generator=generator)

        garments = draw(len(self.labels))
        digits, colours, photos = draw(len(self.values)), draw(len(COLOURS)), draw(len(self.photos))
        # What lies where: the garment first, then the tag at the border, then small garments where there is room.
        room = side - LARGE + 1
        corners = draw(room, 2)
        if side == SIDE:  # every place as often as any other, and none on a border between two
            corners = torch.tensor(_STARTS)[draw(3, 2)] + draw(_SPAN, 2)
        there = torch.ones(count, dtype=torch.bool)
        if "garment" in wanted:
            there = wanted["garment"] >= 0
            sizes = torch.tensor([len(items) for items in self._of_class])
            starts = sizes.cumsum(0) - sizes
            classes = wanted["garment"].clamp(min=0)
            garments = torch.cat(self._of_class)[starts[classes] + garments % sizes[classes]]
        boxes: list[Box] = [(corners, LARGE, there)]
        corners, size, found = _find_room(_at_border(draw, side), TAG, boxes)
        if "colour" in wanted:
            found, colours = found & (wanted["colour"] >= 0), wanted["colour"].clamp(min=0)
        boxes.append((corners, size, found))
        amounts = draw(MOST + 1, len(SMALL_KINDS))
        amounts = torch.stack([wanted.get(item, amounts[:, kind]) for kind, item in enumerate(SMALL_KINDS)], 1)
        order = torch.rand(count, len(SMALL_KINDS) * MOST, generator=generator).argsort(1)
        kinds = order // MOST
        pieces = [draw(len(small)) for small in self.small for _ in range(MOST)]
        for k in range(len(SMALL_KINDS) * MOST):
            present = (order[:, k] % MOST) < amounts.gather(1, kinds[:, k : k + 1])[:, 0]
            corners, size, found = _find_room(draw(side - SMALL + 1, _TRIES, 2), SMALL, boxes)
            boxes.append((corners, size, found & present))

        pictures = self._backgrounds(photos, side, draw)
        patches = torch.zeros(count, side * side, dtype=torch.long)
        what = [1 + self.labels[garments], FIRST_DIGIT + self.values[digits], *(FIRST_KIND + kinds).unbind(1)]
        things = [self.large[garments][:, None], self._tags(digits, colours)]
        chosen = torch.stack(pieces, 1).gather(1, order)
        for k in range(len(SMALL_KINDS) * MOST):
            rows = torch.empty(count, SMALL, SMALL, dtype=torch.uint8)
            for kind, small in enumerate(self.small):
                mine = kinds[:, k] == kind
                rows[mine] = small[chosen[mine, k]]
            things.append(rows[:, None])
        for box, thing, name in zip(boxes, things, what, strict=True):
            _paste(pictures, patches, box, thing, name)

        tagged, corner_pixels = boxes[1][2], torch.tensor(corner) * PATCH
        facts = {
            "garment": torch.where(there, self.labels[garments], -1),
            "garment place": torch.where(there, _place(boxes[0][0] + LARGE / 2 + corner_pixels), -1),
            "tag place": torch.where(tagged, _place(boxes[1][0] + TAG / 2 + corner_pixels), -1),
            "colour": torch.where(tagged, colours, -1),
            "digit": torch.where(tagged, self.values[digits], -1),
        }
        found = torch.stack([there for _, _, there in boxes[2:]], 1)
        facts |= {name: (found & (kinds == kind)).sum(1) for kind, name in enumerate(SMALL_KINDS)}
        return Scenes(
            pictures=pictures.view(count, 3, side, side) / 127.5 - 1,
            boxes=torch.stack(
                [
                    torch.cat([corners, torch.stack([torch.full_like(name, size), name * there], 1)], 1)
                    for (corners, size, there), name in zip(boxes, what, strict=True)
                ], 1,
            ),
            patches=patches.view(count, side, side)[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten(1),
            facts=facts,
        )  # fmt: skip

    def _backgrounds(self, photos: Tensor, side: int, draw: Callable[..., Tensor]) -> Tensor:
        """Crops of photographs, float32 [N, 3, side * side] of whole numbers from 0 to 255.

        They are mirrored, their colours exchanged, and more or less faded.
        """
        count, whole = len(photos), self.photos.shape[-1]
        corners, steps = draw(whole - side + 1, 2), 1 - 2 * draw(2, 2)
        along = torch.arange(side)
        rows = torch.where(steps[:, :1] > 0, along, side - 1 - along) + corners[:, :1]
        columns = torch.where(steps[:, 1:] > 0, along, side - 1 - along) + corners[:, 1:]
        channels = (torch.arange(3) * (1 + draw(2, 1)) + draw(3, 1)) % 3  # all six orders
        flat = self.photos.flatten()
        index = (photos[:, None] * 3 + channels)[:, :, None] * whole + rows[:, None]
        crops = flat[(index[..., None] * whole + columns[:, None, None]).view(count, 3, -1)].float()
        return (127.5 + (crops - 127.5) * (3 + draw(6, 1, 1)) / 10).round()

    def _tags(self, digits: Tensor, colours: Tensor) -> Tensor:
        """Tags uint8 [N, 3, 16, 16]: black ink on a colour, a white rim."""
        paint = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colours]
        ink = self.digits[digits].float()[:, None] / 255
        inside = paint[:, :, None, None] * (1 - ink)
        return F.pad(inside, (1, 1, 1, 1), value=255.0).round().to(torch.uint8)


Box = tuple[Tensor, int, Tensor]  # corners [N, 2], side in pixels, whether it is there [N]


def _resized(images: Tensor, side: int) -> Tensor:
    """uint8 [N, side, side]."""
    parts = [
        F.interpolate(part[:, None].float(), (side, side), mode="bilinear", antialias=True)[:, 0]
        for part in images.split(4096)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def _at_border(draw: Callable[..., Tensor], side: int) -> Tensor:
    """Corners [N, tries, 2] of tags that touch one of the four borders, on whole patches."""
    along = draw((side - TAG) // PATCH + 1, _TRIES) * PATCH
    corners = torch.stack([draw(2, _TRIES) * (side - TAG), along], -1)
    return torch.where(draw(2, _TRIES)[..., None] > 0, corners, corners.flip(-1))


def _find_room(tries: Tensor, size: int, boxes: list[Box]) -> Box:
    """The first of the tried corners [N, tries, 2] whose square overlaps none of the boxes that are there."""
    free = torch.ones(tries.shape[:2], dtype=torch.bool)
    for corners, other, there in boxes:
        apart = ((tries + size <= corners[:, None]) | (corners[:, None] + other <= tries)).any(-1)
        free &= apart | ~there[:, None]
    first = free.to(torch.uint8).argmax(1)
    chosen = tries.gather(1, first[:, None, None].expand(-1, 1, 2))[:, 0]
    return chosen, size, free.any(1)


def _paste(pictures: Tensor, patches: Tensor, box: Box, things: Tensor, ids: Tensor) -> None:
    """Put things [N, 1 or 3, size, size] where the box says, and their numbers [N] on `patches`."""
    corners, size, there = box
    side = int(patches.shape[1] ** 0.5)
    rows, columns = (corners[there][:, :, None] + torch.arange(size)).unbind(1)
    index = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    values = things[there].flatten(2).float().expand(-1, 3, -1)
    where = there.nonzero()[:, 0]
    pictures[where[:, None, None], torch.arange(3)[None, :, None], index[:, None]] = values
    patches[where[:, None], index] = ids[there][:, None].expand_as(index)


def _place(centres: Tensor) -> Tensor:
    """Which of the nine places [N] the centres [N, 2] lie in; -1 too near to a border between two."""
    third = SIDE / 3
    near = torch.stack([(centres - third).abs(), (centres - 2 * third).abs()]).amin((0, 2)) < _EDGE
    cells = (centres / third).long().clamp(0, 2)
    return torch.where(near, -1, cells[:, 0] * 3 + cells[:, 1])
