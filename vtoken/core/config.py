"""Settings of a method: frozen dataclasses that validate themselves, and the names they are found by."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vtoken.checks import hint
from vtoken.errors import ConfigError

if TYPE_CHECKING:  # so that settings can be read without torch
    from vtoken.core.method import Method

CONFIG_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What a method should do; knows nothing of models. Subclasses set `method` and implement `build`."""

    method: ClassVar[str] = ""
    #: Which part of a model the method acts in: "tower" (vision transformer) or "prompt" (of a multimodal model). Or
    #: "training": in none, it trains a model. Then a wrapper such as `vtoken.AttentiveMaskCLIP` takes the settings, no
    #: verb such as `vtoken.apply` does, and `build` raises a ConfigError that says so.
    part: ClassVar[str] = "tower"
    #: Two settings of which one is given, if there are such: in `replace` one takes the other's place.
    _either: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def example(cls) -> Self:
        """Typical settings: the defaults, and something for what must be given."""
        return cls()

    def build(self, depth: int) -> Method | tuple[Method, ...]:
        """The method, or one per hook, for a model with `depth` blocks; raises ConfigError if they do not fit it."""
        raise NotImplementedError(f"{type(self).__name__} must implement build(depth)")

    def counted(self) -> MethodConfig:
        """The settings under which a counter of matrix products sees all that shapes tell; see `vtoken.report`."""
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed; unknown names raise ConfigError."""
        names = [f.name for f in fields(self)]
        check_names(type(self).__name__, changes, names)
        for new, old in (self._either, self._either[::-1]) if self._either else ():
            if changes.get(new) is not None:
                changes.setdefault(old, None)
        return type(self)(**{name: getattr(self, name) for name in names} | changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with "method" and "version"; `config_from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"method": self.method, "version": CONFIG_VERSION} | values


# Modules whose classes register themselves; imported when a method is first asked for by name.
_BUILTIN = (
    "vtoken.methods.attentive_clip.settings",
    "vtoken.methods.merging.baselines",
    "vtoken.methods.merging.pitome",
    "vtoken.methods.merging.threshold",
    "vtoken.methods.sparsifiner.settings",
    "vtoken.methods.vtc_cls",
    "vtoken.methods.divprune",
    "vtoken.methods.visionzip",
    "vtoken.methods.cdpruner",
    "vtoken.methods.controls",
    "vtoken.methods.quota",
)
_registry: dict[str, type[MethodConfig]] = {}


def _known() -> dict[str, type[MethodConfig]]:
    for module in _BUILTIN:
        importlib.import_module(module)
    return _registry


def register_method(config: type[MethodConfig]) -> type[MethodConfig]:
    """Make a method known under its `config.method` name; usable as a class decorator.

    Raises:
        ConfigError: if it is no MethodConfig, or the name is empty or taken by another class.
    """
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise ConfigError(f"register_method takes a subclass of vtoken.MethodConfig, got {config!r}")
    name = config.method
    taken = _registry if config.__module__ in _BUILTIN else _known()
    if not isinstance(name, str) or not name or taken.get(name, config) is not config:
        raise ConfigError(f"{config.__name__}.method={name!r} must be a new, non-empty name; taken: {methods()}")
    if config.build is MethodConfig.build:
        raise ConfigError(f"{config.__name__} must implement build(depth), which makes the method")
    _registry[name] = config
    return config


def methods() -> list[str]:
    """Names of the registered methods. `vtoken.apply(model, "name", ...)` takes all but those that train a model.

    Example:
        >>> import vtoken
        >>> "pitome" in vtoken.methods()
        True
    """
    return sorted(_known())


def applicable() -> list[str]:
    """Names of the methods that `vtoken.apply` takes."""
    return [name for name in methods() if _known()[name].part != "training"]


def example(method: str) -> MethodConfig:
    """Typical settings of the method called `method`, for lists of methods."""
    return _known()[method].example()


def make_config(method: str, options: Mapping[str, Any]) -> MethodConfig:
    """The settings of the method called `method`; unknown methods or options raise ConfigError with a suggestion."""
    if not isinstance(method, str) or method not in _known():
        others = [name for name in methods() if name not in applicable()]
        raise ConfigError(
            f"unknown method {method!r}{hint(method, methods())}; known methods: {', '.join(applicable())}, and for "
            f"training {', '.join(others)}"
        )
    config = _known()[method]
    check_names(config.__name__, options, [f.name for f in fields(config)])
    return config(**options)


def config_from_dict(values: Mapping[str, Any]) -> MethodConfig:
    """Read what `MethodConfig.to_dict` wrote (also after a JSON round trip).

    Raises:
        ConfigError: for unknown methods, versions or keys, and values out of range.

    Example:
        >>> import vtoken
        >>> vtoken.config_from_dict(vtoken.ToMe(r=8).to_dict()) == vtoken.ToMe(r=8)
        True
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"settings are a dict as to_dict writes it, got {values!r}")
    options = dict(values)
    method: Any = options.pop("method", None)
    version = options.pop("version", None)
    if version != CONFIG_VERSION:
        raise ConfigError(f"settings have version {version!r}, this vtoken reads version {CONFIG_VERSION}")
    return make_config(method, options)


def check_names(owner: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ConfigError for the first name in `given` that is not known, with the nearest known one."""
    for name in given:
        if name not in known:
            raise ConfigError(f"{owner} has no setting {name!r}{hint(name, known)}; it has: {', '.join(known)}")
