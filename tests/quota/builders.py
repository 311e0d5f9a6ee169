"""Tiny video models whose answers depend on what they see, and prompts with their videos."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.llavas import lively

VIDEO, IMAGE, START, END, PAD = 58, 59, 56, 57, 0
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD,
    "max_position_embeddings": 4096,
}  # fmt: skip
FAMILIES = ("onevision", "next", "qwen2_5", "qwen2", "qwen3", "llama3")
QWEN = ("qwen2_5", "qwen2", "qwen3")
MERGED_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}


def build(kind: str, **options: Any) -> Any:
    """A tiny model of one family."""
    model = lively(_BUILD[kind](**options))
    with torch.no_grad():  # so that answers hang on what is seen rather than on the last word
        for name, p in model.named_parameters():
            if "language_model" in name and "self_attn" in name and p.dim() > 1:
                p *= 2.5
            if "merger" in name and p.dim() > 1:
                p *= 2
    return model


def _vision(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2} | more


def _onevision(**options: Any) -> Any:
    t = transformers
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**_vision(image_size=54, patch_size=6)), text_config=t.Qwen2Config(**TEXT),
        image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=[[54, 54], [54, 108], [108, 54]],
        vision_feature_layer=-1, **options,
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config)


def _next(**options: Any) -> Any:
    t = transformers
    config = t.LlavaNextVideoConfig(
        vision_config=t.CLIPVisionConfig(**_vision(image_size=56, patch_size=7)), text_config=t.LlamaConfig(**TEXT),
        image_token_index=IMAGE, video_token_index=VIDEO, image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=[[56, 56], [56, 112]], vision_feature_layer=-2, **options,
    )  # fmt: skip
    return t.LlavaNextVideoForConditionalGeneration(config)


def _tokens() -> dict[str, int]:
    return {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    }  # fmt: skip


def _qwen2(**options: Any) -> Any:
    t = transformers
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    config = t.Qwen2VLConfig(
        vision_config=vision, text_config=TEXT | {"rope_parameters": MERGED_ROPE}, **_tokens(), **options
    )
    return t.Qwen2VLForConditionalGeneration(config)


def _qwen2_5(**options: Any) -> Any:
    t = transformers
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48, "window_size": 16,
              "fullatt_block_indexes": [1], "tokens_per_second": 2}  # fmt: skip
    config = t.Qwen2_5_VLConfig(
        vision_config=vision, text_config=TEXT | {"rope_parameters": MERGED_ROPE}, **_tokens(), **options
    )
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3(**options: Any) -> Any:
    t = transformers
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48, "num_position_embeddings": 64,
              "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    rope = MERGED_ROPE | {"mrope_interleaved": True}
    text = TEXT | {"rope_parameters": rope, "head_dim": 12}
    config = t.Qwen3VLConfig(vision_config=vision, text_config=text, **_tokens(), **options)
    return t.Qwen3VLForConditionalGeneration(config)


def _llama3(**options: Any) -> Any:
    t = transformers
    vision = _vision(patch_size=4)
    config = t.VideoLlama3Config(
        vision_config=vision, text_config=t.Qwen2Config(**TEXT), image_token_id=IMAGE, video_token_id=VIDEO, **options
    )
    return t.VideoLlama3ForConditionalGeneration(config)


_BUILD = {
    "onevision": _onevision, "next": _next, "qwen2": _qwen2, "qwen2_5": _qwen2_5, "qwen3": _qwen3, "llama3": _llama3,
}  # fmt: skip

#: Cells of the test videos, and default tokens of one cell.
GRID = {"onevision": 25, "next": 16, "qwen2": 6, "qwen2_5": 6, "qwen3": 6, "llama3": 6}
NATIVE = {"onevision": (9, 9), "next": (8, 8), "qwen2": (2, 3), "qwen2_5": (2, 3), "qwen3": (2, 3), "llama3": (2, 3)}


def video_inputs(kind: str, cells: list[int], seed: int = 1) -> dict[str, Tensor]:
    """Pixels of videos with so many cells each."""
    rng = torch.Generator().manual_seed(seed)
    if kind in ("onevision", "next"):
        side = 54 if kind == "onevision" else 56
        assert len(set(cells)) == 1
        return {"pixel_values_videos": torch.randn(len(cells), cells[0], 3, side, side, generator=rng)}
    height, width = NATIVE[kind][0] * 2, NATIVE[kind][1] * 2
    channels = 3 * 4 * 4 * (1 if kind == "llama3" else 2)
    found = {
        "pixel_values_videos": torch.randn(sum(cells) * height * width, channels, generator=rng),
        "video_grid_thw": torch.tensor([[t, height, width] for t in cells]),
    }
    if kind == "qwen2_5":
        found["second_per_grid_ts"] = torch.tensor([1.5] * len(cells))
    if kind == "llama3":
        found["video_merge_sizes"] = torch.tensor([2] * len(cells))
        found["video_compression_mask"] = torch.ones(sum(cells) * GRID[kind], dtype=torch.bool)
    return found


def run(kind: str, cells: int) -> list[int]:
    """The placeholders of one video, with what the processor puts around them."""
    if kind in ("qwen3", "llama3"):
        return [token for t in range(cells) for token in [10 + t, START, *[VIDEO] * GRID[kind], END]]
    extra = 1 if kind == "onevision" else 0
    body = [VIDEO] * (cells * GRID[kind] + extra)
    return [START, *body, END] if kind in QWEN else body


def prompt(kind: str, rows: list[list[Any]], pad: str | None = None) -> dict[str, Tensor]:
    """Rows of ids, where a list is a run of placeholders; padded on one side, with a mask."""
    ids = [[i for part in row for i in (part if isinstance(part, list) else [part])] for row in rows]
    width = max(map(len, ids))
    fill = [[PAD] * (width - len(row)) for row in ids]
    assert pad or all(len(row) == width for row in ids)
    full = [f + r if pad == "left" else r + f for f, r in zip(fill, ids, strict=True)]
    out = {"input_ids": torch.tensor(full)}
    if pad:
        mask = [[0] * len(f) + [1] * len(r) if pad == "left" else [1] * len(r) + [0] * len(f)
                for f, r in zip(fill, ids, strict=True)]  # fmt: skip
        out["attention_mask"] = torch.tensor(mask)
    if kind in QWEN:
        out["mm_token_type_ids"] = (out["input_ids"] == VIDEO) * 2 + (out["input_ids"] == IMAGE) * 1
    return out


def one_video(kind: str, cells: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """A question about one video."""
    return prompt(kind, [[3, run(kind, cells), 7, 8, 9]]) | video_inputs(kind, [cells], seed)


def image_inputs(kind: str) -> tuple[dict[str, Tensor], int]:
    """Pixels of one image, and its placeholders."""
    rng = torch.Generator().manual_seed(5)
    if kind == "onevision":
        return {
            "pixel_values": torch.randn(1, 2, 3, 54, 54, generator=rng),
            "image_sizes": torch.tensor([[54, 54]]),
        }, 171
    if kind == "next":
        return {
            "pixel_values": torch.randn(1, 2, 3, 56, 56, generator=rng),
            "image_sizes": torch.tensor([[56, 56]]),
        }, 136
    channels = 3 * 4 * 4 * (1 if kind == "llama3" else 2)
    found = {"pixel_values": torch.randn(16, channels, generator=rng), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if kind == "llama3":
        found["image_merge_sizes"] = torch.tensor([1])
        return found, 16
    return found, 4


def thinned() -> dict[str, Tensor]:
    """A video whose still frames VideoLLaMA3's processor left placeholders out of: 6, 1, 2 and 6 are there."""
    still = (6, 1, 2, 6)
    body = [token for t, n in enumerate(still) for token in [10 + t, START, *[VIDEO] * n, END]]
    mask = torch.cat([torch.arange(6) < n for n in still])
    return one_video("llama3") | {"video_compression_mask": mask} | prompt("llama3", [[3, body, 7, 8, 9]])


def rows_given(call: dict[str, Any]) -> Tensor:
    """The rows [N, C] that a prepared call brings for its videos, separators among them."""
    if "mm_encoder_outputs" not in call:
        return call["inputs_embeds"][call["input_ids"] == VIDEO]
    rows = call["mm_encoder_outputs"]["video"].pooler_output
    return rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat(list(rows))
