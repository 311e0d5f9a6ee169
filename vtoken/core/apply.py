"""The public verbs: apply, remove, applied, is_applied, config_of, configure, plan."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from vtoken.core.carried import SavesSettings, config_tuple, is_saved_with_config, unapplied
from vtoken.core.compiled import CompiledBlocks
from vtoken.core.config import MethodConfig, make_config
from vtoken.core.host import Host, host_of, refuse_compiled
from vtoken.core.method import AttentionMethod, BlockMethod, Method, Methods
from vtoken.core.patch import (
    PREDICTOR,
    is_patched,
    parts_of,
    patch,
    remembered,
    restore,
    unpatch,
    unpatch_all,
    wraps_patched_forward,
)
from vtoken.core.wrapper import Wrapper, wrappers_in
from vtoken.errors import AlreadyAppliedError, ConfigError, VTokenError, VTokenWarning

Config = MethodConfig | str | Sequence[MethodConfig]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Applied:
    """What a patched model carries.

    Args:
        configs: the settings.
        methods: built from them, by kind.
        depth: for how many blocks; some may have been deleted since.
        compiled: the graphs of its blocks, after `vtoken.compile`.
    """

    configs: tuple[MethodConfig, ...]
    methods: Methods
    depth: int
    compiled: CompiledBlocks | None = None


def apply(model: M, config: Config, *, replace: bool = False, **options: Any) -> M:
    """Make a model carry fewer tokens, in place.

    The model stays the same object with the same class name, parameters and state-dict keys. `remove` undoes it.

    Args:
        model: a supported model (see `vtoken.supported`), not compiled or wrapped.
        config: settings such as `vtoken.PiToMe(ratio=0.9)`; or a method's name, with its settings as `options`; or a
            list of settings whose methods act in different places. Methods that act in different parts of a model
            (merging in the tower, pruning of the prompt) may also be applied one after the other, in any order.
        replace: replace what is applied in the same part instead of raising.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if tokens cannot be taken from it, with the reason.
        ConfigError: if the settings do not fit it.
        AlreadyAppliedError: if that part of it carries a method and `replace` is false. In every case the model is
            left as it was.

    Example:
        >>> import timm, vtoken
        >>> model = timm.create_model("test_vit")
        >>> vtoken.apply(model, vtoken.PiToMe(ratio=0.9)) is model
        True
    """
    configs = resolve(config, options)
    parts = [(host_of(model, part), group) for part, group in _by_part(configs).items()]
    refuse_compiled(model)
    built = [build_methods(host, group) for host, group in parts]
    carriers = [(m, part) for m, part in patched_parts(model) if part in _by_part(configs)]
    if carriers and not replace:
        names = ", ".join(c.method for c in config_tuple(model) if c.part in _by_part(configs))
        raise AlreadyAppliedError(
            f"{type(model).__name__} already carries {names or 'a method on a submodule'}; "
            "call vtoken.remove(model) first, use vtoken.configure to change settings, or pass replace=True"
        )
    with unchanged_on_error(model):
        for module, part in carriers:
            unpatch(module, part)
        for (host, group), methods in zip(parts, built, strict=True):
            enter(host, group, methods)
    return model


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever was patched or unpatched in the model inside the block is undone if the block raises."""
    previous = remembered(patched_modules(model))
    try:
        yield
    except BaseException:
        for module in patched_modules(model):
            unpatch(module)
        restore(previous)
        raise


def enter(host: Host, configs: tuple[MethodConfig, ...], methods: Methods) -> None:
    """Patch one part of a model that carries nothing there, with methods that were built for it."""
    targets = host.targets(methods)
    targets[0][2]["_vtoken"] = Applied(configs, methods, host.spec.depth)
    if is_saved_with_config(host.model) and all(module is not host.model for module, _, _ in targets):
        targets.append((host.model, SavesSettings, {}))  # a holder, which is saved with what its tower carries
    patch(targets, host.adapter.part)


def remove(model: M, method: str | None = None) -> M:
    """Give back exactly the model that came in: its classes restored, everything that was added deleted.

    Works on a model or on any module that holds patched ones. A wrapper such as `vtoken.AttentiveMaskCLIP` is not
    removed; its `unwrap()` gives the model.

    Args:
        method: name of the method to remove, such as "vtc_cls", if several are applied; None removes all.

    Raises:
        VTokenError: if nothing (of that name) is applied, or a wrapper around the patched forward would be left behind.

    Example:
        >>> import timm, torch, vtoken
        >>> model = timm.create_model("test_vit").eval()
        >>> vtoken.remove(vtoken.apply(model, "tome", r=8)) is model, vtoken.is_applied(model)
        (True, False)
    """
    carriers = patched_parts(model) if method is None else _carriers_of(model, method)
    if not carriers:
        raise VTokenError(
            f"nothing to remove: no method is applied to this {type(model).__name__}{_unwrap_hint(model)}"
        )
    _leave(carriers)
    return model


@contextlib.contextmanager
def applied(model: M, config: Config, **options: Any) -> Iterator[M]:
    """`apply` for the length of a `with` block; always undone, also on an error.

    Example:
        >>> import timm, torch, vtoken
        >>> model = timm.create_model("test_vit").eval()
        >>> with vtoken.applied(model, "tome", r=8):
        ...     tokens = vtoken.num_tokens(model)
        >>> tokens < vtoken.num_tokens(model)
        True
    """
    if "replace" in options:
        raise ConfigError("applied() cannot replace what is applied; vtoken.remove it first, or use vtoken.configure")
    configs = resolve(config, options)
    apply(model, configs)
    try:
        yield model
    finally:
        _leave([(m, part) for m, part in patched_parts(model) if part in _by_part(configs)])


def is_applied(model: nn.Module) -> bool:
    """Whether `apply` put a method into the model, or into a module inside it, so that `remove` has something to do.

    Wrappers such as `vtoken.AttentiveMaskCLIP` have settings (`config_of`), but patch nothing.

    Settings that a config only names do not count, and are warned of: see `vtoken.restore`.

    Example:
        >>> import timm, vtoken
        >>> vtoken.is_applied(vtoken.apply(timm.create_model("test_vit"), "tome", r=8))
        True
    """
    warn_of_unapplied(model)
    return bool(patched_parts(model))


def config_of(model: nn.Module) -> MethodConfig | tuple[MethodConfig, ...] | None:
    """The settings that the model carries: None, one, or a tuple if several methods are applied.

    Those of a wrapper such as `vtoken.AttentiveMaskCLIP` count, too, and come first.

    Example:
        >>> import timm, vtoken
        >>> vtoken.config_of(vtoken.apply(timm.create_model("test_vit"), "tome", r=8)).r
        8
    """
    warn_of_unapplied(model)
    configs = (*(wrapper._settings for wrapper in wrappers_in(model)), *config_tuple(model))
    return configs if len(configs) > 1 else configs[0] if configs else None


def configure(model: M, **changes: Any) -> M:
    """Change settings of the applied method without patching again; for sweeps.

    If several methods are applied, the one that has all the named settings is meant. The method is built anew from its
    settings: what a method of your own had kept on itself is lost. Wrappers such as `vtoken.AttentiveMaskCLIP` change
    theirs between steps.

    Raises:
        VTokenError: if nothing is applied, or it cannot be told which method is meant.
        ConfigError: if a value is wrong, or a setting used up when a wrapper was built; the old settings stay.

    Example:
        >>> import timm, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit"), "tome", r=8)
        >>> vtoken.config_of(vtoken.configure(model, r=4)).r
        4
    """
    held: list[tuple[Wrapper | None, MethodConfig]] = [(w, w._settings) for w in wrappers_in(model)]
    held += [(None, config) for config in config_tuple(model)]
    meant = [(w, c) for w, c in held if len(held) == 1 or all(hasattr(c, name) for name in changes)]
    if len(meant) != 1:
        raise VTokenError(f"configure needs exactly one applied method, found {len(held)}; use vtoken.apply")
    ((wrapper, old),) = meant
    if wrapper is not None:
        wrapper._change(changes)
        return model
    owner = next(m for m in model.modules() if "_vtoken" in m.__dict__ and old in m.__dict__["_vtoken"].configs)
    new = tuple(c.replace(**changes) if c is old else c for c in owner.__dict__["_vtoken"].configs)
    host = host_of(owner, old.part)
    applied = Applied(new, build_methods(host, new), host.spec.depth, owner.__dict__["_vtoken"].compiled)
    carriers = [m for m in owner.modules() if "_vtoken_method" in m.__dict__]
    attention: AttentionMethod | None = applied.methods.get(AttentionMethod)
    if attention is not None:
        layers = {int(m.__dict__["_vtoken_index"]) for m in carriers}
        if any(attention.acts_on(layer) != (layer in layers) for layer in range(host.spec.depth)):
            raise ConfigError("configure cannot add or take away layers with a learned part; use replace=True in apply")
        for carrier in carriers:
            attention.fits(int(carrier.__dict__["_vtoken_index"]), carrier.get_submodule(PREDICTOR))
        for carrier in carriers:
            attention.tune(carrier.get_submodule(PREDICTOR))
            carrier.__dict__["_vtoken_method"] = attention
    owner.__dict__["_vtoken"] = applied
    return model


def resolve(config: Config, options: dict[str, Any]) -> tuple[MethodConfig, ...]:
    """Whatever `apply` accepts as one tuple of settings of methods in a model."""
    if options and not isinstance(config, str):
        raise ConfigError(f"options {sorted(options)} go with a method's name, not with a settings object")
    if isinstance(config, str):
        configs: tuple[MethodConfig, ...] = (make_config(config, options),)
    else:
        several = isinstance(config, Sequence)
        configs = (config,) if isinstance(config, MethodConfig) else tuple(config) if several else ()
    if not configs or not all(isinstance(c, MethodConfig) for c in configs):
        raise ConfigError(
            f"expected settings such as vtoken.PiToMe(ratio=0.9), a method name or a list, got {config!r}"
        )
    for each in configs:
        if each.part == "training":
            each.build(0)  # raises, and says what to do instead
    return configs


def given_or_carried(model: nn.Module, config: Config | None, options: dict[str, Any]) -> tuple[MethodConfig, ...]:
    """The given settings, or else those of what is applied to the model.

    Raises:
        ConfigError: if they are of no method in a model, but of a wrapper around one.
    """
    if config is not None:
        return resolve(config, options)
    configs = config_tuple(model)
    around = [wrapper._settings for wrapper in wrappers_in(model)]
    return resolve(around, {}) if around and not configs else configs


def build_methods(host: Host, configs: tuple[MethodConfig, ...], depth: int | None = None) -> Methods:
    """The methods by their kind, checked against the model; nothing is changed.

    Args:
        depth: blocks that they are for; None means those that there are.
    """
    spec, adapter = host.spec, host.adapter
    built: dict[type[Method], Method] = {}
    made = [(config, method) for config in configs for method in _made(config.build(depth or spec.depth))]
    for config, method in made:
        kind = method.kind()
        if kind in built:
            names = ", ".join(c.method for c in configs)
            raise ConfigError(f"two methods act at one place, as {kind.__name__}: {names}; apply one of them")
        if kind not in adapter.serves:
            known = ", ".join(each.__name__ for each in adapter.serves)
            raise ConfigError(
                f"{config.method} does not work on {spec.name}: its kind is {kind.__name__}, and vtoken serves only "
                f"{known} in {adapter.name}"
            )
        if isinstance(method, BlockMethod) and method.metric == "cls" and not spec.class_token:
            raise ConfigError(f"{config.method} ranks tokens by the class token's attention, {spec.name} has none")
        if isinstance(method, BlockMethod) and spec.fixed_size:
            method.check_patches(spec.grid[0] * spec.grid[1])
        built[kind] = method
    adapter.check(host.model, built)
    return built


def _made(methods: Method | tuple[Method, ...]) -> tuple[Method, ...]:
    return methods if isinstance(methods, tuple) else (methods,)


def warn_of_unapplied(model: nn.Module) -> None:
    """A VTokenWarning at the caller of a verb if the model's config names settings that are not applied."""
    told = unapplied(model)
    if told:
        warnings.warn(told, VTokenWarning, stacklevel=3)


def carrier_of(model: nn.Module, configs: tuple[MethodConfig, ...]) -> Applied | None:
    """What was applied with these settings to the model or inside it."""
    found: Iterator[Applied] = (m.__dict__["_vtoken"] for m in model.modules() if "_vtoken" in m.__dict__)
    return next((carried for carried in found if carried.configs == configs), None)


def _by_part(configs: tuple[MethodConfig, ...]) -> dict[str, tuple[MethodConfig, ...]]:
    return {part: tuple(c for c in configs if c.part == part) for part in dict.fromkeys(c.part for c in configs)}


def _leave(carriers: list[tuple[nn.Module, str]]) -> None:
    if any(wraps_patched_forward(module) for module, _ in carriers):
        raise VTokenError(
            "cannot remove: a wrapper on the instance holds the patched forward (accelerate's mixed precision does); "
            "take it off first: accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    unpatch_all(carriers)


def patched_parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The patched modules, each with a part that it serves.

    What serves the prompts of a model around `model` does not count: its tower may be watched from there. Nor does a
    holder whose tower is patched no more.
    """
    owned = {c.part for c in config_tuple(model)}
    found = [(m, part, mixin) for m in patched_modules(model) for part, (mixin, _) in parts_of(m).items()]
    return [(m, part) for m, part, mixin in found if part in owned or (part == "tower" and mixin is not SavesSettings)]


def _carriers_of(model: nn.Module, method: str) -> list[tuple[nn.Module, str]]:
    """The patched modules that serve one method, which must be alone in its part of the model."""
    parts = {c.part for c in config_tuple(model) if c.method == method}
    others = [c.method for c in config_tuple(model) if c.part in parts and c.method != method]
    if others:
        raise VTokenError(f"{method} and {', '.join(others)} are patched together; remove both: vtoken.remove(model)")
    if not parts:
        names = ", ".join(c.method for c in config_tuple(model)) or "no method"
        raise VTokenError(
            f"nothing to remove: {type(model).__name__} carries {names}, not {method}{_unwrap_hint(model)}"
        )
    return [(m, part) for m, part in patched_parts(model) if part in parts]


def _unwrap_hint(model: nn.Module) -> str:
    """What to do instead of removing a wrapper, if there is one; for messages."""
    names = [type(wrapper).__name__ for wrapper in wrappers_in(model)]
    return f"; {names[0]} patches nothing, its unwrap() gives the model" if names else ""


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """Every patched module in the model, itself included."""
    return [m for m in model.modules() if is_patched(m)]
