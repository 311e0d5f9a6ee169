"""`vtoken.budget`: other counts, and clues, for the calls of one model inside a block; the settings stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.checks import hint
from vtoken.core.method import PromptMethod
from vtoken.core.wrapper import Wrapper
from vtoken.errors import ConfigError, InputError

_asked: ContextVar[tuple[tuple[Any, dict[str, Any]], ...]] = ContextVar("vtoken_budgets", default=())


@contextlib.contextmanager
def budget(model: nn.Module, **asked: Any) -> Iterator[None]:
    """Counts and clues for the calls of one model inside the block; only in this thread or task.

    Inner blocks win, name by name. A thread that is started inside starts without it.

    Args:
        model: a model that carries a method in its prompts, or a `vtoken.QuotaVideoModel`.
        asked: settings of that method that may change from call to call, such as `num_tokens` or `keep_ratio` (one
            value, or a list with one for every image and video of a call, in prompt order); and what a call brings for
            it, such as `relevance` of `vtoken.CDPruner` or `frame_scores` of `vtoken.QuoTA`.

    Raises:
        ConfigError: for a model without such a method, an unknown name, or a value that the settings refuse.

    Example:
        with vtoken.budget(model, num_tokens=64):
            model.generate(**inputs)
    """
    _check(model, asked)
    token = _asked.set((*_asked.get(), (model, asked)))
    try:
        yield
    finally:
        _asked.reset(token)


def asked_of(model: Any) -> dict[str, Any]:
    """What the blocks around this call ask of the model, by name."""
    found: dict[str, Any] = {}
    for owner, asked in _asked.get():
        if owner is model:
            for pair in (("num_tokens", "keep_ratio"), ("keep_ratio", "num_tokens")):
                if pair[0] in asked:
                    found.pop(pair[1], None)
            found |= asked
    return found


def method_of(model: Any) -> PromptMethod | None:
    """The method in a model's prompts, or of a wrapper around it, with its own settings."""
    if isinstance(model, Wrapper):
        return model._method
    found: PromptMethod | None = getattr(model.__dict__.get("_vtoken"), "methods", {}).get(PromptMethod)
    return found


def methods_for(method: PromptMethod, asked: Mapping[str, Any], count: int) -> list[PromptMethod]:
    """The method for each of `count` visuals; where nothing is asked, the method itself.

    Raises:
        InputError: if a list does not have one value for every visual.
    """
    own = {name: getattr(getattr(method, "config", None), name, None) for name in method.budgets}
    settings = {name: value for name, value in own.items() if _several(value) is not None}
    settings |= {name: value for name, value in asked.items() if name in method.budgets}
    if not settings:
        return [method] * count
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in settings.items():
        values = _several(value)
        if values is not None and len(values) != count:
            some = "budgets" if name == "budget" else "values"
            raise InputError(
                f"{name}: {len(values)} {some} for {count} {_visuals(method)}; give one each, or one for all"
            )
        for i in range(count):
            each[i][name] = value if values is None else values[i]
    return [replaced(method, changes) for changes in each]


def likely_methods(method: PromptMethod, asked: Mapping[str, Any]) -> list[PromptMethod]:
    """The method as a call in these blocks would run it: one, or one for every value of a list."""
    counts = [len(value) for name, value in asked.items() if name in method.budgets and _several(value) is not None]
    return methods_for(method, asked, max(counts, default=1))


def clues_for(method: PromptMethod, asked: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Every visual's share of what came with the call: one for one visual, else one entry for each.

    Raises:
        InputError: if a list does not have one entry for every visual.
    """
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in asked.items():
        if name not in method.clues or value is None:
            continue
        values = list(value) if _holds_several(value) else [value] * count if name == "query" else [value]
        if len(values) != count:
            raise InputError(f"{name} for {len(values)} {_visuals(method)}, but there are {count}; give one list each")
        for i in range(count):
            each[i][name] = values[i]
    return each


def _visuals(method: PromptMethod) -> str:
    return "video(s)" if method.kinds == {"video"} else "image(s) and video(s)"


def _holds_several(value: Any) -> bool:
    """Whether a clue is one for every visual: a list of lists, or an array of more dimensions than one."""
    if isinstance(value, Tensor) or hasattr(value, "ndim"):
        return bool(value.ndim > 1)
    first = next(iter(value), None) if isinstance(value, (list, tuple)) else None
    return getattr(first, "ndim", 1) > 0 and hasattr(first, "__len__")


def _name(method: PromptMethod) -> str:
    """What the user wrote, where the method keeps its settings."""
    return type(getattr(method, "config", method)).__name__


def replaced(method: PromptMethod, changes: dict[str, Any]) -> PromptMethod:
    """The method under changed settings; raises ConfigError for values that they refuse."""
    config: Any = getattr(method, "config", None)
    if config is None:
        raise ConfigError(f"{type(method).__name__} names budgets but keeps no settings as `config`")
    made = config.replace(**changes).build(0)
    assert isinstance(made, PromptMethod)
    return made


def _several(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def _check(model: Any, asked: dict[str, Any]) -> None:
    method = method_of(model) if isinstance(model, nn.Module) else None
    if method is None:
        raise ConfigError(
            f"budget: this {type(model).__name__} carries no method in its prompts; vtoken.apply one first, and pass "
            "the model that it was applied to"
        )
    known = sorted(method.budgets | method.clues)
    for name, value in asked.items():
        if name not in known:
            raise ConfigError(
                f"budget({name}=...): {_name(method)} knows {', '.join(known) or 'nothing'} per call{hint(name, known)}"
            )
        if name in method.budgets:
            values = _several(value)
            for one in [value] if values is None else values:
                replaced(method, {name: one})
        elif isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ConfigError(f"budget({name}=...): holds values that are not finite")
    both = [name for name in ("num_tokens", "keep_ratio") if asked.get(name) is not None]
    if len(both) == 2:
        raise ConfigError("budget(num_tokens=..., keep_ratio=...): give exactly one of the two")
