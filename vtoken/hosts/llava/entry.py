"""The entry methods of a LLaVA-like model whose prompts are shortened: `forward` and `generate`.

Source: docs/methods/vtc_cls.md 5 to 7.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.core.records import PromptRecord
from vtoken.core.trace import current_trace
from vtoken.errors import InputError, ShapeError, VTokenWarning
from vtoken.hosts.llava.features import PIXELS, ImageFeatures, encode, tower_of, without_images
from vtoken.hosts.transformers.families import grid_of
from vtoken.hosts.transformers.images import pair
from vtoken.prompts.calls import (
    as_it_is,
    by_name,
    cache_of,
    check_cache,
    count_from_full,
    inferred_mask,
    is_chosen,
    is_decided,
    is_filled,
    mark,
    refuse_chunks,
    setting,
    with_prompt,
)
from vtoken.prompts.shrink import ShortPrompt, check_ids, check_shapes, placeholders_in, rows_at, shrink_inputs

_ALONG = ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


class PromptMixin:
    """A multimodal model that hands fewer image tokens to its language model.

    `forward` returns logits of the shortened prompt [B, L', V]; `vtoken.trace(model, ...)` tells which position is
    which, and `vtoken.shrink_inputs` shortens labels for a loss that is computed outside. `generate` returns the ids
    that the caller passed, followed by the new tokens, and that is what stopping criteria, logits processors and
    streamers see; cache, scores and attentions are of the short prompt.
    """

    _vtoken: Any
    _vtoken_part: ClassVar[str] = "prompt"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if (len(args) < 2 and not _has_vision(kwargs)) or is_decided(self.model):
            return stock(*args, **kwargs)
        given = by_name(stock, args, kwargs)
        both = given.get("input_ids") is not None and given.get("inputs_embeds") is not None  # the library says so
        prepared = None
        if _is_prunable(given, stacklevel=5) and not both:
            prepared = prepare(self, given, padding_side="right")
        if prepared is None:
            with as_it_is(self):
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
        if not any(given.get(name) is not None for name in (*PIXELS, "pixel_values_videos")):
            check_cache(cache_of(given), ids, image_token_id(self))
        prepared = None
        with torch.no_grad():
            if _is_prunable(given | {"input_ids": ids}, stacklevel=4):
                given["input_ids"] = ids
                if given.get("attention_mask") is None and isinstance(ids, Tensor):
                    given["attention_mask"] = inferred_mask(self, given, ids)
                prepared = prepare(self, given, padding_side="left")
            if prepared is None:
                with as_it_is(self):
                    return stock(*args, **kwargs)
            call, short, changed = prepared
            call.pop("inputs", None)
            _check_generation(self, call)
            full = given["inputs_embeds"].shape[1] if ids is None else ids.shape[1]
            if changed:
                count_from_full(self, call, full)
            call = _handed_over(self, call, generating=True)
        with as_it_is(self):
            out = _generated(self, stock, call, given, short.shape[1], changed)
        returned = cache_of(out)
        mark(cache_of(call) if returned is None else returned, short, image_token_id(self))
        return out


class InnerMixin:
    """The model inside, which has no place to shorten the labels and the ids that its caller holds."""

    _vtoken_part: ClassVar[str] = "prompt"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if (len(args) >= 2 or _has_vision(kwargs)) and not is_decided(self):
            given = by_name(stock, args, kwargs) | {"mm_encoder_outputs": None}  # as its caller made them
            if any(given.get(name) is not None for name in PIXELS):
                raise InputError(
                    f"{type(self).__name__} is the inner model (base_model, model.model) of a model whose prompts are "
                    "shortened, and was called with images past that model's own forward: it would run with all image "
                    "tokens. Call the model itself (leave out what replaces its forward, such as a fused loss), or "
                    "take the method off with vtoken.remove. get_image_features may be called"
                )
            _is_prunable(given, stacklevel=5)  # warns of what is not pruned
        return stock(*args, **kwargs)


def prepare(
    model: Any, given: dict[str, Any], *, padding_side: str
) -> tuple[dict[str, Any], Tensor, bool] | None:  # fmt: skip
    """Encode the images of a call and shorten its prompt.

    Where the prompt comes as embeddings, its placeholders are those that equal a placeholder's own, as for the host.

    Returns:
        The arguments of the shortened call, its features under "features"; the short ids; and whether anything was
        taken away. None if there is no placeholder.

    Raises:
        ShapeError: if the placeholders fit neither the full nor the kept features.
        InputError: if something else of the call cannot be shortened.
    """
    token_id, embeds = image_token_id(model), given.get("inputs_embeds")
    if embeds is None:
        ids = given["input_ids"]
        check_ids(ids)
    else:
        ids = placeholders_in(embeds, model.get_input_embeddings(), token_id)
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
    if embeds is not None:
        blank = model.get_input_embeddings()(ids.new_tensor(0 if pad is None else pad))
        call |= {"input_ids": given.get("input_ids"), "inputs_embeds": rows_at(embeds, short.index, blank)}
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
    features, embeds = call.pop("features"), call.get("inputs_embeds")
    if embeds is None and _takes_outputs(model):
        return call | {"mm_encoder_outputs": {"image": features}}
    rows = features.pooler_output
    rows = rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat(list(rows))
    table, token_id = model.get_input_embeddings(), image_token_id(model)
    if embeds is None:
        ids = call["input_ids"]
        embeds = table(ids)
    else:
        ids = placeholders_in(embeds, table, token_id)
    places = (ids == token_id).unsqueeze(-1).to(embeds.device)
    call["inputs_embeds"] = embeds.masked_scatter(places, rows.to(embeds.device, embeds.dtype))
    if generating:
        refuse_chunks(model, call, "needs a prompt of ids and a transformers whose generate takes mm_encoder_outputs")
    if not generating or call["input_ids"] is None:
        del call["input_ids"]
    return call


def _generated(
    model: Any, stock: Any, call: dict[str, Any], given: dict[str, Any], short: int, changed: bool
) -> Any:  # fmt: skip
    """What `generate` makes of the shortened call, with the caller's ids in front, if there are any."""
    from vtoken.prompts.generation import FullPrompt, check_way, generate_on

    ids = given["input_ids"]
    if not changed and "inputs_embeds" not in call:
        return stock(**call)
    if given.get("inputs_embeds") is not None:  # then the ids are only shown to callbacks, and may be any
        check_way(model, call)
        return stock(**call)
    out = generate_on(stock, call, FullPrompt(model, ids, given.get("attention_mask"), short))
    return with_prompt(out, ids, short)


def _check_generation(model: Any, call: dict[str, Any]) -> None:
    uncached = setting(model, call, "use_cache") is False
    if (
        uncached
        and call.get("position_ids") is not None
        and model._vtoken.methods["on_features"].positions == "original"
    ):
        raise InputError("positions='original' leaves gaps, which generate(use_cache=False) takes for packed sequences")


def _is_prunable(given: dict[str, Any], stacklevel: int) -> bool:
    """Whether the call's images are still to be encoded and can be pruned; warns, at that level, of what cannot."""
    ready = given.get("mm_encoder_outputs") or {}
    if given.get("pixel_values_videos") is not None:
        message = "vtc_cls does not prune video tokens: this call runs unpruned, its images too"
    elif ready.get("image") is not None and not is_chosen(ready["image"]):
        message = "vtc_cls prunes images that it encodes: this call came with mm_encoder_outputs and runs unpruned"
    else:
        prompt = given.get("input_ids") is not None or given.get("inputs_embeds") is not None
        return prompt and any(given.get(name) is not None for name in PIXELS)
    warnings.warn(message, VTokenWarning, stacklevel=stacklevel)
    return False


def _has_vision(given: dict[str, Any]) -> bool:
    return any(given.get(name) is not None for name in (*PIXELS, "pixel_values_videos", "mm_encoder_outputs"))
