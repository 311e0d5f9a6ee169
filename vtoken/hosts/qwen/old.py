"""Models of transformers before 5.18 whose calls take pixels but not what the tower made of them, nor embeddings.

Qwen3-VL, whose deeper features would be lost, and Gemma 3 and PaliGemma, whose `generate` takes ids alone.

Source: docs/methods/quota.md 9.5.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vtoken.core.calling import call as call_as
from vtoken.core.patch import view
from vtoken.hosts.exchanged import Exchanged
from vtoken.prompts.calls import fresh
from vtoken.prompts.family import like, rows_of


def encoded(model: Any, call: dict[str, Any], token_ids: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """A stand-in for the model whose towers hand out `mm_encoder_outputs`, and the call for it.

    The model itself is not written to. The pixels of the call are empty: they only say that there are some.
    """
    outputs = call["mm_encoder_outputs"]
    rest = {name: value for name, value in call.items() if name != "mm_encoder_outputs"}
    towers = {kind: _Encoded(output, token_ids[kind]) for kind, output in outputs.items()}
    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    rest |= {names[kind]: torch.empty(0) for kind in outputs}

    def expand(
        expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        pixels = {name: kwargs.pop(name) for name in ("pixel_values", "pixel_values_videos") if name in kwargs}
        for tower in towers.values():
            tower.expand(input_ids, expand_size)
        ids, kwargs = model._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, kwargs | pixels

    inner = Exchanged(model.model, {f"get_{kind}_features": tower for kind, tower in towers.items()})
    stand_in = view(model, model=inner, _expand_inputs_for_generation=expand)
    # What torch calls in a module's place: its forward as a call of the model, whose hooks then get the model.
    run = functools.partial(type(stand_in).forward, stand_in)
    stand_in.__dict__["_compiled_call_impl"] = functools.partial(call_as, model, run)
    return stand_in, rest


class _Encoded:
    """Stands where `get_video_features` or `get_image_features` stood, for one call."""

    def __init__(self, output: Any, token_id: int) -> None:
        deeper = getattr(output, "deepstack_features", None) or []
        levels = [level if isinstance(level, Tensor) else torch.cat(list(level)) for level in deeper]
        self._rows = [rows_of(output), *levels]
        self._output = output
        self._token_id = token_id

    def __call__(self, *_: Any, **__: Any) -> Any:
        fields: dict[str, Any] = {"pooler_output": like(self._output.pooler_output, self._rows[:1])}
        if len(self._rows) > 1:
            fields["deepstack_features"] = self._rows[1:]
        return fresh(self._output, **fields)

    def expand(self, ids: Tensor, times: int) -> None:
        """Repeat what belongs to every row of ids [B, L], as the rows are repeated."""
        counts = (ids == self._token_id).sum(1).tolist()
        self._rows = [torch.cat([part for part in rows.split(counts) for _ in range(times)]) for rows in self._rows]
