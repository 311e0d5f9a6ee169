"""`vtoken.serving.check`: what would end an engine, or serve wrongly, is refused before it starts."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from vtoken.core.config import MethodConfig, make_config
from vtoken.errors import ConfigError, UnsupportedModelError
from vtoken.serving.pruning import SETTINGS, Pruning
from vtoken.serving.vllm import SERVED


def check(model: str | os.PathLike[str] | Any, method: MethodConfig | str, **options: Any) -> dict[str, Any]:
    """The `hf_overrides` under which a vLLM engine serves a model with a method.

    Where vLLM is installed, it is looked at, too: whether its classes are those that vtoken builds on.

    Args:
        model: a folder as `save_pretrained` writes it, or a transformers config.
        method: settings such as `vtoken.VTCCLS(num_tokens=64)`, or a method's name with its settings as `options`.

    Returns:
        A dict for `LLM(folder, hf_overrides=...)`, or as JSON for `--hf-overrides`.

    Raises:
        ConfigError: for settings that are out of range, do not fit the model, or cannot be served: methods that read
            the text of a prompt, and counts that depend on pixels.
        UnsupportedModelError: if there is no class for the model, or this vLLM has other hooks.

    Example:
        >>> import transformers, vtoken
        >>> found = vtoken.serving.check(transformers.LlavaConfig(), "divprune", num_tokens=64)
        >>> found["architectures"], found["vtoken"]["num_tokens"]
        (['VTokenLlavaForConditionalGeneration'], 64)
    """
    from transformers import AutoConfig

    if isinstance(method, str):
        method = make_config(method, options)
    elif options:
        raise ConfigError(f"settings {sorted(options)} stand beside {method!r}, which has its own")
    config: Any = AutoConfig.from_pretrained(model) if isinstance(model, (str, os.PathLike)) else model
    kind = getattr(config, "model_type", None)
    if kind not in SERVED:
        raise UnsupportedModelError(
            f"no class for {kind or type(config).__name__} models in vLLM shortens their images; there are some for "
            f"{', '.join(SERVED)}. Ready rows of other models are taken by vLLM's own classes (docs/serving.md 2)"
        )
    Pruning(config, method)
    name, module = SERVED[kind]
    if importlib.util.find_spec("vllm") is not None:
        _import(module)
    values: Mapping[str, Any] = method.to_dict()
    return {"architectures": [name], SETTINGS: {k: v for k, v in values.items() if v is not None}}


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise UnsupportedModelError(
            f"vLLM's classes import torchvision, which does not fit this torch ({error}): install the torchvision that "
            "belongs to it (docs/serving.md 1)"
        ) from error
