"""The programs of docs/extend run as they stand, in as few lines as the pages promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vtoken
import vtoken.testing
from vtoken.core import config, host
from vtoken.core.method import PromptMethod

PAGES = Path(__file__).resolve().parents[2] / "docs" / "extend"


def program(name: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (PAGES / name).read_text(), re.DOTALL)
    return str(found)


@pytest.fixture
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    vtoken.methods()
    monkeypatch.setattr(config, "_registry", dict(config._registry))
    monkeypatch.setattr(host, "_registered", list(host._registered))


@pytest.mark.usefixtures("_registries")
def test_a_prompt_method() -> None:
    text = program("prompt_method.md")
    lines = [line for line in text.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 40
    scope: dict[str, Any] = {"__name__": "__main__"}  # dataclasses look their module up
    exec(compile(text, "prompt_method.md", "exec"), scope)
    pytest.importorskip("transformers")
    from tests.hosts import llavas

    model, given = llavas.build("llava"), llavas.prompt([1, 5, -36, 7]) | {"pixel_values": llavas.images(1)}
    kept = []
    for name in ("far_apart", "divprune"):
        with vtoken.applied(model, name, num_tokens=6), torch.no_grad():
            kept.append(vtoken.trace(model, **given)[1].prompt.kept[0].tolist())
    assert kept[0] == kept[1]


@pytest.mark.usefixtures("_registries")
def test_a_family() -> None:
    pytest.importorskip("transformers")
    text = program("multimodal.md")
    family = text[text.index("@vtoken.register_adapter") : text.index("def small_model")]
    assert len([line for line in family.splitlines() if line.strip()]) <= 60
    exec(compile(text, "multimodal.md", "exec"), {"__name__": "__main__"})


def test_all_methods_pass() -> None:
    for name in vtoken.methods():
        settings = config.example(name)
        if settings.part == "prompt":
            changes = {"num_tokens": 5} if hasattr(settings, "num_tokens") else {"budget": 5}
            vtoken.testing.check_prompt_method(settings.replace(**changes))
    with pytest.raises(vtoken.ConfigError, match="prompt"):
        vtoken.testing.check_prompt_method(vtoken.PiToMe(ratio=0.9))


@pytest.mark.parametrize("fault", ["count", "again", "order"])
def test_wrong_methods_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = vtoken.RandomTokens(num_tokens=5)
    kind: Any = type(made.build(0))
    stock, calls = kind.choose, []

    def choose(self: PromptMethod, seen: Any) -> Any:
        calls.append(1)
        index = stock(self, seen)
        if fault == "count":
            return index[:-1]
        if fault == "order":
            return index.flip(0)
        return (index + len(calls) % 2).clamp(max=seen.visual.content - 1).unique() if len(index) == 1 else index

    monkeypatch.setattr(kind, "choose", choose)
    with pytest.raises(vtoken.VTokenError, match=r"count said|ascending|second time"):
        vtoken.testing.check_prompt_method(made)


@pytest.mark.parametrize("kind", ["llava", "next", "qwen2_5", "qwen3", "qwen3_5", "internvl"])
def test_all_families_pass(kind: str) -> None:
    pytest.importorskip("transformers")
    from tests.hosts import llavas
    from tests.prompts import qwens, test_internvl
    from tests.prompts.frozen import make

    if kind == "internvl":
        model, given = test_internvl.build(), test_internvl.call()
    elif kind.startswith("qwen"):
        model, given = qwens.build(kind), qwens.call()
    else:
        model = llavas.build(kind)
        given = make._crops(model) if kind == "next" else make._flat(model, kind)
        given |= llavas.prompt(*given.pop("rows"), pad="left")
    vtoken.testing.check_family(model, given)
