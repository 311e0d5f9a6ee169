"""Modules of vtoken's own around a model: they hold their settings, as no model is patched that could carry them."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import nn

from vtoken.core.config import MethodConfig
from vtoken.core.method import PromptMethod
from vtoken.errors import ConfigError

S = TypeVar("S", bound=MethodConfig)


class Wrapper(nn.Module):
    """A module that holds a model, and the settings of its method.

    `vtoken.config_of` finds them and `vtoken.configure` changes them; each is an attribute, too, see `setting`.
    """

    #: Names of the settings that are used up when the wrapper is built.
    _fixed: ClassVar[frozenset[str]] = frozenset()
    _settings: MethodConfig
    #: What it does to the model's prompts, if that is what it is for.
    _method: PromptMethod | None = None

    def _adopt(self, settings: Any) -> None:
        """Make these its settings; subclasses raise ConfigError, nothing changed, where they do not fit the model."""
        self._settings = settings

    def _change(self, changes: dict[str, Any]) -> None:
        """Change settings, all of them or, where one cannot be, none.

        Raises:
            ConfigError: for a setting that is fixed or unknown, and for a value that is wrong or does not fit.
        """
        for name in changes:
            if name in self._fixed:
                raise ConfigError(
                    f"{name} is used when {type(self).__name__} is built and cannot be changed later: wrap the model "
                    f"again with {name}={changes[name]!r}"
                )
        self._adopt(self._settings.replace(**changes))


def setting(name: str) -> Any:
    """A property of a wrapper that is one of its settings; who sets it changes this one by `Wrapper._change`."""

    def get(self: Any) -> Any:
        return getattr(self._settings, name)

    def set_(self: Any, value: Any) -> None:
        self._change({name: value})

    return property(get, set_)


def settings_from(owner: str, kind: type[S], config: S | None, given: dict[str, Any]) -> S:
    """Settings that were given as one object or by name; raises ConfigError for both, or for an object that is none."""
    if config is None:
        return kind.example().replace(**given)
    if not isinstance(config, kind):
        raise ConfigError(f"{owner}(config={config!r}): must be settings, vtoken.{kind.__name__}(...)")
    if given:
        raise ConfigError(
            f"{owner} takes vtoken.{kind.__name__} or settings by name, not both: {', '.join(given)}; "
            "config.replace(...) makes a copy with some changed"
        )
    return config


def wrappers_in(model: nn.Module) -> list[Wrapper]:
    """The wrappers in a model, itself included."""
    return [module for module in model.modules() if isinstance(module, Wrapper)]
