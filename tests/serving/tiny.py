"""Folders with tiny random models, as a server finds them: weights, tokenizer, processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

WORDS = [f"w{i}" for i in range(80)]
SPECIAL = [
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
ID = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
KINDS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ARCHITECTURES = {
    "llava": "VTokenLlavaForConditionalGeneration",
    "llava_next": "VTokenLlavaNextForConditionalGeneration",
    "qwen2_vl": "VTokenQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "VTokenQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "VTokenQwen3VLForConditionalGeneration",
}


def config_of(kind: str, **text: Any) -> Any:
    """The config of a tiny model."""
    t, own = transformers, TEXT | text
    if kind.startswith("llava"):
        common: dict[str, Any] = {
            "vision_config": t.CLIPVisionConfig(**VISION), "text_config": t.LlamaConfig(**own),
            "image_token_id": ID["<image>"],
        }  # fmt: skip
        if kind == "llava":
            return t.LlavaConfig(**common)
        return t.LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
    ids = {
        "image_token_id": ID["<|image_pad|>"], "video_token_id": ID["<|video_pad|>"],
        "vision_start_token_id": ID["<|vision_start|>"], "vision_end_token_id": ID["<|vision_end|>"],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    width = own["hidden_size"]
    if kind == "qwen2_vl":
        vision = {"depth": 4, "embed_dim": 64, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
                  "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
        return t.Qwen2VLConfig(vision_config=vision, text_config=own | {"rope_parameters": rope}, **ids)
    if kind == "qwen2_5_vl":
        vision = QWEN_VISION | {"out_hidden_size": width, "window_size": 56, "fullatt_block_indexes": [1, 3]}
        return t.Qwen2_5_VLConfig(vision_config=vision, text_config=own | {"rope_parameters": rope}, **ids)
    vision = QWEN_VISION | {"out_hidden_size": width, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    rope |= {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    return t.Qwen3VLConfig(vision_config=vision, text_config=own | {"rope_parameters": rope}, **ids)


def save(kind: str, folder: Path, **text: Any) -> Path:
    """Write a tiny model whose answers depend on its images."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config_of(kind, **text)).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.02) if p.dim() == 1 else p.normal_(std=1.5 / p[0].numel() ** 0.5)
            if p.dim() == 1 and "norm" in name and name.endswith("weight"):
                p += 1
            tower = "tower" in name or "visual" in name
            if tower and any(word in name for word in ("q_proj", "k_proj", "qkv")):
                p *= 2
            if "projector" in name or "merger" in name:
                p *= 2
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    _processor(kind).save_pretrained(folder)
    return folder


def _processor(kind: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )  # fmt: skip
    if kind.startswith("llava"):
        side = VISION["image_size"]
        crop = {"height": side, "width": side}
        if kind == "llava":
            images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)
            make: Any = transformers.LlavaProcessor
        else:
            images = transformers.LlavaNextImageProcessor(
                size={"shortest_edge": side}, crop_size=crop, image_grid_pinpoints=PINPOINTS
            )
            make = transformers.LlavaNextProcessor
        return make(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            image_token="<image>",
        )  # fmt: skip
    images = transformers.Qwen2VLImageProcessor(
        patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=56 * 56, max_pixels=224 * 224
    )
    if kind == "qwen3_vl":
        video = transformers.Qwen3VLVideoProcessor(patch_size=14, merge_size=2, temporal_patch_size=2)
        return transformers.Qwen3VLProcessor(images, tokenizer, video)
    video = transformers.Qwen2VLVideoProcessor(patch_size=14, merge_size=2, temporal_patch_size=2)
    make = transformers.Qwen2VLProcessor if kind == "qwen2_vl" else transformers.Qwen2_5_VLProcessor
    return make(images, tokenizer, video)


def image(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """A random picture of blocks, height by width."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(size[0] // 14, 1), max(size[1] // 14, 1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.NEAREST)


def prompt(kind: str, seed: int, images: int = 1) -> str:
    """A few words around the images."""
    rng = np.random.default_rng(seed)
    words = lambda n: " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), n))  # noqa: E731
    place = "<image>" if kind.startswith("llava") else "<|vision_start|> <|image_pad|> <|vision_end|>"
    return f"{words(3)} " + "".join(f"{place} {words(2)} " for _ in range(images)) + words(int(rng.integers(3, 9)))
