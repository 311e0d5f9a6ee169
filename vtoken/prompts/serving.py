"""Doors for servers: how many tokens stay before a pixel is there, which ones afterwards, and final rows of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtoken import checks
from vtoken.core.config import MethodConfig
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Cell, Seen, TowerFacts, Visual
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.prompts.budget import method_of
from vtoken.prompts.engine import choose, lay_out, rows_of_level, select, service_of


def grid_visual(thw: tuple[int, int, int], merge: int = 1) -> Visual:
    """A visual of `t` grids of `h` by `w` patches, of which `merge` x `merge` become a token; no model is needed.

    Raises:
        ShapeError: if the grid does not divide by `merge`.
    """
    checks.whole("grid_visual", "merge", merge, 1)
    values = checks.whole_numbers(tuple(thw))
    if values is None or len(values) != 3 or min(values) < 1 or values[1] % merge or values[2] % merge:
        raise ShapeError(f"a grid is (frames, rows, columns) of patches that {merge} divides, got {tuple(thw)}")
    cell = Cell((values[1] // merge, values[2] // merge), "image" if values[0] == 1 else "frame")
    return Visual("image" if values[0] == 1 else "video", (cell,) * values[0])


def retained_count(
    config: MethodConfig, thw: tuple[int, int, int], merge: int = 1, clues: Mapping[str, Any] | None = None
) -> int:  # fmt: skip
    """How many tokens of an image or video stay, from its grid alone; the number of true values of `retention_mask`.

    Args:
        config: settings of a prompt method, such as `vtoken.DivPrune(keep_ratio=0.25)`.
        thw: frames, rows and columns of patches, as processors return them.
        merge: patches along one side of a token.
        clues: what the method is told of this visual, if anything.

    Raises:
        ConfigError: if the settings are not of a prompt method. ShapeError: for a grid that is none.

    Example:
        >>> import vtoken
        >>> vtoken.retained_count(vtoken.DivPrune(keep_ratio=0.25), (1, 16, 24), merge=2)
        24
    """
    visual = grid_visual(thw, merge)
    method = _method(config)
    count = method.count(visual, dict(clues or {}))
    return count if method.replaces else min(count, visual.content)


def retention_mask(
    config: MethodConfig,
    rows: Tensor,
    thw: tuple[int, int, int],
    merge: int = 1,
    clues: Mapping[str, Any] | None = None,
) -> Tensor:
    """Which rows of an image or video stay: bool [n] for rows [n, C] as they leave the merger or projector.

    Args:
        config, thw, merge, clues: as in `retained_count`.
        rows: in raster order, frame by frame.

    Raises:
        ConfigError: if the method needs more than these rows; see `servable`.
        ShapeError: if there are not as many rows as the grid has tokens.

    Example:
        >>> import torch, vtoken
        >>> vtoken.retention_mask(vtoken.DivPrune(num_tokens=2), torch.eye(6), (1, 4, 6), merge=2).sum()
        tensor(2)
    """
    if not servable(config):
        raise ConfigError(
            f"{config.method} cannot choose from final rows alone (it reads attention, other rows or puts rows in "
            "place of others); use vtoken.encode_images"
        )
    visual, method = grid_visual(thw, merge), _method(config)
    checks.tensor("retention_mask", "rows", rows, 2, shape="[n, C]")
    if len(rows) != visual.content:
        raise ShapeError(f"{len(rows)} rows for a grid of {visual.content} tokens: {tuple(thw)} with merge={merge}")
    given = dict(clues or {})
    if method.needs(TowerFacts(1, 0)).text and given.get("relevance") is None:
        raise InputError(f"{config.method} needs clues={{'relevance': [n]}} where there is no prompt")
    count = min(method.count(visual, given), visual.content)
    chosen = select(method, Seen(visual, count, given, after=rows, stack=rows))[1]
    mask = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    mask[chosen.index.to(rows.device)] = True
    return mask


def servable(config: MethodConfig) -> bool:
    """Whether a method can choose from final rows alone (and a clue in place of the text)."""
    method = _method(config)
    needs = method.needs(TowerFacts(1, 0))
    clued = not needs.text or "relevance" in method.clues
    return needs.attention == "none" and needs.features <= {"after"} and clued and not method.replaces


@dataclass(frozen=True, eq=False)
class FinalRows:
    """What one image or video enters a language model with.

    Args:
        kind: "image" or "video".
        rows: [k, C], separators and class token included.
        deeper: further levels of features, [k, C'] each, where they enter deeper layers.
        kept: which of its placeholders these are, [k] int64.
        places: of models that number along three axes, positions [3, k] from its first placeholder on; else None.
    """

    kind: str
    rows: Tensor
    deeper: tuple[Tensor, ...]
    kept: Tensor
    places: Tensor | None


def encode_images(model: nn.Module, inputs: Mapping[str, Any]) -> list[FinalRows]:
    """The final rows of every image and video of a call, in prompt order, for engines that take ready embeddings.

    The language model does not run. `vtoken.budget` counts here, too.

    Args:
        model: a model that carries a method in its prompts.
        inputs: what the processor returned, the prompt included.

    Raises:
        ConfigError: if the model carries no such method.
        InputError: if there is no prompt, or no image. As a call of the model in every other way.

    Example:
        rows = [final.rows for final in vtoken.encode_images(model, processor(text, images, return_tensors="pt"))]
    """
    owner: Any = model
    if method_of(owner) is None or "_vtoken_family" not in owner.__dict__:
        raise ConfigError(f"encode_images: this {type(model).__name__} carries no method in its prompts; apply one")
    given = {name: value for name, value in inputs.items() if value is not None}
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        raise InputError("encode_images needs input_ids: images are laid out by the prompt")
    family, service = owner._vtoken_family, service_of(owner)
    plan = lay_out(service, given, ids)
    if not plan.visuals:
        raise InputError("encode_images: the call has no image and no video")
    totals = {k: int((ids == token_id).sum()) for k, token_id in family.token_ids(owner).items()}
    for kind, total in totals.items():
        said = sum(v.length for v in plan.visuals if v.kind == kind)
        if total != said:
            raise ShapeError(f"{total} {kind} placeholders in the prompt for {said} {kind} tokens")
    with torch.no_grad():
        encoded, kept = choose(service, given, ids, plan, traced=False)
        numbered = family.places(owner, given, generating=False)
    found = []
    for i in plan.order:
        kind = plan.visuals[i].kind
        at = plan.of_kind(kind).index(i)
        levels = [rows_of_level(level[at], kept[i], number) for number, level in enumerate(encoded[kind].levels)]
        places = None
        if numbered is not None:
            own = _own_places(numbered[0], ids, family.token_ids(owner), plan.visuals, i)
            places = own[:, kept[i].places.to(own.device)] - own[:, :1]
        found.append(FinalRows(kind, levels[0], tuple(levels[1:]), kept[i].places, places))
    return found


def _own_places(positions: Tensor, ids: Tensor, tokens: dict[str, int], visuals: list[Visual], i: int) -> Tensor:
    """Positions [3, length] of the placeholders of visual i."""
    kind = visuals[i].kind
    start = sum(v.length for v in visuals[:i] if v.kind == kind)
    at = (ids == tokens[kind]).nonzero()[start : start + visuals[i].length]
    return positions[:, at[:, 0], at[:, 1]]


def _method(config: Any) -> PromptMethod:
    method = config.build(0) if isinstance(config, MethodConfig) and config.part == "prompt" else None
    if not isinstance(method, PromptMethod):
        raise ConfigError(f"expected settings of a prompt method such as vtoken.DivPrune(...), got {config!r}")
    return method
