"""docs/extend: the programs are short, run as they stand, and keep their promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vtoken
from vtoken.__main__ import main
from vtoken.core import config, host

PAGES = Path(__file__).resolve().parents[2] / "docs" / "extend"


def programs(page: str) -> list[str]:
    """Code of a page, in its order."""
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_programs_are_short(page: str) -> None:
    found = programs(page)
    assert found
    most = 60 if page == "multimodal.md" else 40  # a family, and a small model to try it on
    for program in found:
        assert len([line for line in program.splitlines() if line.strip()]) <= most


def test_a_merging_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    whole, plan = programs("method.md")
    exec(compile(plan, "docs/extend/method.md", "exec"), {"__name__": "plan"})
    file = tmp_path / "my_method.py"
    file.write_text(whole)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "timm VisionTransformer, class token" in done.stdout
    assert "197 -> 178" in done.stdout
    assert "[197, 178, 161" in done.stdout
    config.methods()
    monkeypatch.setattr(config, "_registry", dict(config._registry))
    commands = re.findall(r"^python -m vtoken (plan .*)$", (PAGES / "method.md").read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        assert main(command.replace("my_method.py", str(file)).split()) == 0
        assert "    0    197        8    189" in capsys.readouterr().out


def test_a_model_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_registered", list(host._registered))
    names = {"__name__": "docs_extend_host"}
    adapter = programs("host.md")[1]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 28
    for program in programs("host.md"):
        exec(compile(program, "docs/extend/host.md", "exec"), names)


def test_a_model_of_ones_own_without_an_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_registered", list(host._registered))
    names: dict[str, Any] = {"__name__": "docs_extend_host"}
    for program in programs("host.md")[:2]:
        exec(compile(program, "docs/extend/host.md", "exec"), names)
    monkeypatch.delattr(names["MyAdapter"], "image_size")
    model = vtoken.apply(names["MyViT"]().eval(), "tome", r=4)
    assert vtoken.plan(model, img_size=64).tokens == (65, 61, 57, 53, 49)
    assert vtoken.report(model, input_size=(3, 64, 64)).tokens == (65, 61, 57, 53, 49)
    for verb in (vtoken.plan, vtoken.num_tokens, vtoken.report):
        with pytest.raises(vtoken.UnsupportedModelError, match=r"MyAdapter tells no image size.*img_size=.*input_size"):
            verb(model)
