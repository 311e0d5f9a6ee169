"""The entry methods of a LLaVA-like model whose prompts are shortened: `forward` and `generate` (vtc_cls.md 5 to 7)."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.core.errors import InputError, ShapeError
from vtoken.core.prompt import PromptRecord
from vtoken.core.trace import current_trace
from vtoken.hosts.hf_entry import grid_of, pair
from vtoken.hosts.llava_features import PIXELS, ImageFeatures, encode, tower_of, without_images
from vtoken.hosts.prompt import ShortPrompt, check_shapes, shrink_inputs
from vtoken.hosts.prompt_calls import (
    by_name,
    cache_of,
    check_cache,
    count_from_full,
    is_filled,
    mark,
    refuse_assistant,
    refuse_chunks,
    setting,
    with_prompt,
)

_ALONG = ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


class PromptMixin:
    """A multimodal model that hands fewer image tokens to its language model.

    `forward` returns logits of the shortened prompt [B, L', V]; `vtoken.trace(model, ...)` tells which position is
    which, and `vtoken.shrink_inputs` shortens labels for a loss that is computed outside. `generate` returns the ids
    that the caller passed, followed by the new tokens; cache, scores and streamers see the short prompt.
    """

    _vtoken: Any
    _vtoken_part: ClassVar[str] = "prompt"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if len(args) < 2 and not _has_images(kwargs):
            return stock(*args, **kwargs)
        given = by_name(stock, args, kwargs)
        prepared = prepare(self, given, padding_side="right") if _is_prunable(given, stacklevel=5) else None
        if prepared is None:
            return stock(*args, **kwargs)
        call, short, _ = prepared
        before = is_filled(cache_of(given))
        out = stock(**_handed_over(self, call))
        mark(cache_of(out), short, image_token_id(self), goes_on=before)
        return out

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().generate  # type: ignore[misc]
        given = by_name(stock, args, kwargs)
        ids: Any = given.get("input_ids", given.get("inputs"))
        if not _has_images(given):
            check_cache(cache_of(given), ids, image_token_id(self))
            return stock(*args, **kwargs)
        given["input_ids"] = ids
        # Where generate hands videos on to forward, that warns of them.
        if not _is_prunable(given, stacklevel=3 if _takes_outputs(self) else None):
            return stock(*args, **kwargs)
        with torch.no_grad():
            prepared = prepare(self, given, padding_side="left")
            if prepared is None:
                return stock(*args, **kwargs)
            call, short, changed = prepared
            call.pop("inputs", None)
            _check_generation(self, call, changed)
            if changed:
                count_from_full(self, call, ids.shape[1])
            call = _handed_over(self, call, generating=True)
        out = stock(**call)
        returned = cache_of(out)
        mark(cache_of(call) if returned is None else returned, short, image_token_id(self))
        return with_prompt(out, ids, short.shape[1])


def prepare(
    model: Any, given: dict[str, Any], *, padding_side: str
) -> tuple[dict[str, Any], Tensor, bool] | None:  # fmt: skip
    """Encode the images of a call and shorten its prompt.

    Returns:
        The arguments of the shortened call, its features under "features"; the short ids; and whether anything was
        taken away. None if there is no placeholder.

    Raises:
        ShapeError: if the placeholders fit neither the full nor the kept features.
        InputError: if something else of the call cannot be shortened.
    """
    ids, token_id = given["input_ids"], image_token_id(model)
    total = int((ids == token_id).sum())
    if total == 0:  # the library says so
        return None
    along = {name: given.get(name) for name in _ALONG}
    places, cached = given.get("position_ids"), is_filled(cache_of(given))
    if not cached:  # before the tower runs; with a cache the mask is longer than the ids
        check_shapes(ids, along, places)
    method = model._vtoken.methods["on_features"]
    features = encode(model, method, given)
    chosen = _selection(features, total, cached=cached)
    pad = getattr(model.config, "pad_token_id", None)
    if cached:  # nothing is to be taken out, or the selection would have raised
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        short = ShortPrompt(input_ids=ids, position_ids=places, index=index, **along)
    else:
        short = shrink_inputs(
            ids,
            chosen,
            features.full_lengths if chosen is features.kept else features.lengths,
            token_id=token_id,
            **along,
            position_ids=places,
            pad_token_id=0 if pad is None else pad,
            padding_side=padding_side,
            positions=method.positions,
        )
    changed = features.lengths != features.full_lengths
    if short.input_ids is not ids and isinstance(given.get("logits_to_keep"), Tensor):
        raise InputError("logits_to_keep names positions of the full prompt; pass how many of the last ones to keep")
    _record(model, given, features, short)
    call = {name: value for name, value in without_images(given).items() if name not in (*_ALONG, "position_ids")}
    call |= {**short.arguments(), "features": features.pruned()}
    return call, short.input_ids, changed


def image_token_id(model: Any) -> int:
    """Id of an image placeholder."""
    config = model.config
    return int(config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index)


def _selection(features: ImageFeatures, total: int, *, cached: bool) -> tuple[Tensor, ...]:
    """What to take out of the prompt: what is not kept, or nothing if its placeholders already fit."""
    full, kept = sum(features.full_lengths), sum(features.lengths)
    if total == kept != full:
        return tuple(torch.arange(n) for n in features.lengths)
    if total != full:
        raise ShapeError(
            f"{total} image placeholders in the prompt, but its {len(features.lengths)} image(s) give {full} features, "
            f"{kept} of them kept: it must have one of these two numbers. The processor and the model disagree on the "
            "token count (patch size, image sizes or feature strategy)"
        )
    if cached and kept != full:
        raise InputError(
            "a cache that is not empty came with a full prompt: what it holds cannot be matched to a shortened one. "
            "Send the whole conversation without the cache, or pass the short ids from the record of vtoken.trace"
        )
    return features.kept


def _record(model: Any, given: dict[str, Any], features: ImageFeatures, short: ShortPrompt) -> None:
    trace = current_trace(model)
    if trace is None:
        return
    pixels = next(given[name] for name in PIXELS if given.get(name) is not None)
    tower: Any = tower_of(model)[1]
    own_size = hasattr(model.model, "pack_image_features")  # crops are cut to the tower's size
    size = pair(tower.config.image_size) if own_size else (pixels.shape[-2], pixels.shape[-1])
    trace.record_prompt(
        PromptRecord(
            kept=features.kept,
            full_lengths=features.full_lengths,
            lengths=features.lengths,
            scores=features.scores,
            index=short.index,
            input_ids=short.input_ids,
            scorer=features.scorer,
            layers=features.layers,
            grid=grid_of(tower, size),
            first_patch=features.first_patch,
            anchors=features.anchors,
        )
    )


def _takes_outputs(model: Any) -> bool:
    """Whether this version of the host takes features that are ready; then its generate encodes images itself."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def _handed_over(model: Any, call: dict[str, Any], *, generating: bool = False) -> dict[str, Any]:
    """The call with its features in the form that this version of the host takes."""
    features, ids = call.pop("features"), call["input_ids"]
    if _takes_outputs(model):
        return call | {"mm_encoder_outputs": {"image": features}}
    rows = features.pooler_output
    rows = rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat(list(rows))
    embeds = model.get_input_embeddings()(ids)
    places = (ids == image_token_id(model)).unsqueeze(-1).to(embeds.device)
    call["inputs_embeds"] = embeds.masked_scatter(places, rows.to(embeds.device, embeds.dtype))
    if not generating:
        del call["input_ids"]
    else:
        refuse_chunks(model, call, "needs a transformers whose generate takes mm_encoder_outputs")
    return call


def _check_generation(model: Any, call: dict[str, Any], changed: bool) -> None:
    if changed:
        refuse_assistant(model, call)
    uncached = setting(model, call, "use_cache") is False
    if (
        uncached
        and call.get("position_ids") is not None
        and model._vtoken.methods["on_features"].positions == "original"
    ):
        raise InputError("positions='original' leaves gaps, which generate(use_cache=False) takes for packed sequences")


def _is_prunable(given: dict[str, Any], stacklevel: int | None) -> bool:
    """Whether the call's images are still to be encoded and can be pruned; warns of videos at that level."""
    ready = given.get("inputs_embeds") is not None or bool(given.get("mm_encoder_outputs"))
    if given.get("input_ids") is None or ready or not _has_images(given):
        return False
    if given.get("pixel_values_videos") is None:
        return True
    if stacklevel is not None:
        message = "vtc_cls does not prune video tokens: this call runs unpruned, its images too"
        warnings.warn(message, stacklevel=stacklevel)
    return False


def _has_images(given: dict[str, Any]) -> bool:
    return any(given.get(name) is not None for name in (*PIXELS, "pixel_values_videos"))
