"""Image features of the LLaVA family: how its visuals lie, and what the tower says of their tokens.

Source: docs/methods/vtc_cls.md 2, 3, 5, 8.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.core.bound import changed
from vtoken.core.patch import is_patched, view
from vtoken.core.visual import Cell, Encoded, Needs, Visual
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, ShapeError
from vtoken.hosts.exchanged import Overheard
from vtoken.hosts.hidden_states import LAYER_NAMES, STRATEGY, drops_first, last_read
from vtoken.hosts.transformers.families import num_prefix

#: Where transformers keeps the image tower inside the inner model.
TOWER_NAMES = ("vision_tower", "image_tower")
#: Names of the images' argument, over the versions.
PIXELS = ("pixel_values", "pixel_values_images")
#: Arguments that say how images are encoded; they go once images have become features.
IMAGE_SIDE = (
    *PIXELS, *LAYER_NAMES, "image_sizes", "batch_num_images", STRATEGY, "vision_aspect_ratio",
    "interpolate_pos_encoding",
)  # fmt: skip


def tower_of(model: Any) -> tuple[str, Any]:
    """Name and module of the image tower of a LLaVA-like model."""
    name = next(n for n in TOWER_NAMES if hasattr(model.model, n))
    return name, getattr(model.model, name)


def feature_layer(model: Any, given: dict[str, Any] | None = None) -> int:
    """The block whose output the projector reads, -1 for the embeddings; of several layers the last one."""
    return last_read(model.config, int(tower_of(model)[1].config.num_hidden_layers), given)


def image_arguments(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Of a call's arguments those that the model's `get_image_features` takes, by name or for its tower."""
    takes = {*inspect.signature(model.model.get_image_features).parameters, "interpolate_pos_encoding"}
    return {name: value for name, value in given.items() if name in takes and value is not None and name in IMAGE_SIDE}


def encode(model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
    """Run the tower and the projector as the model would, and note what a method needs on the way.

    Args:
        model: the top-level model, whose `model` owns tower and projector.
        given: the arguments of the call, by name.
    """
    name, tower = tower_of(model)
    reads = needs.attention != "none" or "keys" in needs.features
    last = feature_layer(model, given)
    rows, packing, seen = Watch.of(needs, last), Packing(model.model), list[Tensor]()
    if reads and not is_patched(tower):
        raise changed("the image tower", tower)
    parts: dict[str, Any] = {name: functools.partial(tower, vtoken_rows=rows)} if is_patched(tower) else {}
    if "before" in needs.features:
        parts["multi_modal_projector"] = Overheard(model.model.multi_modal_projector, before=seen.append)
    packs = hasattr(model.model, "pack_image_features")
    if packs:
        parts["pack_image_features"] = packing.watch
    output = view(model.model, **parts).get_image_features(**image_arguments(model, given))
    first, prefix = int(drops_first(model, given)), num_prefix(tower)
    each, anchors = rows.each(last)
    features = list(output.pooler_output)
    device = features[0].device
    fixed = visuals[0].fixed

    def laid_out(values: Tensor, blank: float, skip: int = 0) -> list[Tensor]:
        """Values [crops, T, c] in the order of an image's placeholders; without separators and `skip` fixed ones."""
        found = packing.packed(values, blank) if packs else list(values)
        found = [value.to(device) for value in found]
        places = [v.places().to(device) for v in visuals]
        if packs:
            return [value.index_select(0, at) for value, at in zip(found, places, strict=True)]
        return [value[skip:] for value in found]

    attention = keys = before = None
    if each:
        stacked = torch.stack([row.to(each[-1].device) for row in each], dim=-1)[:, first:]
        attention = [row.T for row in laid_out(stacked, -1.0)]
    if rows.keys is not None:
        keys = laid_out(rows.keys[:, first:].to(rows.keys), 0.0, fixed)
    if seen:
        before = laid_out(seen[0], 0.0, fixed)
    places = None if anchors is None else tuple((anchors[:, first:] - prefix).to(device))
    return Encoded({"image": output}, [features], attention, before, keys, places, first - prefix)


class Packing:
    """Notes how the model packs the crops of its images, so that anything can be packed in the very same way."""

    def __init__(self, inner: Any) -> None:
        self._pack = inner.pack_image_features if hasattr(inner, "pack_image_features") else None
        self._call: Any = None
        self._crops: list[int] = []

    def watch(self, image_features: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Stands where the model's `pack_image_features` stood."""
        assert self._pack is not None
        self._crops = [f.shape[0] for f in image_features]
        kwargs = dict(zip(list(inspect.signature(self._pack).parameters)[1:], args, strict=False)) | kwargs
        self._call = functools.partial(self._pack, **{k: v for k, v in kwargs.items() if k != "image_newline"})
        return self._pack(image_features, **kwargs)

    def packed(self, rows: Tensor, blank: float) -> list[Tensor]:
        """Rows [crops, N, c] as features of c channels: of every image [n, c], newlines `blank`."""
        packed, _ = self._call(rows.split(self._crops), image_newline=rows.new_full((rows.shape[2],), blank))
        return list(packed)


def packed_visual(model: Any, patches: int, crops: int, size: Sequence[int], aspect: Any = None) -> Visual:
    """One image that is cut into crops, as the model packs it: an overview, and a grid with newlines."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    if patches != side * side:
        raise ShapeError(f"{patches} tokens of a crop cannot be packed on a grid of {side} x {side}")
    # The two classes name different options; what is not given has the default of the configuration.
    options: dict[str, Any] = {STRATEGY: "full"}
    if hasattr(model.config, "vision_aspect_ratio"):
        options = {"vision_aspect_ratio": model.config.vision_aspect_ratio if aspect is None else aspect}
    packed, _ = model.model.pack_image_features(
        [torch.zeros(crops, patches, 1)], [list(size)], image_newline=torch.tensor([-1.0]), **options
    )
    lines = (packed[0][:, 0] < 0).nonzero()[:, 0].tolist()
    content = len(packed[0]) - len(lines)
    if crops == 1:
        return Visual("image", (Cell((side, side)),), tuple(lines))
    detail = content - patches
    rows = len(lines)
    if rows and detail % rows:
        raise ConfigError(f"a detail grid of {detail} tokens in {rows} rows is not understood")
    cells = [Cell((side, side), "overview")]
    if rows or detail:
        cells.append(Cell((rows, detail // rows) if rows else (1, detail), "detail"))
    return Visual("image", tuple(cells), tuple(lines))
