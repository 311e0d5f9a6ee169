"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM that shorten their own images; text keeps its place among three axes.

vLLM numbers a prompt before its images are encoded. Text is numbered by the whole grids, so it is right at once. The
places of kept tokens are known afterwards: they travel as further channels of an image's rows, and vLLM calls
`recompute_mrope_positions`, its hook for pruned videos, when the rows enter a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.platforms import current_platform

from vtoken.core.visual import Encoded, Visual
from vtoken.errors import InputError, UnsupportedModelError
from vtoken.serving.pruning import Pruning, settings_in
from vtoken.serving.vllm.hooks import need
from vtoken.serving.vllm.processing import ASKED, ROWS, PruningInfo, PruningProcessor, read
from vtoken.serving.vllm.taps import Taps, refuse

#: Field of ready embeddings: which tokens of its image the rows are.
KEPT = "image_kept"
#: Rows and columns as two digits each of this base, which bfloat16 holds exactly.
_BASE, _CHANNELS = 128, 4

_POSITIONS = ("input_tokens", "mm_features")
_RECOMPUTE = ("input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens")
for _stock in (
    qwen2_vl.Qwen2VLForConditionalGeneration,
    qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
    qwen3_vl.Qwen3VLForConditionalGeneration,
):
    need(_stock, "embed_multimodal", "kwargs")
    need(_stock, "get_mrope_input_positions", *_POSITIONS)
    need(_stock, "_process_image_input", "image_input")
    need(_stock, "_parse_and_validate_image_input", "kwargs")
need(SupportsMultiModalPruning, "recompute_mrope_positions", *_RECOMPUTE)


class _Qwen:
    """Mixin in front of vLLM's class."""

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        if vllm_config.speculative_config is not None:
            # Its drafter looks at the rows of an image one token further on, and would place them there.
            raise UnsupportedModelError("speculative decoding cannot be combined with shortened images of Qwen-VL")
        media = vllm_config.model_config.get_multimodal_config()
        # Prunes no video (1 - 1e-18 is 1.0), but lets vLLM call recompute_mrope_positions.
        media.video_pruning_rate = media.video_pruning_rate or 1e-18
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        self._dtype = vllm_config.model_config.dtype  # where no tower is loaded, it cannot be asked
        self.pruning = Pruning(self.config, settings_in(self.config))
        refuse(self.pruning.needs, vllm_config)

    def embed_multimodal(self: Any, **kwargs: Any) -> Any:
        """Rows of every image with their places behind them, [k, C + 4] each."""
        grids, counts = kwargs.get("image_grid_thw"), kwargs.pop(ROWS, None)
        if grids is None:
            return ()
        if kwargs.get("image_embeds") is not None:
            ready, at = (kwargs[name].split(counts.tolist()) for name in ("image_embeds", KEPT))
            return tuple(self._placed(r.to(self._dtype), k, g) for r, k, g in zip(ready, at, grids, strict=True))
        asked = [read(field) for field in kwargs.pop(ASKED)]
        pruning: Pruning = self.pruning
        visuals = pruning.visuals(kwargs)
        blocks = [block.attn for block in self.visual.blocks]
        with Taps(pruning.needs, [b.attn for b in blocks], [b.qkv for b in blocks], self.visual.merger) as taps:
            full = self._process_image_input(self._parse_and_validate_image_input(**kwargs))
        width = int(self.config.get_text_config().hidden_size)
        levels = [list(level) for level in zip(*(rows.split(width, dim=-1) for rows in full), strict=True)]
        attention = keys = before = None
        if pruning.needs.layers:
            rows = torch.stack([row[0] for row in taps.attention()], dim=-1)
            attention = [row.T for row in self._tokens(rows, visuals, grids)]
        if taps.keys is not None:
            keys = self._tokens(taps.keys, visuals, grids)
        if taps.before is not None:
            before = self._tokens(taps.before.flatten(0, -2), visuals, grids)
        kept = pruning.kept(visuals, asked, Encoded({}, levels, attention, before, keys), self.visual.merger)
        return tuple(self._placed(rows, at, grid) for (rows, at), grid in zip(kept, grids, strict=True))

    def _tokens(self: Any, patches: Tensor, visuals: Sequence[Visual], grids: Tensor) -> list[Tensor]:
        """Values [patches, c] as means over the patches of every token, by image."""
        merges = [int(self.config.vision_config.spatial_merge_size)] * len(visuals)
        tokens = self.pruning.family.tokens_of(self.pruning.model, patches, torch.as_tensor(grids).cpu(), merges)
        return list(tokens.split([visual.length for visual in visuals]))

    def _placed(self: Any, rows: Tensor, index: Tensor, grid: Tensor) -> Tensor:
        """Rows [k, C] with row and column of the tokens [k] that they are, in digits."""
        columns = int(grid[2]) // int(self.config.vision_config.spatial_merge_size)
        index = index.to(rows.device)
        places = (index // columns, index % columns)
        digits = torch.stack([digit for place in places for digit in (place // _BASE, place % _BASE)], dim=1)
        return torch.cat([rows, digits.to(rows)], dim=1)

    def get_encoder_cudagraph_config(self: Any) -> Any:
        """Of no kind of input: a graph of the tower would leave out what comes behind it."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        config.modalities = []
        return config

    def get_mrope_input_positions(
        self: Any, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:  # fmt: skip
        """Positions [3, N] of text by the whole grids, and of every image's tokens where the image begins."""
        merge, parts, done, start = int(self.config.vision_config.spatial_merge_size), [], 0, 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            at, length = feature.mm_position.offset, feature.mm_position.length
            grid = feature.data["image_grid_thw"].data
            begin = start + at - done
            parts += [torch.arange(start, begin), torch.full((length,), begin)]
            start, done = begin + max(int(grid[1]), int(grid[2])) // merge, at + length
        parts.append(torch.arange(start, start + len(input_tokens) - done))
        positions = torch.cat(parts)
        return positions.expand(3, -1).clone(), int(positions.max()) + 1 - len(input_tokens)

    def recompute_mrope_positions(
        self: Any,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Rows without their places, and positions with the places of the rows that this part of the prompt brings.

        Along the first axis an image stands still: what is there says where it begins, however often this is called.
        """
        positions = mrope_positions.clone()
        ids = torch.as_tensor(input_ids, device=positions.device)
        at = (ids == self.config.image_token_id).nonzero()[:, 0]
        at, done = at[at >= num_computed_tokens], 0
        for rows in multimodal_embeddings:
            mine = at[done : done + len(rows)]
            digits = rows[:, -_CHANNELS:].to(device=positions.device, dtype=positions.dtype)
            positions[1, mine] = positions[0, mine] + digits[:, 0] * _BASE + digits[:, 1]
            positions[2, mine] = positions[0, mine] + digits[:, 2] * _BASE + digits[:, 3]
            done += len(rows)
        # Text stands behind every image, so the last position is one of text.
        return [rows[:, :-_CHANNELS] for rows in multimodal_embeddings], positions, int(positions.max()) + 1 - len(ids)


class _Parser(qwen2_vl.Qwen2VLMultiModalDataParser):
    """Ready rows of images, whole or shortened: `vtoken.serving.image_embeds` makes what it takes."""

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, dict):
            return _checked(data, self._spatial_merge_size, self.expected_hidden_size)
        if self.is_embeddings(data):
            raise InputError(
                "ready rows of this model come with their grids, as vtoken.serving.image_embeds gives them"
            )
        return super()._parse_image_data(data)

    def _parse_video_data(self, data: Any) -> Any:
        raise InputError("videos are not shortened inside vLLM: this class takes images alone")


def _checked(data: dict[str, Any], merge: int, width: int | None) -> Any:
    """Items of ready rows; raises InputError for what would end the engine, or place rows wrongly."""
    from vllm.multimodal.parse import DictEmbeddingItems

    names = {"image_embeds", "image_grid_thw", ROWS, KEPT}
    if not {"image_embeds", "image_grid_thw"} <= set(data) <= names:
        raise InputError(f"ready images are {', '.join(sorted(names))} (the last two if shortened), got {sorted(data)}")
    rows, grids = torch.as_tensor(data["image_embeds"]), torch.as_tensor(data["image_grid_thw"])
    if rows.dim() < 2 or (width is not None and rows.shape[-1] != width):
        raise InputError(f"image_embeds must be [rows, {width}], got {tuple(rows.shape)}")
    if grids.dim() < 1 or grids.shape[-1] != 3 or bool((grids < 1).any()) or bool((grids[..., 1:] % merge).any()):
        raise InputError(f"image_grid_thw must be [images, 3] of patches that {merge} divides, got {grids.tolist()}")
    rows, grids = rows.flatten(0, -2), grids.reshape(-1, 3)  # parts of a message come stacked
    if bool((grids[:, 0] != 1).any()):
        raise InputError(f"an image has one frame, got grids {grids.tolist()}")
    tokens = (grids.prod(1) // merge**2).tolist()
    if KEPT not in data and ROWS not in data:
        data = data | {ROWS: torch.tensor(tokens), KEPT: torch.cat([torch.arange(n) for n in tokens])}
    counts = torch.as_tensor(data.get(ROWS, [])).flatten().tolist()
    kept = torch.as_tensor(data.get(KEPT, [])).flatten()
    if len(counts) != len(tokens) or min(counts, default=0) < 1 or {sum(counts)} != {len(rows), len(kept)}:
        raise InputError(
            f"{len(rows)} rows for {len(tokens)} image(s) of {tokens} tokens, {ROWS}={counts}, {len(kept)} {KEPT}: "
            f"{ROWS} says how many rows every image has, {KEPT} which tokens they are"
        )
    for index, n in zip(kept.split(counts), tokens, strict=True):
        if bool((index < 0).any()) or bool((index >= n).any()) or bool((index.diff() < 0).any()):
            raise InputError(f"{KEPT} must be ascending indices of an image's {n} tokens, got {index.tolist()}")
    data = {"image_embeds": rows, "image_grid_thw": grids, ROWS: torch.tensor(counts), KEPT: kept.to(torch.int64)}
    return DictEmbeddingItems(data, "image", required_fields=names, fields_factory=_ready_fields)


def _ready_fields(data: Any) -> dict[str, Any]:
    """How the fields of ready rows belong to images."""
    flat = MultiModalFieldConfig.flat_from_sizes("image", torch.as_tensor(data[ROWS]).flatten())
    whole = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
    return {"image_embeds": flat, KEPT: flat, "image_grid_thw": whole, ROWS: whole}


class _QwenInfo(PruningInfo):
    """Mixin in front of vLLM's class."""

    def get_data_parser(self: Any) -> Any:
        """Takes shortened rows as well, deeper levels beside the first."""
        vision, width = self.get_hf_config().vision_config, self._get_expected_hidden_size()
        levels = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        return _Parser(
            vision.spatial_merge_size,
            expected_hidden_size=None if width is None else width * levels,
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class _QwenProcessor(PruningProcessor):
    """Mixin in front of vLLM's class."""

    def _get_mm_fields_config(self: Any, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        if KEPT in hf_inputs:
            return _ready_fields(hf_inputs)
        return super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)

    def apply(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own; text must stand behind the last image, for what is generated is numbered from there."""
        found = super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
        ends = [image.offset + image.length for image in found["mm_placeholders"].get("image", [])]
        if max(ends, default=0) >= len(found["prompt_token_ids"]) > 0:
            raise InputError("the prompt ends in an image: text must follow, such as <|vision_end|> and a question")
        return found


class _Qwen2VLInfo(_QwenInfo, qwen2_vl.Qwen2VLProcessingInfo):
    pass


class _Qwen2VLProcessor(_QwenProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    pass


class _Qwen2_5_VLInfo(_QwenInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class _Qwen2_5_VLProcessor(_QwenProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


class _Qwen3VLInfo(_QwenInfo, qwen3_vl.Qwen3VLProcessingInfo):
    pass


class _Qwen3VLProcessor(_QwenProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2VLProcessor, info=_Qwen2VLInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class VTokenQwen2VLForConditionalGeneration(
    _Qwen, qwen2_vl.Qwen2VLForConditionalGeneration, SupportsMultiModalPruning
):  # fmt: skip
    """Qwen2-VL, images alone."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2_5_VLProcessor, info=_Qwen2_5_VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class VTokenQwen2_5_VLForConditionalGeneration(_Qwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, images alone."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen3VLProcessor, info=_Qwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class VTokenQwen3VLForConditionalGeneration(_Qwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, images alone; deeper levels of features are shortened alike."""


if current_platform.is_cpu():
    # The runner for CPUs takes over the loading of a model and forgets this flag, without which the places of rows
    # would reach the language model.
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    _stock_initialize = CPUModelRunner.initialize_kv_cache

    def _initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, _Qwen):
            self.is_multimodal_pruning_enabled = True
        return _stock_initialize(self, *args, **kwargs)

    CPUModelRunner.initialize_kv_cache = _initialize_kv_cache
