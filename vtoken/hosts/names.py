"""Names of ready-made architectures that vtoken supports, found by building them without weights."""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any

import torch
from torch import nn

from vtoken.core.errors import ConfigError, UnsupportedModelError
from vtoken.core.host import find_adapter

# Files of timm whose architectures may be plain towers; every candidate is still built and checked.
_TIMM_FILES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "naflexvit", "vitamin")


def supported(pattern: str = "*") -> list[str]:
    """timm architecture names matching `pattern` ("deit3_*") that `vtoken.apply` accepts.

    Each candidate is built on the meta device, so no weights are made; "*" takes about a minute.

    Raises:
        ConfigError: if timm is not installed.
    """
    return [name for name in _candidates(pattern) if why_not(name) is None]


def why_not(name: str) -> str | None:
    """Why timm's architecture `name` is not supported; None if it is."""
    model = build_weightless(name)
    try:
        find_adapter(model).spec(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def check_name(name: str) -> None:
    """Raise ConfigError, with the nearest name, if timm knows no such architecture."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"timm {timm.__version__} has no architecture {name!r}{hint}")


def build_weightless(name: str, **options: Any) -> nn.Module:
    """timm's architecture `name` on the meta device; with weights where an older timm cannot be built there."""
    import timm

    check_name(name)
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except RuntimeError as error:
        if "item()" not in str(error):  # older releases of timm read drop-path rates from a tensor
            raise
        model = timm.create_model(name, pretrained=False, **options)
    return model


def _candidates(pattern: str) -> list[str]:
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("vtoken.supported lists timm architectures; install timm")
    import timm

    files = {name for file in _TIMM_FILES for name in timm.list_models(module=file)}
    return [name for name in timm.list_models(pattern) if name in files]
