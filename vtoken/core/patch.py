"""Entering a live model and leaving it: same-name subclasses and views (docs/mechanism.md 2)."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

#: Name of the child module that holds a learned part; the only child that patching ever adds.
PREDICTOR = "predictor"
#: Attribute of every patched module; see `parts_of`.
_PARTS = "_vtoken_parts"
#: Whether graphs can hold what is done to a module's `__dict__`: compilers before torch 2.13 look it up by name only.
_GRAPHS_KNOW_DICTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

_derived: dict[tuple[type, type], type] = {}
_stripped: dict[type, type] = {}


def derive(base: type, mixin: type) -> type:
    """The subclass of `base` that runs `mixin` first; made once, with the name and module of `base`.

    The name stays because saved configs, device maps and sharding policies match classes by name.
    """
    if (base, mixin) not in _derived:
        body: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_vtoken_base": base,
            "__reduce_ex__": _reduce,
        }
        inherited = [vars(cls).items() for cls in reversed(mixin.__mro__[:-1])]
        entries = {name: value for items in inherited for name, value in items if hasattr(base, name)}
        body |= {name: _signed(value, base) for name, value in entries.items() if _takes_anything(value)}
        # Of two threads one's class is kept. No lock: an interrupt at the wrong moment would leave it locked.
        _derived.setdefault((base, mixin), type(base.__name__, (mixin, base), body))
    return _derived[base, mixin]


def _takes_anything(value: Any) -> bool:
    parameters = inspect.signature(value).parameters.values() if inspect.isfunction(value) else ()
    return any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _signed(function: types.FunctionType, base: type) -> types.FunctionType:
    """A copy of an entry method that shows the signature of the method it stands for: export and trainers read it."""
    stock = getattr(base, function.__name__)
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    copy.__doc__ = stock.__doc__
    return copy


def patched_class(cls: type) -> type | None:
    """The class that `derive` made, among `cls` and its bases: torch's parametrizations and FSDP2 subclass it again."""
    return next((c for c in cls.__mro__ if "_vtoken_base" in c.__dict__), None)


def base_of(cls: type) -> type:
    """What `cls` would be had it never been patched: later subclasses kept, the mixin taken out."""
    if not hasattr(cls, "_vtoken_base"):  # asked several times a block: the usual answers come first
        return cls
    if "_vtoken_base" in cls.__dict__:
        base: type = cls.__dict__["_vtoken_base"]
        return base
    if cls not in _stripped:
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        _stripped[cls] = type(cls.__name__, tuple(base_of(b) for b in cls.__bases__), body)
    return _stripped[cls]


def mixin_of(cls: type) -> type:
    """The mixin that a patched class runs."""
    patched = patched_class(cls)
    if patched is None:
        raise TypeError(f"{cls.__name__} is not patched")
    return patched.__mro__[1]


def is_patched(module: nn.Module) -> bool:
    """Whether this very module (not its children) is patched."""
    return patched_class(type(module)) is not None


def view(module: nn.Module, **parts: Any) -> Any:
    """A stand-in of the unpatched class that shares everything with `module` except `parts`.

    Parameters, buffers and settings are the module's own. It lets the host's code run for one call with some attributes
    replaced, without writing to the model; see `forward_with`. It is never called itself, so hooks and compiled calls
    are those of the modules in the model. Attributes that the host's code writes to it are lost.
    """
    return view_as(base_of(type(module)), module, **parts)


def forward_with(module: nn.Module, parts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The `forward` of the module's unpatched class, run on a view of it with `parts` in place of its own."""
    cls: Any = base_of(type(module))
    return cls.forward(view(module, **parts), *args, **kwargs)


def view_as(cls: type, module: nn.Module, **parts: Any) -> Any:
    """A view of another class, one whose `forward` serves in place of the module's."""
    stand_in: Any = object.__new__(cls)
    own = stand_in.__dict__
    if torch.compiler.is_compiling() and not _GRAPHS_KNOW_DICTS:
        for name in module.__dict__["_vtoken_names"]:
            own[name] = module.__dict__[name]
        for name, part in parts.items():
            own[name] = part
        return stand_in
    own.update(module.__dict__)
    own.pop("_compiled_call_impl", None)  # it would run the module
    if "forward" in own:
        _follow_hooks(stand_in, module)
    own.update(parts)
    return stand_in


def _follow_hooks(stand_in: Any, module: Any) -> None:
    # accelerate's offloading hooks put a partial over the module into its `forward` and keep the method that they
    # found in `_old_forward`; taken off, they leave that method. All of it would run the module instead.
    # Weak, because a view must not hold itself.
    forward, old = module.__dict__["forward"], module.__dict__.get("_old_forward")
    if _is_own(forward, module, type(module)):
        del stand_in.__dict__["forward"]
    elif _is_hook(forward, module):
        weak = weakref.proxy(stand_in)
        stand_in.forward = functools.partial(forward.func, weak)
        if _is_own(old, module, type(module)):
            stand_in._old_forward = types.MethodType(type(stand_in).forward, weak)


def _is_hook(forward: Any, module: nn.Module) -> bool:
    return isinstance(forward, functools.partial) and forward.args == (module,)


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a `forward` that is neither its class's nor an accelerate hook around that."""
    forward, old = module.__dict__.get("forward"), module.__dict__.get("_old_forward")
    hooked = _is_hook(forward, module) and _is_own(old, module, type(module))
    return forward is not None and not hooked and not _is_own(forward, module, type(module))


def runs_as_known(module: nn.Module, known: Collection[type]) -> bool:
    """Whether a module, patched or not, runs the `forward` of the first of the known classes that it is."""
    kind: Any = base_of(type(module))
    cls: Any = next((c for c in kind.__mro__ if c in known), None)
    return cls is not None and kind.forward is cls.forward and not forward_is_replaced(module)


def _is_own(method: Any, module: nn.Module, cls: type) -> bool:
    """Whether `method` is the `forward` that `module` has by its class `cls`."""
    bound = isinstance(method, types.MethodType) and method.__self__ is module
    return bound and method.__func__ is cls.forward  # type: ignore[attr-defined]


def _become(module: nn.Module, cls: type) -> None:
    """Change the class of a module, and with it the bound `forward`s that accelerate keeps on the instance."""
    was = type(module)
    module.__class__ = cls
    for name in ("forward", "_old_forward"):
        if _is_own(module.__dict__.get(name), module, was):
            module.__dict__[name] = types.MethodType(cls.forward, module)  # type: ignore[attr-defined]


def wraps_patched_forward(module: nn.Module) -> bool:
    """Whether somebody put a function around the patched `forward` on the instance, which would outlive the patch."""
    forward = module.__dict__.get("forward")
    if not callable(forward) or not forward_is_replaced(module):
        return False  # the class's own and hooks around it follow the class
    patched: Any = type(module).forward
    return inspect.unwrap(forward) is patched and patched is not base_of(type(module)).forward  # type: ignore[attr-defined]


def patch(targets: Iterable[tuple[nn.Module, type, dict[str, Any]]], part: str = "tower") -> None:
    """Give every module its mixin, `_vtoken*` attributes and learned part; all of them or, if one fails, none.

    A module that is patched for another part of the model, too, gets the mixin that derives from the other's.
    """
    targets = list(targets)
    before = remembered(module for module, _, _ in targets)
    try:
        for module, mixin, attributes in targets:
            parts = {**parts_of(module), part: (mixin, tuple(attributes))}
            _serve(module, parts)
            _add(module, {**attributes, _PARTS: parts})
            if not _GRAPHS_KNOW_DICTS:
                names = [name for name in module.__dict__ if name not in ("forward", "_compiled_call_impl")]
                _add(module, {"_vtoken_names": (*names, "_vtoken_names")})
    except BaseException:
        restore(before)
        raise


def _serve(module: nn.Module, parts: dict[str, tuple[type, tuple[str, ...]]]) -> None:
    """Give a module, of the mixins of its parts, the one that derives from all others."""
    mixins = [mixin for mixin, _ in parts.values()]
    mixin = next((m for m in mixins if all(issubclass(m, other) for other in mixins)), None)
    if mixin is None:
        raise TypeError(f"{type(module).__name__} cannot be patched for {' and '.join(parts)} at once")
    if not is_patched(module) or mixin_of(type(module)) is not mixin:
        _become(module, derive(base_of(type(module)), mixin))


def parts_of(module: nn.Module) -> dict[str, tuple[type, tuple[str, ...]]]:
    """The parts (see MethodConfig.part) for which a module is patched, with the mixin and attributes of each."""
    found: dict[str, tuple[type, tuple[str, ...]]] = module.__dict__.get(_PARTS, {})
    return found


def unpatch(module: nn.Module, part: str | None = None) -> None:
    """Drop what `patch` added to one module, for one part or (None) for all, and then give it its own class back.

    Until the last step it counts as patched, so that whoever was interrupted finds it again.
    """
    parts = parts_of(module)
    left = {} if part is None else {other: names for other, names in parts.items() if other != part}
    if left:
        kept = {name for _, names in left.values() for name in names}
        for name in {name for _, names in parts.values() for name in names} - kept:
            _drop(module, name)
        module.__dict__[_PARTS] = left
        _serve(module, left)
        return
    for name in additions(module):
        _drop(module, name)
    _become(module, base_of(type(module)))


def unpatch_all(carried: Iterable[tuple[nn.Module, str]]) -> None:
    """`unpatch` every module for the part beside it; all of them or, if that is interrupted, none."""
    carried = list(carried)
    before = remembered(module for module, _ in carried)
    try:
        for module, part in carried:
            unpatch(module, part)
    except BaseException:
        restore(before)
        raise


def remembered(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """What `restore` needs to give patched modules back what they are now."""
    return [(module, type(module), additions(module)) for module in modules]


def restore(before: Iterable[tuple[nn.Module, type, dict[str, Any]]]) -> None:
    """Make modules what they were, whatever became of them since."""
    for module, cls, attributes in before:
        for name in additions(module):
            _drop(module, name)
        _become(module, cls)
        _add(module, attributes)


def _drop(module: nn.Module, name: str) -> None:
    (module._modules if name == PREDICTOR else module.__dict__).pop(name)


def _add(module: nn.Module, attributes: dict[str, Any]) -> None:
    children = {name: value for name, value in attributes.items() if isinstance(value, nn.Module)}
    module.__dict__.update({name: value for name, value in attributes.items() if name not in children})
    module._modules.update(children)  # last: `_vtoken_method`, now there, tells that the learned part is ours


def additions(module: nn.Module) -> dict[str, Any]:
    """What `patch` added to a patched module, by name."""
    found: dict[str, Any] = {name: value for name, value in module.__dict__.items() if name.startswith("_vtoken")}
    if "_vtoken_method" in found and PREDICTOR in module._modules:  # only an attention method brings a learned part
        found = {PREDICTOR: module._modules[PREDICTOR], **found}  # first: what comes last tells that it is ours
    return found


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    # The derived class cannot be found by its name (that name is the base's), so pickle rebuilds it from its parts.
    cls = type(self)
    if cls is not patched_class(cls):  # a later wrapper's class: it pickles, or refuses to, in its own way
        reduced: tuple[Any, ...] = nn.Module.__reduce_ex__(self, protocol)  # type: ignore[assignment]
        return reduced
    return _rebuild, (base_of(cls), mixin_of(cls)), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(base: type, mixin: type) -> Any:
    return object.__new__(derive(base, mixin))
