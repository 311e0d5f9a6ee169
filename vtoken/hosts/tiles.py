"""Towers that see tiles of one size, whose patches become tokens block by block: what their families share.

Attention and keys of a token are means over its block of patches; what is kept of a tile never hangs on another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vtoken.core.config import MethodConfig
from vtoken.core.host import keys_of
from vtoken.core.patch import base_of, view
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Cell, Encoded, Needs, TowerFacts, Visual
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, ShapeError, UnsupportedModelError
from vtoken.hosts.by_name import watched_by_name
from vtoken.hosts.exchanged import Overheard
from vtoken.hosts.hidden_states import last_read
from vtoken.hosts.tower import pair
from vtoken.prompts.family import Family, linear_macs, named_for, rows_of


class Tiles(Family):
    """Every tile is an image by itself, unless a family says which are one."""

    #: Towers that are understood: module of transformers.models and class name.
    towers: ClassVar[frozenset[tuple[str, str]]] = frozenset({("siglip", "SiglipVisionModel")})
    #: Where the tower lies in the inner model.
    tower_name: ClassVar[str] = "vision_tower"
    #: Where its blocks lie, and in a block its attention and in that what makes keys.
    path: ClassVar[tuple[str, ...]] = ("encoder", "layers")
    attention, keys = "self_attn", "k_proj"
    #: Rows in front of the patches: a class token, which leaves before the projector.
    prefix: ClassVar[int] = 0
    #: Whether one row in front of the projector can be projected by itself.
    per_token: ClassVar[bool] = True
    side: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def side_of(self, model: Any) -> int:
        """Patches along one side of a token."""
        return 1

    def last(self, model: Any, given: dict[str, Any]) -> int:
        """The block whose output the projector reads, as the call or the settings say."""
        return last_read(model.config, len(self._blocks(model)), given)

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """What stands in the inner model so that rows in front of the projector [tiles, n, C0] are taken."""
        return {"multi_modal_projector": Overheard(model.model.multi_modal_projector, before=take)}

    def images(self, ids: Tensor, runs: list[Run], tiles: list[int]) -> list[int]:
        """Tiles of every image, from those of every run of placeholders."""
        return [1] * sum(tiles)

    def spec(self, model: nn.Module) -> HostSpec:
        """The measures of the tower; raises UnsupportedModelError unless it is understood and carries no method."""
        tower: Any = self.tower(model)
        self.check_known(model, (tower, f"model.{self.tower_name}"))
        if not any(key in self.towers for key in keys_of(base_of(type(tower)))):
            raise UnsupportedModelError(
                f"cannot shorten the prompts of transformers {type(model).__name__}: its image tower is a "
                f"{type(tower).__qualname__}, understood: {', '.join(sorted(n for _, n in self.towers))}. The model "
                "was left as it was."
            )
        width, heads = int(tower.config.hidden_size), int(tower.config.num_attention_heads)
        grid = self.patches(model)
        return self.measured(model, self._blocks(model), width, heads, prefix=self.prefix, grid=grid)

    def tower(self, model: nn.Module) -> Any:
        """The image tower."""
        return getattr(model.model, self.tower_name)

    def _blocks(self, model: Any) -> Any:
        found = self.tower(model)
        for name in self.path:
            found = getattr(found, name)
        return found

    def facts(self, model: Any, given: dict[str, Any]) -> TowerFacts:
        """Attention goes over a whole tile in every block."""
        return TowerFacts(
            len(self._blocks(model)), self.last(model, given), class_token=self.prefix > 0, per_token=self.per_token
        )

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """Patches become tokens by their places on the grid, which a tower that merges does not keep."""
        if "_vtoken" in self.tower(model).__dict__:
            raise ConfigError(
                f"the image tower of {type(model).__name__} carries a method: it joins patches by their places on the "
                f"grid, so its prompts are shortened behind a plain tower only; vtoken.remove(model.model."
                f"{self.tower_name})"
            )

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """From runs of placeholders."""
        ids = given["input_ids"]
        runs = runs_of(ids == self.token_ids(model)["image"])
        tiles = self.tiles(model, given, runs)
        if tiles is None:
            return [self.image(model, 1)] * int(given["pixel_values"].shape[0])
        return [self.image(model, count) for count in self.images(ids, runs, tiles)]

    def tiles(self, model: Any, given: dict[str, Any], runs: list[Run]) -> list[int] | None:
        """Tiles of every run; a prompt that is short already has a run a tile, or they cannot be told."""
        size, total = Cell(self.grid(model)).tokens, int(given["pixel_values"].shape[0])
        found = [run.length // size for run in runs]
        if not any(run.length % size for run in runs) and sum(found) == total:
            return found
        return [1] * total if len(runs) == total else None

    def image(self, model: Any, tiles: int) -> Visual:
        """An image of so many tiles; of several the last one shows it all."""
        grid = self.grid(model)
        if tiles == 1:
            return Visual("image", (Cell(grid),))
        return Visual("image", (*(Cell(grid, "tile"),) * (tiles - 1), Cell(grid, "overview")))

    def encode(self, model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
        """By the model's own `get_image_features`."""
        inner, tower, seen = model.model, self.tower(model), list[Tensor]()
        last = self.last(model, given)
        watch = Watch.of(needs, last, joined=True)
        parts: dict[str, Any] = {}
        if watch.reads:
            parts[self.tower_name] = watched_by_name(watch, tower, self.path, self.attention, self.keys)
        if "before" in needs.features:
            parts |= self.reading(model, seen.append)
        named = self.arguments(model, given)
        out = (view(inner, **parts) if parts else inner).get_image_features(**named, return_dict=True)
        lengths = [v.length for v in visuals]
        self.check_tokens(model, out, given, lengths)

        def split(rows: Tensor) -> list[Tensor]:
            """Rows [tiles, n, c] by visual."""
            return list(rows.flatten(0, -2).split(lengths))

        found, attention, keys = watch.each(last)[0], None, None
        if found:
            attention = [rows.T for rows in split(self.means(model, given, torch.stack(found, dim=-1)))]
        if watch.keys is not None:
            keys = split(self.means(model, given, watch.keys))
        return Encoded({"image": out}, [split(rows_of(out))], attention, split(seen[0]) if seen else None, keys)

    def check_tokens(self, model: Any, out: Any, given: dict[str, Any], lengths: Sequence[int]) -> None:
        """Raise ShapeError if the tower made other numbers of tokens than the prompt has room for."""
        got = len(rows_of(out))
        if got != sum(lengths):
            raise ShapeError(
                f"{type(model).__name__} made {got} tokens of its images, which were laid out as {sum(lengths)}: the "
                "processor and the model disagree on the token count"
            )

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What `get_image_features` is called with."""
        return named_for(model.model.get_image_features, given, self.side)

    def means(self, model: Any, given: dict[str, Any], rows: Tensor) -> Tensor:
        """Means [tiles, n, c] over the patches of every token, of rows [tiles, prefix + patches, c]."""
        (height, width), side = self.grid(model), self.side_of(model)
        return rows[:, self.prefix :].unflatten(1, (height, side, width, side)).mean((2, 4)).flatten(1, 2)

    def patches(self, model: Any) -> tuple[int, int]:
        """Patch rows and columns of one tile."""
        (height, width), (high, wide) = self.image_size(model), pair(self.tower(model).config.patch_size)
        return height // high, width // wide

    def grid(self, model: Any, img_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of the tokens of one tile."""
        (rows, columns), side = self.patches(model), self.side_of(model)
        return rows // side, columns // side

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Of one tile, in pixels."""
        return pair(self.tower(model).config.image_size)

    def channels(self, model: nn.Module) -> int:
        """Channels of its images."""
        return int(self.tower(model).config.num_channels)

    def cut(self, model: Any, size: tuple[int, int]) -> int:
        """Tiles that the processor cuts an image of `size` pixels into, the overview not counted."""
        return 1

    def visual(self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] = ()) -> Visual:
        """One image of `size` pixels; cut into several tiles, it has an overview besides."""
        tiles = self.cut(model, size)
        return self.image(model, tiles + 1 if tiles > 1 else 1)

    def crops(self, model: Any, size: tuple[int, int]) -> int:
        """Tiles, the overview included."""
        return len(self.visual(model, size).cells)

    def tower_macs(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Of one tile: patch embedding, linear layers, attention."""
        tower, (rows, columns) = self.tower(model), self.patches(model)
        width = int(tower.config.hidden_size)
        tokens = rows * columns + self.prefix
        embedding = [p.numel() for n, p in tower.embeddings.named_parameters() if "patch" in n and n.endswith("weight")]
        blocks = sum(tokens * linear_macs(block) + 2 * width * tokens**2 for block in self._blocks(model))
        total = rows * columns * sum(embedding) + blocks + (_head_macs(tower, tokens) if hasattr(tower, "head") else 0)
        return total, total

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """A row a layer for class scores, all rows for received ones."""
        needs, (rows, columns) = self.method(model, configs).needs(self.facts(model, {})), self.patches(model)
        tokens = rows * columns + self.prefix
        each = {"class": tokens, "received": tokens**2}.get(needs.attention, 0)
        return len(needs.layers) * each * self.spec(model).width


class Run(NamedTuple):
    """Placeholders that stand next to each other, the first one at (row, start)."""

    row: int
    start: int
    length: int


def runs_of(places: Tensor) -> list[Run]:
    """The runs of True in [B, L], row by row."""
    found: list[Run] = []
    for row, line in enumerate(places.tolist()):
        start = -1
        for column, here in enumerate([*line, False]):
            if here and start < 0:
                start = column
            elif not here and start >= 0:
                found.append(Run(row, start, column - start))
                start = -1
    return found


def named_in_front(ids: Tensor, runs: Sequence[Run], tiles: Sequence[int], *, closing: bool) -> list[int]:
    """Tiles of every image, by the token in front of a run.

    Args:
        closing: whether that token tells the last run of an image (the one that shows it all), so that it is the one
            in front of a row's last run; else it tells the first one, and stands in front of a row's first run.
    """
    found: list[int] = []
    for row in dict.fromkeys(run.row for run in runs):
        mine = [(run, count) for run, count in zip(runs, tiles, strict=True) if run.row == row]
        names = [int(ids[row, run.start - 1]) if run.start else -1 for run, _ in mine]
        told, begins = names[-1 if closing else 0], True
        for name, (_, count) in zip(names, mine, strict=True):
            if begins or (not closing and name == told):
                found.append(0)
            found[-1] += count
            begins = closing and name == told
    return found


def _head_macs(tower: Any, tokens: int) -> int:
    """Of SigLIP's pooling head, which runs although nobody reads it: one query over all tokens."""
    width = int(tower.config.hidden_size)
    return (2 + 2 * tokens) * width**2 + 2 * tokens * width + linear_macs(tower.head.mlp)
