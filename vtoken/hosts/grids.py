"""Images and videos that come as rows of patches with a grid (t, h, w) each: what Qwen's models and VideoLLaMA3 share.

Their processors hand out patches block by block: the square of a merge size of consecutive ones becomes one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtoken.core.config import MethodConfig
from vtoken.core.patch import base_of
from vtoken.core.visual import Cell, Encoded, Needs, Visual
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, ShapeError, UnsupportedModelError
from vtoken.prompts.family import Family, linear_macs, need

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class GridFamily(Family):
    """A model whose `get_image_features` takes patches [sum(t * h * w), C] and `image_grid_thw`; videos alike."""

    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    side: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
    #: Attribute of the inner model that holds the tower, the way from there to its blocks, and a block's attention.
    tower_name: ClassVar[str] = "visual"
    path: ClassVar[tuple[str, ...]] = ("blocks",)
    attention: ClassVar[str] = "attn"
    #: What makes keys in an attention.
    keys: ClassVar[str] = "qkv"
    #: Attribute of the tower that embeds patches.
    embedding: ClassVar[str] = "patch_embed"
    #: Further arguments of the two functions with a row for every visual, without the kind in front.
    per_visual: ClassVar[tuple[str, ...]] = ()
    #: Modules (of transformers.models) of classes whose cells have runs of their own.
    apart: ClassVar[frozenset[str]] = frozenset()

    def tower(self, model: Any) -> Any:
        """The image tower."""
        return getattr(model.model, self.tower_name)

    def merges(self, model: Any, given: dict[str, Any], kind: str) -> list[int]:
        """Of every visual of a kind, how many patches along one side become one token."""
        return [self.side_of(model)] * len(given[f"{kind}_grid_thw"])

    def side_of(self, model: Any) -> int:
        """Patches along one side of a token of an image."""
        return int(model.config.vision_config.spatial_merge_size)

    def blocks_of(self, model: Any) -> list[Any]:
        """The blocks of the tower; raises UnsupportedModelError if a part of it is not the family's own."""
        tower: Any = self.tower(model)
        self.check_known(model, (tower, f"model.{self.tower_name}"))
        modules = {f"transformers.models.{module}.modeling_{module}" for module, _ in self.models}
        blocks: Any = tower
        for name in self.path:
            blocks = getattr(blocks, name, [])
        strange = [b for b in blocks if base_of(type(b)).__module__ not in modules or not hasattr(b, self.attention)]
        if not len(blocks) or strange or not all(hasattr(getattr(b, self.attention), self.keys) for b in blocks):
            raise UnsupportedModelError(
                f"cannot shorten the prompts of transformers {type(model).__name__}: its image tower is a "
                f"{type(tower).__qualname__} whose blocks are not understood. The model was left as it was."
            )
        return list(blocks)

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """Attention inside a window says nothing of the image; there is no class token."""
        facts = self.facts(model, {})
        inside = [layer for layer in needs.layers if layer in facts.windowed]
        if inside:
            whole = [i for i in range(facts.depth) if i not in facts.windowed]
            raise ConfigError(
                f"block {inside[0]} of {type(model).__name__}'s tower attends inside windows, where tokens of small "
                f"ones look better; only {whole} see the whole image: start_layer must leave out the others"
            )
        if needs.attention == "class":
            raise ConfigError(f"the tower of {type(model).__name__} has no class token")

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """From the grids alone."""
        found = []
        for kind, name in _PIXELS.items():
            pixels = given.get(name)
            if pixels is None:
                continue
            grids = torch.as_tensor(need(model, given, f"{kind}_grid_thw"))
            patches, merges = int(grids.prod(1).sum()), self.merges(model, given, kind)
            if len(pixels) != patches:
                raise ShapeError(f"{name} has {len(pixels)} patches, {kind}_grid_thw speaks of {patches}")
            role, frames = ("image", 1) if kind == "image" else ("frame", self.frames_per_cell(model))
            for (cells, height, width), merge in zip(grids.tolist(), merges, strict=True):
                grid = (Cell((height // merge, width // merge), role),) * cells
                apart = kind == "video" and self.is_apart(model)
                found.append(Visual(kind, grid, frames_per_cell=frames, apart=apart, patches=height * width))
        return found

    def frames_per_cell(self, model: Any) -> int:
        """Frames that the tower makes one cell of."""
        return int(getattr(model.config.vision_config, "temporal_patch_size", 1))

    def is_apart(self, model: Any) -> bool:
        """Whether every cell of a video has a run of placeholders of its own."""
        return any(c.__module__.split(".")[2:3] == [name] for c in base_of(type(model)).__mro__ for name in self.apart)

    def encode(self, model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
        """By the model's own `get_image_features` or `get_video_features`; long videos in pieces.

        Pieces of a video are its cells, as no token looks beyond its own.
        """
        kind, inner, seen = visuals[0].kind, model.model, list[Tensor]()
        last, before = len(self.blocks_of(model)) - 1, "before" in needs.features
        watch = Watch.of(needs, last, joined=True)
        if watch.reads or before:
            inner = self.watched(model, watch, self.reading(model, seen.append) if before else {})
        run = getattr(inner, f"get_{kind}_features")
        outs = [run(**named, return_dict=True) for named in self._pieces(given, kind, visuals, needs)]
        merges, grids = self.merges(model, given, kind), torch.as_tensor(given[f"{kind}_grid_thw"])
        patches = grids.prod(1).tolist()
        lengths = [n // merge**2 for n, merge in zip(patches, merges, strict=True)]
        out = outs[0]
        if len(outs) == 1:
            levels = [_split(level, lengths) for level in _levels(out)]
        else:
            pieces = zip(*([_joined(level) for level in _levels(o)] for o in outs), strict=True)
            levels = [list(torch.cat(level).split(lengths)) for level in pieces]
            out = self.outputs(model, out, levels)
        read = {"before": seen[0]} if seen else {}
        rows = watch.each(last)[0]
        if rows:
            read["attention"] = torch.stack([row[0].to(rows[-1][0].device) for row in rows], dim=-1)
        if watch.keys is not None:
            read["keys"] = watch.keys
        taps = {}
        for tap, found in read.items():
            if len(found) != sum(lengths):  # rows of patches
                found = self.tokens_of(model, found, grids, merges)
            taps[tap] = [row.T if tap == "attention" else row for row in found.split(lengths)]
        return Encoded({kind: out}, levels, taps.get("attention"), taps.get("before"), taps.get("keys"))

    def _pieces(
        self, given: dict[str, Any], kind: str, visuals: Sequence[Visual], needs: Needs
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The arguments of every run: one, or of every video a few cells at a time."""
        name, grid, more = _PIXELS[kind], f"{kind}_grid_thw", [f"{kind}_{n}" for n in self.per_visual]
        pixels, grids = given[name], given[grid]
        cells = None if needs.chunk is None or kind == "image" else max(1, needs.chunk // visuals[0].frames_per_cell)
        if cells is None or int(grids[:, 0].sum()) <= cells:
            return [{n: given[n] for n in (name, grid, *more)}]
        found = []
        for v, (rows, (_, height, width)) in enumerate(
            zip(pixels.split(grids.prod(1).tolist()), grids.tolist(), strict=True)
        ):
            for part in rows.split(cells * height * width):
                thw = grids.new_tensor([[len(part) // (height * width), height, width]])
                found.append({name: part, grid: thw} | {n: given[n][v : v + 1] for n in more})
        return found

    def tokens_of(self, model: Any, values: Tensor, grids: Tensor, merges: Sequence[int]) -> Tensor:
        """Of values [patches, c] in the tower's order the means over a token's patches, in the order of the prompt.

        Args:
            merges: of every visual, how many patches along one side become one token.
        """
        parts, order = zip(values.split(grids.prod(1).tolist()), merges, strict=True), self.order(model, grids)
        tokens = torch.cat([part.unflatten(0, (-1, merge**2)).mean(1) for part, merge in parts])
        return tokens if order is None else tokens.index_select(0, order.to(tokens.device))

    def visual(self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] = ()) -> Visual:
        """One image of `size` pixels, rounded to whole tokens as the processor does within its limits."""
        side = int(model.config.vision_config.patch_size) * self.side_of(model)
        height, width = (max(1, round(s / side)) for s in size)
        return Visual("image", (Cell((height, width)),))

    def tower_macs(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        """From its measures: patch embedding, linear layers, and attention over the image or inside windows."""
        tower, spec, windowed = self.tower(model), self.spec(model), self.facts(model, {}).windowed
        merge = self.side_of(model)
        rows, columns = (side * merge for side in self.visual(model, size).cells[0].grid)
        patches, pairs = rows * columns, (rows * columns) ** 2
        side = int(getattr(tower, "window_size", 0)) // int(model.config.vision_config.patch_size)
        inside = _squares(rows, side) * _squares(columns, side) if windowed else pairs
        embedding = getattr(tower, self.embedding).named_parameters()
        total = patches * sum(p.numel() for n, p in embedding if n.endswith("weight"))
        for i, block in enumerate(self.blocks_of(model)):
            total += patches * linear_macs(block) + 2 * spec.width * (inside if i in windowed else pairs)
        return total, total

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """All rows of attention in every layer that is read."""
        needs = self.method(model, configs).needs(self.facts(model, {}))
        patches = self.visual(model, size).content * self.side_of(model) ** 2
        return len(needs.layers) * patches**2 * self.spec(model).width

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """There is no size of its own."""
        raise ShapeError(f"{type(model).__name__} takes images of any size: say which, in pixels")

    def watched(self, model: Any, watch: Watch, parts: dict[str, Any]) -> Any:
        """The inner model with a watched tower, and with `parts` of `reading` in place of their own."""
        raise NotImplementedError

    def reading(self, model: Any, take: Callable[[Tensor], None]) -> dict[str, Any]:
        """What stands, by attribute, in the model so that patches are taken as they leave the tower's blocks."""
        raise NotImplementedError

    def order(self, model: Any, grids: Tensor) -> Tensor | None:
        """Where every token of the prompt is among those of the tower; None: in the same order."""
        return None


def _levels(out: Any) -> list[Any]:
    """Features of every level: rows of all visuals, or split already, over the releases."""
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]


def _split(level: Any, lengths: list[int]) -> list[Tensor]:
    return list(level.split(lengths) if isinstance(level, Tensor) else level)


def _joined(level: Any) -> Tensor:
    return level if isinstance(level, Tensor) else torch.cat(list(level))


def _squares(length: int, side: int) -> int:
    """Sum of the squares of the pieces of a line that is cut every `side`."""
    return length // side * side**2 + (length % side) ** 2
