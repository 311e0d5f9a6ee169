"""Image features of the LLaVA family, a score for every one, and which of them stay.

Source: docs/methods/vtc_cls.md 2, 3, 5, 8.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtoken.core.bound import changed
from vtoken.core.method import FeatureMethod
from vtoken.core.patch import is_patched, view
from vtoken.core.watch import Watch
from vtoken.hosts.transformers.families import num_prefix
from vtoken.prompts.calls import chosen

#: Where transformers keeps the image tower inside the inner model.
TOWER_NAMES = ("vision_tower", "image_tower")
#: Names of the images' argument and of the feature layer's, over the versions.
PIXELS = ("pixel_values", "pixel_values_images")
LAYER_NAMES = ("vision_feature_layer", "vision_feature_layers")
#: Arguments that say how images are encoded; they go once images have become features.
_IMAGE_SIDE = (
    *PIXELS, *LAYER_NAMES, "image_sizes", "batch_num_images", "vision_feature_select_strategy", "vision_aspect_ratio",
    "interpolate_pos_encoding",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of all images of one call and what stays of them.

    Args:
        output: what the model's own `get_image_features` returned.
        scores, kept: of every image, [n] float32 and [k] int64.
        scorer, layers: how the scores were made.
        first_patch, anchors: see PromptRecord.
    """

    output: Any
    scores: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    scorer: str
    layers: tuple[int, ...]
    first_patch: int
    anchors: tuple[Tensor, ...] | None

    @property
    def full_lengths(self) -> tuple[int, ...]:
        """Features of every image."""
        return tuple(len(s) for s in self.scores)

    @property
    def lengths(self) -> tuple[int, ...]:
        """What stays of them."""
        return tuple(len(k) for k in self.kept)

    def pruned(self) -> Any:
        """The model's output object with the features that stay, in the container that they came in."""
        features = self.output.pooler_output
        if self.lengths != self.full_lengths:
            rows = [f.index_select(0, k.to(f.device)) for f, k in zip(features, self.kept, strict=True)]
            features = torch.stack(rows) if isinstance(features, Tensor) else rows
        return chosen(type(self.output)(**{**self.output, "pooler_output": features}))


def tower_of(model: Any) -> tuple[str, Any]:
    """Name and module of the image tower of a LLaVA-like model."""
    name = next(n for n in TOWER_NAMES if hasattr(model.model, n))
    return name, getattr(model.model, name)


def feature_layer(model: Any, given: dict[str, Any] | None = None) -> int:
    """The block whose output the projector reads, -1 for the embeddings; of several layers the last one."""
    named = [(given or {}).get(n) for n in LAYER_NAMES] + [getattr(model.config, n, None) for n in LAYER_NAMES]
    value = next(v for v in named if v is not None)
    states = int(tower_of(model)[1].config.num_hidden_layers) + 1
    return max(v % states for v in ([value] if isinstance(value, int) else value)) - 1


def drops_first(model: Any, given: dict[str, Any] | None = None) -> bool:
    """Whether the first row that leaves the tower is thrown away: the class token, if there is one."""
    name = "vision_feature_select_strategy"
    strategy = (given or {}).get(name) or getattr(model.config, name, "default")  # ViP-LLaVA has no such setting
    return bool(strategy == "default")


def image_arguments(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Of a call's arguments those that the model's `get_image_features` takes, by name or for its tower."""
    takes = {*inspect.signature(model.model.get_image_features).parameters, "interpolate_pos_encoding"}
    return {name: value for name, value in given.items() if name in takes and value is not None and name in _IMAGE_SIDE}


def without_images(given: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments without those that say how images are encoded."""
    return {name: value for name, value in given.items() if name not in _IMAGE_SIDE}


def encode(model: Any, method: FeatureMethod, given: dict[str, Any]) -> ImageFeatures:
    """Run the tower and the projector as the model would, and choose what stays.

    Args:
        model: the top-level model, whose `model` owns tower and projector.
        method: chooses.
        given: the arguments of the call, by name.
    """
    name, tower = tower_of(model)
    last = feature_layer(model, given)
    scorer = method.scorer(num_prefix(tower) > 0)
    layers = method.layers(last, scorer)
    rows, packing = Watch(layers, scorer), _Packing(model.model)
    if not is_patched(tower):
        raise changed("the image tower", tower)
    parts: dict[str, Any] = {name: functools.partial(tower, vtoken_rows=rows)}
    if hasattr(model.model, "pack_image_features"):
        parts["pack_image_features"] = packing.watch
    output = view(model.model, **parts).get_image_features(**image_arguments(model, given))
    first = int(drops_first(model, given))
    found, anchors = rows.scores(last, method.ensemble)
    crops, always = found[:, first:], num_prefix(tower) - first
    scores = packing.scores(crops) if "pack_image_features" in parts else list(crops)
    device = output.pooler_output[0].device
    scores = [s.to(device) for s in scores]
    kept = tuple(_chosen(method, s, max(always, 0), crops.shape[1]) for s in scores)
    places = None if anchors is None else tuple((anchors[:, first:] - num_prefix(tower)).to(device))
    return ImageFeatures(output, tuple(scores), kept, scorer, tuple(layers), -always, places)


def _chosen(method: FeatureMethod, scores: Tensor, always: int, rows: int) -> Tensor:
    """Ascending indices of what stays; the first `always` features, a class token, do in any case."""
    best = method.choose(scores[always:], rows - always) + always
    return torch.cat([torch.arange(always, device=best.device), best])


class _Packing:
    """Notes how the model packs the crops of its images, so that scores can be packed in the very same way."""

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

    def scores(self, rows: Tensor) -> list[Tensor]:
        """Scores [crops, N] as one-channel features: of every image [n], newlines -1."""
        crops = rows.unsqueeze(-1).split(self._crops)
        packed, _ = self._call(crops, image_newline=rows.new_tensor([-1.0]))
        return [p[:, 0] for p in packed]
