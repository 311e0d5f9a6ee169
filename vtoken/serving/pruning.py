"""What settings mean for the images of a model that an engine runs: laid out, counted, chosen from.

An engine has towers of its own, so the model here is a stand-in: transformers' class without weights, which carries the
method as any model does. Sizes, layers and refusals are those of the library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.checks import hint
from vtoken.core.apply import apply
from vtoken.core.carried import ENTRY
from vtoken.core.config import CONFIG_VERSION, MethodConfig, config_from_dict
from vtoken.core.method import PromptMethod
from vtoken.core.visual import Encoded, Needs, TowerFacts, Visual, length_of
from vtoken.errors import ConfigError, InputError, UnsupportedModelError
from vtoken.hosts.llava.adapter import LlavaAdapter
from vtoken.hosts.qwen.family import QwenVL
from vtoken.prompts.budget import budget, method_of, replaced
from vtoken.prompts.engine import count_of, rows_of_level, seen_of, stays
from vtoken.prompts.family import Family

#: Name of the settings in the config of a model that is served, and of what a request asks for.
SETTINGS = ENTRY


class Pruning:
    """A method in the images of one model, without the model.

    Args:
        config: the model's transformers config.
        settings: of a method in the prompt.

    Raises:
        ConfigError: if the settings do not fit the model, or the method cannot be served: it reads the text, or how
            much it keeps depends on pixels.
        UnsupportedModelError: if images of this model cannot be shortened.
    """

    def __init__(self, config: Any, settings: MethodConfig) -> None:
        if not isinstance(settings, MethodConfig) or settings.part != "prompt":
            name = getattr(settings, "method", settings)
            raise ConfigError(
                f"{name} cannot be served: engines run methods that take tokens out of the prompt, such as "
                "vtoken.VTCCLS or vtoken.DivPrune"
            )
        self.settings = settings
        #: The stand-in, on the device "meta".
        self.model: Any = apply(_weightless(config), settings)
        self.family: Family = self.model._vtoken_family
        if not isinstance(self.family, (LlavaAdapter, QwenVL)):
            raise UnsupportedModelError(
                f"{self.family.name} is not served inside an engine: LLaVA and LLaVA-NeXT with a CLIP or SigLIP tower "
                "and Qwen-VL are"
            )
        found = method_of(self.model)
        assert found is not None
        self.method: PromptMethod = found
        self.facts: TowerFacts = self.family.facts(self.model, {})
        self.needs: Needs = self.method.needs(self.facts)
        if self.needs.text:
            raise ConfigError(
                f"{settings.method} reads the text of a prompt, which engines do not show where images are encoded; "
                "shorten outside with vtoken.encode_images and hand the rows over"
            )
        if self.family.axes == 1 and self.method.positions == "original":
            raise ConfigError("positions='original' cannot be served here: the engine numbers tokens one by one")
        if self.method.newline == "row" and hasattr(self.model.model, "pack_image_features"):
            raise ConfigError(
                "newline='row' keeps as many newlines as the pixels decide, and an engine must know the count before; "
                "use newline='all' or 'none'"
            )

    def asked(self, given: Any) -> dict[str, Any]:
        """What one request asks for, checked: settings that may change from call to call, the same for all its images.

        Raises:
            ConfigError: for unknown names or values that the settings refuse. InputError: if it is no dict of numbers.
        """
        if not isinstance(given, Mapping):
            raise InputError(f"{SETTINGS} of a request is a dict such as {{'num_tokens': 64}}, got {given!r}")
        known = sorted(self.method.budgets)
        for name, value in given.items():
            if name not in known:
                raise ConfigError(
                    f"{SETTINGS} of a request: {type(self.settings).__name__} knows {', '.join(known) or 'nothing'} "
                    f"per request, not {name!r}{hint(str(name), known)}"
                )
            if isinstance(value, (list, tuple, Mapping)):
                raise InputError(f"{name}={value!r}: one number for all images of a request")
        with budget(self.model, **given):  # refuses values
            return dict(given)

    def visuals(self, given: Mapping[str, Any]) -> list[Visual]:
        """The images of what a processor returned."""
        return self.family.layout(self.model, dict(given))

    def method_for(self, asked: Mapping[str, Any]) -> PromptMethod:
        """The method as a request asks for it."""
        return replaced(self.method, dict(asked)) if asked else self.method

    def length(self, visual: Visual, asked: Mapping[str, Any]) -> int:
        """Placeholders of an image in the short prompt, exactly."""
        method = self.method_for(asked)
        return length_of(visual, count_of(method, visual, {}), method.newline)[0]

    def kept(
        self,
        visuals: Sequence[Visual],
        asked: Sequence[Mapping[str, Any]],
        encoded: Encoded,
        project: Callable[[Tensor], Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Of every image the rows [k, C + C' + ...] of all levels side by side, and their placeholders [k]."""
        found = []
        for i, (visual, wanted) in enumerate(zip(visuals, asked, strict=True)):
            method, levels = self.method_for(wanted), [level[i] for level in encoded.levels]
            seen = seen_of(visual, count_of(method, visual, {}), {}, encoded, i, None)
            one = stays(method, seen, levels, project)
            rows = [rows_of_level(level, one, number) for number, level in enumerate(levels)]
            found.append((rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1), one.places))
        return found


def settings_in(config: Any) -> MethodConfig:
    """The settings that a config brings: those of an engine's overrides, or those that a patched model was saved with.

    Raises:
        ConfigError: if there are none, more than one method, or values that the method refuses.
    """
    values = getattr(config, SETTINGS, None)
    example = f'hf_overrides={{"architectures": [...], "{SETTINGS}": {{"method": "divprune", "num_tokens": 64}}}}'
    if not isinstance(values, Mapping):
        raise ConfigError(f"the config of the served model has no settings, {SETTINGS}={values!r}: pass {example}")
    if "places" in values and "method" not in values:
        methods = [method for place in values["places"] for method in place.get("methods", [])]
        if len(methods) != 1:
            raise ConfigError(f"the model was saved with {len(methods)} methods, an engine runs one: pass {example}")
        values = methods[0]
    if "method" not in values:
        raise ConfigError(f'{SETTINGS}={dict(values)!r} names no "method": pass {example}')
    return config_from_dict({"version": CONFIG_VERSION, **{k: v for k, v in values.items() if k != "places"}})


def _weightless(config: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    own = copy.deepcopy(config)
    own.__dict__.pop(SETTINGS, None)
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(own)
    except ValueError as error:  # no class of it for this config
        raise UnsupportedModelError(f"{type(config).__name__} is no config of a model with images: {error}") from error
