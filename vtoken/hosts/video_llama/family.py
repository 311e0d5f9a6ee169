"""Images and videos of VideoLLaMA3: a run of placeholders for every frame, with its time before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vtoken.core.patch import view
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Cell, Encoded, Needs, TowerFacts, Visual
from vtoken.core.watch import Watch
from vtoken.errors import ShapeError
from vtoken.hosts.by_name import watched_by_name
from vtoken.hosts.exchanged import Overheard
from vtoken.hosts.grids import GridFamily
from vtoken.prompts.family import linear_macs, need


class VideoLlama3(GridFamily):
    """A token is the mean of a block of patches; processors may leave out those of frames that stand still."""

    name = "transformers VideoLLaMA3"
    models = frozenset({("video_llama_3", "VideoLlama3ForConditionalGeneration")})
    side = (*GridFamily.side, "image_merge_sizes", "video_merge_sizes", "video_compression_mask")
    tower_name, path, attention, keys = "vision_model", ("encoder", "layers"), "self_attn", "k_proj"
    embedding, per_visual = "embeddings", ("merge_sizes",)
    apart = frozenset({"video_llama_3"})

    def spec(self, model: nn.Module) -> HostSpec:
        """The measures of the tower; raises UnsupportedModelError if a part of it is not the family's own."""
        blocks = self.blocks_of(model)
        attn = blocks[0].self_attn
        return self.measured(model, blocks, int(attn.embed_dim), int(attn.num_heads))

    def facts(self, model: Any, given: dict[str, Any]) -> TowerFacts:
        """No class token; the projector works token by token."""
        depth = len(self.tower(model).encoder.layers)
        return TowerFacts(depth=depth, last=depth - 1, per_token=True)

    def merges(self, model: Any, given: dict[str, Any], kind: str) -> list[int]:
        """As the processor says, of every visual by itself."""
        return [int(size) for size in need(model, given, f"{kind}_merge_sizes")]

    def side_of(self, model: Any) -> int:
        """The processor's own merge size of images is 1."""
        return 1

    def frames_per_cell(self, model: Any) -> int:
        """Frames are not merged in time."""
        return 1

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """The processor's compression mask says how many placeholders every frame has."""
        found, mask = super().layout(model, given), given.get("video_compression_mask")
        if mask is None or given.get("pixel_values_videos") is None:
            return found
        total = sum(visual.content for visual in found if visual.kind == "video")
        if len(mask) != total:
            raise ShapeError(f"video_compression_mask has {len(mask)} entries for {total} features")
        cells = [cell for visual in found if visual.kind == "video" for cell in visual.cells]
        kept = iter([int(part.sum()) for part in mask.split([cell.tokens for cell in cells])])
        thinned = [
            tuple(cell if n == cell.tokens else Cell((1, n), cell.role, cell.grid) for cell, n in zip(v.cells, kept))  # noqa: B905
            if v.kind == "video"
            else v.cells
            for v in found
        ]
        return [replace(v, cells=cells) for v, cells in zip(found, thinned, strict=True)]

    def encode(self, model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
        """What the processor left out goes, but for who resamples whole frames."""
        made, mask = super().encode(model, given, visuals, needs), given.get("video_compression_mask")
        if visuals[0].kind == "image" or mask is None:
            return made
        rows = made.levels[0]
        kept = [part.nonzero()[:, 0] for part in mask.split([len(own) for own in rows])]

        def thinned(values: Sequence[Tensor] | None, dim: int = 0) -> Any:
            if values is None:
                return None
            return [value.index_select(dim, at.to(value.device)) for value, at in zip(values, kept, strict=True)]

        stay = thinned(rows)
        return Encoded(
            {"video": self.outputs(model, made.outputs["video"], [stay])},
            [stay],
            thinned(made.attention, 1),
            thinned(made.before),
            thinned(made.keys),
            native=[_cells(own, visual) for own, visual in zip(rows, visuals, strict=True)],
        )

    def watched(self, model: Any, watch: Watch, parts: dict[str, Any]) -> Any:
        """The projector stands behind the tower."""
        tower = watched_by_name(watch, self.tower(model), self.path, self.attention, self.keys)
        return view(model.model, vision_model=tower, **parts)

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """Behind the mean over a block."""
        return {"projector": Overheard(model.model.projector, before=take)}

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """By the projector."""
        projected: Tensor = model.model.projector(rows)
        return projected

    def projector_macs(self, model: Any) -> int:
        """Of the projector."""
        return linear_macs(model.model.projector)


def _cells(rows: Tensor, visual: Visual) -> tuple[Tensor, ...]:
    """Rows of all frames [T * H * W, C] as [H, W, C] of each."""
    grid = next(cell.native or cell.grid for cell in visual.cells)
    return tuple(rows.unflatten(0, (-1, *grid)))
