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
    PIXELS,
    as_it_is,
    by_name,
    cache_of,
    check_cache,
    count_from_full,
    holds,
    inferred_mask,
    is_chosen,
    is_decided,
    is_filled,
    mark,
    offset_of,
    setting,
    with_prompt,
)
from vtoken.prompts.engine import Prepared, Service, prepare, service_of


class PromptMixin(SavesSettings):
    """A multimodal model that hands fewer tokens of images and videos to its language model.

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
                go_on(self, self._vtoken_family, kwargs)
            return stock(*args, **kwargs)
        given = by_name(stock, args, kwargs)
        both = given.get("input_ids") is not None and given.get("inputs_embeds") is not None  # the library says so
        prepared = service = None
        if _is_prunable(self, given, stacklevel=5) and not both:
            service = service_of(self)
            prepared = eagerly(service, given, generating=False)
        if service is None or prepared is None:
            go_on(self, self._vtoken_family, given)
            with as_it_is(self):
                return stock(*args, **kwargs)
        return forwarded(service, stock, prepared, given)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().generate  # type: ignore[misc]
        given = by_name(stock, args, kwargs)
        ids: Any = given.get("input_ids", given.get("inputs"))
        if not any(holds(given, kind) for kind in PIXELS):
            check_goes_on(self, self._vtoken_family, given, ids)
        prepared = service = None
        with torch.no_grad():
            if _is_prunable(self, given | {"input_ids": ids}, stacklevel=4):
                service, given = service_of(self), with_ids(self, given, ids)
                prepared = eagerly(service, given, generating=True)
        if service is None or prepared is None:
            go_on(self, self._vtoken_family, given)
            with as_it_is(self):
                return stock(*args, **kwargs)
        return generated(service, stock, prepared, given)


class InnerMixin(SavesSettings):
    """The model inside, which has no place to shorten the labels and the ids that its caller holds."""

    _vtoken_kinds: tuple[str, ...]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if (len(args) >= 2 or _has_vision(kwargs)) and not is_decided(self):
            given = by_name(stock, args, kwargs) | {"mm_encoder_outputs": None}  # as its caller made them
            kind = next((kind for kind in self._vtoken_kinds if holds(given, kind)), None)
            if kind is not None:
                raise InputError(
                    f"{type(self).__name__} is the inner model (base_model, model.model) of a model whose prompts are "
                    f"shortened, and was called with {kind}s past that model's own forward: it would run with all "
                    f"{kind} tokens. Call the model itself (leave out what replaces its forward, such as a fused "
                    f"loss), or take the method off with vtoken.remove. get_{kind}_features may be called"
                )
            if holds(given, "video"):
                _warn("does not prune video tokens: this call runs unpruned, its images too", "vtc_cls", 4)
        return stock(*args, **kwargs)


def eagerly(service: Service, given: dict[str, Any], *, generating: bool) -> Prepared | None:
    """`prepare`, also in a compiled model: it hangs on values. As a decorator, disable would load the compiler."""
    run = torch.compiler.disable(prepare) if torch.compiler.is_compiling() else prepare
    return run(service, given, generating=generating)


def forwarded(service: Service, run: Any, prepared: Prepared, given: dict[str, Any]) -> Any:
    """The model's forward on a shortened prompt.

    Args:
        run: that forward; another one where the family names another target.
        given: the call as it came.
    """
    before = is_filled(cache_of(given))
    target, call = service.family.hand_over(service.model, dict(prepared.call), generating=False)
    out = run(**call) if target is service.model else type(target).forward(target, **call)
    _mark(service, cache_of(out), prepared, goes_on=before)
    return out


def generated(service: Service, run: Any, prepared: Prepared, given: dict[str, Any]) -> Any:
    """What the model's `generate` makes of a shortened prompt, with the caller's ids in front, if there are any.

    Args:
        run: that method, bound to the model.
        given: the call as it came.
    """
    model, ids = service.model, given["input_ids"]
    prepared.call.pop("inputs", None)
    _check_generation(service, prepared)
    if prepared.changed:
        count_from_full(model, prepared.call, given["inputs_embeds"].shape[1] if ids is None else ids.shape[1])
    with torch.no_grad():
        target, call = service.family.hand_over(model, dict(prepared.call), generating=True)
    with as_it_is(model):
        out = _answered(service, target, run, call, given, prepared)
    returned = cache_of(out)
    _mark(service, cache_of(call) if returned is None else returned, prepared)
    return out


def with_ids(model: Any, given: dict[str, Any], ids: Any) -> dict[str, Any]:
    """A call of `generate` with its ids under their own name, and the mask that it would make of padding."""
    found = given | {"input_ids": ids}
    if given.get("attention_mask") is None and isinstance(ids, Tensor):
        found["attention_mask"] = inferred_mask(model, given, ids)
    return found


def check_goes_on(model: Any, family: Any, given: dict[str, Any], ids: Any) -> None:
    """Raise InputError for the full ids of a conversation whose cache was made from a shortened prompt."""
    for kind, token_id in family.token_ids(model).items():
        check_cache(cache_of(given), ids, token_id, kind)


def go_on(model: Any, family: Any, given: dict[str, Any]) -> None:
    """Text behind a cached prompt is numbered by that prompt's offset, whatever ran in between."""
    offset = offset_of(cache_of(given))
    if offset is not None:
        family.go_on(model, offset)


def _mark(service: Service, cache: Any, prepared: Prepared, *, goes_on: bool = False) -> None:
    for kind, token_id in service.family.token_ids(service.model).items():
        mark(cache, prepared.ids, token_id, kind, goes_on=goes_on, offset=prepared.offset)
    if prepared.offset is not None:
        service.family.go_on(service.model, prepared.offset)


def _answered(
    service: Service, target: Any, run: Any, call: dict[str, Any], given: dict[str, Any], prepared: Prepared
) -> Any:  # fmt: skip
    from vtoken.prompts.generation import FullPrompt, check_way, generate_on

    ids, model = given["input_ids"], service.model
    if not prepared.changed and "inputs_embeds" not in call and target is model:
        return run(**call)
    if given.get("inputs_embeds") is not None:  # then the ids are only shown to callbacks, and may be any
        check_way(model, call)
        return run(**call)
    run = run if target is model else target.generate
    full = FullPrompt(target, ids, given.get("attention_mask"), prepared.ids.shape[1])
    full.token_ids = service.family.token_ids(model)
    return with_prompt(generate_on(run, call, full), ids, prepared.ids.shape[1])


def _check_generation(service: Service, prepared: Prepared) -> None:
    family, uncached = service.family, setting(service.model, prepared.call, "use_cache") is False
    original = any(family.original(m) for m in service.methods.values())
    if uncached and prepared.call.get("position_ids") is not None and family.axes == 1 and original:
        raise InputError("positions='original' leaves gaps, which generate(use_cache=False) takes for packed sequences")


def _is_prunable(model: Any, given: dict[str, Any], stacklevel: int) -> bool:
    """Whether the call's visuals are still to be encoded and can be pruned; warns, at that level, of what cannot."""
    ready, family = given.get("mm_encoder_outputs"), model._vtoken_family
    ready = {"image": ready} if isinstance(ready, Tensor) else ready or {}  # Idefics3 and SmolVLM take rows alone, too
    name, method = model._vtoken.configs[0].method, model._vtoken.methods[PromptMethod]
    kinds = [kind for kind in family.kinds if kind in method.kinds]
    if "video" in method.kinds and "video" not in kinds and holds(given, "video"):
        _warn("does not prune video tokens: this call runs unpruned, its images too", name, stacklevel)
        return False
    if any(ready.get(kind) is not None and not is_chosen(ready[kind]) for kind in kinds):
        message = "shortens what it encodes: this call came with mm_encoder_outputs and runs unpruned"
        _warn(message, name, stacklevel)
        return False
    prompt = given.get("input_ids") is not None or given.get("inputs_embeds") is not None
    return prompt and any(holds(given, kind) for kind in kinds)


def _warn(message: str, name: str, stacklevel: int) -> None:
    warnings.warn(f"{name} {message}", VTokenWarning, stacklevel=stacklevel + 1)


def _has_vision(given: dict[str, Any]) -> bool:
    return given.get("mm_encoder_outputs") is not None or any(holds(given, kind) for kind in PIXELS)
