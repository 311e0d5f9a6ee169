"""LLaVA and LLaVA-NeXT in vLLM that shorten their own images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtoken.core.visual import Encoded
from vtoken.hosts.hidden_states import drops_first
from vtoken.serving.pruning import Pruning, settings_in
from vtoken.serving.vllm.hooks import need
from vtoken.serving.vllm.processing import ASKED, ROWS, PruningInfo, PruningProcessor, read
from vtoken.serving.vllm.taps import Taps, refuse

for _stock in (llava.LlavaForConditionalGeneration, llava_next.LlavaNextForConditionalGeneration):
    need(_stock, "embed_multimodal", "kwargs")
#: transformers 5 writes the tower's weights under its own names, vLLM reads those of the hub. Both are loaded.
_OWN_NAMES = {
    f"vision_tower.{part}": f"vision_tower.vision_model.{part}"
    for part in ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")
}


class _Llava:
    """Mixin in front of vLLM's class."""

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.pruning = Pruning(self.config, settings_in(self.config))
        refuse(self.pruning.needs, vllm_config)

    def embed_multimodal(self: Any, **kwargs: Any) -> Any:
        """Rows of every image, [k, C] each: ready ones as they are, others shortened."""
        kwargs.pop(ROWS, None)
        if kwargs.get("image_embeds") is not None:
            return tuple(kwargs["image_embeds"])  # of any lengths; vLLM's own wants equal ones in a step
        if kwargs.get("pixel_values") is None:
            return []
        asked = [read(field) for field in kwargs.pop(ASKED)]
        pruning: Pruning = self.pruning
        visuals = pruning.visuals(kwargs)
        layers = [layer.self_attn.attn for layer in self.vision_tower.vision_model.encoder.layers]
        with Taps(pruning.needs, layers, None, self.multi_modal_projector) as taps:
            features = list(super().embed_multimodal(**kwargs))  # type: ignore[misc]
        first, fixed = int(drops_first(pruning.model)), visuals[0].fixed
        attention = keys = before = None
        if pruning.needs.layers:
            rows = torch.stack(taps.attention(), dim=-1)[:, first:]
            attention = [row.T for row in self._laid_out(rows, visuals, kwargs)]
        if taps.keys is not None:
            keys = self._laid_out(taps.keys[:, first:], visuals, kwargs, fixed)
        if taps.before is not None:
            before = self._laid_out(taps.before, visuals, kwargs, fixed)
        encoded = Encoded({}, [features], attention, before, keys)
        return tuple(rows for rows, _ in pruning.kept(visuals, asked, encoded, self.multi_modal_projector))

    def _laid_out(self: Any, values: Tensor, visuals: Any, kwargs: Any, skip: int = 0) -> list[Tensor]:
        """Values [images, T, c] of every image, without `skip` fixed ones."""
        return [value[skip:] for value in values]


class _LlavaNext(_Llava):
    """Images that are cut into crops."""

    def _laid_out(self: Any, values: Tensor, visuals: Any, kwargs: Any, skip: int = 0) -> list[Tensor]:
        """Values [crops, T, c] in the order of an image's placeholders, without those of newlines."""
        model, sizes = self.pruning.model, torch.as_tensor(kwargs["image_sizes"])
        crops = [self.pruning.family.crops(model, size) for size in sizes.tolist()]
        parts = values.split([len(pixels) for pixels in kwargs["pixel_values"]])
        packed, _ = model.model.pack_image_features(
            [part[:n] for part, n in zip(parts, crops, strict=True)],
            sizes,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            image_newline=values.new_zeros(values.shape[2]),
        )
        return [rows.index_select(0, v.places().to(rows.device)) for rows, v in zip(packed, visuals, strict=True)]


class _LlavaInfo(PruningInfo, llava.LlavaProcessingInfo):
    pass


class _LlavaProcessor(PruningProcessor, llava.LlavaMultiModalProcessor):
    pass


class _LlavaNextInfo(PruningInfo, llava_next.LlavaNextProcessingInfo):
    def get_max_image_tokens(self) -> int:
        """Of the size with the most features."""
        size = self.get_image_size_with_most_features()
        return int(self.get_num_image_tokens(image_width=size.width, image_height=size.height))


class _LlavaNextProcessor(PruningProcessor, llava_next.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_LlavaProcessor, info=_LlavaInfo, dummy_inputs=llava.LlavaDummyInputsBuilder)
class VTokenLlavaForConditionalGeneration(_Llava, llava.LlavaForConditionalGeneration):
    """LLaVA with a CLIP or SigLIP tower."""

    hf_to_vllm_mapper = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix=_OWN_NAMES
    )


@MULTIMODAL_REGISTRY.register_processor(
    _LlavaNextProcessor, info=_LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class VTokenLlavaNextForConditionalGeneration(_LlavaNext, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with a CLIP or SigLIP tower."""

    hf_to_vllm_mapper = llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix=_OWN_NAMES
    )
