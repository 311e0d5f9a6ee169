"""Names of ready-made architectures that vtoken supports, found by building them without weights."""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vtoken.core.host import HostAdapter, host_of, registered
from vtoken.errors import ConfigError, UnsupportedModelError

# Files of timm whose architectures may be plain towers; every candidate is still built and checked.
_TIMM_FILES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "naflexvit", "vitamin")


def supported(pattern: str = "*") -> list[str]:
    """timm architecture names matching `pattern` ("deit3_*") that `vtoken.apply` accepts.

    Each candidate is built on the meta device, so no weights are made; "*" takes some seconds the first time. What was
    found about a name is remembered until timm's function of that name or the registered adapters change.

    Raises:
        ConfigError: if timm is not installed, or the pattern is no string.

    Example:
        >>> import vtoken
        >>> vtoken.supported("deit_tiny*")
        ['deit_tiny_distilled_patch16_224', 'deit_tiny_patch16_224']
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"supported takes one pattern such as 'deit3_*', got {pattern!r}")
    return [name for name in _candidates(pattern) if why_not(name) is None]


def why_not(name: str) -> str | None:
    """Why timm's architecture `name` is not supported; None if it is."""
    import timm

    check_name(name)
    return _verdict(name, timm.model_entrypoint(name.partition(".")[0]), registered())


@functools.lru_cache(maxsize=4096)
def _verdict(name: str, entrypoint: Callable[..., Any], adapters: tuple[HostAdapter, ...]) -> str | None:
    # What the answer depends on is in the arguments, so that it is asked again when one of them changes.
    model = build_weightless(name)
    try:
        host_of(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def check_name(name: str) -> None:
    """Raise ConfigError, with the nearest name, if timm knows no such architecture, or no such weights of it."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"timm {timm.__version__} has no architecture {name!r}{hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")] if tag else []
    if tag and tag not in tags:
        raise ConfigError(
            f"timm {timm.__version__} has no weights {tag!r} of {architecture}; it has: {', '.join(tags)}"
        )


def build(name: str, **options: Any) -> nn.Module:
    """timm's architecture `name` with the given options of its constructor; those that are None are left out.

    Raises:
        ConfigError: if timm has no such architecture, or it cannot be built with these options.
    """
    import timm

    check_name(name)
    given = {option: value for option, value in options.items() if value is not None}
    changed = [f"{option}={value}" for option, value in given.items() if value is not False]
    try:
        model: nn.Module = timm.create_model(name, **given)
    except (AssertionError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        if not changed:
            raise
        raise ConfigError(f"{name} cannot be built with {', '.join(changed)}: {error}") from error
    return model


def build_weightless(name: str, **options: Any) -> nn.Module:
    """`build` on the meta device; with weights where an older timm cannot be built there."""
    try:
        with torch.device("meta"), _WithoutInitialisation():
            return build(name, pretrained=False, **options)
    except RuntimeError as error:
        if "item()" not in str(error):  # older releases of timm read drop-path rates from a tensor
            raise
    return build(name, pretrained=False, **options)


class _WithoutInitialisation(TorchFunctionMode):
    """Functions that fill tensors leave those on the meta device alone: nothing is there to fill, and torch takes long.

    Holds for this thread only, while it is entered.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING:
            filled = args[0] if args else kwargs.get("tensor")  # as torch.nn.init hands it on
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)


# What initialisers do to a tensor's values; none of them changes anything else of it.
_FILLING = frozenset(
    {Tensor.add_, Tensor.bernoulli_, Tensor.clamp_, Tensor.copy_, Tensor.erfinv_, Tensor.fill_, Tensor.mul_}
    | {Tensor.normal_, Tensor.uniform_, Tensor.zero_}
    | {nn.init.constant_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_}
)


def _candidates(pattern: str) -> list[str]:
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("vtoken.supported lists timm architectures; install timm")
    import timm

    files = {name for file in _TIMM_FILES for name in timm.list_models(module=file)}
    return [name for name in timm.list_models(pattern) if name in files]
