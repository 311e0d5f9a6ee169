"""Images and videos that come as rows of patches with a grid (t, h, w) each: what Qwen's models and VideoLLaMA3 share.

Their processors hand out patches block by block: the square of a merge size of consecutive ones becomes one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.core.patch import base_of
from vtoken.core.spec import HostSpec
from vtoken.core.visual import Cell, Encoded, Needs, Visual
from vtoken.core.watch import Watch
from vtoken.errors import ShapeError, UnsupportedModelError
from vtoken.prompts.family import Family, need

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
    #: Further arguments of the two functions with a row for every visual, without the kind in front.
    per_visual: ClassVar[tuple[str, ...]] = ()
    #: Modules (of transformers.models) of classes whose cells have runs of their own.
    apart: ClassVar[frozenset[str]] = frozenset()

    def tower(self, model: Any) -> Any:
        """The image tower."""
        return getattr(model.model, self.tower_name)

    def merges(self, model: Any, given: dict[str, Any], kind: str) -> list[int]:
        """Of every visual of a kind, how many patches along one side become one token."""
        return [int(model.config.vision_config.spatial_merge_size)] * len(given[f"{kind}_grid_thw"])

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

    def measured(self, model: Any, width: int, heads: int) -> HostSpec:
        """A tower of images of any size, without a class token."""
        return HostSpec(
            name=type(model).__name__,
            depth=len(self.blocks_of(model)),
            width=width,
            num_heads=heads,
            head_dim=width // heads,
            num_prefix=0,
            grid=(1, 1),
            pooling="",
            position="rotary",
            fixed_size=False,
            class_token=False,
        )

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
