"""What a prompt method and a family of multimodal models must hold, tried out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.apply import applied, apply, is_applied, remove
from vtoken.core.config import MethodConfig
from vtoken.core.method import PromptMethod
from vtoken.core.trace import tracing
from vtoken.core.visual import Cell, Seen, TowerFacts, Visual
from vtoken.errors import ConfigError, VTokenError
from vtoken.prompts.engine import select
from vtoken.prompts.serving import encode_images

_GRIDS = ((1, 1), (1, 7), (3, 2), (5, 5), (9, 4), (24, 24), (40, 40))
_WIDTH = 16


def check_prompt_method(config: MethodConfig) -> None:
    """Try a prompt method on many visuals, with features that it has never seen; no model is needed.

    Counts must be what `choose` returns; indices in range and ascending; the same for the same visual; and values that
    are not numbers must not raise.

    Args:
        config: settings of the method; where they have `keep_ratio`, other shares are tried, too.

    Raises:
        VTokenError: for what does not hold: the method, the visual, what was expected and what came.
        ConfigError: if these are no settings of a prompt method.

    Example:
        >>> import vtoken, vtoken.testing
        >>> vtoken.testing.check_prompt_method(vtoken.DivPrune(num_tokens=5))
    """
    if not (isinstance(config, MethodConfig) and config.part == "prompt"):
        raise ConfigError(f"check_prompt_method takes settings whose part is 'prompt', got {config!r}")
    configs = [config]
    if hasattr(config, "keep_ratio"):
        configs += [config.replace(keep_ratio=share) for share in (0.01, 0.37, 1.0)]
    for one in configs:
        method = one.build(0)
        if not isinstance(method, PromptMethod):
            raise ConfigError(f"{type(one).__name__}.build must return a vtoken PromptMethod, got {method!r}")
        facts = [TowerFacts(4, 3, class_token=True, per_token=True), TowerFacts(4, 3)]
        for grid in _GRIDS:
            for visual in _visuals(grid):
                for tower in facts if visual.kind in method.kinds else ():
                    _try(one, method, visual, tower)


def _visuals(grid: tuple[int, int]) -> list[Visual]:
    lines = tuple(grid[0] * grid[1] + (i + 1) * (grid[1] + 1) - 1 for i in range(grid[0]))
    return [
        Visual("image", (Cell(grid),)),
        Visual("image", (Cell(grid),), (), 1),
        Visual("image", (Cell(grid, "overview"), Cell(grid, "detail")), lines),
        Visual("video", (Cell(grid, "frame"),) * 3),
        Visual("video", (Cell(grid, "frame", (grid[0] * 2, grid[1] * 2)),) * 3, apart=True),
    ]


def _try(config: MethodConfig, method: PromptMethod, visual: Visual, tower: TowerFacts) -> None:
    name = type(method).__name__
    count = method.count(visual, {})
    if not isinstance(count, int) or not count >= 1:
        raise VTokenError(f"{name}.count must be a whole number from 1 on, got {count!r} for {visual}")
    if not method.replaces:
        count = min(count, visual.content)
    first = select(method, _seen(method, visual, count, tower, broken=False))
    again = select(config.build(0), _seen(method, visual, count, tower, broken=False))  # type: ignore[arg-type]
    if not torch.equal(first[0], again[0]):
        raise VTokenError(f"{name}.choose chose other tokens the second time, for {visual}")
    select(method, _seen(method, visual, count, tower, broken=True))


def _seen(method: PromptMethod, visual: Visual, count: int, tower: TowerFacts, *, broken: bool) -> Seen:
    """What such a method would be shown, with random features."""
    needs, n, rng = method.needs(tower), visual.content, torch.Generator().manual_seed(visual.length)
    rows = torch.randn(n, _WIDTH, generator=rng)
    attention = torch.rand(max(len(needs.layers), 1), n, generator=rng)
    if broken:
        rows[0], attention[:, -1] = math.nan, math.nan
    return Seen(
        visual,
        count,
        {},
        attention=None if needs.attention == "none" else attention,
        after=rows,
        stack=rows,
        before=rows * 2 if "before" in needs.features else None,
        keys=rows[:, :8] if "keys" in needs.features else None,
        text=torch.randn(3, _WIDTH, generator=rng) if needs.text else None,
        native=_native(visual, rows) if "native" in needs.features else None,
    )


def _native(visual: Visual, rows: Tensor) -> tuple[Tensor, ...]:
    """Grids in front of a pooling that would take the first of every few rows."""
    cells = zip(visual.cells, rows.split([cell.tokens for cell in visual.cells]), strict=True)
    grids = [(own.unflatten(0, cell.grid), cell.native or cell.grid) for cell, own in cells]
    return tuple(
        own.repeat_interleave(size[0] // own.shape[0], 0).repeat_interleave(size[1] // own.shape[1], 1)
        for own, size in grids
    )


@torch.no_grad()
def check_family(model: nn.Module, inputs: Mapping[str, Any], *, tolerance: float = 1e-4) -> None:
    """Try a family on a small model of it: nothing kept changes a bit, pruned calls are hand-fed rows, remove undoes.

    Args:
        model: with weights under which its answer hangs on its images (random ones, scaled up, will do), in eval mode.
        inputs: a call as its processor would return it: several prompt rows, images of different sizes where the model
            takes them, left padding with a mask.
        tolerance: of logits of hand-fed rows, beside the largest.

    Raises:
        VTokenError: for what does not hold. UnsupportedModelError: if no family knows the model.
    """
    if is_applied(model):
        raise VTokenError("check_family takes a model that carries no method; vtoken.remove it first")
    owner: Any = model
    given, classes = dict(inputs), [type(m) for m in model.modules()]
    stock = owner(**given).logits
    pixels = [name for name in given if name.startswith("pixel_values")]
    other = owner(**given | {name: given[name].flip(0) for name in pixels}).logits
    if float((other - stock).abs().max()) < 100 * tolerance:
        raise VTokenError("other images give the same logits: with such weights nothing can be checked")
    ids = owner.generate(**given, do_sample=False, max_new_tokens=3)
    with applied(model, "uniform_tokens", keep_ratio=1.0):
        _equal("keeping all: forward", owner(**given).logits, stock, 0.0)
        with tracing(model):
            _equal("keeping all: rows handed over", owner(**given).logits, stock, 0.0)
        _equal("keeping all: generate", owner.generate(**given, do_sample=False, max_new_tokens=3), ids, 0.0)
    for name, share in (("uniform_tokens", 0.5), ("divprune", 0.3), ("pooled_tokens", 0.4)):
        apply(model, name, keep_ratio=share)
        try:
            _check_pruned(owner, given, name, tolerance)
        finally:
            remove(model)
    if [type(m) for m in model.modules()] != classes:
        raise VTokenError("vtoken.remove did not give every module its class back")
    _equal("after remove", owner(**given).logits, stock, 0.0)


def _check_pruned(model: Any, given: dict[str, Any], name: str, tolerance: float) -> None:
    with tracing(model) as trace:
        out = model(**given)
    record = trace.prompt
    if record is None:
        raise VTokenError(f"{name}: the call went past the engine: no image was found in it")
    rows = encode_images(model, given)
    new = model.generate(**given, do_sample=False, max_new_tokens=2)
    prompt = given["input_ids"]
    _equal(f"{name}: ids in front", new[:, : prompt.shape[1]], prompt, 0.0)
    beams = model.generate(**given, do_sample=False, max_new_tokens=2, num_beams=2)
    _equal(f"{name}: ids in front of beams", beams[:, : prompt.shape[1]], prompt, 0.0)
    if any(final.deeper for final in rows):
        return  # deeper levels cannot be fed as embeddings
    family = model._vtoken_family
    tokens = set(family.token_ids(model).values())
    for row in range(len(prompt)):
        seen = record.index[row] >= 0
        short = record.input_ids[row][seen]
        embeds = model.get_input_embeddings()(short)
        at = torch.zeros_like(seen[seen])
        for token_id in tokens:
            at |= short == token_id
        before = int(sum((record.input_ids[:row] == t).sum() for t in tokens))
        mine = torch.cat([final.rows for final in rows])[before : before + int(at.sum())]
        embeds[at] = mine.to(embeds)
        call: dict[str, Any] = {"attention_mask": torch.ones(1, len(short), dtype=torch.int64)}
        if "token_type_ids" in given:
            call["token_type_ids"] = given["token_type_ids"][row][record.index[row][seen]].unsqueeze(0)
        numbered = family.places(model, given, generating=False)
        if numbered is not None:
            line = torch.arange(len(short)).view(1, 1, -1)
            call["position_ids"] = torch.cat([line, numbered[0][:, row : row + 1, record.index[row][seen]]])
        fed = model(inputs_embeds=embeds.unsqueeze(0), **call).logits[0]
        _equal(f"{name}: row {row} fed by hand", out.logits[row][seen], fed, tolerance)


def _equal(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise VTokenError(f"{what}: expected {tuple(expected.shape)}, got {tuple(got.shape)}")
    if tolerance == 0:
        if not torch.equal(got, expected):
            raise VTokenError(f"{what}: differs from what the model gave before")
        return
    off, largest = float((got - expected).abs().max()), float(expected.abs().max())
    if not off <= tolerance * max(largest, 1.0):
        raise VTokenError(f"{what}: logits are off by {off:.3g} of {largest:.3g}")
