"""Tiny Qwen-VL models, calls with images and videos, and what pruning should give, the plain way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hosts.llavas import lively
from tests.quota import builders
from tests.quota.builders import END, IMAGE, PAD, START, TEXT, VIDEO

MERGED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 48, "num_position_embeddings": 64,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 24,
}  # fmt: skip
KINDS = ("qwen2", "qwen2_5", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe")
#: Kinds whose language model has attention alone.
ATTENTION = ("qwen2", "qwen2_5", "qwen3", "qwen3_moe")


GLM = ("glm4v", "glm4v_moe", "glm46v")


def _glm(kind: str) -> Any:
    t, ids = transformers, builders._tokens()
    vision: dict[str, Any] = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "image_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48,
    }  # fmt: skip
    text = TEXT | {"rope_parameters": MERGED | {"partial_rotary_factor": 1.0}, "head_dim": 12}
    ids = {name: value for name, value in ids.items() if not name.startswith("vision_")}
    if kind == "glm4v_moe":
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1}
        text |= {"first_k_dense_replace": 1, "topk_group": 1, "n_shared_experts": 1}
    config_class, cls = {
        "glm4v": (t.Glm4vConfig, t.Glm4vForConditionalGeneration),
        "glm4v_moe": (t.Glm4vMoeConfig, t.Glm4vMoeForConditionalGeneration),
        "glm46v": (t.Glm46VConfig, t.Glm46VForConditionalGeneration),
    }[kind]
    parts: dict[str, Any] = {"text_config": text, "vision_config": vision}
    if kind == "glm46v":
        own = t.models.glm4v
        parts = {"text_config": own.Glm4vTextConfig(**text), "vision_config": own.Glm4vVisionConfig(**vision)}
    ids |= {"image_start_token_id": START, "image_end_token_id": END}
    ids |= {"video_start_token_id": 50, "video_end_token_id": 51}
    return _loud(lively(cls(config_class(**parts, **ids))))


def build(kind: str) -> Any:
    """A tiny model, with weights under which its answer depends on what it sees."""
    if kind in builders.QWEN:
        return builders.build(kind)
    t, ids = transformers, builders._tokens()
    if kind in GLM:
        return _glm(kind)
    moe = MOE if kind.endswith("moe") else {}
    if kind == "qwen3_moe":
        text = TEXT | MOE | {"rope_parameters": MERGED, "head_dim": 12}
        config = t.Qwen3VLMoeConfig(
            vision_config=VISION | {"deepstack_visual_indexes": [0, 1]}, text_config=text, **ids
        )
        model = t.Qwen3VLMoeForConditionalGeneration(config)
    else:
        text = TEXT | moe | LINEAR | {"rope_parameters": MERGED | {"partial_rotary_factor": 0.5}}
        if moe:
            text |= {"shared_expert_intermediate_size": 24}
        cls = t.Qwen3_5MoeConfig if moe else t.Qwen3_5Config
        config = cls(vision_config=VISION, text_config=text, **ids)
        model = (t.Qwen3_5MoeForConditionalGeneration if moe else t.Qwen3_5ForConditionalGeneration)(config)
    return _loud(lively(model))


def _loud(model: Any) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and ("merger" in name or ("language_model" in name and "self_attn" in name)):
                p *= 2.5
    return model


GRIDS = [[1, 4, 6], [1, 8, 4], [1, 4, 4]]
COUNTS = [6, 8, 4]


def call(*, pad: str = "left", video: bool = False, kind: str = "qwen2", seed: int = 0) -> dict[str, Tensor]:
    """Two rows: two images of different sizes and text; one image (and a video of two cells) and text."""
    rng = torch.Generator().manual_seed(seed)
    first = [3, START, [IMAGE] * 6, END, 5, START, [IMAGE] * 8, END, 7, 9]
    last: list[Any] = [3, 4, START, [IMAGE] * 4, END, 7]
    if video:
        # Qwen3 has a run per cell, with its time in front.
        cells = [START, [VIDEO] * 12, END] if kind in ("qwen2", "qwen2_5") else [
            token for t in (10, 11) for token in (t, START, [VIDEO] * 6, END)]  # fmt: skip
        last = [3, *cells, 4, START, [IMAGE] * 4, END, 7]
    given = builders.prompt("qwen2", [first, last], pad)
    grids = torch.tensor(GRIDS)
    given |= {
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 96, generator=rng), "image_grid_thw": grids,
    }  # fmt: skip
    if video:
        given |= {
            "pixel_values_videos": torch.randn(2 * 24, 96, generator=rng),
            "video_grid_thw": torch.tensor([[2, 4, 6]]),
        }
    return given


def row_of(given: dict[str, Tensor], row: int, *, video: bool = False) -> dict[str, Tensor]:
    """One row of `call` alone, without padding."""
    seen = given["attention_mask"][row] == 1
    images = [0, 1] if row == 0 else [2]
    bounds = torch.tensor([0, *torch.tensor(GRIDS).prod(1).cumsum(0).tolist()])
    found = {name: given[name][row : row + 1, seen] for name in ("input_ids", "mm_token_type_ids")}
    found |= {
        "pixel_values": given["pixel_values"][bounds[images[0]] : bounds[images[-1] + 1]],
        "image_grid_thw": given["image_grid_thw"][images],
    }
    if video and row == 1:
        found |= {name: given[name] for name in ("pixel_values_videos", "video_grid_thw")}
    return found


@contextlib.contextmanager
def handing(model: Any, outputs: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The unpatched model with towers that hand out these features, in any release; and pixels to call it with."""
    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    for kind, out in outputs.items():
        setattr(model.model, f"get_{kind}_features", lambda *_, out=out, **__: type(out)(**out))
    try:
        yield {names[kind]: torch.empty(0) for kind in outputs}
    finally:
        for kind in outputs:
            delattr(model.model, f"get_{kind}_features")


@torch.no_grad()
def masked(model: Any, given: dict[str, Tensor], kept: list[Tensor], new: int = 0) -> tuple[Tensor, list[int]]:
    """Logits [k, V] of one unpadded row at the places that stay, and greedily chosen ids.

    The full prompt runs, uncached, with all dropped tokens masked as keys: nothing is shortened anywhere.
    """
    ids, inner = given["input_ids"], model.model
    starts = [0, *given["image_grid_thw"].prod(1).div(4, rounding_mode="floor").cumsum(0).tolist()]
    places = (ids[0] == IMAGE).nonzero()[:, 0]
    stay = ids[0] != IMAGE
    stay[places[torch.cat([k + start for k, start in zip(kept, starts, strict=False)])]] = True
    features = {"image": inner.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)}
    positions = inner.get_rope_index(
        ids, mm_token_type_ids=given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"]
    )[0]
    found: list[int] = []
    logits = torch.zeros(0)
    for step in range(new + 1):
        length = ids.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & stay | torch.eye(length, dtype=torch.bool)
        mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        line = torch.arange(length)[None, None]
        with handing(model, features) as pixels:
            run = model(
                input_ids=ids, attention_mask=mask, position_ids=torch.cat([line, positions]), use_cache=False, **pixels
            )
        if step == 0:
            logits = run.logits[0, stay]
        if step == new:
            break
        found.append(int(run.logits[0, -1].index_fill(0, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax()))
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], 1)
        stay = torch.cat([stay, torch.tensor([True])])
        positions = torch.cat([positions, positions[:, :, -1:].amax(0, keepdim=True).expand(3, 1, 1) + 1], 2)
    return logits, found


@torch.no_grad()
def fed(model: Any, given: dict[str, Tensor], kept: dict[str, list[Tensor]], pad: int = PAD) -> Tensor:
    """Logits of one unpadded row whose kept rows are handed over by hand, token by token, with their old positions."""
    ids, inner = given["input_ids"][0].tolist(), model.model
    features: dict[str, Any] = {}
    rows: dict[str, list[list[Tensor]]] = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name in given:
            run = getattr(inner, f"get_{kind}_features")
            features[kind] = run(given[name], given[f"{kind}_grid_thw"], return_dict=True)
            rows[kind] = [list(features[kind].pooler_output)]
            for level in getattr(features[kind], "deepstack_features", None) or []:
                packed = isinstance(level, Tensor)  # of all visuals, in some releases
                rows[kind].append(list(level.split([len(r) for r in rows[kind][0]]) if packed else level))
    takes = {"mm_token_type_ids", "image_grid_thw", "video_grid_thw"}
    named = {name: value for name, value in given.items() if name in takes}
    positions = inner.get_rope_index(given["input_ids"], **named)[0]
    stays, passed = [], {"image": 0, "video": 0}
    flat = {
        kind: [i + sum(len(r) for r in rows[kind][0][:v]) for v, k in enumerate(kept[kind]) for i in k.tolist()]
        for kind in rows
    }
    for place, token in enumerate(ids):
        kind = {IMAGE: "image", VIDEO: "video"}.get(token)
        if kind is None:
            stays.append(place)
            continue
        if passed[kind] in flat[kind]:
            stays.append(place)
        passed[kind] += 1
    outputs = {}
    for kind, out in features.items():
        fields = {**out, "pooler_output": tuple(r[k] for r, k in zip(rows[kind][0], kept[kind], strict=True))}
        if len(rows[kind]) > 1:
            levels = [[r[k] for r, k in zip(level, kept[kind], strict=True)] for level in rows[kind][1:]]
            packed = isinstance(out.deepstack_features[0], Tensor)
            fields["deepstack_features"] = [torch.cat(level) if packed else tuple(level) for level in levels]
        outputs[kind] = type(out)(**fields)
    at = torch.tensor(stays)
    line = torch.arange(len(stays))[None, None]
    with handing(model, outputs) as pixels:
        return model(
            input_ids=given["input_ids"][:, at], position_ids=torch.cat([line, positions[:, :, at]]),
            attention_mask=torch.ones(1, len(stays), dtype=torch.int64), **pixels,
        ).logits[0]  # fmt: skip
