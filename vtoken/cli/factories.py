"""The functions by which libraries hand out models, watched for the length of a `with` block.

A library is touched when it is imported, not before, so that a program may set its environment first. Afterwards all is
as it was: whoever kept the watched function has one that only calls the library's own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

#: Module, class in it ("" for none), function or class method, and what it is called in messages.
FACTORIES = (
    ("timm.models._factory", "", "create_model", "timm.create_model"),
    ("open_clip.factory", "", "create_model", "open_clip.create_model"),
    ("transformers.modeling_utils", "PreTrainedModel", "from_pretrained", "from_pretrained"),
)
#: What is told of a model: who made it, the first argument, the model. What it returns goes to the caller.
Told = Callable[[str, Any, Any], Any]


@contextlib.contextmanager
def watched(told: Told) -> Iterator[None]:
    """Hand every model that a program gets from a factory to `told` first.

    A factory that calls another one (open_clip takes timm models for its towers) hands out one model, its own.
    """
    hooks = _Hooks(told)
    sys.meta_path.insert(0, hooks)
    try:
        for module, *_ in FACTORIES:
            if module in sys.modules:
                hooks.install(sys.modules[module])
        yield
    finally:
        sys.meta_path.remove(hooks)
        hooks.uninstall()


class _Hooks(importlib.abc.MetaPathFinder):
    """Watches the factories of modules, those that are there and those that are imported from now on."""

    def __init__(self, told: Told) -> None:
        self.told = told
        self.inside: ContextVar[bool] = ContextVar("inside", default=False)
        self.active = True
        #: What was put where, and what was there: module, watched function, own; class, name, own method.
        self.functions: list[tuple[str, Any, Any]] = []
        self.methods: list[tuple[type, str, Any]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that would be found without this finder, whose loader tells when the module is there."""
        if all(name != module for module, *_ in FACTORIES):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def install(self, module: ModuleType) -> None:
        """Put watched functions in place of those of one module, wherever the library has them by name."""
        for name, owner, function, shown in FACTORIES:
            if name == module.__name__ and owner:
                cls = getattr(module, owner)
                method = vars(cls)[function]
                setattr(cls, function, classmethod(self._watching(method.__func__, shown, bound=True)))
                self.methods.append((cls, function, method))
            elif name == module.__name__:
                own = getattr(module, function)
                watching = self._watching(own, shown, bound=False)
                self.functions.append((name, watching, own))
                _exchange(name, own, watching)

    def uninstall(self) -> None:
        """Give the libraries their own functions back."""
        self.active = False
        for cls, function, method in self.methods:
            setattr(cls, function, method)
        for name, watching, own in self.functions:
            _exchange(name, watching, own)

    def _watching(self, own: Any, shown: str, *, bound: bool) -> Any:
        @functools.wraps(own)
        def factory(*args: Any, **kwargs: Any) -> Any:
            if self.inside.get() or not self.active:
                return own(*args, **kwargs)
            token = self.inside.set(True)
            try:
                made = own(*args, **kwargs)
            finally:
                self.inside.reset(token)
            source = next(iter([*args[bound:], *kwargs.values()]), None)
            if isinstance(made, tuple):  # with what was found out while loading
                return self.told(shown, source, made[0]), *made[1:]
            return self.told(shown, source, made)

        return factory


class _Loader(importlib.abc.Loader):
    """The loader of a module, which then has its factories watched."""

    def __init__(self, own: Any, hooks: _Hooks) -> None:
        self.own, self.hooks = own, hooks

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        made: ModuleType | None = self.own.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which keeps its own loader, and watch what it has."""
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        if self.hooks.active:
            self.hooks.install(module)


def _exchange(name: str, old: Any, new: Any) -> None:
    """In all modules of the library of module `name`, put one function in the place of another."""
    library = name.partition(".")[0]
    for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == library]:
        for attribute, value in list(vars(module).items()):
            if value is old:
                setattr(module, attribute, new)
