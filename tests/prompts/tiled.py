"""Tiny models of families whose towers see tiles, calls for them, and what their own code gives for every image."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts import llavas
from tests.hosts.llavas import IMAGE, TEXT

KINDS = ("smolvlm", "idefics3", "gemma3", "paligemma", "aya", "cohere2", "mistral3", "llava_pixtral")
#: Tokens of one tile.
SIZE = {"smolvlm": 9, "idefics3": 9, "gemma3": 9, "paligemma": 36, "aya": 9, "cohere2": 9}
#: Pixels of a token, of those that take images of any size; and the size of an image of so many "tiles".
SIDE = {"mistral3": 8, "llava_pixtral": 4}
SHAPES = {1: (24, 8), 2: (16, 24)}
#: Tokens in front of a tile: of the first one of an image, of a further one, and of the one that shows it all.
NAMES = {"smolvlm": (21, 22, 20), "idefics3": (21, 22, 20), "aya": (21, 22, 20), "cohere2": (20, 22, 22)}
SIGLIP: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 24,
    "patch_size": 4,
}  # fmt: skip


def build(kind: str, **options: Any) -> Any:
    """A tiny model, with weights under which its answer depends on what it sees."""
    t = transformers
    text = dict(TEXT)
    if kind in ("smolvlm", "idefics3"):
        config_class, vision_class, cls = (
            (t.SmolVLMConfig, t.models.smolvlm.SmolVLMVisionConfig, t.SmolVLMForConditionalGeneration)
            if kind == "smolvlm"
            else (t.Idefics3Config, t.models.idefics3.Idefics3VisionConfig, t.Idefics3ForConditionalGeneration)
        )
        config = config_class(
            vision_config=vision_class(**SIGLIP), text_config=t.LlamaConfig(**text), image_token_id=IMAGE,
            scale_factor=2, pad_token_id=0, **options,
        )  # fmt: skip
    elif kind == "gemma3":
        cls = t.Gemma3ForConditionalGeneration
        layers = options.pop("layer_types", ["sliding_attention", "full_attention"])
        more = {"head_dim": 16, "sliding_window": options.pop("sliding_window", 512), "layer_types": layers}
        config = t.Gemma3Config(
            vision_config=t.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
            text_config=t.Gemma3TextConfig(**text | more), mm_tokens_per_image=9, image_token_index=IMAGE,
            boi_token_index=57, eoi_token_index=58, **options,
        )  # fmt: skip
    elif kind == "paligemma":
        cls = t.PaliGemmaForConditionalGeneration
        config = t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**SIGLIP, projection_dim=32, vision_use_head=False),
            text_config=t.GemmaConfig(**text | {"head_dim": 16}), image_token_index=IMAGE, projection_dim=32,
            **options,
        )  # fmt: skip
    elif kind in SIDE:
        pixtral = t.PixtralVisionConfig(**SIGLIP | {"hidden_size": 48, "head_dim": 16})
        common = {
            "vision_config": pixtral,
            "text_config": t.MistralConfig(**text),
            "image_token_index": IMAGE,
        } | options
        if kind == "mistral3":
            cls, config = t.Mistral3ForConditionalGeneration, t.Mistral3Config(**common, spatial_merge_size=2)
        else:
            common |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
            cls, config = t.LlavaForConditionalGeneration, t.LlavaConfig(**common)
    elif kind == "aya":
        cls = t.AyaVisionForConditionalGeneration
        config = t.AyaVisionConfig(
            vision_config=t.SiglipVisionConfig(**SIGLIP), text_config=t.Cohere2Config(**text),
            image_token_index=IMAGE, image_token_id=IMAGE, **options,
        )  # fmt: skip
    else:
        cls = t.Cohere2VisionForConditionalGeneration
        config = t.Cohere2VisionConfig(
            vision_config=t.SiglipVisionConfig(**SIGLIP), text_config=t.Cohere2Config(**text), image_token_id=IMAGE,
            alignment_intermediate_size=64, **options,
        )  # fmt: skip
    model = llavas.lively(cls(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "connector" in name or "mm_input_projection" in name:
                p *= 2
            if "lm_head" in name or "embed_tokens" in name:
                p *= 3 if kind in ("gemma3", "aya", "cohere2", "paligemma") else 1
    return model


def image(kind: str, tiles: int = 1) -> list[int]:
    """What stands for an image of so many tiles in a prompt, as the processor writes it; -n for n placeholders."""
    if kind in SIDE:
        rows, columns = (pixels // SIDE[kind] for pixels in SHAPES[tiles])
        return [*[-columns, 24] * (rows - 1), -columns, 25]
    size = SIZE[kind]
    if kind in ("gemma3", "paligemma"):
        return [token for _ in range(tiles) for token in (57, -size, 58)] if kind == "gemma3" else [-size] * tiles
    first, further, whole = NAMES[kind]
    found: list[int] = []
    for i in range(tiles):
        last = i == tiles - 1
        name = (first if i == 0 else further) if kind == "cohere2" or not last else whole
        found += [name, -size]
    return [*found, 23]


#: Tiles of every image of `call`: two images, no image, one.
TILES = ((2, 1), (), (1,))


def call(kind: str, pad: str = "left", tiles: Any = TILES, seed: int = 2) -> dict[str, Any]:
    """Rows of several images with text between, of none, and of one that ends the prompt."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "paligemma":
        tiles = tuple(tuple(1 for _ in row) for row in tiles)
    rows = []
    for number, row in enumerate(tiles):
        ids = [] if kind == "paligemma" else [1]
        for i, n in enumerate(row):
            ids += image(kind, n) + ([5 + i] if number == 0 else [])
        ids += [1] if kind == "paligemma" else []
        rows.append(ids + [7, 8] * (number == 0) + [9, 10, 11, 12, 6] * (number == 1) + [9] * (number > 1))
    given: dict[str, Any] = llavas.prompt(*rows, pad=pad)
    if kind in SIDE:
        shapes = [SHAPES[n] for row in tiles for n in row]
        pixels = torch.zeros(len(shapes), 3, 24, 24)
        for i, (h, w) in enumerate(shapes):
            pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=rng)
        return given | {"pixel_values": pixels, "image_sizes": torch.tensor(shapes)}
    total = sum(map(sum, tiles))
    pixels = torch.randn(total, 3, 24, 24, generator=rng)
    if kind in ("gemma3", "paligemma"):
        given["token_type_ids"] = (given["input_ids"] == IMAGE).long() if kind == "gemma3" else torch.zeros_like(
            given["input_ids"])  # fmt: skip
    if kind in ("smolvlm", "idefics3"):
        most, at = max(max(map(sum, tiles)), 1), 0
        full, mask = torch.zeros(len(tiles), most, 3, 24, 24), torch.zeros(len(tiles), most, 24, 24, dtype=torch.int64)
        for i, row in enumerate(tiles):
            full[i, : sum(row)] = pixels[at : at + sum(row)]
            mask[i, : sum(row)] = 1
            mask[i, : max(sum(row) - 1, 0), :, 20:] = 0  # parts of tiles are padding, too
            at += sum(row)
        return given | {"pixel_values": full, "pixel_attention_mask": mask}
    return given | {"pixel_values": pixels}


def alone(kind: str, given: dict[str, Any], row: int, tiles: Any = TILES) -> dict[str, Any]:
    """One row of `call`, without padding."""
    seen = given["attention_mask"][row] == 1
    found = {n: given[n][row : row + 1, seen] for n in ("input_ids", "token_type_ids") if n in given}
    if not tiles[row]:
        return found
    if kind in ("smolvlm", "idefics3"):
        return found | {n: given[n][row : row + 1] for n in ("pixel_values", "pixel_attention_mask")}
    counts = [len(r) if kind == "paligemma" or kind in SIDE else sum(r) for r in tiles]
    start = sum(counts[:row])
    return found | {n: given[n][start : start + counts[row]] for n in ("pixel_values", "image_sizes") if n in given}


def sizes(kind: str, tiles: Any = TILES) -> list[int]:
    """Tokens of every image, as the prompt tells them apart."""
    if kind in SIDE:
        return [h * w // SIDE[kind] ** 2 for h, w in (SHAPES[n] for row in tiles for n in row)]
    if kind == "paligemma":
        return [SIZE[kind]] * sum(map(len, tiles))
    if kind == "gemma3":
        return [SIZE[kind]] * sum(map(sum, tiles))
    return [n * SIZE[kind] for row in tiles for n in row]


def features(kind: str, model: Any, given: dict[str, Any], tiles: Any = TILES) -> list[Tensor]:
    """What the model's own code gives for every image."""
    named = {n: given[n] for n in ("pixel_values", "pixel_attention_mask", "image_sizes") if n in given}
    rows = model.model.get_image_features(**named, return_dict=True).pooler_output
    flat = rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat(list(rows))
    return list(flat.split(sizes(kind, tiles)))


@functools.cache
def takes_outputs() -> bool:
    """Whether this release's models take features that are ready."""
    return "mm_encoder_outputs" in inspect.signature(transformers.SmolVLMForConditionalGeneration.forward).parameters


def fed(
    kind: str,
    model: Any,
    given: dict[str, Any],
    rows: list[Tensor],
    kept: list[list[int]],
    *,
    original: bool = False,
    new: int = 0,
    more: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Logits [k, V] of one unpadded row whose kept rows are put into the prompt one by one, and of greedy steps [n, V].

    Nothing is cached. Behind the prompt stand ids `more`.
    """
    table, ids = model.get_input_embeddings(), given["input_ids"][0].tolist()
    types = given["token_type_ids"][0].tolist() if "token_type_ids" in given else [0] * len(ids)
    values = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
    embeds, kinds, places, at = [], [], [], 0
    for place, token in enumerate(ids):
        row = table(torch.tensor(token)) if token != IMAGE else None
        if token == IMAGE:
            i, j = values[at]
            at += 1
            row = rows[i][j] if j in kept[i] else None
        if row is not None:
            embeds.append(row)
            kinds.append(types[place])
            places.append(place)
    assert at == len(values)
    steps: list[Tensor] = []
    logits, waiting = torch.zeros(0), list(more)
    for step in range(max(new, 1)):
        for token in waiting:
            embeds.append(table(torch.tensor(token)))
            kinds.append(1 if kind == "paligemma" else 0)
            places.append(places[-1] + 1)
        call: dict[str, Any] = {"attention_mask": torch.ones(1, len(embeds), dtype=torch.int64), "use_cache": False}
        if "token_type_ids" in given:
            call["token_type_ids"] = torch.tensor([kinds])
        if original:
            call["position_ids"] = torch.tensor([places])
        out = model(inputs_embeds=torch.stack(embeds).unsqueeze(0), **call).logits[0]
        logits = out if step == 0 else logits
        steps.append(out[-1])
        waiting = [int(out[-1].index_fill(0, torch.tensor([IMAGE]), -torch.inf).argmax())]
    return logits, torch.stack(steps)
