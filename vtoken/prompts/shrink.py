"""Shortening a prompt whose image tokens became fewer: ids, masks, labels, positions, padding.

Source: docs/methods/vtc_cls.md 6.

Nothing here knows a model or a method: placeholders are counted, never looked for in runs, so images may be adjacent
and rows may hold several images or none. A video is an image of many frames, and may get longer too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import InputError, ShapeError

SIDES, POSITIONS = ("right", "left"), ("compact", "original")
_FILL = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "attention_mask": 0, "position_ids": 0}


@dataclass(frozen=True, eq=False)
class ShortPrompt:
    """A shortened prompt; None where nothing was given and nothing is needed.

    Args:
        input_ids: [B, L'] int64.
        attention_mask: [B, L'].
        labels: [B, L'], -100 where padded.
        token_type_ids, mm_token_type_ids: [B, L'], 0 where padded.
        position_ids: [B, L'].
        index: place of every position in the full prompt, [B, L'] int64, -1 where padded.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    token_type_ids: Tensor | None
    mm_token_type_ids: Tensor | None
    position_ids: Tensor | None
    index: Tensor

    def arguments(self) -> dict[str, Tensor]:
        """What a model is called with."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "index"}
        return {name: value for name, value in named.items() if value is not None}


def shrink_inputs(
    input_ids: Tensor,
    kept: Sequence[Tensor],
    lengths: Sequence[int],
    *,
    token_id: int,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    pad_token_id: int = 0,
    padding_side: str = "right",
    positions: str = "compact",
) -> ShortPrompt:
    """Drop the placeholders of image tokens that are gone, from a whole batch and all that goes with it.

    Args:
        input_ids: [B, L]. The images own its placeholders one after the other, in (row, column) order.
        kept: of every image, ascending indices [k] of what stays of it; one that is repeated is there several times.
        lengths: of every image, its number of placeholders.
        token_id: id of a placeholder.
        attention_mask: [B, L]; leading and trailing zeros are padding, other zeros are tokens that nobody attends to.
        labels, token_type_ids, mm_token_type_ids: [B, L].
        position_ids: [B, L] or [1, L]. In "compact" mode only the default ones are taken.
        pad_token_id, padding_side: for rows that get shorter than others; padding that the mask shows keeps its side.
        positions: "compact" or "original" (position ids are handed out as in the full prompt, always with a mask).

    Raises:
        ShapeError: if the counts or the shapes do not belong together, or the mask has more than two dimensions.
        InputError: for positions of your own in "compact" mode, for a selection that is no tensor of indices, and for
            an unknown side or mode.

    Example:
        >>> import torch, vtoken
        >>> ids = torch.tensor([[1, 9, 9, 9, 9, 2]])
        >>> short = vtoken.shrink_inputs(ids, [torch.tensor([0, 3])], [4], token_id=9)
        >>> short.input_ids.tolist(), short.index.tolist()
        ([[1, 9, 9, 2]], [[0, 1, 4, 5]])
    """
    along = {
        "attention_mask": attention_mask, "labels": labels, "token_type_ids": token_type_ids,
        "mm_token_type_ids": mm_token_type_ids,
    }  # fmt: skip
    return shrink_kinds(
        input_ids, {token_id: (kept, lengths)}, along, position_ids, pad_token_id, padding_side, positions
    )


def shrink_kinds(
    input_ids: Tensor,
    kinds: Mapping[int, tuple[Sequence[Tensor], Sequence[int]]],
    along: dict[str, Tensor | None],
    position_ids: Tensor | None,
    pad_token_id: int,
    padding_side: str,
    positions: str,
) -> ShortPrompt:
    """`shrink_inputs` for placeholders of several ids, each with its selections and lengths, in one go."""
    named: Any = (("padding_side", padding_side, SIDES), ("positions", positions, POSITIONS))
    for word, said, choices in named:
        if said not in choices:
            raise InputError(f"shrink_inputs({word}={said!r}): supported: {', '.join(choices)}")
    check_shapes(input_ids, along, position_ids)
    counts = torch.ones_like(input_ids, dtype=torch.int64)
    for token_id, (kept, lengths) in kinds.items():
        _count(counts, input_ids, kept, lengths, token_id)
    if bool((counts == 1).all()):
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return ShortPrompt(input_ids=input_ids, position_ids=position_ids, index=index, **along)
    index = _index(counts, along["attention_mask"], padding_side)
    short: dict[str, Any] = {name: _gather(value, index, _FILL[name]) for name, value in along.items()}
    places = _positions(position_ids, along["attention_mask"], index, compact=positions == "compact")
    if short["attention_mask"] is None and (places is not None or bool((index < 0).any())):
        short["attention_mask"] = (index >= 0).long()
    if positions == "compact" and places is not None:  # the caller numbered unpadded tokens: so do we
        places = default_positions(short["attention_mask"])
    return ShortPrompt(input_ids=_gather(input_ids, index, pad_token_id), position_ids=places, index=index, **short)


def check_shapes(input_ids: Tensor, along: dict[str, Tensor | None], position_ids: Tensor | None) -> None:
    """Raise ShapeError unless everything that goes along with the ids [B, L] has their shape, InputError for no ids."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        found = str(input_ids.dtype) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"input_ids must be a tensor of whole numbers [B, L], got {found}")
    if input_ids.dim() != 2:
        raise ShapeError(f"input_ids must be [B, L], got {tuple(input_ids.shape)}")
    for name, value in along.items():
        if value is not None and getattr(value, "shape", None) != input_ids.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            hint = "; masks with more dimensions name rows of the full prompt" if name == "attention_mask" else ""
            raise ShapeError(f"{name} must be [B, L] = {list(input_ids.shape)} like input_ids, got {got}{hint}")
    rows, columns = input_ids.shape
    if position_ids is not None and tuple(position_ids.shape) not in ((rows, columns), (1, columns)):
        raise ShapeError(f"position_ids must be [B, L] = {[rows, columns]}, got {tuple(position_ids.shape)}")


def check_ids(input_ids: Tensor) -> None:
    """Raise InputError for ids that no embedding has, such as the placeholder -200 of the original LLaVA code."""
    lowest = int(input_ids.min()) if isinstance(input_ids, Tensor) and input_ids.numel() else 0
    if lowest < 0:
        raise InputError(
            f"input_ids holds {lowest}: prompts as the original LLaVA code writes them have one placeholder -200 per "
            "image, those of transformers one placeholder with the id of model.config for every image token. Let the "
            "model's AutoProcessor write the prompt"
        )


def placeholders_in(embeds: Tensor, table: Any, *token_ids: int) -> Tensor:
    """Ids [B, L] of a prompt of embeddings [B, L, C]: a placeholder's where they are that token's own, else -1."""
    if not isinstance(embeds, Tensor) or embeds.dim() != 3:
        got = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ShapeError(f"inputs_embeds must be [B, L, C], got {got}")
    ids = torch.full(embeds.shape[:2], -1, dtype=torch.int64, device=embeds.device)
    for token_id in token_ids:
        own = table(torch.full((), token_id, dtype=torch.int64, device=embeds.device)).to(embeds.device)
        ids = torch.where((embeds == own).all(-1), token_id, ids)
    return ids


def rows_at(embeds: Tensor, index: Tensor, fill: Tensor) -> Tensor:
    """Rows of embeddings [B, L, C] at index [B, L'], `fill` [C] where it is -1."""
    index = index.to(embeds.device).unsqueeze(-1)
    rows = embeds.gather(1, index.clamp_min(0).expand(-1, -1, embeds.shape[2]))
    return torch.where(index < 0, fill.to(rows), rows)


def default_positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, L] that count the tokens of a mask [B, L]; 0 where it is 0."""
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.masked_fill(attention_mask == 0, 0)


def _count(
    counts: Tensor, input_ids: Tensor, kept: Sequence[Tensor], lengths: Sequence[int], token_id: int
) -> None:  # fmt: skip
    """Write into counts [B, L] int64 how often every placeholder of one id is there in the new prompt."""
    placeholder = input_ids == token_id
    total = int(placeholder.sum())
    if len(kept) != len(lengths) or total != sum(lengths):
        raise ShapeError(
            f"{total} placeholders in the prompt for {len(lengths)} image(s) with {sum(lengths)} tokens and "
            f"{len(kept)} selection(s)"
        )
    found = []
    for image, (chosen, length) in enumerate(zip(kept, lengths, strict=True)):
        if not isinstance(chosen, Tensor) or chosen.dtype not in (torch.int64, torch.int32) or chosen.dim() != 1:
            got = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
            raise InputError(
                f"kept[{image}] must be a tensor of indices [k], got {got}; of a mask: mask.nonzero()[:, 0]"
            )
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < length:
            wrong = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
            raise ShapeError(f"image {image} has tokens 0 to {length - 1}, its selection reaches {wrong}")
        found.append(torch.bincount(chosen.to(input_ids.device), minlength=length))
    counts[placeholder] = torch.cat(found) if found else counts.new_zeros(0)


def _index(counts: Tensor, mask: Tensor | None, padding_side: str) -> Tensor:
    """Old position of every new one, [B, L'], -1 where padded on the side where the old prompt was."""
    rows, columns = counts.shape
    left = torch.full((rows,), padding_side == "left", device=counts.device)
    if mask is not None:
        seen = (mask != 0).long()
        leading = seen.cumsum(1) == 0
        trailing = (seen.flip(1).cumsum(1) == 0).flip(1)
        on_left, on_right = leading[:, 0], trailing[:, -1]
        if bool(on_left.any()) or bool(on_right.any()):
            left = on_left | (bool(on_left.any()) & ~on_right)
        counts = counts.masked_fill(leading | trailing, 0)
    totals = counts.sum(1, keepdim=True)
    width = int(totals.max())
    place = torch.arange(width, device=counts.device).expand(rows, -1)
    place = torch.where(left.unsqueeze(1), place - (width - totals), place)
    old = torch.arange(columns, device=counts.device).repeat(rows).repeat_interleave(counts.flatten())
    index = counts.new_full((rows, width), -1)
    index[(place >= 0) & (place < totals)] = old
    return index


def _gather(value: Tensor | None, index: Tensor, fill: int) -> Any:
    if value is None:
        return None
    return value.gather(1, index.clamp_min(0)).masked_fill(index < 0, fill)


def _positions(given: Tensor | None, mask: Tensor | None, index: Tensor, *, compact: bool) -> Tensor | None:
    """Position ids as in the full prompt, or in compact mode whether positions were given that skip padding."""
    if given is None and compact:
        return None
    # Of the full prompt: up to its last token if the mask does not tell.
    plain = torch.arange(given.shape[1] if given is not None else _full_length(mask, index), device=index.device)
    by_mask = plain.unsqueeze(0) if mask is None else default_positions(mask)
    if not compact:
        full = by_mask if given is None else given
        return torch.as_tensor(_gather(full.expand(index.shape[0], -1), index, _FILL["position_ids"]))
    assert given is not None
    if bool((given == plain).all()):
        return None
    seen = torch.ones_like(given, dtype=torch.bool) if mask is None else mask != 0
    if bool(((given == by_mask) | ~seen).all()):
        return given
    raise InputError(
        "position_ids of your own cannot be combined with positions='compact', which numbers what is kept anew; leave "
        "them out, or use VTCCLS(positions='original')"
    )


def _full_length(mask: Tensor | None, index: Tensor) -> int:
    return int(index.max()) + 1 if mask is None else mask.shape[1]
