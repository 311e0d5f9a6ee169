"""What QuoTA must know of a family of video models: where frames lie in the prompt, and their features.

Source: docs/methods/quota.md 9.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.host import HostAdapter, keys_of
from vtoken.errors import InputError

#: Arguments that say how images and videos are encoded; they go once these have become features.
VISION_SIDE = (
    "pixel_values", "pixel_values_videos", "image_sizes", "image_sizes_videos", "batch_num_images", "image_grid_thw",
    "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "image_merge_sizes", "video_merge_sizes",
    "video_compression_mask", "vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class VideoLayout:
    """How one video lies in a prompt; known before anything is run.

    Args:
        grid: rows and columns (H, W) of one cell's features, where they are resampled.
        default: rows and columns that the unmodified model makes of them.
        placeholders: of every cell in the prompt; a cell is a frame, or a few where the model merges frames in time.
        patches: tokens of one cell inside the tower.
        trailing: placeholders after the last cell, for separators.
        frames_per_cell: frames that become one cell.
    """

    grid: tuple[int, int]
    default: tuple[int, int]
    placeholders: tuple[int, ...]
    patches: int
    trailing: int = 0
    frames_per_cell: int = 1

    @property
    def cells(self) -> int:
        """T."""
        return len(self.placeholders)

    @property
    def default_tokens(self) -> int:
        """n, tokens of one cell in the unmodified model."""
        return self.default[0] * self.default[1]

    @property
    def length(self) -> int:
        """All its placeholders."""
        return sum(self.placeholders) + self.trailing


@dataclass(frozen=True, eq=False)
class VideoFeatures:
    """One video behind the tower: enough to answer any number of questions about it.

    Args:
        layout: how it lies in a prompt.
        grid: features [T, H, W, C].
        extra: more levels of features that are resampled alike, each [T, H, W, C'].
        newline: separator embedding [C], if the model has one.
        inputs: what the model needs to number positions, such as its grid; one row each.
    """

    layout: VideoLayout
    grid: Tensor
    extra: tuple[Tensor, ...] = ()
    newline: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> VideoFeatures:
        """The same on another device."""
        return replace(
            self,
            grid=self.grid.to(device),
            extra=tuple(level.to(device) for level in self.extra),
            newline=None if self.newline is None else self.newline.to(device),
            inputs={name: value.to(device) for name, value in self.inputs.items()},
        )


class VideoAdapter(HostAdapter):
    """Knowledge of one family of video models. Subclass it and pass the class to `vtoken.register_adapter`.

    The arguments `given` of its methods are those of the model's own call, by name.
    """

    part = "video"
    package = "transformers"
    #: Classes that it knows: module of transformers.models and class name.
    models: frozenset[tuple[str, str]] = frozenset()
    #: "none", "video" (one separator after the last frame) or "row" (one after each row of each frame).
    newline: str = "none"
    #: A "single" run of placeholders, or one "per_frame" with text between, where a frame keeps a token by default.
    runs: str = "single"
    #: How the unmodified model comes from grid to default: "bilinear" or "pool".
    pooling: str = "bilinear"
    #: How tokens enter: "embeds", or "encoder_outputs" where more than embeddings are needed.
    inject: str = "embeds"

    def supported(self) -> str:
        """Its classes."""
        return f"transformers {', '.join(sorted(name for _, name in self.models))}"

    def matches(self, model: nn.Module) -> bool:
        """Whether the model is of one of the classes, or a subclass of one."""
        return any(key in self.models for key in keys_of(type(model)))

    def ready(self, model: Any, given: dict[str, Any]) -> None:
        """Raise, before anything runs, if something that was applied to the model cannot serve this call."""

    def layouts(self, model: Any, given: dict[str, Any]) -> list[VideoLayout]:
        """How the videos of a call lie in its prompt, in prompt order; nothing is run."""
        raise NotImplementedError

    def encode(self, model: Any, given: dict[str, Any], chunk: int | None) -> list[VideoFeatures]:
        """Features of the videos of a call, at most `chunk` frames in one run of the tower."""
        raise NotImplementedError

    def finish(self, model: Any, tokens: Tensor) -> Tensor:
        """What is done to all tokens [N, C] after resampling."""
        return tokens

    def placeholder_id(self, model: Any) -> int:
        """Id of a video placeholder."""
        config = model.config
        return int(config.video_token_id if hasattr(config, "video_token_id") else config.video_token_index)

    def image_id(self, model: Any) -> int:
        """Id of an image placeholder."""
        config = model.config
        return int(config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index)

    def positions(
        self, model: Any, given: dict[str, Any], *, generating: bool
    ) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
        """Positions [axes, B, L] of the full prompt and the model's own offset [B, 1] for what follows.

        None for models that count positions along one axis.
        """
        return None

    def go_on(self, model: Any, deltas: Tensor) -> None:
        """Let a model with several axes know the offset [B, 1] with which text after the cached prompt is numbered."""

    def handed_over(self, model: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What to call, with which arguments, for a call that holds `mm_encoder_outputs` or `inputs_embeds`."""
        return model, call

    def outputs(self, model: Any, levels: Sequence[Sequence[Tensor]]) -> Any:
        """Of every level of features the tokens of every video, as the model hands them to itself."""
        raise NotImplementedError

    def images(self, model: Any, given: dict[str, Any]) -> Any:
        """What the model's own image path makes of the images of a call; its `pooler_output` holds their tokens."""
        takes = inspect.signature(model.model.get_image_features).parameters
        named = {name: given[name] for name in VISION_SIDE if name in takes and given.get(name) is not None}
        return model.model.get_image_features(**named, return_dict=True)


def embed(model: Any, ids: Tensor, tokens: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Embeddings [B, L, C] of ids [B, L] with the placeholders of some ids replaced by rows [N, C] in order."""
    embeds: Tensor = model.get_input_embeddings()(ids)
    for token_id, rows in tokens:
        places = ids == token_id
        if int(places.sum()) != len(rows):
            raise InputError(f"{int(places.sum())} placeholders with id {token_id} for {len(rows)} tokens")
        embeds = embeds.masked_scatter(places.unsqueeze(-1).to(embeds.device), rows.to(embeds.device, embeds.dtype))
    return embeds


def chunks(total: int, size: int | None) -> list[tuple[int, int]]:
    """Bounds of runs of at most `size` of `total`; None is one run."""
    step = total if size is None else max(size, 1)
    return [(start, min(start + step, total)) for start in range(0, total, max(step, 1))]
