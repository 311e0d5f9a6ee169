"""Examples in docstrings give what they print; public functions and classes say what they do and show it."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import vtoken

ROOT = Path(__file__).resolve().parents[2]
#: Files that only vLLM imports; they need it.
PLUGIN = "vtoken.serving.vllm."
MODULES = [
    m.name
    for m in pkgutil.walk_packages(vtoken.__path__, "vtoken.")
    if m.name != "vtoken.__main__" and (not m.name.startswith(PLUGIN) or importlib.util.find_spec("vllm") is not None)
]
#: Public, but handed to users, who neither make nor call them; or what users inherit from.
GIVEN = {
    "Assigned", "Choice", "Connections", "Decoupler", "HostAdapter", "HostSpec", "MethodConfig", "Plan", "PromptReport",
    "QuotaReport", "Report", "ScheduledMergeConfig", "Scorer", "TeacherOutput", "Trace", "Tuned", "VideoInfo",
    "register_adapter", "register_method",
}  # fmt: skip
#: Their example needs more than a few lines: run from a page or a test of its own.
ELSEWHERE = {
    "LVLMScorer": "tests/video/test_scorers.py", "text_generator": "tests/video/test_scorers.py",
    "QuotaVideoModel": "tests/quota/test_page.py", "budget": "tests/methods/test_vtc_cls.py",
    "encode_images": "tests/prompts/test_serving.py",
}  # fmt: skip


def public() -> dict[str, Any]:
    """Every function and class that users get by name."""
    found: dict[str, Any] = {}
    for place in (vtoken, vtoken.ops, vtoken.nn, vtoken.serving, vtoken.train, vtoken.video):
        found |= {name: getattr(place, name) for name in place.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)}


def shown() -> list[str]:
    """Modules of vtoken whose docstrings hold examples."""
    return [name for name in MODULES if ">>>" in inspect.getsource(importlib.import_module(name))]


@pytest.mark.parametrize("name", shown())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, verbose=False)
    attempted, failed, runner = result.attempted, result.failed, doctest.DocTestRunner(verbose=False)
    for value in vars(module).values():  # doctest takes what a decorator wraps for another module's
        if inspect.isfunction(value) and value.__module__ == name and hasattr(value, "__wrapped__"):
            for test in doctest.DocTestFinder().find(inspect.unwrap(value), value.__name__, module):
                found = runner.run(test)
                attempted, failed = attempted + found.attempted, failed + found.failed
    assert attempted > 0
    assert failed == 0


def test_everything_public_has_an_example() -> None:
    called = {
        n: value for n, value in public().items() if not (inspect.isclass(value) and issubclass(value, Exception))
    }
    assert len(called) > 80
    without = {name for name, value in called.items() if ">>>" not in (value.__doc__ or "")}
    assert without == GIVEN | set(ELSEWHERE)
    for name, path in ELSEWHERE.items():
        assert name in (ROOT / path).read_text(), name


@pytest.mark.parametrize("name", MODULES)
def test_public_objects_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for label, value in vars(module).items():
        if label.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, f"{name}.{label}"
