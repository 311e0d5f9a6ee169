"""Calls of a model whose prompt was shortened: arguments by name, lengths, caches and the ids that come back."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import InputError

#: Arguments that bring images and videos, over the releases.
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
_CACHED, _OFFSET = "_vtoken_placeholders", "_vtoken_offset"


def by_name(stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(stock)
    bound = signature.bind(*args, **kwargs).arguments
    rest = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    options = bound.pop(rest[0], {}) if rest else {}
    return {**bound, **options}


def holds(given: dict[str, Any], kind: str) -> bool:
    """Whether a call brings pixels of a kind of visuals."""
    return any(given.get(name) is not None for name in PIXELS[kind])


def setting(model: Any, call: dict[str, Any], name: str) -> Any:
    """A generation setting, from the first place that has it."""
    places = (call.get("generation_config"), model.generation_config)
    return next((v for v in (call.get(name), *(getattr(p, name, None) for p in places)) if v is not None), None)


def count_from_full(model: Any, call: dict[str, Any], full: int) -> None:
    """Lengths that count the caller's prompt, as numbers of new tokens."""
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = setting(model, call, name)
        if not length or setting(model, call, new) is not None:
            continue
        if name == "max_length" and length <= full:
            raise InputError(f"max_length={length} counts the prompt, which has {full} tokens; use max_new_tokens")
        call.pop(name, None)
        call[new] = max(0, length - full)


def refuse_assistant(model: Any, call: dict[str, Any]) -> None:
    """Raise InputError for helpers that guess tokens from what only the full prompt has.

    Another model of the same build, or the prompt's own words, may guess where features enter as `mm_encoder_outputs`:
    there the short prompt is all that transformers sees.
    """
    parts = ("assistant_early_exit", "use_mtp", "speculation_type")
    found = next((name for name in parts if setting(model, call, name)), None)
    if found is None and call.get("assistant_tokenizer") is not None:
        found = "assistant_tokenizer"
    if found is not None:
        raise InputError(
            f"{found} of a shortened prompt is not supported; an assistant_model of the same build helps, "
            "or prompt_lookup_num_tokens"
        )
    lookup = setting(model, call, "prompt_lookup_num_tokens")
    if (call.get("assistant_model") is not None or lookup) and "mm_encoder_outputs" not in call:
        raise InputError(
            "assisted decoding of a shortened prompt needs a prompt of ids and a transformers whose generate takes "
            "mm_encoder_outputs (5.18 does); leave out the assistant"
        )


def refuse_chunks(model: Any, call: dict[str, Any], why: str) -> None:
    """Raise InputError if the prompt is to be read in chunks of a fixed size."""
    if setting(model, call, "prefill_chunk_size") is not None:
        raise InputError(f"prefill_chunk_size {why}; this one would generate from chunks of the wrong length")


def with_prompt(out: Any, ids: Tensor, short: int) -> Any:
    """The result with its rows starting with the caller's ids instead of the short ones."""
    rows = out if isinstance(out, Tensor) else out.sequences
    prompt = ids.to(rows.device).repeat_interleave(rows.shape[0] // ids.shape[0], dim=0)
    rows = torch.cat([prompt, rows[:, short:]], dim=1)
    if isinstance(out, Tensor):
        return rows
    out.sequences = rows
    return out


def cache_of(holder: Any) -> Any:
    """The key-value cache among a call's arguments or in an output, under the name that the release gives it."""
    if isinstance(holder, tuple):  # an output under return_dict=False
        return next((part for part in holder if hasattr(part, "get_seq_length")), None)
    read = holder.get if isinstance(holder, dict) else lambda name: getattr(holder, name, None)
    found = read("cache")
    return read("past_key_values") if found is None else found


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens already."""
    return cache is not None and cache.get_seq_length() > 0


def mark(
    cache: Any,
    short: Tensor,
    token_id: int,
    kind: str = "image",
    *,
    goes_on: bool = False,
    offset: Tensor | None = None,
) -> None:
    """Let the cache, which is the caller's, tell how many placeholders each row of its prompt has.

    Args:
        short: ids [B, L'] that were put into it; only the new ones if it `goes_on` from what it held.
        kind: of the placeholders, "image" or "video".
        offset: with which models of three axes number what follows, [B, 1].
    """
    if not hasattr(cache, "get_seq_length"):
        return
    counts, held = (short == token_id).sum(1).tolist(), getattr(cache, _CACHED, {})
    old = held.get(kind, []) if goes_on else []
    counts = [a + b for a, b in zip(old, counts, strict=True)] if len(old) == len(counts) else counts
    setattr(cache, _CACHED, {**held, kind: counts})
    if offset is not None:
        setattr(cache, _OFFSET, offset)


def offset_of(cache: Any) -> Tensor | None:
    """The offset [B, 1] that a filled cache was marked with; what marks an emptied one is forgotten."""
    if cache is None or not hasattr(cache, _CACHED):
        return None
    if is_filled(cache):
        return getattr(cache, _OFFSET, None)
    for name in (_CACHED, _OFFSET):
        if hasattr(cache, name):
            delattr(cache, name)
    return None


def check_cache(cache: Any, ids: Tensor | None, token_id: int, what: str = "image") -> None:
    """Refuse the full ids of a conversation whose cache was made from a shortened prompt."""
    marked = getattr(cache, _CACHED, {}).get(what)
    if marked is None or ids is None or not is_filled(cache):
        return
    counts = (ids == token_id).sum(1).tolist()
    if any(counts) and not set(counts) <= set(marked):
        raise InputError(
            f"the cache was made from a shortened prompt with {marked} {what} tokens per row, but the ids have "
            f"{counts}: the wrong tokens would be left out. Send the whole conversation without the cache, or go on "
            "from the short ids in the record of vtoken.trace"
        )


def inferred_mask(model: Any, call: dict[str, Any], ids: Tensor) -> Tensor | None:
    """The mask that `generate` makes of padding in ids [B, L] if it is given none; it does not look at embeddings."""
    pad, ends = setting(model, call, "pad_token_id"), setting(model, call, "eos_token_id")
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()


#: Inner models of those whose patched entry is running, and has decided what enters.
_decided: ContextVar[tuple[Any, ...]] = ContextVar("vtoken_decided", default=())


@contextlib.contextmanager
def as_it_is(model: Any) -> Iterator[None]:
    """For its length what is handed to the model and to the model inside it enters as it is, without a word."""
    token = _decided.set((*_decided.get(), model.model))
    try:
        yield
    finally:
        _decided.reset(token)


def is_decided(inner: Any) -> bool:
    """Whether that is so for the model inside."""
    return any(module is inner for module in _decided.get())


def fresh(output: Any, **fields: Any) -> Any:
    """A new output object of the same class with the same values, but for `fields`.

    Some releases keep rows in an attribute that the class has no field for.
    """
    made = type(output)(**output)
    for name, value in {**vars(output), **fields}.items():
        if value is not None:
            setattr(made, name, value)
    return made


def chosen(output: Any) -> Any:
    """An output of features, marked as holding what a method chose."""
    output._vtoken_chosen = True
    return output


def is_chosen(output: Any) -> bool:
    """Whether a method has chosen what is in it."""
    return getattr(output, "_vtoken_chosen", False) is True
