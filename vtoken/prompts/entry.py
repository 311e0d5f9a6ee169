"""The entry methods of a multimodal model whose prompts are shortened: `forward` and `generate`.

Source: docs/methods/vtc_cls.md 5 to 7.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from vtoken.core.carried import SavesSettings
from vtoken.core.method import PromptMethod
from vtoken.errors import InputError, VTokenWarning
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
    offset_of,
    setting,
    with_prompt,
)
from vtoken.prompts.engine import Prepared, prepare

IMAGES, VIDEOS = ("pixel_values", "pixel_values_images"), ("pixel_values_videos",)


class PromptMixin(SavesSettings):
    """A multimodal model that hands fewer image tokens to its language model.

    `forward` returns logits of the shortened prompt [B, L', V]; `vtoken.trace(model, ...)` tells which position is
    which, and `vtoken.shrink_inputs` shortens labels for a loss that is computed outside. `generate` returns the ids
    that the caller passed, followed by the new tokens, and that is what stopping criteria, logits processors and
    streamers see; cache, scores and attentions are of the short prompt.
    """

    _vtoken: Any
    _vtoken_family: Any

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if (len(args) < 2 and not _has_vision(kwargs)) or is_decided(self.model):
            if not is_decided(self.model):
                _go_on(self, kwargs)
            return stock(*args, **kwargs)
        given = by_name(stock, args, kwargs)
        both = given.get("input_ids") is not None and given.get("inputs_embeds") is not None  # the library says so
        prepared = None
        if _is_prunable(self, given, stacklevel=5) and not both:
            prepared = _eagerly(self, given, generating=False)
        if prepared is None:
            _go_on(self, given)
            with as_it_is(self):
                return stock(*args, **kwargs)
        before = is_filled(cache_of(given))
        target, call = self._vtoken_family.hand_over(self, dict(prepared.call), generating=False)
        out = stock(**call) if target is self else type(target).forward(target, **call)
        _mark(self, cache_of(out), prepared, goes_on=before)
        return out

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().generate  # type: ignore[misc]
        given = by_name(stock, args, kwargs)
        ids: Any = given.get("input_ids", given.get("inputs"))
        if not any(given.get(name) is not None for name in (*IMAGES, *VIDEOS)):
            for kind, token_id in self._vtoken_family.token_ids(self).items():
                check_cache(cache_of(given), ids, token_id, kind)
            _go_on(self, given)
        prepared = None
        with torch.no_grad():
            if _is_prunable(self, given | {"input_ids": ids}, stacklevel=4):
                given["input_ids"] = ids
                if given.get("attention_mask") is None and isinstance(ids, Tensor):
                    given["attention_mask"] = inferred_mask(self, given, ids)
                prepared = _eagerly(self, given, generating=True)
            if prepared is None:
                _go_on(self, given)
                with as_it_is(self):
                    return stock(*args, **kwargs)
            prepared.call.pop("inputs", None)
            _check_generation(self, prepared.call)
            full = given["inputs_embeds"].shape[1] if ids is None else ids.shape[1]
            if prepared.changed:
                count_from_full(self, prepared.call, full)
            target, call = self._vtoken_family.hand_over(self, dict(prepared.call), generating=True)
        with as_it_is(self):
            out = _generated(self, target, stock, call, given, prepared)
        returned = cache_of(out)
        _mark(self, cache_of(call) if returned is None else returned, prepared)
        return out


class InnerMixin(SavesSettings):
    """The model inside, which has no place to shorten the labels and the ids that its caller holds."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if (len(args) >= 2 or _has_vision(kwargs)) and not is_decided(self):
            given = by_name(stock, args, kwargs) | {"mm_encoder_outputs": None}  # as its caller made them
            if any(given.get(name) is not None for name in IMAGES):
                raise InputError(
                    f"{type(self).__name__} is the inner model (base_model, model.model) of a model whose prompts are "
                    "shortened, and was called with images past that model's own forward: it would run with all image "
                    "tokens. Call the model itself (leave out what replaces its forward, such as a fused loss), or "
                    "take the method off with vtoken.remove. get_image_features may be called"
                )
            if any(given.get(name) is not None for name in VIDEOS):
                _warn("does not prune video tokens: this call runs unpruned, its images too", "vtc_cls", 4)
        return stock(*args, **kwargs)


def _eagerly(model: Any, given: dict[str, Any], *, generating: bool) -> Prepared | None:
    # Eagerly, also in a compiled model: it hangs on values. As a decorator, disable would load the compiler.
    run = torch.compiler.disable(prepare) if torch.compiler.is_compiling() else prepare
    return run(model, given, generating=generating)


def _mark(model: Any, cache: Any, prepared: Prepared, *, goes_on: bool = False) -> None:
    for kind, token_id in model._vtoken_family.token_ids(model).items():
        mark(cache, prepared.ids, token_id, kind, goes_on=goes_on, offset=prepared.offset)
    if prepared.offset is not None:
        model._vtoken_family.go_on(model, prepared.offset)


def _go_on(model: Any, given: dict[str, Any]) -> None:
    """Text behind a cached prompt is numbered by that prompt's offset, whatever ran in between."""
    offset = offset_of(cache_of(given))
    if offset is not None:
        model._vtoken_family.go_on(model, offset)


def _generated(
    model: Any, target: Any, stock: Any, call: dict[str, Any], given: dict[str, Any], prepared: Prepared
) -> Any:  # fmt: skip
    """What `generate` makes of the shortened call, with the caller's ids in front, if there are any."""
    from vtoken.prompts.generation import FullPrompt, check_way, generate_on

    ids = given["input_ids"]
    if not prepared.changed and "inputs_embeds" not in call and target is model:
        return stock(**call)
    if given.get("inputs_embeds") is not None:  # then the ids are only shown to callbacks, and may be any
        check_way(model, call)
        return stock(**call)
    run = stock if target is model else target.generate
    full = FullPrompt(target, ids, given.get("attention_mask"), prepared.ids.shape[1])
    full.token_ids = model._vtoken_family.token_ids(model)
    return with_prompt(generate_on(run, call, full), ids, prepared.ids.shape[1])


def _check_generation(model: Any, call: dict[str, Any]) -> None:
    method, family = model._vtoken.methods[PromptMethod], model._vtoken_family
    uncached = setting(model, call, "use_cache") is False
    if uncached and call.get("position_ids") is not None and family.axes == 1 and family.original(method):
        raise InputError("positions='original' leaves gaps, which generate(use_cache=False) takes for packed sequences")


def _is_prunable(model: Any, given: dict[str, Any], stacklevel: int) -> bool:
    """Whether the call's visuals are still to be encoded and can be pruned; warns, at that level, of what cannot."""
    ready, family = given.get("mm_encoder_outputs"), model._vtoken_family
    ready = {"image": ready} if isinstance(ready, Tensor) else ready or {}  # Idefics3 and SmolVLM take rows alone, too
    name = model._vtoken.configs[0].method
    if "video" not in family.kinds and any(given.get(n) is not None for n in VIDEOS):
        _warn("does not prune video tokens: this call runs unpruned, its images too", name, stacklevel)
        return False
    if any(ready.get(kind) is not None and not is_chosen(ready[kind]) for kind in family.kinds):
        message = "prunes images that it encodes: this call came with mm_encoder_outputs and runs unpruned"
        _warn(message, name, stacklevel)
        return False
    prompt = given.get("input_ids") is not None or given.get("inputs_embeds") is not None
    names = [*(IMAGES if "image" in family.kinds else ()), *(VIDEOS if "video" in family.kinds else ())]
    return prompt and any(given.get(n) is not None for n in names)


def _warn(message: str, name: str, stacklevel: int) -> None:
    warnings.warn(f"{name} {message}", VTokenWarning, stacklevel=stacklevel + 1)


def _has_vision(given: dict[str, Any]) -> bool:
    return any(given.get(name) is not None for name in (*IMAGES, *VIDEOS, "mm_encoder_outputs"))
