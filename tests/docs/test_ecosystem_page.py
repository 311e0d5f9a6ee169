"""Every snippet of docs/ecosystem.md runs, after the lines that the page says every recipe starts with."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vtoken

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
START, *RECIPES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
TITLES = re.findall(r"^## (.+)$", PAGE.read_text(), flags=re.M)[:-1]  # the last one says what is not possible
_OPTIONAL = ("peft", "torchao", "accelerate", "onnxruntime", "onnxscript")


@pytest.fixture(autouse=True)
def _one_process_of_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()


def test_every_section_has_one_recipe() -> None:
    assert len(TITLES) == len(RECIPES) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(("title", "recipe"), list(zip(TITLES, RECIPES, strict=True)), ids=TITLES)
def test_recipe_runs(title: str, recipe: str, tmp_path: Path) -> None:
    for name in _OPTIONAL:
        if re.search(rf"^(from|import) {name}\b", recipe, flags=re.M):
            pytest.importorskip(name)
    # A file, because export reads the source of functions.
    script = tmp_path / "recipe.py"
    script.write_text(START + recipe)
    names: dict[str, object] = {"__name__": "recipe", "__file__": str(script)}
    exec(compile(script.read_text(), str(script), "exec"), names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    removed = "vtoken.remove(merged)" in recipe or "vtoken.remove(accelerator" in recipe
    assert vtoken.is_applied(model) != removed
