"""What a model carries, as plain settings: read from its modules, written to JSON, taken along by `save_pretrained`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from vtoken.core.config import MethodConfig
from vtoken.core.patch import PREDICTOR, base_of, is_patched, view
from vtoken.core.wrapper import Wrapper

#: Of the form below; `config_from_dict` has a version of its own.
VERSION = 1
#: Name of the entry in a transformers config, and of the file without its ending.
ENTRY = "vtoken"


def config_tuple(model: nn.Module) -> tuple[MethodConfig, ...]:
    """The settings of every method applied to the model or inside it; those in the tower, where images come first."""
    found = [m.__dict__["_vtoken"] for m in model.modules() if "_vtoken" in m.__dict__]
    configs = [config for carried in found for config in carried.configs]
    return tuple(sorted(configs, key=lambda config: config.part != "tower"))


def settings_of(model: nn.Module) -> dict[str, Any] | None:
    """Everything that is applied to a model or inside it, JSON-ready; None if nothing is.

    Each of the "places" is a module ("at", its name in `model`), what is applied there ("methods", as
    `MethodConfig.to_dict` writes them) and the modules that hold learned parts ("learned", names in the place). Their
    weights are not settings: they come with the state dict. Wrappers (`vtoken.AttentiveMaskCLIP`) are places, too.
    """
    wrappers = [(name, module) for name, module in model.named_modules() if isinstance(module, Wrapper)]
    places: list[dict[str, Any]] = [
        {"at": name, "methods": [wrapper._settings.to_dict()], "learned": []} for name, wrapper in wrappers
    ]
    for name, module in outermost(model, is_patched):
        configs = config_tuple(module)
        if configs:
            methods = [config.to_dict() for config in configs]
            places.append({"at": name, "methods": methods, "learned": learned(module)})
    return {"version": VERSION, "places": places} if places else None


def learned(model: nn.Module) -> list[str]:
    """Names of the learned parts that methods brought into a model."""
    return [f"{n}.{PREDICTOR}".lstrip(".") for n, m in model.named_modules() if "_vtoken_method" in m.__dict__]


def outermost(model: nn.Module, wanted: Any) -> list[tuple[str, nn.Module]]:
    """Names and modules of which `wanted(module)` is true, without those that lie in another of them."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if wanted(module) and not any(name.startswith(f"{other}.") or not other for other, _ in found):
            found.append((name, module))
    return found


def entry_of(module: nn.Module) -> Any:
    """The entry in the config of a transformers model that was loaded with one; None if there is none."""
    return getattr(module.__dict__.get("config"), "__dict__", {}).get(ENTRY)


def forget(model: nn.Module) -> None:
    """Take the entry out of every config of a model: what they named is applied now, and the model says so itself."""
    for config in {id(c): c for m in model.modules() for c in _configs(m.__dict__.get("config"))}.values():
        config.__dict__.pop(ENTRY, None)


def _configs(config: Any) -> Iterator[Any]:
    """A transformers config and those inside it."""
    if hasattr(config, "model_type"):
        yield config
        for inner in vars(config).values():
            yield from _configs(inner)


def unapplied(model: nn.Module) -> str:
    """A sentence if a config in the model names settings and nothing is applied; else empty."""
    if config_tuple(model) or all(entry_of(module) is None for module in model.modules()):
        return ""
    return (
        f"the config of this {type(model).__name__} names settings of vtoken that are not applied: "
        "vtoken.restore(model) applies them"
    )


def is_saved_with_config(model: nn.Module) -> bool:
    """Whether a model is a transformers one: its `save_pretrained` writes its config."""
    return hasattr(model, "save_pretrained") and hasattr(model.__dict__.get("config"), "model_type")


class SavesSettings:
    """A transformers model, patched or with something patched inside, that takes its settings along when it is saved.

    The entry is made of what the model carries at that moment and stands in a copy of the config, since models may
    share one config.
    """

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, with the settings in `config.json`."""
        config, settings = copy.copy(self.config), settings_of(self)
        if settings is not None:
            setattr(config, ENTRY, settings)
        stock: Any = base_of(type(self))
        if learned(self) and "save_original_format" in inspect.signature(stock.save_pretrained).parameters:
            # transformers gives the weights names of older releases, by which no state dict loads into the model:
            # from_pretrained takes those and the model's own, but keeps no learned part.
            kwargs.setdefault("save_original_format", False)
        done = stock.save_pretrained(view(self, config=config), *args, **kwargs)
        # What transformers notes on the way (dtype, architectures) belongs to the model's own.
        vars(self.config).update({name: value for name, value in vars(config).items() if name != ENTRY})
        return done
