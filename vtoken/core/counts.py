"""The verbs that count, before any pixel is seen: plan, num_tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtoken import checks
from vtoken.core.apply import Config, build_methods, config_tuple, resolve
from vtoken.core.config import MethodConfig
from vtoken.core.host import HostAdapter, find_adapter
from vtoken.core.method import BlockMethod, KeepAll
from vtoken.core.spec import Plan
from vtoken.errors import ConfigError, ShapeError


def plan(
    model: nn.Module, config: Config | None = None, *, img_size: int | tuple[int, int] | None = None, **options: Any
) -> Plan:
    """Token counts per layer; nothing is run and the model is not changed.

    Args:
        model: a supported model; its weights are not read.
        config: settings; None means those that are applied.
        img_size: pixels, one side or (height, width); None means the model's own.
    """
    adapter, _, method = chosen(model, config, options)
    size = adapter.image_size(model) if img_size is None else pixels(img_size)
    return plan_of(model, adapter, method, size)


def num_tokens(
    model: nn.Module, config: Config | None = None, *, img_size: int | tuple[int, int] | None = None, **options: Any
) -> int:
    """How many tokens of one image the model hands on.

    For a LLaVA, the placeholders that the prompt needs; else the rows that leave the last block, prefix included. Where
    a method shortens the prompt, the image tokens that reach the language model; prompts may then have this many
    placeholders or, as the processor writes them, as many as without it. Newlines that depend on the image all count.

    Args:
        model: a supported model.
        config: settings; None means those that are applied, or none at all.
        img_size: pixels, one side or (height, width); None means the model's own.

    Example:
        >>> import timm, vtoken
        >>> vtoken.num_tokens(timm.create_model("test_vit"), vtoken.PiToMe(ratio=0.9))
        55
    """
    configs = resolve(config, options) if config is not None else config_tuple(model)
    if any(c.part == "prompt" for c in configs):
        shortening = find_adapter(model, "prompt")
        size = shortening.image_size(model) if img_size is None else pixels(img_size)
        return shortening.count(model, configs, size).kept
    adapter = find_adapter(model)
    size = adapter.image_size(model) if img_size is None else pixels(img_size)
    if not configs:
        spec, (height, width) = adapter.spec(model), adapter.grid(model, size)
        full = Plan((spec.num_prefix + height * width,) * (spec.depth + 1), spec.num_prefix)
        return adapter.num_tokens(model, full)
    method = chosen(model, config, options)[2]
    return adapter.num_tokens(model, plan_of(model, adapter, method, size))


def chosen(
    model: nn.Module, config: Config | None, options: dict[str, Any]
) -> tuple[HostAdapter, tuple[MethodConfig, ...], BlockMethod]:
    """The model's adapter, the given or else the applied settings, and the method they make."""
    adapter = find_adapter(model)
    configs = resolve(config, options) if config is not None else config_tuple(model)
    if not configs:
        raise ConfigError("no settings given and no method applied to this model")
    in_tower = tuple(c for c in configs if c.part == "tower")
    if not in_tower:
        find_adapter(model, "prompt")  # or says why no prompt of the model can be shortened
    method = build_methods(model, adapter, in_tower).get("on_block", KeepAll())
    assert isinstance(method, BlockMethod)
    return adapter, configs, method


def plan_of(model: nn.Module, adapter: HostAdapter, method: BlockMethod, size: tuple[int, int]) -> Plan:
    """Token counts of `method` on images of `size` (height, width) pixels."""
    spec = adapter.spec(model)
    own = tuple(adapter.image_size(model)) if spec.fixed_size else tuple(size)
    if tuple(size) != own:
        raise ShapeError(
            f"{spec.name} does not take images of {size} pixels (height, width), only of {own}; build it for another "
            "size, or so that it takes any (timm: dynamic_img_size=True)"
        )
    height, width = adapter.grid(model, size)
    return count_tokens(method, spec.depth, spec.num_prefix + height * width, spec.num_prefix)


def pixels(size: int | Sequence[int]) -> tuple[int, int]:
    """One side or (height, width) in pixels as a pair; raises ShapeError for anything else."""
    sides = checks.whole_numbers(tuple(size) if isinstance(size, Sequence) else (size, size))
    if sides is None or len(sides) != 2 or min(sides) < 1:
        raise ShapeError(f"an image size is one number of pixels or (height, width), got {size!r}")
    return sides[0], sides[1]


def count_tokens(method: BlockMethod, depth: int, num_tokens: int, num_prefix: int) -> Plan:
    """The plan of `method` for `num_tokens` embedded tokens (prefix included)."""
    tokens, embedded = [num_tokens], num_tokens - num_prefix
    for layer in range(depth):
        tokens.append(tokens[-1] - method.num_removed(layer, tokens[-1] - num_prefix, embedded))
    return Plan(tuple(tokens), num_prefix)
