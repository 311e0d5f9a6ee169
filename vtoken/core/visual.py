"""What the engine of prompts, the families of models and the methods that choose tell each other.

A visual is one image or one video of a call. It has cells: grids of tokens. An image has one, or an overview and a
grid of crops; a video has one for every frame, or every few frames that its model merges in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """One grid of tokens.

    Args:
        grid: rows and columns as the unmodified model hands them on; tokens are in raster order.
        role: "image", "overview", "detail" (a stitched grid of crops), "tile" or "frame".
        native: rows and columns in front of the model's own pooling, where there are others.
    """

    grid: tuple[int, int]
    role: str = "image"
    native: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """Rows times columns."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Visual:
    """One image or video of a call; known before anything runs.

    Args:
        kind: "image" or "video".
        cells: its grids, in order.
        separators: which of its placeholders hold no content (newlines), ascending.
        fixed: leading placeholders that always stay and never count (a class token).
        frames_per_cell: frames that the model makes one cell of.
        apart: whether every cell has a run of placeholders of its own, with text between.
        patches: tokens of a cell inside the tower; 0 where that is not known.
        pooling: how the model comes from the native grid of a cell to its own, "bilinear" or "pool" (average).
    """

    kind: str
    cells: tuple[Cell, ...]
    separators: tuple[int, ...] = ()
    fixed: int = 0
    frames_per_cell: int = 1
    apart: bool = False
    patches: int = 0
    pooling: str = "bilinear"

    @property
    def content(self) -> int:
        """Tokens of all cells."""
        return sum(cell.tokens for cell in self.cells)

    @property
    def length(self) -> int:
        """All its placeholders."""
        return self.fixed + self.content + len(self.separators)

    def places(self) -> Tensor:
        """Of every content token its placeholder, [n] int64 ascending."""
        free = torch.ones(self.length, dtype=torch.bool)
        free[: self.fixed] = False
        free[list(self.separators)] = False
        return free.nonzero()[:, 0]


@dataclass(frozen=True)
class TowerFacts:
    """What a method may know of an image tower before it runs.

    Args:
        depth: its blocks.
        last: the block that makes the features; of towers with windows the last one without.
        class_token: whether it has a class token that patches can be ranked by.
        per_token: whether a single row in front of the projector can be projected by itself.
        windowed: blocks whose attention sees a window only.
    """

    depth: int
    last: int
    class_token: bool = False
    per_token: bool = False
    windowed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Needs:
    """What a method must be shown; nothing else is computed.

    Args:
        attention: "none", "class" (how much the class token attends to a token) or "received" (how much it gets from
            all).
        layers: blocks of the tower whose attention is read, ascending.
        features: of "after", "before", "keys", "stack" and "native"; see `Seen`.
        text: whether it needs the embeddings of the instruction.
        chunk: the most frames of videos in one run of the tower; None: all of a call.
    """

    attention: str = "none"
    layers: tuple[int, ...] = ()
    features: frozenset[str] = frozenset()
    text: bool = False
    chunk: int | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What a method is shown of one visual; what it did not ask for is None. n is the visual's content.

    Args:
        visual: its cells.
        count: how many tokens the method said it keeps.
        clues: what came with the call for this visual.
        attention: [layers, n] float32, mean over heads (and over the patches of a token).
        after: rows behind the projector, [n, C].
        stack: the same and deeper levels beside it, [n, C + C' + ...].
        before: rows in front of the projector, [n, C0]; means over the patches of a token.
        keys: of the last block that is read, not rotated, mean over heads (and patches), [n, D].
        text: input embeddings of the instruction, [m, C].
        native: of every cell its rows on the grid in front of the model's own pooling, [H, W, C]; where the model does
            not pool, those of `stack`.
    """

    visual: Visual
    count: int
    clues: Mapping[str, Any] = field(default_factory=dict)
    attention: Tensor | None = None
    after: Tensor | None = None
    stack: Tensor | None = None
    before: Tensor | None = None
    keys: Tensor | None = None
    text: Tensor | None = None
    native: tuple[Tensor, ...] | None = None

    def parts(self) -> tuple[Tensor, ...]:
        """Content indices of every cell."""
        return torch.arange(self.visual.content).split([cell.tokens for cell in self.visual.cells])


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a method keeps of one visual.

    Args:
        index: the content token whose place each row takes, [k] int64, never falling.
        rows: rows in place of those tokens' own, [k, like `Seen.stack`].
        before: whether the rows still have to go through the projector; then they are [k, like `Seen.before`]. Where a
            method asked for `Seen.native`, rows are like those, and the family finishes them.
        ends: which of the rows end a line, ascending, for models with a separator behind each; None: as in the model.
    """

    index: Tensor
    rows: Tensor | None = None
    before: bool = False
    ends: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a family made of the visuals of one call. Lists have one entry for every visual, in the family's order.

    Args:
        outputs: by kind, the model's own output object.
        levels: of every level of features the rows of every visual, [length, C].
        attention: [layers, fixed + n] float32 each; None where it was not asked for.
        before, keys: [n, C0] and [n, D] each; None where they were not asked for.
        anchors: of every visual the patch whose place each row of its first cell keeps, if the tower merges tokens.
        first_patch: patch that row 0 is; -1 if it is a class token.
        native: of every visual its cells [H, W, C]; None where those are the rows of `levels`.
    """

    outputs: dict[str, Any]
    levels: list[list[Tensor]]
    attention: list[Tensor] | None = None
    before: list[Tensor] | None = None
    keys: list[Tensor] | None = None
    anchors: tuple[Tensor, ...] | None = None
    first_patch: int = 0
    native: list[tuple[Tensor, ...]] | None = None


def placed(visual: Visual, index: Tensor, rule: str) -> Tensor:
    """Placeholders of a visual that stay, ascending, by content index [k] and the rule for its separators.

    Args:
        rule: "row" (a separator stays if something of the row in front of it does), "all" or "none". An overview is no
            part of the first row of a grid.
    """
    at = visual.places()[index.cpu()]
    lines = torch.tensor(visual.separators, dtype=torch.int64)
    if rule == "none":
        lines = lines[:0]
    elif rule == "row" and len(lines):
        over = len(visual.cells) > 1 and visual.cells[0].role == "overview"
        first = visual.fixed + (visual.cells[0].tokens if over else 0)
        starts = torch.cat([torch.tensor([first]), lines[:-1] + 1])
        seen = torch.zeros(visual.length + 1, dtype=torch.int64)
        seen[at + 1] = 1
        seen = seen.cumsum(0)
        lines = lines[seen[lines] > seen[starts]]
    return torch.cat([torch.arange(visual.fixed), at, lines]).sort(stable=True).values


def in_lines(visual: Visual, index: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Placeholders of a visual with a separator behind each of its lines, [k + lines], and which are content's, [k].

    Lines may be more or fewer than the model's own: a new one takes the separator behind the place of its last row.
    """
    at, lines = visual.places()[index.cpu()], torch.tensor(visual.separators, dtype=torch.int64)
    behind = lines[torch.searchsorted(lines, at[ends.cpu()])]
    rank = torch.cat([torch.arange(len(at)) * 2, ends.cpu() * 2 + 1]).argsort()
    return torch.cat([at, behind])[rank].cummax(0).values, (rank < len(at)).nonzero()[:, 0]


def length_of(visual: Visual, count: int, rule: str) -> tuple[int, bool]:
    """Placeholders of a visual that keeps `count` tokens of its content: the most, and whether it is always so many."""
    lines = len(visual.separators)
    if count == visual.content:
        return visual.fixed + count + lines, True
    return visual.fixed + count + (0 if rule == "none" else lines), not lines or rule != "row"


def in_prompt_order(starts: Sequence[tuple[int, int]]) -> list[int]:
    """Indices of visuals sorted by (row, column) of their first placeholder."""
    return sorted(range(len(starts)), key=lambda i: starts[i])
