"""Images of Idefics3 and SmolVLM: a run of placeholders for every tile, behind the name of its row and column.

The last tile shows the whole image and has a name of its own; the token in front of a row's last run is that name. A
frame of a video comes as an image of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vtoken.core.visual import Cell
from vtoken.errors import ShapeError
from vtoken.hosts.exchanged import Exchanged
from vtoken.hosts.tiles import Run, Tiles, named_in_front
from vtoken.prompts.family import rows_of


class Idefics(Tiles):
    """Rows of a batch are filled up with black tiles, which the model leaves out."""

    name = "transformers Idefics3 and SmolVLM"
    models = frozenset(
        {("idefics3", "Idefics3ForConditionalGeneration"), ("smolvlm", "SmolVLMForConditionalGeneration")}
    )
    towers = frozenset({("idefics3", "Idefics3VisionTransformer"), ("smolvlm", "SmolVLMVisionTransformer")})
    tower_name = "vision_model"
    side = ("pixel_values", "pixel_attention_mask")

    def side_of(self, model: Any) -> int:
        """The factor of its settings."""
        return int(model.config.scale_factor)

    def images(self, ids: Tensor, runs: list[Run], tiles: list[int]) -> list[int]:
        """The tile that shows it all is the last one of its image."""
        return named_in_front(ids, runs, tiles, closing=True)

    def tiles(self, model: Any, given: dict[str, Any], runs: list[Run]) -> list[int]:
        """By placeholders alone: of the tiles [B, T, C, H, W] some fill rows up, as only values would tell."""
        pixels, rows = given["pixel_values"], len(given["input_ids"])
        self._check_pixels(model, pixels, rows)
        size, most = Cell(self.grid(model)).tokens, int(pixels.shape[1])
        found = [run.length // size for run in runs]
        if any(run.length % size for run in runs):
            found = [1] * len(runs)  # short already, with a run a tile
        for row in range(rows):
            mine = sum(n for n, run in zip(found, runs, strict=True) if run.row == row)
            if mine > most:
                raise ShapeError(
                    f"row {row} of the prompt has placeholders of {mine} tiles ({size} each), pixel_values room for "
                    f"{most}: the processor and the model disagree on the token count"
                )
        return found

    def _check_pixels(self, model: Any, pixels: Tensor, rows: int) -> None:
        if pixels.dim() != 5 or len(pixels) != rows:
            raise ShapeError(
                f"pixel_values of {type(model).__name__} are [B, tiles, C, H, W] with a row for every row of the "
                f"prompt, got {tuple(pixels.shape)} for {rows} row(s)"
            )
        own = self.image_size(model)
        if tuple(pixels.shape[-2:]) != own:
            raise ShapeError(f"tiles of {type(model).__name__} are {own}, got {tuple(pixels.shape[-2:])}")

    def check_tokens(self, model: Any, out: Any, given: dict[str, Any], lengths: Sequence[int]) -> None:
        """Raise ShapeError if the tower saw other tiles than the prompt names."""
        size, total = Cell(self.grid(model)).tokens, sum(lengths)
        got = len(rows_of(out))
        if got != total:
            raise ShapeError(
                f"the prompt names {total // size} tile(s), {type(model).__name__}'s tower saw {got // size}: a tile "
                "that is black all over counts as padding and vanishes, or rows of pixel_values and of the prompt do "
                "not belong together"
            )

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """Behind the shuffle, in front of the projection."""
        connector = model.model.connector

        def shuffled(rows: Tensor, factor: int) -> Tensor:
            out: Tensor = connector.pixel_shuffle(rows, factor)
            take(out)
            return out

        return {"connector": Exchanged(connector, {"pixel_shuffle": shuffled})}

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """By the projection behind the shuffle."""
        projected: Tensor = model.model.connector.modality_projection(rows)
        return projected

    def projector_macs(self, model: Any) -> int:
        """Of that projection."""
        return sum(p.numel() for p in model.model.connector.modality_projection.parameters() if p.dim() == 2)

    def cut(self, model: Any, size: tuple[int, int]) -> int:
        """As processors do that cut: whole tiles over both sides."""
        height, width = self.image_size(model)
        return math.ceil(size[0] / height) * math.ceil(size[1] / width)
