"""`generate` on a prompt that was rebuilt: its callbacks see the ids that the caller passed, followed by the new ones.

transformers makes its list of processors and its list of stopping criteria, the user's and those of the settings alike,
by two methods of the model. An alias of the model, which shares all that the model holds, makes lists that put the
caller's ids in front before anything in them is asked; the model itself is not written to. Calls of the alias are calls
of the model, so hooks see the model.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from vtoken.errors import InputError, UnsupportedModelError
from vtoken.prompts.calls import refuse_assistant, setting

#: The methods of a model by which transformers makes a call's list of processors and that of criteria.
_MAKERS = ("_get_logits_processor", "_get_stopping_criteria")


class FullPrompt:
    """The prompt as the caller passed it, in place of the one that the model reads.

    Args:
        model: what a call of the alias calls.
        ids: the caller's ids [B, L] int64.
        mask: their mask [B, L], or None.
        short: length L' of the prompt that the model reads, shorter or longer.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor | None, short: int) -> None:
        self.model, self.ids, self.short = model, ids, short
        self.mask = None if mask is None or bool((mask == 1).all()) else mask  # as generate keeps it
        self.more = ids.shape[1] - short
        self.shown: set[str] = set()  # what has been made to see it, of _MAKERS
        #: Ids of placeholders by kind, of the visuals that enter as ready outputs.
        self.token_ids: dict[str, int] = {}

    def ids_for(self, seen: Tensor) -> Tensor:
        """Ids [R, L' + n] of the decoding loop with the caller's prompt; R rows are so many copies of each of B."""
        return torch.cat([self.rows(self.ids, seen), seen[:, self.short :]], dim=1)

    def rows(self, value: Tensor, like: Tensor) -> Tensor:
        """Of every row of `value` [B, L] its copies, next to each other as generate makes them."""
        return value.to(like.device).repeat_interleave(like.shape[0] // value.shape[0], dim=0)

    def settings(self, given: Any) -> Any:
        """A copy of generation settings whose lengths count the caller's prompt."""
        counted = copy.copy(given)
        for name in ("max_length", "min_length"):
            if getattr(given, name, None):
                setattr(counted, name, getattr(given, name) + self.more)
        return counted


def generate_on(stock: Any, call: dict[str, Any], full: FullPrompt) -> Any:
    """Run a `generate` method, bound to any model, on a rebuilt prompt; see `FullPrompt`.

    Args:
        stock: the method.
        call: its arguments for the rebuilt prompt; lengths are numbers of new tokens.
        full: the prompt of the caller.

    Raises:
        InputError: for ways to generate that would see, or that would need to see, another prompt.
        UnsupportedModelError: if this release of transformers makes its lists in another way.
    """
    if not inspect.ismethod(stock):
        raise InputError(
            "generate was replaced on the instance; put the model's own back, or give it embeddings by hand"
        )
    check_way(stock.__self__, call)
    if call.get("streamer") is not None:
        call = call | {"streamer": _Streamer(call["streamer"], full)}
    if not all(hasattr(stock.__self__, name) for name in _MAKERS):
        raise _unknown_release(stock.__self__)
    out = stock.__func__(_alias(stock.__self__, full), **call)
    if full.shown != set(_MAKERS):  # they are there, but nobody called them: callbacks saw the wrong prompt
        raise _unknown_release(stock.__self__)
    return out


def _unknown_release(model: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} of transformers {transformers.__version__} does not make its logits processors and "
        f"stopping criteria by {' and '.join(_MAKERS)}: they would see a rebuilt prompt, not yours. This vtoken "
        "supports transformers from 5.17 on in which it does; vtoken.remove gives the model back as it was"
    )


def check_way(model: Any, call: dict[str, Any]) -> None:
    """Raise InputError for ways to generate that cannot be given a rebuilt prompt."""
    refuse_assistant(model, call)
    if call.get("custom_generate") is not None:
        raise InputError("custom_generate of a shortened prompt is not supported: it would be handed the short ids")
    if setting(model, call, "cache_implementation") == "paged":
        raise InputError("cache_implementation='paged' generates from ids alone, without images; leave it out")
    if setting(model, call, "token_healing"):
        raise InputError("token_healing rewrites the end of the prompt and cannot be combined with a shortened one")


class _Streamer:
    """Hands a streamer the caller's prompt first, then what it would be handed anyway."""

    def __init__(self, streamer: Any, full: FullPrompt) -> None:
        self._streamer = streamer
        self._full: FullPrompt | None = full

    def put(self, value: Tensor) -> None:
        if self._full is not None:
            value, self._full = self._full.rows(self._full.ids, value), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


class _Shown:
    """A list of callbacks that see the caller's prompt."""

    full: FullPrompt

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        stock: Any = super().__call__  # type: ignore[misc]
        return stock(self.full.ids_for(input_ids), scores, **kwargs)


class _Processors(_Shown, LogitsProcessorList):
    """Processors that do."""


class _Whole(LogitsProcessor):
    """A list of processors as one of another list, which would take it to pieces."""

    def __init__(self, processors: _Processors) -> None:
        self._processors = processors

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self._processors(input_ids, scores)


class _Criteria(_Shown, StoppingCriteriaList):
    """Criteria that do."""

    @property
    def max_length(self) -> int | None:
        """For the loop, which counts the short prompt."""
        longest: int | None = super().max_length
        return None if longest is None else longest - self.full.more


def spread(rows: Any, counts: list[int], copies: int) -> Any:
    """Rows of a batch's visuals, `counts` of them a prompt row, for `copies` of every row; one entry a prompt row."""
    flat = rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat([r.flatten(0, -2) for r in rows])
    each = [part for part in flat.split(counts) for _ in range(copies)]
    return torch.cat(each).unsqueeze(0) if isinstance(rows, Tensor) else type(rows)(each)


class _Aliased:
    """The methods by which an alias differs from its model."""

    _vtoken_full: FullPrompt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._vtoken_full.model(*args, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()._get_logits_processor  # type: ignore[misc]
        full, given = self._vtoken_full, inspect.signature(stock).bind(*args, **kwargs).arguments
        given["generation_config"] = full.settings(given["generation_config"])
        given["input_ids_seq_length"], given["encoder_input_ids"] = full.ids.shape[1], full.ids
        if given.get("model_kwargs") is not None:
            given["model_kwargs"] = given["model_kwargs"] | {"attention_mask": self._expanded_mask(given)}
        made = _Processors(stock(**given))
        made.full = full
        full.shown.add("_get_logits_processor")
        return made

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()._get_stopping_criteria  # type: ignore[misc]
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        given["generation_config"] = self._vtoken_full.settings(given["generation_config"])
        made = _Criteria(stock(**given))
        made.full = self._vtoken_full
        made.full.shown.add("_get_stopping_criteria")
        return made

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An assistant decodes by lists of its own: the caller's processors in it see the caller's prompt, too."""
        stock: Any = super()._get_candidate_generator  # type: ignore[misc]
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        if given.get("logits_processor"):
            given["logits_processor"] = LogitsProcessorList([_Whole(given["logits_processor"])])
        return stock(**given)

    def _expand_multimodal_outputs(
        self, input_ids: Any, mm_encoder_output: Any, expand_size: int = 1, inputs_embeds: Any = None
    ) -> Any:  # fmt: skip
        """Ready outputs for several copies of every row; the library's own takes unequal counts for one row's."""
        known = self._vtoken_full.token_ids
        if input_ids is None or not input_ids.numel() or not set(mm_encoder_output) <= set(known):
            stock: Any = super()._expand_multimodal_outputs  # type: ignore[misc]
            return stock(input_ids, mm_encoder_output, expand_size=expand_size, inputs_embeds=inputs_embeds)
        for kind, output in mm_encoder_output.items():
            counts = (input_ids == known[kind]).sum(1).tolist()
            output.pooler_output = spread(output.pooler_output, counts, expand_size)
            levels = getattr(output, "deepstack_features", None)
            if levels is not None:
                output.deepstack_features = [spread(level, counts, expand_size) for level in levels]
        return mm_encoder_output

    def _expanded_mask(self, given: dict[str, Any]) -> Tensor | None:
        """The caller's mask with a row for every row that is generated."""
        mask, settings = self._vtoken_full.mask, given["generation_config"]
        copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        return None if mask is None else mask.repeat_interleave(copies, dim=0)


def _alias(model: Any, full: FullPrompt) -> Any:
    """A second object over everything that the model holds, of a class that differs in `_Aliased`'s methods."""
    kind: Any = type(model)
    cls: Any = _alias_class(kind)
    alias: Any = object.__new__(cls)
    object.__setattr__(alias, "__dict__", model.__dict__)
    object.__setattr__(alias, "_vtoken_full", full)
    return alias


@functools.cache
def _alias_class(cls: type) -> type:
    # What belongs to one call is in a slot, as the attributes are the model's own.
    body = {"__slots__": ("_vtoken_full",), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_Aliased, cls), body)
