"""Positions along three axes, by the model's own function (docs/methods/quota.md 9.4)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import InputError
from vtoken.prompts.shrink import default_positions


def places(
    model: Any, given: dict[str, Any], *, generating: bool, one_axis: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Positions [3, B, L] of a full prompt and the offset [B, 1] of what follows, or None where it is the caller's.

    Args:
        one_axis: whether the model's forward counts along one axis if it is not told token types; else it refuses.

    Raises:
        InputError: without token types, where the model would refuse.
    """
    ids, mask, own = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
    if own is not None:
        return (own[-3:] if own.dim() == 3 else own.expand(3, *ids.shape)), None
    if given.get("mm_token_type_ids") is None:
        if not generating and not one_axis:
            raise InputError(f"{type(model).__name__} needs mm_token_type_ids; pass all that the processor returns")
        line = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if mask is not None and generating:
            line = default_positions(mask)
        return line.expand(3, -1, -1), None
    takes = inspect.signature(model.model.get_rope_index).parameters
    named = {name: given[name] for name in takes if given.get(name) is not None}
    positions, deltas = model.model.get_rope_index(**named)
    return positions, deltas
