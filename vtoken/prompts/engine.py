"""A multimodal call made shorter: visuals are laid out, counted, encoded and chosen from, and the prompt follows.

A family (`prompts/family.py`) says what a model is, a method (`core/method.PromptMethod`) what a paper does; neither
knows the other. Source: docs/methods/vtc_cls.md 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtoken.core.method import KeepVisuals, PromptMethod
from vtoken.core.records import PromptRecord
from vtoken.core.trace import current_trace
from vtoken.core.visual import Chosen, Encoded, Needs, Seen, Visual, in_lines, in_prompt_order, length_of, placed
from vtoken.errors import ConfigError, InputError, ShapeError, VTokenError
from vtoken.prompts.budget import asked_of, clues_for, methods_for
from vtoken.prompts.calls import cache_of, chosen, fresh, holds, is_filled
from vtoken.prompts.shrink import (
    ShortPrompt,
    check_ids,
    check_shapes,
    default_positions,
    placeholders_in,
    rows_at,
    shrink_kinds,
)

_ALONG = ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class Service:
    """Who shortens the prompts of a model.

    Args:
        model: the model.
        family: what it is.
        methods: by kind of visual; kinds without one stay whole.
        asked: of every kind what `vtoken.budget` asks.
        told: what the call itself brings for videos: of their visuals in prompt order, the clues of each.
        known: videos that have been encoded before, in place of pixels; a visual and what it was made into.
    """

    model: Any
    family: Any
    methods: Mapping[str, PromptMethod]
    asked: Mapping[str, Mapping[str, Any]]
    told: Callable[[list[Visual]], list[dict[str, Any]]] | None = None
    known: Sequence[tuple[Visual, Encoded]] = ()

    def method(self, kind: str) -> PromptMethod:
        """What shortens visuals of a kind."""
        return self.methods.get(kind, _WHOLE)


_WHOLE = KeepVisuals()


def service_of(model: Any) -> Service:
    """The service of a model that carries a method in its prompts."""
    family, method = model._vtoken_family, model._vtoken.methods[PromptMethod]
    kinds, asked = [kind for kind in family.kinds if kind in method.kinds], asked_of(model)
    return Service(model, family, dict.fromkeys(kinds, method), dict.fromkeys(kinds, asked))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A call with a shorter prompt.

    Args:
        call: its arguments; ready outputs of the visuals, by kind, under "features".
        ids: the short ids [B, L'].
        index: of every position the place in the caller's prompt, [B, L'] int64, -1 where padded.
        changed: whether anything was taken away or replaced.
        plan: what was known before anything ran.
        offset: with which text behind the prompt is numbered, [B, 1]; None on one axis.
    """

    call: dict[str, Any]
    ids: Tensor
    index: Tensor
    changed: bool
    plan: Layout
    offset: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of one visual: placeholders [k], and rows of every level for them where they are not its own."""

    places: Tensor
    rows: tuple[Tensor, ...] | None = None
    scores: Tensor | None = None


def prepare(service: Service, given: dict[str, Any], *, generating: bool) -> Prepared | None:
    """Encode the visuals of a call and shorten its prompt.

    Where the prompt comes as embeddings, its placeholders are those that equal a placeholder's own, as for the model.

    Returns:
        None if there is nothing to shorten: no placeholder, or every token stays as it is.

    Raises:
        ShapeError: if the placeholders fit neither the full nor the kept tokens.
        InputError: if something else of the call cannot be shortened.
    """
    model, family = service.model, service.family
    tokens, embeds = family.token_ids(model), given.get("inputs_embeds")
    if embeds is None:
        ids = given["input_ids"]
        check_ids(ids)
    else:
        ids = placeholders_in(embeds, model.get_input_embeddings(), *tokens.values())
    if not any(bool((ids == token_id).any()) for token_id in tokens.values()):  # the library says so
        return None
    along = {name: given.get(name) for name in _ALONG}
    places, cached = given.get("position_ids"), is_filled(cache_of(given))
    if not cached:  # before the tower runs; with a cache the mask is longer than the ids
        check_shapes(ids, along, places if family.axes == 1 else None)
    plan = lay_out(service, given, ids)
    visuals, methods, counts, order = plan.visuals, plan.methods, plan.counts, plan.order
    full = all(_keeps_all(m, v, k) for m, v, k in zip(methods, visuals, counts, strict=True))
    already = _fit(ids, tokens, visuals, counts, methods)
    trace = current_trace(model)
    if full and trace is None and already is not True:
        return None
    if cached and not full and already is not True:
        raise InputError(
            "a cache that is not empty came with a full prompt: what it holds cannot be matched to a shortened one. "
            "Send the whole conversation without the cache, or pass the short ids from the record of vtoken.trace"
        )
    if family.axes == 3 and (cached or already is not False) and (cached or places is None):
        why = "came with a cache that is not empty" if cached else "has fewer placeholders than its images have tokens"
        raise InputError(
            f"{type(model).__name__} numbers tokens along three axes by the whole prompt, but this one {why}: send the "
            "whole, full prompt without the cache"
        )
    original = _keeps_places(family, methods)
    numbered = family.places(model, given, generating=generating)
    encoded, kept = choose(service, given, ids, plan, traced=trace is not None)
    lengths = [len(k.places) for k in kept]
    if already is None:
        already = _decide(ids, tokens, visuals, lengths)
    pad = getattr(model.config, "pad_token_id", None)
    pad = 0 if pad is None else pad
    short = ShortPrompt(
        input_ids=ids,
        position_ids=places,
        index=torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
        **along,
    )
    if not cached:
        kinds = {token_id: _of_kind(kind, visuals, kept, whole=already) for kind, token_id in tokens.items()}
        short = shrink_kinds(
            ids,
            kinds,
            along,
            places if numbered is None else None,
            pad,
            "left" if generating else "right",
            "original" if original and numbered is None else "compact",
        )
    if short.input_ids is not ids and isinstance(given.get("logits_to_keep"), Tensor):
        raise InputError("logits_to_keep names positions of the full prompt; pass how many of the last ones to keep")
    if trace is not None:
        _record(service, trace, given, [visuals[i] for i in order], [kept[i] for i in order], short, plan, encoded)
    gone = {*family.side, *_ALONG, "position_ids"}
    call = {name: value for name, value in given.items() if name not in gone}
    call |= {**short.arguments(), "features": _features(service, visuals, kept, encoded)}
    if "labels" in call:  # a row that is no token's own stands for none
        replaced = [tokens[kind] for kind in tokens if service.method(kind).replaces]
        own = sum((short.input_ids == token_id for token_id in replaced), torch.zeros_like(short.input_ids).bool())
        call["labels"] = call["labels"].masked_fill(own.to(call["labels"].device), -100)
    if family.axes == 3:
        call.pop("mm_token_type_ids", None)  # the model would number the short prompt by the full grids
    offset = None
    if numbered is not None and not cached:
        call["position_ids"], offset = _numbered(numbered, given.get("attention_mask"), short)
    if embeds is not None:
        blank = model.get_input_embeddings()(ids.new_tensor(pad))
        call |= {"input_ids": given.get("input_ids"), "inputs_embeds": rows_at(embeds, short.index, blank)}
    changed = any(k.rows is not None or len(k.places) != v.length for k, v in zip(kept, visuals, strict=True))
    return Prepared(call, short.input_ids, short.index, changed, plan, offset)


@dataclass(frozen=True, eq=False)
class Layout:
    """What is known of a call's visuals before anything runs, in the family's order.

    Args:
        methods: the method for each, as `vtoken.budget` asks.
        counts: content tokens that stay.
        order: indices in the order of the prompt.
        needs: of the method for every kind that the call brings.
    """

    visuals: list[Visual]
    methods: list[PromptMethod]
    clues: list[dict[str, Any]]
    counts: list[int]
    order: list[int]
    needs: dict[str, Needs]

    def of_kind(self, kind: str) -> list[int]:
        """Indices of the visuals of a kind."""
        return [i for i, v in enumerate(self.visuals) if v.kind == kind]


def lay_out(service: Service, given: dict[str, Any], ids: Tensor) -> Layout:
    """The visuals of a call and how much stays of them; nothing has run yet."""
    model, family = service.model, service.family
    facts = family.facts(model, given)
    brought = [kind for kind in family.kinds if holds(given, kind) or (kind == "video" and service.known)]
    needs = {kind: service.method(kind).needs(facts) for kind in brought}
    for needed in needs.values():
        family.refuse(model, given, needed)
    visuals = [*family.layout(model, given | {"input_ids": ids}), *(visual for visual, _ in service.known)]
    order = _order(ids, family.token_ids(model), visuals)
    methods, clues = [service.method(v.kind) for v in visuals], [dict[str, Any]() for _ in visuals]
    for method in {id(m): m for m in service.methods.values()}.values():
        mine = [i for i in order if methods[i] is method]
        asked = service.asked[next(kind for kind, m in service.methods.items() if m is method)]
        told = clues_for(method, asked, len(mine))
        if service.told is not None and mine and method is service.methods.get("video"):
            told = service.told([visuals[i] for i in mine])
        for i, own, clue in zip(mine, methods_for(method, asked, len(mine)), told, strict=True):
            methods[i], clues[i] = own, clue
    counts = [count_of(m, v, c) for m, v, c in zip(methods, visuals, clues, strict=True)]
    return Layout(visuals, methods, clues, counts, order, needs)


def choose(
    service: Service, given: dict[str, Any], ids: Tensor, plan: Layout, *, traced: bool
) -> tuple[dict[str, Encoded], list[Kept]]:  # fmt: skip
    """Run the towers once, a kind of visuals after the other, and the methods on what they made."""
    model, family, visuals = service.model, service.family, plan.visuals
    text: Sequence[Tensor | None] = [None] * len(visuals)
    if any(needs.text for needs in plan.needs.values()):
        text = _instruction(model, ids, visuals, family.token_ids(model), plan)
    encoded, kept = dict[str, Encoded](), dict[int, Kept]()
    for kind, needs in plan.needs.items():
        mine = plan.of_kind(kind)
        if not mine:
            continue
        if kind == "video" and service.known:
            encoded[kind] = joined([made for _, made in service.known])
        else:
            encoded[kind] = family.encode(model, given, [visuals[i] for i in mine], needs)
        _check_lengths([visuals[i] for i in mine], encoded[kind])
        for at, i in enumerate(mine):
            seen = seen_of(
                visuals[i], plan.counts[i], plan.clues[i], encoded[kind], at, text[i], native="native" in needs.features
            )
            kept[i] = _select(service, plan.methods[i], seen, encoded[kind], at, traced=traced)
    return encoded, [kept[i] for i in range(len(visuals))]


def joined(parts: Sequence[Encoded]) -> Encoded:
    """What visuals of one kind were made into, one after the other."""
    natives = [part.native for part in parts]
    return replace(
        parts[0],
        levels=[[rows for level in same for rows in level] for same in zip(*(p.levels for p in parts), strict=True)],
        native=None if any(n is None for n in natives) else [cells for n in natives if n for cells in n],
    )


def _keeps_places(family: Any, methods: Sequence[PromptMethod]) -> bool:
    """Whether what stays keeps its places in the full prompt; all methods of a call must agree."""
    found = {family.original(m) for m in methods if m is not _WHOLE}
    if len(found) > 1:
        raise ConfigError(
            "positions='original' numbers tokens by the full prompt, which a video with a budget does not keep; use "
            "positions='compact' (vtoken.configure), or ask about images and videos in calls of their own"
        )
    return True in found


def select(method: PromptMethod, seen: Seen) -> tuple[Tensor, Chosen]:
    """The placeholders [k] of one visual that stay, and what the method chose; every token if it keeps all.

    Raises:
        VTokenError: if the method breaks its contract.
    """
    visual = seen.visual
    if _keeps_all(method, visual, seen.count):
        return torch.arange(visual.length), Chosen(torch.arange(visual.content))
    found = method.choose(seen)
    picked = found if isinstance(found, Chosen) else Chosen(found)
    _check_choice(method, seen, picked)
    if picked.ends is not None and len(visual.separators) > 1:
        return in_lines(visual, picked.index, picked.ends)[0], picked
    rule = "all" if seen.count >= visual.content else method.newline
    return placed(visual, picked.index, rule), picked


def _check_choice(method: PromptMethod, seen: Seen, picked: Chosen) -> None:
    """Raise VTokenError unless the method chose what it said it would."""
    index, n, name = picked.index, seen.visual.content, type(method).__name__
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise VTokenError(f"{name}.choose must return int64 indices [k], got {got}")
    if len(index) != seen.count:
        raise VTokenError(f"{name}.choose returned {len(index)} indices for {seen.visual}, its count said {seen.count}")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise VTokenError(f"{name}.choose returned indices {int(index.min())} to {int(index.max())} of {n} tokens")
    step = index.diff()
    if bool((step < 0).any()) or (picked.rows is None and bool((step == 0).any())):
        raise VTokenError(
            f"{name}.choose must return ascending indices{'' if picked.rows is None else ' or equal ones'}"
        )
    if picked.rows is not None:
        if not method.replaces:
            raise VTokenError(f"{name}.choose returned rows, but the method does not say that it replaces them")
        like = seen.before if picked.before else seen.stack if seen.native is None else seen.native[0]
        width = None if like is None else like.shape[-1]
        shape = tuple(picked.rows.shape) if isinstance(picked.rows, Tensor) else type(picked.rows).__name__
        if shape != (seen.count, width):
            raise VTokenError(f"{name}.choose returned rows {shape}, expected {(seen.count, width)}")


def _keeps_all(method: PromptMethod, visual: Visual, count: int) -> bool:
    return count >= visual.content and not method.replaces


def count_of(method: PromptMethod, visual: Visual, clues: dict[str, Any]) -> int:
    """How many content tokens of a visual stay; raises VTokenError where a method breaks its contract."""
    for name, value in clues.items():
        if name == "relevance" and len(value) != visual.content:
            raise InputError(f"budget({name}=...) has {len(value)} values for a visual of {visual.content} tokens")
    count = method.count(visual, clues)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise VTokenError(f"{type(method).__name__}.count must be a whole number from 1 on, got {count!r} for {visual}")
    return count if method.replaces else min(count, visual.content)


def _back(values: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """What is listed in prompt order, in the order of the layout."""
    found: list[Any] = [None] * len(values)
    for value, place in zip(values, order, strict=True):
        found[place] = value
    return found


def _order(ids: Tensor, tokens: dict[str, int], visuals: Sequence[Visual]) -> list[int]:
    """The visuals in the order in which they begin in the prompt; that of the layout where this cannot be told."""
    if len({v.kind for v in visuals}) < 2:
        return list(range(len(visuals)))
    starts: dict[int, tuple[int, int]] = {}
    for kind, token_id in tokens.items():
        at, passed = (ids == token_id).nonzero().tolist(), 0
        for i in [i for i, v in enumerate(visuals) if v.kind == kind]:
            if passed >= len(at):
                return list(range(len(visuals)))
            starts[i] = (at[passed][0], at[passed][1])
            passed += visuals[i].length
    return in_prompt_order([starts[i] for i in range(len(visuals))])


def _fit(
    ids: Tensor,
    tokens: dict[str, int],
    visuals: Sequence[Visual],
    counts: Sequence[int],
    methods: Sequence[PromptMethod],
) -> bool | None:
    """Whether the prompt is short already: False if it is full, None if only the choice will tell."""
    if all(_total(ids, tokens, k) == sum(v.length for v in visuals if v.kind == k) for k in tokens):
        return False
    kept = [length_of(v, c, m.newline) for v, c, m in zip(visuals, counts, methods, strict=True)]
    if not all(exact for _, exact in kept):
        return None
    return _decide(ids, tokens, visuals, [length for length, _ in kept])


def _decide(ids: Tensor, tokens: dict[str, int], visuals: Sequence[Visual], lengths: Sequence[int]) -> bool:
    """True if the prompt has as many placeholders as stay; raises ShapeError if not."""
    for kind in tokens:
        mine = [i for i, v in enumerate(visuals) if v.kind == kind]
        total, full = _total(ids, tokens, kind), sum(visuals[i].length for i in mine)
        kept = sum(lengths[i] for i in mine)
        if total != kept:
            raise ShapeError(
                f"{total} {kind} placeholders in the prompt, but its {len(mine)} {kind}(s) need {full}: they give "
                f"{full} features, {kept} of them kept, and it must have one of these two numbers. The processor and "
                "the model disagree on the token count (patch size, image sizes, frames or feature strategy)"
            )
    return True


def _total(ids: Tensor, tokens: dict[str, int], kind: str) -> int:
    return int((ids == tokens[kind]).sum())


def _check_lengths(visuals: Sequence[Visual], encoded: Encoded) -> None:
    got, said = [len(rows) for rows in encoded.levels[0]], [v.length for v in visuals]
    if got != said:
        raise ShapeError(
            f"the model made {got} tokens of its images and videos, their sizes speak of {said}: the processor and the "
            "model disagree on the token count"
        )


def _select(
    service: Service, method: PromptMethod, seen: Seen, encoded: Encoded, at: int, *, traced: bool
) -> Kept:  # fmt: skip
    """What stays of the visual that is number `at` of its kind."""
    model, family = service.model, service.family
    kept = stays(
        method,
        seen,
        [level[at] for level in encoded.levels],
        lambda rows: family.project(model, rows),
        lambda rows: family.finish(model, rows, seen.visual),
    )
    return replace(kept, scores=_shown(method, seen, encoded, at)) if traced else kept


def stays(
    method: PromptMethod,
    seen: Seen,
    levels: Sequence[Tensor],
    project: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Kept:
    """What stays of one visual.

    Args:
        levels: rows [length, C] of all its placeholders, of every level of features.
        project: from in front of the projector to behind it.
        finish: from rows made of `Seen.native` to what the model gets; None if these are that already.
    """
    visual = seen.visual
    places, picked = select(method, seen)
    if picked.rows is None:
        return Kept(places)
    rows = picked.rows
    if picked.before:
        rows = project(rows)
    elif seen.native is not None and finish is not None:
        rows = finish(rows)
    if picked.ends is not None and len(visual.separators) > 1:
        content = in_lines(visual, picked.index, picked.ends)[1]
    else:
        holds_content = torch.zeros(visual.length, dtype=torch.bool)
        holds_content[visual.places()] = True
        content = holds_content[places].nonzero()[:, 0]
    found, start = [], 0
    for level in levels:
        width = level.shape[1]
        own = level.index_select(0, places.to(level.device))
        found.append(own.index_copy(0, content.to(own.device), rows[:, start : start + width].to(own)))
        start += width
    return Kept(places, tuple(found))


def seen_of(
    visual: Visual,
    count: int,
    clues: Mapping[str, Any],
    encoded: Encoded,
    at: int,
    text: Tensor | None,
    *,
    native: bool = False,
) -> Seen:
    """What a method is shown of the visual that is number `at` of its kind; if asked for, with its native grids."""
    rows = [level[at] for level in encoded.levels]
    own = rows
    if visual.length != visual.content:
        places = visual.places().to(rows[0].device)
        own = [r.index_select(0, places) for r in rows]
    stack, grids = own[0] if len(own) == 1 else torch.cat(own, dim=-1), None
    if native:
        cells = stack.split([cell.tokens for cell in visual.cells])
        grids = tuple(rows.unflatten(0, cell.grid) for rows, cell in zip(cells, visual.cells, strict=True))
        grids = grids if encoded.native is None else encoded.native[at]
    return Seen(
        visual,
        count,
        clues,
        attention=None if encoded.attention is None else encoded.attention[at][:, visual.fixed :],
        after=own[0],
        stack=stack,
        before=None if encoded.before is None else encoded.before[at],
        keys=None if encoded.keys is None else encoded.keys[at],
        text=text,
        native=grids,
    )


def _shown(method: PromptMethod, seen: Seen, encoded: Encoded, i: int) -> Tensor | None:
    """Scores of all placeholders of a visual [length]: -1 for separators."""
    visual = seen.visual
    if encoded.attention is not None:  # the fixed ones have attention, too
        seen = replace(seen, attention=encoded.attention[i])
    scores = method.scores(seen)
    if scores is None:
        return None
    found = scores.new_full((visual.length,), -1.0)
    places = visual.places()
    if len(scores) == visual.fixed + visual.content:
        places = torch.cat([torch.arange(visual.fixed), places])
    found[places.to(found.device)] = scores
    return found


def _of_kind(
    kind: str, visuals: Sequence[Visual], kept: Sequence[Kept], *, whole: bool
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """Selections and lengths for the placeholders of a kind; of a prompt that is short already everything stays."""
    mine = [i for i, v in enumerate(visuals) if v.kind == kind]
    if whole:
        return [torch.arange(len(kept[i].places)) for i in mine], [len(kept[i].places) for i in mine]
    return [kept[i].places for i in mine], [visuals[i].length for i in mine]


def _features(
    service: Service, visuals: Sequence[Visual], kept: Sequence[Kept], encoded: dict[str, Encoded]
) -> dict[str, Any]:  # fmt: skip
    """Fresh output objects by kind, with the rows that stay; where all do, with the model's own."""
    found = {}
    for kind, made in encoded.items():
        mine, output = [(v, k) for v, k in zip(visuals, kept, strict=True) if v.kind == kind], made.outputs[kind]
        if all(k.rows is None and len(k.places) == v.length for v, k in mine):
            found[kind] = chosen(fresh(output))
            continue
        levels = [
            [rows_of_level(rows, k, number) for rows, (_, k) in zip(level, mine, strict=True)]
            for number, level in enumerate(made.levels)
        ]
        found[kind] = chosen(service.family.outputs(service.model, output, levels))
    return found


def rows_of_level(own: Tensor, kept: Kept, level: int) -> Tensor:
    """The rows [k, C] of one visual and level that stay, or what stands for them."""
    return own.index_select(0, kept.places.to(own.device)) if kept.rows is None else kept.rows[level]


def _numbered(
    numbered: tuple[Tensor, Tensor | None], full_mask: Tensor | None, short: ShortPrompt
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Positions [4, B, L'] of the short prompt, every token at its old place; and the offset of what follows.

    Models count what follows from the largest position, which may lie in a video's time, though text goes on from the
    last token's. Behind text its own position counts here, so that a cached turn is numbered as an uncached one.
    """
    positions, deltas = numbered
    index, mask = short.index, short.attention_mask
    old = positions.gather(2, index.clamp_min(0).expand(positions.shape[0], -1, -1)).masked_fill(index < 0, 0)
    line = torch.arange(index.shape[1], device=index.device).expand_as(index)
    line = line if mask is None else default_positions(mask)
    if deltas is not None:
        seen = torch.ones_like(positions[0]) if full_mask is None else full_mask.to(positions)
        final = (seen * torch.arange(1, seen.shape[1] + 1).to(seen)).argmax(1)
        last = positions.gather(2, final.view(1, -1, 1).expand(3, -1, 1))
        largest = positions.masked_fill(seen == 0, 0).amax((0, 2)).unsqueeze(1)
        text = (last == last[:1]).all(0)
        deltas = deltas - torch.where(text, largest - last[0], 0).to(deltas)
        before = positions.shape[2] if full_mask is None else full_mask.sum(1, keepdim=True)
        after = index.shape[1] if mask is None else mask.sum(1, keepdim=True)
        deltas = deltas + (before - after)
    return torch.cat([line.unsqueeze(0), old]), deltas


def _instruction(
    model: Any, ids: Tensor, visuals: Sequence[Visual], tokens: dict[str, int], plan: Layout
) -> list[Tensor | None]:  # fmt: skip
    """Of every visual the input embeddings [m, C] of the text behind the last visual of its row, else in front."""
    table, config = model.get_input_embeddings(), model.config
    settings = (config, getattr(config, "text_config", config))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "vision_start_token_id", "vision_end_token_id")
    plain = {getattr(place, name, None) for place in settings for name in names}
    special = {i for value in plain for i in (value if isinstance(value, (list, tuple)) else [value]) if i is not None}
    found: list[Tensor | None] = []
    rows = _rows_of(ids, tokens, visuals)
    for clue, row, visual in zip(plan.clues, rows, visuals, strict=True):
        if "relevance" in clue or not plan.needs[visual.kind].text:
            found.append(None)
            continue
        words = clue.get("query")
        if words is None:
            line = ids[row]
            shown = torch.zeros_like(line, dtype=torch.bool)
            for token_id in tokens.values():
                shown |= line == token_id
            text = ~shown & (line >= 0)
            for one in special:
                text &= line != one
            last = int(shown.nonzero()[-1])
            behind = text.clone()
            behind[: last + 1] = False
            words = line[behind] if bool(behind.any()) else line[text]
        words = torch.as_tensor(words, device=ids.device).flatten()
        if not len(words):
            raise InputError(
                "the prompt has no word of an instruction to compare image tokens with; ask something, or pass "
                "vtoken.budget(model, query=ids) or relevance=..."
            )
        found.append(table(words).detach())
    return found


def _rows_of(ids: Tensor, tokens: dict[str, int], visuals: Sequence[Visual]) -> list[int]:
    """The row of ids in which every visual begins."""
    passed, found = dict.fromkeys(tokens, 0), []
    reached = {kind: (ids == token_id).sum(1).cumsum(0).tolist() for kind, token_id in tokens.items()}
    for visual in visuals:
        start, ends = passed[visual.kind], reached[visual.kind]
        found.append(next((row for row, end in enumerate(ends) if end > start), len(ends) - 1))
        passed[visual.kind] += visual.length
    return found


def _record(
    service: Service,
    trace: Any,
    given: dict[str, Any],
    visuals: Sequence[Visual],
    kept: Sequence[Kept],
    short: ShortPrompt,
    plan: Layout,
    encoded: dict[str, Encoded],
) -> None:
    scores = tuple(k.scores for k in kept if k.scores is not None)
    needs = next((n for n in plan.needs.values() if n.attention != "none"), Needs())
    first = encoded[visuals[0].kind]
    trace.record_prompt(
        PromptRecord(
            kept=tuple(k.places if k.scores is None else k.places.to(k.scores.device) for k in kept),
            full_lengths=tuple(v.length for v in visuals),
            lengths=tuple(len(k.places) for k in kept),
            scores=scores,
            index=short.index,
            input_ids=short.input_ids,
            scorer={"class": "cls", "none": ""}.get(needs.attention, needs.attention),
            layers=needs.layers,
            grid=service.family.record_grid(service.model, given, visuals[0]),
            first_patch=first.first_patch,
            anchors=first.anchors,
            visuals=tuple(visuals),
        )
    )
