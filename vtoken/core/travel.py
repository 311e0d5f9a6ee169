"""The verbs by which settings travel with a checkpoint: save_settings, load_settings, restore."""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vtoken.core.apply import apply, unchanged_on_error
from vtoken.core.carried import ENTRY, VERSION, entry_of, forget, learned, outermost, settings_of, unapplied
from vtoken.core.config import MethodConfig, check_names, config_from_dict
from vtoken.core.host import refuse_wrappers
from vtoken.core.wrapper import Wrapper
from vtoken.errors import ConfigError, VTokenError, VTokenWarning

M = TypeVar("M", bound=nn.Module)
#: Where settings are to be applied, by name of the module, and what.
Places = dict[str, list[MethodConfig]]
FILE = f"{ENTRY}.json"


def save_settings(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write what is applied to a model, or to modules inside it, to `vtoken.json` in a folder.

    Transformers models need this only where a module inside them was patched by itself: their `save_pretrained` writes
    the same into `config.json`. Weights are not written; learned parts come with the state dict.

    Args:
        model: a patched model, or one around it (peft's wrapper counts as the model that it adapts).
        folder: is made if it is not there; the file is replaced in one step.

    Returns:
        The path of the file.

    Raises:
        VTokenError: if nothing is applied, or the model is compiled or distributed.
        ConfigError: if the settings of a method of your own are no JSON, or the folder is a file.

    Example:
        >>> import tempfile, timm, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit"), "tome", r=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = vtoken.save_settings(model, folder)
        ...     again = vtoken.load_settings(timm.create_model("test_vit"), folder)
        >>> path.name, vtoken.config_of(again) == vtoken.config_of(model)
        ('vtoken.json', True)
    """
    model = _adapted(model)
    settings = settings_of(model)
    if settings is None:
        told = unapplied(model)
        raise VTokenError(f"no method is applied to this {type(model).__name__}" + (told and f"; {told}"))
    try:
        text = json.dumps(settings, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the settings of this {type(model).__name__} cannot be written as JSON: {error}") from error
    path = Path(folder) / FILE
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"{folder} is a file; vtoken.save_settings writes {FILE} into a folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    _replace(path, text)
    return path


def load_settings(model: M, source: str | os.PathLike[str] | Mapping[str, Any], *, replace: bool = False) -> M:
    """Apply saved settings to a model, in place.

    A method's learned parts (Sparsifiner's predictors) are new afterwards: load the state dict then, not before.

    Args:
        model: a model as it was when they were saved; one of another size serves, if they fit it.
        source: a folder with `vtoken.json` or with a `config.json` that has the entry; or the dict that is in them.
        replace: as in `vtoken.apply`.

    Returns:
        The same model.

    Raises:
        ConfigError: if there are no settings, they are damaged or of another version, a method is not known, or they
            do not fit the model.
        UnsupportedModelError, AlreadyAppliedError: as `vtoken.apply`. In every case the model is left as it was.

    Warns:
        VTokenWarning: if there are learned parts whose weights must be loaded now.

    Example:
        >>> import timm, vtoken
        >>> tome = {"version": 1, "places": [{"at": "", "methods": [vtoken.ToMe(r=8).to_dict()]}]}
        >>> vtoken.config_of(vtoken.load_settings(timm.create_model("test_vit"), tome)).r
        8
    """
    inner = _adapted(model)
    values, where = (source, "the settings") if isinstance(source, Mapping) else _found(Path(source))
    _apply(inner, _read(values, where), where, replace)
    return model


def restore(model: M, *, replace: bool = False) -> M:
    """Apply the settings that the config of a transformers model names, in place.

    `save_pretrained` of a patched model writes them and `from_pretrained` keeps them, but applies nothing. Then they
    leave the config, since the model carries them: after `vtoken.remove` it is saved without.

    Args:
        model: as `from_pretrained` gave it.
        replace: as in `vtoken.apply`.

    Returns:
        The same model.

    Raises:
        VTokenError: if no config in the model names settings.
        ConfigError, UnsupportedModelError, AlreadyAppliedError: as `vtoken.load_settings`. In every case the model is
            left as it was.

    Warns:
        VTokenWarning: if there are learned parts whose weights must be loaded now.

    Example:
        >>> import tempfile, vtoken
        >>> from transformers import ViTConfig, ViTModel
        >>> sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
        >>> model = vtoken.apply(ViTModel(ViTConfig(**sizes)), "tome", r=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = ViTModel.from_pretrained(folder)
        >>> vtoken.config_of(vtoken.restore(again)).r
        2
    """
    inner = _adapted(model)
    places: Places = {}
    for name, module in outermost(inner, lambda m: entry_of(m) is not None):
        where = f"the config of {name or type(inner).__name__}"
        for at, configs in _read(entry_of(module), where).items():
            places[".".join(filter(None, (name, at)))] = configs
    if not places:
        raise VTokenError(
            f"nothing to restore: no config in this {type(inner).__name__} names settings of vtoken; "
            f"vtoken.load_settings reads {FILE} of a folder"
        )
    _apply(inner, places, "its config", replace)
    forget(inner)
    return model


def _adapted(model: Any) -> nn.Module:
    """The model that a wrapper of peft adapts; distributed and compiled ones are refused."""
    refuse_wrappers(model)
    base = getattr(model, "get_base_model", None)
    found: nn.Module = base() if callable(base) else model
    return found


def _apply(model: nn.Module, places: Places, where: str, replace: bool) -> None:
    modules: dict[str, Any] = {}
    for at in places:
        try:
            modules[at] = model.get_submodule(at)
        except AttributeError as error:
            raise ConfigError(f"{where}: settings are for {at!r}, which this {type(model).__name__} lacks") from error
    held = {at: configs for at, configs in places.items() if isinstance(modules[at], Wrapper)}
    for at, configs in places.items():
        own = [modules[at]._settings] if at in held else []
        if any(c.part == "training" for c in configs) and configs != own:
            raise ConfigError(
                f"{where}: {configs[0].method} is not applied but built: make the wrapper with these settings "
                "(vtoken.config_from_dict reads them), then load the rest"
            )
        if own and [type(c) for c in configs] != [type(c) for c in own]:
            raise ConfigError(f"{where}: the {type(modules[at]).__name__} there does not take {configs[0].method}")
    with unchanged_on_error(model):
        for at, configs in places.items():
            if at not in held:
                apply(modules[at], configs, replace=replace)
        for at, configs in held.items():
            modules[at]._adopt(configs[0])
    new = [".".join(filter(None, (at, name))) for at in places for name in learned(modules[at])]
    if new:
        warnings.warn(
            f"{len(new)} learned parts are new, {new[0]} first: load the state dict now, after the settings",
            VTokenWarning,
            stacklevel=3,
        )


def _read(values: Any, where: str) -> Places:
    """Settings by the name of the module that they are for, checked as far as they can be without a model."""
    try:
        return _places(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _places(values: Any) -> Places:
    if not isinstance(values, Mapping):
        raise ConfigError(f'expected {{"version": {VERSION}, "places": [...]}}, got {values!r:.80}')
    version = values.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise ConfigError(f"settings have version {version!r}, this vtoken reads version {VERSION}")
    check_names("a file of settings", values, ("version", "places"))
    given, found = values.get("places"), Places()
    if not isinstance(given, list) or not given:
        raise ConfigError(f'"places" is a list of what is applied where, got {given!r:.80}')
    for place in given:
        if not isinstance(place, Mapping):
            raise ConfigError(f'a place is {{"at": module, "methods": [...]}}, got {place!r:.80}')
        check_names("a place", place, ("at", "methods", "learned"))
        at, methods, parts = place.get("at"), place.get("methods"), place.get("learned", [])
        if not isinstance(at, str) or at in found:
            raise ConfigError(f'"at" names a module, "" the model itself, each once; got {at!r:.80}')
        if not isinstance(methods, list) or not methods:
            raise ConfigError(f'"methods" is a list of settings, got {methods!r:.80}')
        if not isinstance(parts, list) or not all(isinstance(name, str) for name in parts):
            raise ConfigError(f'"learned" is a list of names of modules, got {parts!r:.80}')
        found[at] = [config_from_dict(each) for each in methods]
    return found


def _found(folder: Path) -> tuple[Any, str]:
    """The settings in a folder, and the file that has them."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; vtoken.load_settings reads {FILE} or config.json in it")
    files = {file: _json(folder / file) for file in (FILE, "config.json") if (folder / file).is_file()}
    if isinstance(files.get("config.json"), dict):
        files["config.json"] = files["config.json"].get(ENTRY)
    told = {file: values for file, values in files.items() if values is not None}
    if not told:
        raise ConfigError(f"{folder} has no {FILE}, and no config.json with an entry {ENTRY!r}")
    if len(told) == 2 and told[FILE] != told["config.json"]:
        raise ConfigError(f"{folder}: {FILE} and the entry of config.json differ; take one of them away")
    file = next(iter(told))
    return told[file], str(folder / file)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with new.open("x", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
