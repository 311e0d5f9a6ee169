"""The front of the engine: how many tokens of an image stay, before it is encoded, and what a request may ask for.

Mixins in front of a model's own classes in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement

from vtoken.errors import ConfigError, InputError
from vtoken.serving.pruning import SETTINGS, Pruning, settings_in
from vtoken.serving.vllm.hooks import need

#: Fields that travel with an image: rows that it has in the prompt, and what its request asked for.
ROWS, ASKED = "image_rows", "vtoken_asked"

need(BaseMultiModalProcessor, "_apply_hf_processor_main", "mm_items", "hf_kwargs")
need(BaseMultiModalProcessor, "_get_prompt_updates", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs")
need(BaseMultiModalProcessor, "_get_mm_fields_config", "hf_inputs", "hf_processor_mm_kwargs")


def written(asked: Mapping[str, Any]) -> Tensor:
    """What a request asks for, as bytes [n] uint8: fields are tensors, and floats might lose digits on the way."""
    return torch.tensor(list(json.dumps(asked).encode()), dtype=torch.uint8)


def read(field: Tensor) -> dict[str, Any]:
    """What `written` wrote."""
    asked: dict[str, Any] = json.loads(bytes(field.tolist()))
    return asked


class PruningInfo:
    """Of a model's images, with the counts of its method."""

    @cached_property
    def pruning(self: Any) -> Pruning:
        """The method, from the settings in the config."""
        config = self.get_hf_config()
        return Pruning(config, settings_in(config))

    @property
    def model_id(self: Any) -> str:
        """Part of every image's hash, by which features are cached: the settings belong to it."""
        return f"{self.ctx.model_config.model}|{json.dumps(self.pruning.settings.to_dict())}"

    @cached_property
    def allowed_mm_limits(self: Any) -> Mapping[str, int]:
        """Images alone."""
        own = super().allowed_mm_limits  # type: ignore[misc]
        return {kind: limit if kind == "image" else 0 for kind, limit in own.items()}

    def get_mm_max_tokens_per_item(self: Any, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """Of the whole image, which a request may ask for."""
        return {"image": self.get_max_image_tokens()}


class PruningProcessor:
    """Puts as many placeholders into a prompt as stay of its images."""

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        given = info.ctx.get_mm_config().mm_processor_kwargs or {}
        if SETTINGS in given:
            raise ConfigError(f"{SETTINGS} in mm_processor_kwargs is for requests; the engine's own is in hf_overrides")
        info.pruning  # noqa: B018 - settings that do not fit are refused when the engine starts
        super().__init__(info, *args, **kwargs)  # type: ignore[call-arg]

    def _apply_hf_processor_main(self: Any, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        pruning: Pruning = self.info.pruning
        asked, rest = pruning.asked(hf_kwargs.get(SETTINGS, {})), _without(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=rest)  # type: ignore[misc]
        if "pixel_values" in data:
            lengths = [pruning.length(visual, asked) for visual in pruning.visuals(data)]
            data[ROWS] = torch.tensor(lengths)
            data[ASKED] = written(asked).expand(len(lengths), -1)
        elif "image_embeds" in data and asked:
            raise InputError(f"{SETTINGS}={asked} asks for fewer rows of images that come as ready rows")
        elif "image_embeds" in data and ROWS not in data:
            data[ROWS] = torch.tensor([len(rows) for rows in data["image_embeds"]])
        return data

    def _get_mm_fields_config(self: Any, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        own = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return dict(own) | {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (ROWS, ASKED)}

    def _get_prompt_updates(
        self: Any, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:  # fmt: skip
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items=mm_items, hf_processor_mm_kwargs=_without(hf_processor_mm_kwargs), out_mm_kwargs=out_mm_kwargs
        )

        def placeholders(token: int) -> Any:
            return lambda i: [token] * int(out_mm_kwargs["image"][i][ROWS].data)

        return [
            PromptReplacement(modality="image", target=update.target, replacement=placeholders(update.target[0]))
            for update in updates
            if update.modality == "image"
        ]


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != SETTINGS}
