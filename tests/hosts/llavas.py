"""Tiny multimodal models whose images matter, prompts for them, and what pruning should give, written the plain way."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE, PAD = 59, 0
VISION: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 24,
    "patch_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD,
    "max_position_embeddings": 2048,
}  # fmt: skip
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
FLAT = ("llava", "llava_siglip", "llava_full", "vip", "video")
ANYRES = ("next", "onevision")
PATCHES = 36


def build(kind: str, **options: Any) -> Any:
    """A tiny model of one kind, with weights under which its answer depends on which image tokens are kept."""
    t = transformers
    siglip = kind in ("llava_siglip", "onevision")
    vision = (t.SiglipVisionConfig if siglip else t.CLIPVisionConfig)(**VISION)
    text = (t.Qwen2Config if kind == "onevision" else t.LlamaConfig)(**TEXT)
    common: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE} | options
    if kind == "llava_siglip":
        common |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} | options
    if kind == "llava_full":
        common |= {"vision_feature_select_strategy": "full"}
    if kind == "vip":
        name = (
            "vision_feature_layer" if hasattr(t.VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"
        )
        common |= {name: options.pop("vision_feature_layer", [-3, -2, 1])}
    if kind in ANYRES:
        common |= {"image_grid_pinpoints": options.get("image_grid_pinpoints", PINPOINTS)}
    if kind in ("onevision", "video"):
        common |= {"video_token_id": 58}
    classes = {
        "vip": (t.VipLlavaForConditionalGeneration, t.VipLlavaConfig),
        "next": (t.LlavaNextForConditionalGeneration, t.LlavaNextConfig),
        "onevision": (t.LlavaOnevisionForConditionalGeneration, t.LlavaOnevisionConfig),
        "video": (t.VideoLlavaForConditionalGeneration, t.VideoLlavaConfig),
    }
    model_class, config_class = classes.get(kind, (t.LlavaForConditionalGeneration, t.LlavaConfig))
    return lively(model_class(config_class(**common)))


def lively(model: nn.Module, seed: int = 0) -> Any:
    """Random weights; the tower's attention is far from uniform and the projector loud (docs/methods/vtc_cls.md 17)."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        gain = 1.0
        if "tower" in name and ("q_proj" in name or "k_proj" in name):
            gain = 2.5
        if "projector" in name:
            gain = 2.0
        flat = p.dim() == 1
        p.data = torch.randn(p.shape, generator=rng) * (0.3 if flat else gain * p[0].numel() ** -0.5)
        if flat and "norm" in name and "weight" in name:
            p.data = 1 + p.data / 3
    return model.eval()


def images(count: int = 2, seed: int = 1) -> Tensor:
    """Images for the flat models."""
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def shown(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Images under the name that this release gives their argument."""
    names = inspect.signature(model.forward).parameters
    return {"pixel_values" if "pixel_values" in names else "pixel_values_images": pixels}


def feature_count(kind: str) -> int:
    """Placeholders of one image in a flat model."""
    return PATCHES + int(kind == "llava_full")


def prompt(*rows: list[int], pad: str | None = None) -> dict[str, Tensor]:
    """Rows of ids where a negative number -n stands for n placeholders; padded on one side, with a mask."""
    ids = [[i for token in row for i in ([IMAGE] * -token if token < 0 else [token])] for row in rows]
    width = max(map(len, ids))
    if pad is None:
        assert all(len(row) == width for row in ids)
        return {"input_ids": torch.tensor(ids)}
    full, mask = [], []
    for row in ids:
        fill = width - len(row)
        full.append([PAD] * fill + row if pad == "left" else row + [PAD] * fill)
        mask.append([0] * fill + [1] * len(row) if pad == "left" else [1] * len(row) + [0] * fill)
    return {"input_ids": torch.tensor(full), "attention_mask": torch.tensor(mask)}


def features_of(model: Any, **images: Any) -> list[Tensor]:
    """What the projector gives for every image, by the model's own code."""
    return list(model.model.get_image_features(**images).pooler_output)


def plain_scores(model: Any, pixels: Tensor, start: int, last: int) -> Tensor:
    """Mean class-token attention maps [B, N] of eager attention."""
    eager = copy.deepcopy(model)
    tower = eager.model.image_tower if hasattr(eager.model, "image_tower") else eager.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    return torch.stack([m.mean(1)[:, 0, 1:] for m in maps[start : last + 1]]).mean(0)


def plain_top(scores: Tensor, k: int) -> list[int]:
    """The k best, ties to the lower index, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def by_hand(
    model: Any,
    given: dict[str, Tensor],
    features: list[Tensor],
    kept: list[list[int]],
    *,
    side: str = "right",
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Kept embeddings put into the prompt one row and one token at a time."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    table = model.get_input_embeddings()
    image, place, rows, marks = 0, 0, [], []
    for b in range(ids.shape[0]):
        row, mark = [], []
        for j in range(ids.shape[1]):
            if mask is not None and mask[b, j] == 0:
                continue
            label = -100 if labels is None else int(labels[b, j])
            if ids[b, j] != IMAGE:
                row.append(table(ids[b, j]))
                mark.append(label)
                continue
            if place in kept[image]:
                row.append(features[image][place])
                mark.append(label)
            place += 1
            if place == len(features[image]):
                image, place = image + 1, 0
        rows.append(row)
        marks.append(mark)
    width = max(map(len, rows))
    embeds, new_mask, new_labels = [], [], []
    for row, mark in zip(rows, marks, strict=True):
        fill = width - len(row)
        blank = [table(torch.tensor(PAD))] * fill
        embeds.append(torch.stack(blank + row if side == "left" else row + blank))
        new_mask.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
        new_labels.append([-100] * fill + mark if side == "left" else mark + [-100] * fill)
    out = {"inputs_embeds": torch.stack(embeds), "attention_mask": torch.tensor(new_mask)}
    return out if labels is None else out | {"labels": torch.tensor(new_labels)}
