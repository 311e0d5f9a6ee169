"""Mid-size multimodal models with random weights, and a prompt with one image for each: cases of `mllm.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMAGE, START, END = 5, 6, 7
FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3")


@dataclass(frozen=True)
class Size:
    """Measures of a model.

    Args:
        width, layers: of the language model; the width is a multiple of 256.
        tower_width, tower_layers: of the image tower; the width is a multiple of 64.
        side: tokens along one side of the image, a multiple of 4; LLaVA-NeXT has five crops of half as many.
    """

    width: int
    layers: int
    tower_width: int
    tower_layers: int
    side: int = 24


def build(family: str, size: Size) -> Any:
    """A model in eval mode."""
    return getattr(_Builder(size), family)().eval()


def call(family: str, size: Size, text: int, rng: torch.Generator) -> dict[str, Tensor]:
    """A prompt with one image between two halves of `text` tokens, as the model's processor would return it."""
    side = size.side
    places = side * side
    if family == "llava_next":
        places = 5 * side * side // 4 + side
    words = torch.randint(8, 500, (text,), generator=rng)
    image = torch.tensor([START, *[IMAGE] * places, END])
    ids = torch.cat([words[: text // 2], image, words[text // 2 :]]).unsqueeze(0)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        grid = torch.tensor([[1, 2 * side, 2 * side]])
        pixels = torch.randn(4 * side * side, 3 * 2 * 14 * 14, generator=rng)
        return given | {
            "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).long(),
        }  # fmt: skip
    tiles, pixels_side = {
        "llava_next": ((1, 5), side // 2 * 14), "internvl": ((4,), side * 14), "smolvlm": ((1, 16), side // 2 * 16),
        "gemma3": ((1,), side * 28),
    }.get(family, ((1,), side * 14))  # fmt: skip
    given["pixel_values"] = torch.randn(*tiles, 3, pixels_side, pixels_side, generator=rng)
    if family == "llava_next":
        given["image_sizes"] = torch.tensor([[side * 14, side * 14]])
    if family == "smolvlm":
        given["pixel_attention_mask"] = torch.ones(1, 16, pixels_side, pixels_side, dtype=torch.int64)
    if family == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).long()
    return given


class _Builder:
    def __init__(self, size: Size) -> None:
        self.size = size
        heads = size.width // 64
        self.text: dict[str, Any] = {
            "hidden_size": size.width, "intermediate_size": size.width * 11 // 4, "num_hidden_layers": size.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 512, "head_dim": 64,
            "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        self.tower: dict[str, Any] = {
            "hidden_size": size.tower_width, "intermediate_size": 4 * size.tower_width,
            "num_hidden_layers": size.tower_layers, "num_attention_heads": size.tower_width // 64,
        }  # fmt: skip

    def llava(self) -> Any:
        import transformers as t

        vision = t.CLIPVisionConfig(**self.tower, image_size=self.size.side * 14, patch_size=14)
        text = t.LlamaConfig(**self.text)
        return t.LlavaForConditionalGeneration(
            t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
        )

    def llava_next(self) -> Any:
        import transformers as t

        side = self.size.side // 2 * 14
        vision = t.CLIPVisionConfig(**self.tower, image_size=side, patch_size=14)
        config = t.LlavaNextConfig(
            vision_config=vision, text_config=t.LlamaConfig(**self.text), image_token_id=IMAGE,
            image_grid_pinpoints=[[2 * side, 2 * side]],
        )  # fmt: skip
        return t.LlavaNextForConditionalGeneration(config)

    def _qwen(self, name: str, tower: dict[str, Any], rope: dict[str, Any]) -> Any:
        import transformers as t

        # Of the 32 frequencies of a head of 64 channels.
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]} | rope
        text = self.text | {"rope_parameters": rope}
        ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 3}
        vision = {"num_heads": self.size.tower_width // 64, "depth": self.size.tower_layers, "patch_size": 14} | tower
        config = getattr(t, f"{name}Config")(vision_config=vision, text_config=text, **ids)
        return getattr(t, f"{name}ForConditionalGeneration")(config)

    def qwen2_vl(self) -> Any:
        return self._qwen("Qwen2VL", {"embed_dim": self.size.tower_width, "hidden_size": self.size.width}, {})

    def qwen2_5_vl(self) -> Any:
        tower = {key: self.tower[key] for key in ("hidden_size", "intermediate_size")}
        tower |= {"out_hidden_size": self.size.width, "fullatt_block_indexes": [self.size.tower_layers - 1]}
        return self._qwen("Qwen2_5_VL", tower, {})

    def qwen3_vl(self) -> Any:
        tower = {key: self.tower[key] for key in ("hidden_size", "intermediate_size")}
        tower |= {"out_hidden_size": self.size.width, "deepstack_visual_indexes": [0, 1]}
        return self._qwen("Qwen3VL", tower | {"num_position_embeddings": 1024}, {"mrope_interleaved": True})

    def internvl(self) -> Any:
        import transformers as t

        side = self.size.side * 14
        vision = self.tower | {"image_size": [side, side], "patch_size": [14, 14]}
        return t.InternVLForConditionalGeneration(
            t.InternVLConfig(vision_config=vision, text_config=t.Qwen2Config(**self.text), image_token_id=IMAGE)
        )

    def smolvlm(self) -> Any:
        import transformers as t

        vision = t.models.smolvlm.SmolVLMVisionConfig(**self.tower, image_size=self.size.side // 2 * 16, patch_size=16)
        config = t.SmolVLMConfig(
            vision_config=vision, text_config=t.LlamaConfig(**self.text), image_token_id=IMAGE, scale_factor=2,
            pad_token_id=0,
        )  # fmt: skip
        return t.SmolVLMForConditionalGeneration(config)

    def gemma3(self) -> Any:
        import transformers as t

        vision = t.SiglipVisionConfig(
            **self.tower, image_size=self.size.side * 28, patch_size=14, vision_use_head=False
        )
        layers = ["sliding_attention"] * (self.size.layers - 1) + ["full_attention"]
        text = t.Gemma3TextConfig(**self.text, layer_types=layers, sliding_window=1024)
        config = t.Gemma3Config(
            vision_config=vision, text_config=text, mm_tokens_per_image=self.size.side**2, image_token_index=IMAGE,
            boi_token_index=START, eoi_token_index=END,
        )  # fmt: skip
        return t.Gemma3ForConditionalGeneration(config)
