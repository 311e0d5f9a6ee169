"""Examples in docstrings give what they print; public functions and classes say what they do."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import vtoken

MODULES = [m.name for m in pkgutil.walk_packages(vtoken.__path__, "vtoken.") if m.name != "vtoken.__main__"]


@pytest.mark.parametrize(
    "name",
    [
        "vtoken.core.apply",
        "vtoken.accounting.report",
        "vtoken.methods.merging.base",
        "vtoken.methods.merging.threshold",
        "vtoken.nn.merging",
        "vtoken.nn.sparse",
        "vtoken.testing.method",
        "vtoken.visualize.kept",
    ],
)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_objects_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for label, value in vars(module).items():
        if label.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, f"{name}.{label}"
