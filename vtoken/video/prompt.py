"""The prompt of a video model rebuilt around the tokens that its videos were given (docs/methods/quota.md 9.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtoken.core.trace import current_trace, tracing
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.hosts.video.adapter import VISION_SIDE, VideoAdapter, VideoFeatures, VideoLayout, embed
from vtoken.prompts.budget import method_of
from vtoken.prompts.calls import cache_of, chosen, is_filled
from vtoken.prompts.family import rows_of
from vtoken.prompts.shrink import ShortPrompt, check_ids, check_shapes, default_positions, shrink_inputs
from vtoken.video.tokens import VideoTokens, placeholders, with_separators

_ALONG = ("attention_mask", "labels", "token_type_ids")
_BUILT = ("inputs_embeds", "mm_encoder_outputs")


class PreparedPrompt(dict[str, Any]):
    """Arguments for the model's `generate`, or for its `forward` without `input_ids` where `inputs_embeds` are there.

    Attributes:
        reports: a QuotaReport of every video.
        index: place of every position in the caller's prompt, [B, L'] int64, -1 where padded.
    """

    reports: tuple[Any, ...] = ()
    index: Tensor


@dataclass(frozen=True, eq=False)
class _Images:
    """A prompt whose images have become features: its arguments, those features, places in the caller's prompt."""

    given: dict[str, Any]
    output: Any = None
    index: Tensor | None = None


def check_call(adapter: VideoAdapter, model: Any, given: dict[str, Any]) -> None:
    """Raise InputError for calls whose prompt cannot be rebuilt, before anything runs."""
    ids = given.get("input_ids")
    if ids is None or any(given.get(name) is not None for name in _BUILT):
        raise InputError(
            "a call with a video needs input_ids, and neither inputs_embeds nor mm_encoder_outputs: its prompt is "
            "rebuilt from ids. Tuned prompts (peft's PromptTuningConfig and the like) cannot be combined with it"
        )
    check_ids(ids)
    check_shapes(ids, {name: given.get(name) for name in (*_ALONG, "mm_token_type_ids")}, None)
    if is_filled(cache_of(given)):
        raise InputError(
            "a video came with a cache that is not empty: what it holds cannot be matched to a rebuilt prompt. Send "
            "the whole conversation without the cache"
        )
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise InputError("logits_to_keep names positions of the full prompt; pass how many of the last ones to keep")
    pruning = method_of(model)
    if pruning is not None and given.get("pixel_values") is not None and model._vtoken_family.axes == 3:
        raise ConfigError(
            f"{type(pruning).__name__} shortens prompts of {type(model).__name__} along three axes, which cannot be "
            "combined with a video budget in one call: ask about images and videos in calls of their own"
        )
    if pruning is not None and given.get("pixel_values") is not None and pruning.positions == "original":
        raise ConfigError(
            "VTCCLS(positions='original') numbers tokens by the full prompt, which a video with a budget does not "
            "keep; use positions='compact' (vtoken.configure), or ask about images and videos in calls of their own"
        )
    adapter.ready(model, given)


def check_placeholders(ids: Tensor, token_id: int, layouts: Sequence[VideoLayout]) -> None:
    """Raise ShapeError unless the prompt has the placeholders that the model needs for the pixels."""
    total, expected = int((ids == token_id).sum()), sum(layout.length for layout in layouts)
    if total != expected:
        lengths = ", ".join(str(layout.length) for layout in layouts)
        raise ShapeError(
            f"{total} video placeholders in the prompt, but its {len(layouts)} video(s) need {expected} ({lengths}): "
            "the processor and the model disagree on the token count (patch size, frames or merge size)"
        )


def build(
    adapter: VideoAdapter,
    model: Any,
    given: dict[str, Any],
    features: Sequence[VideoFeatures],
    videos: Sequence[VideoTokens],
    *,
    padding_side: str,
) -> PreparedPrompt:
    """The call `given` with the placeholders of its videos made as many as their tokens, and those tokens in place.

    Args:
        given: arguments of the model, by name.
        features, videos: of every video what it has, and what it enters with.
        padding_side: for rows that get shorter than others; "left" also means that the model will generate.
    """
    numbered = adapter.positions(model, given, generating=padding_side == "left")
    images = _encode_images(adapter, model, given, padding_side)
    given, token_id = images.given, adapter.placeholder_id(model)
    kept = [placeholders(v, f.layout, adapter.newline) for v, f in zip(videos, features, strict=True)]
    short = _shrunk(model, given, kept, [f.layout.length for f in features], token_id, padding_side, numbered is None)
    call = {name: value for name, value in given.items() if name not in (*VISION_SIDE, *_ALONG, "position_ids")}
    call = PreparedPrompt(call | short.arguments())
    if "labels" in call:
        call["labels"] = call["labels"].masked_fill(short.input_ids == token_id, -100)
    if numbered is not None:
        _number(adapter, model, call, numbered, given.get("attention_mask"), short)
    levels = _tokens_by_level(adapter, model, features, videos)
    if adapter.inject == "encoder_outputs":
        outputs = {"video": chosen(adapter.outputs(model, levels))}
        call["mm_encoder_outputs"] = outputs if images.output is None else outputs | {"image": images.output}
    else:
        rows = [] if images.output is None else [(adapter.image_id(model), rows_of(images.output))]
        call["inputs_embeds"] = embed(model, short.input_ids, [*rows, (token_id, torch.cat(list(levels[0])))])
    call.index = short.index
    if images.index is not None:
        call.index = images.index.gather(1, short.index.clamp_min(0)).masked_fill(short.index < 0, -1)
    return call


def _shrunk(
    model: Any, given: dict[str, Any], kept: list[Tensor], lengths: list[int], token_id: int, side: str, one_axis: bool
) -> ShortPrompt:
    pad = getattr(model.config, "pad_token_id", None)
    along: dict[str, Any] = {name: given.get(name) for name in _ALONG}
    return shrink_inputs(
        given["input_ids"],
        kept,
        lengths,
        token_id=token_id,
        **along,
        position_ids=given.get("position_ids") if one_axis else None,
        pad_token_id=0 if pad is None else pad,
        padding_side=side,
    )


def _encode_images(adapter: VideoAdapter, model: Any, given: dict[str, Any], side: str) -> _Images:
    """Images by the model's own path, or pruned if VTC-CLS is applied to it."""
    if given.get("pixel_values") is None:
        return _Images(given)
    if method_of(model) is None:
        return _Images(given, adapter.images(model, given))
    from vtoken.prompts.engine import prepare

    videos = {name: value for name, value in given.items() if name in VISION_SIDE and "video" in name}
    with contextlib.ExitStack() as stack:
        record = current_trace(model) or stack.enter_context(tracing(model))
        prepared = prepare(model, _without(given, videos), generating=side == "left")
    if prepared is None or record.prompt is None:
        raise InputError("pixel_values came without image placeholders in the prompt")
    call = prepared.call
    return _Images(_without(call, {"features": None}) | videos, call["features"]["image"], record.prompt.index)


def _without(given: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def _number(
    adapter: VideoAdapter,
    model: Any,
    call: PreparedPrompt,
    numbered: tuple[Tensor, Tensor | None],
    full_mask: Tensor | None,
    short: ShortPrompt,
) -> None:
    """Positions of several axes: every token keeps those of its place in the full prompt."""
    positions, deltas = numbered
    index, mask = short.index, short.attention_mask
    old = positions.gather(2, index.clamp_min(0).expand(positions.shape[0], -1, -1))
    if mask is None:
        line = torch.arange(index.shape[1], device=index.device).expand_as(index)
    else:
        line = default_positions(mask)
    call["position_ids"] = torch.cat([line.unsqueeze(0), old.masked_fill(index < 0, 0)])
    if deltas is not None:
        before = positions.shape[2] if full_mask is None else full_mask.sum(1, keepdim=True)
        after = index.shape[1] if mask is None else mask.sum(1, keepdim=True)
        adapter.go_on(model, deltas + (before - after))


def _tokens_by_level(
    adapter: VideoAdapter, model: Any, features: Sequence[VideoFeatures], videos: Sequence[VideoTokens]
) -> list[list[Tensor]]:
    """Of every level of features the finished tokens of every video, separators among them."""
    lengths = [len(video.levels[0]) for video in videos]
    found = []
    for level in zip(*(video.levels for video in videos), strict=True):
        finished = adapter.finish(model, torch.cat(list(level))).split(lengths)
        found.append(
            [
                with_separators(tokens, video.rows, adapter.newline, f.newline)
                for tokens, video, f in zip(finished, videos, features, strict=True)
            ]
        )
    return found
