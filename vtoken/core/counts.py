"""The verbs that count, before any pixel is seen: plan, num_tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtoken import checks
from vtoken.core.apply import Config, build_methods, carrier_of, given_or_carried
from vtoken.core.carried import unapplied
from vtoken.core.config import MethodConfig
from vtoken.core.host import Host, find_adapter, host_of
from vtoken.core.method import BlockMethod, KeepAll, Methods
from vtoken.core.spec import Plan
from vtoken.errors import ConfigError, ShapeError


def plan(
    model: nn.Module, config: Config | None = None, *, img_size: int | tuple[int, int] | None = None, **options: Any
) -> Plan:
    """Token counts per layer; nothing is run and the model is not changed.

    Where the images decide how many tokens are left (`vtoken.ThresholdMerge`), the plan holds bounds; see `Plan.exact`.

    Args:
        model: a supported model; its weights are not read.
        config: settings; None means those that are applied.
        img_size: pixels, one side or (height, width); None means the model's own.

    Example:
        >>> import timm, vtoken
        >>> vtoken.plan(timm.create_model("vit_base_patch16_224"), "tome", r=16).tokens[:3]
        (197, 181, 165)
    """
    host, _, methods = chosen(model, config, options)
    return plan_of(host, methods, host.image_size() if img_size is None else pixels(img_size))


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

    Raises:
        ConfigError: if the images decide how many tokens are left, so that there is no such number.

    Example:
        >>> import timm, vtoken
        >>> vtoken.num_tokens(timm.create_model("test_vit"), vtoken.PiToMe(ratio=0.9))
        55
    """
    configs = given_or_carried(model, config, options)
    if any(c.part == "prompt" for c in configs):
        shortening = find_adapter(model, "prompt")
        size = shortening.image_size(model) if img_size is None else pixels(img_size)
        return shortening.count(model, configs, size).kept
    host, methods = (host_of(model), {}) if not configs else chosen(model, config, options)[::2]
    size = host.image_size() if img_size is None else pixels(img_size)
    counts = plan_of(host, methods, size)
    counts.settled("num_tokens")
    return host.adapter.num_tokens(model, counts)


def chosen(
    model: nn.Module, config: Config | None, options: dict[str, Any]
) -> tuple[Host, tuple[MethodConfig, ...], Methods]:
    """The model's tower, the given or else the applied settings, and the methods that these make there.

    What is applied was built for as many blocks as there were then: some may have been deleted since.
    """
    configs = given_or_carried(model, config, options)
    host = host_of(model)
    if not configs:
        told = unapplied(model)
        raise ConfigError("no settings given and no method applied to this model" + (told and f"; {told}"))
    in_tower = tuple(c for c in configs if c.part == "tower")
    if not in_tower:
        find_adapter(model, "prompt")  # or says why no prompt of the model can be shortened
    carried = None if config is not None else carrier_of(model, in_tower)
    return host, configs, build_methods(host, in_tower, None if carried is None else carried.depth)


def removing(methods: Methods) -> BlockMethod:
    """The one among the methods that removes tokens in the blocks."""
    method: BlockMethod = methods.get(BlockMethod) or KeepAll()
    return method


def plan_of(host: Host, methods: Methods, size: tuple[int, int]) -> Plan:
    """Token counts on images of `size` (height, width) pixels."""
    spec = host.spec
    own = host.image_size() if spec.fixed_size else tuple(size)
    if tuple(size) != own:
        raise ShapeError(
            f"{spec.name} does not take images of {size} pixels (height, width), only of {own}; build it for another "
            "size, or so that it takes any (timm: dynamic_img_size=True)"
        )
    height, width = host.grid(size)
    return count_tokens(removing(methods), spec.depth, spec.num_prefix + height * width, spec.num_prefix)


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
    fewest = tuple(tokens)
    if method.exact or fewest[-1] == num_tokens:
        return Plan(fewest, num_prefix)
    return Plan((num_tokens,) * (depth + 1), num_prefix, exact=False, least=fewest)
