"""`--load file.py`: what it registers is found by name in every command, and what is wrong is said in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtoken.__main__ import main
from vtoken.core import config, host

METHOD = """
from __future__ import annotations

import dataclasses
import helper_of_mine
import vtoken


@vtoken.register_method
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(vtoken.ScheduledMergeConfig):
    method = "mine"
    shift: int = 0

    def match(self, layer, depth, metric, r, num_prefix, protect):
        return vtoken.ops.plan_tome(metric, r, num_prefix=num_prefix)


@vtoken.register_method
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(vtoken.MergeConfig):
    method = "fixed"

    def amounts(self, depth):
        return (helper_of_mine.COUNT,) * depth

    def removed(self, amount, mergeable):
        return min(amount, mergeable // 2)

    match = Mine.match
"""
ADAPTER = """
import timm, vtoken
from timm.models.vision_transformer import VisionTransformer
from timm.models import register_model
from vtoken.hosts.timm.adapter import TimmAdapter

@vtoken.register_adapter
class Adapter(TimmAdapter):
    name = "mine"
"""


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    config.methods()
    monkeypatch.setattr(config, "_registry", dict(config._registry))
    monkeypatch.setattr(host, "_registered", list(host._registered))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("vtoken_loaded_") or name == "helper_of_mine":
            del sys.modules[name]


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "helper_of_mine.py").write_text("COUNT = 5\n")
    file = tmp_path / "my_method.py"
    file.write_text(METHOD)
    return str(file)


def test_every_command_that_takes_a_method_finds_it(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "test_vit", "mine", "r=8", "--json"]) == 2
    assert "unknown method 'mine'" in capsys.readouterr().err
    assert main(["plan", "--load", mine, "test_vit", "mine", "r=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][:3] == [101, 93, 85]
    assert main(["report", "test_vit", "fixed", "--load", mine, "--json"]) == 0  # once more, by the same process
    assert json.loads(capsys.readouterr().out)["tokens"][:2] == [101, 96]
    assert main(["methods", "--json", "--load", mine]) == 0
    assert {"mine", "fixed", "pitome"} <= set(json.loads(capsys.readouterr().out))
    for package in ("matplotlib", "PIL"):
        pytest.importorskip(package)
    out = tmp_path / "out"
    command = ["bench", "--load", mine, "--model", "test_vit", "--method", "mine", "fixed", "threshold_merge"]
    assert main([*command, "--ratio", "0.9", "0.8", "--batch", "1", "--rounds", "1", "--out", str(out)]) == 0
    rows = [row["name"] for row in json.loads((out / "test_vit.json").read_text())["rows"]]
    amounts = [f"{name} ratio={ratio}" for name in ("mine", "threshold_merge") for ratio in (0.9, 0.8)]
    assert rows == ["unpatched", *amounts[:2], "fixed", *amounts[2:]]
    picture = tmp_path / "picture.png"
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    overlay = ["overlay", str(tmp_path / "image.png"), "test_vit", "mine", "r=3", "--load", mine, "--out", str(picture)]
    assert main(overlay) == 0
    assert picture.is_file()


def test_an_adapter_counts_as_something_registered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "adapter.py"
    file.write_text(ADAPTER)
    assert main(["plan", "test_vit", "tome", "r=8", "--load", str(file)]) == 0
    assert [adapter.name for adapter in host.registered()][-1] == "mine"
    assert main(["models", "test_vit", "--load", str(file)]) == 0
    assert capsys.readouterr().out.endswith("test_vit\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "registers nothing: call vtoken.register_method or vtoken.register_adapter in it"),
        ("x = 1\nimport vtoken\n", "registers nothing"),
        ("def broken(:\n", "wrong.py, line 1: SyntaxError: invalid syntax"),
        ("x = 1\n\n  y = 2\n", "wrong.py, line 3: IndentationError: unexpected indent"),
        ("import math\n\n\ndef f():\n    return no_such_name\n\n\nf()\n", "line 5: NameError: name 'no_such_name'"),
        ("import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        (METHOD.replace("import helper_of_mine", "").replace('"mine"', '"tome"'), ": ConfigError: Mine.method"),
        ("raise ValueError('several\\nlines')\n", "line 1: ValueError: several lines"),
    ],
    ids=range(9),
)
def test_a_wrong_file_is_told_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    file = tmp_path / "wrong.py"
    file.write_text(text)
    for _ in range(2):  # and again, as it was not kept
        assert main(["plan", "test_vit", "mine", "--load", str(file)]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.strip().splitlines())) == ("", 1)
        assert err.startswith(f"ConfigError: --load {file}")
        assert said in err


@pytest.mark.parametrize("name", ["nowhere.py", ".", "text.txt"])
def test_what_is_no_python_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("words")
    assert main(["methods", "--load", str(tmp_path / name)]) == 2
    assert ("no such file" if name != "text.txt" else "ends in .py") in capsys.readouterr().err


def test_two_files_of_one_name(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other" / "my_method.py"
    other.parent.mkdir()
    other.write_text(METHOD.replace('"mine"', '"mine_too"').replace('"fixed"', '"fixed_too"'))
    assert main(["methods", "--json", "--load", mine, "--load", str(other)]) == 0
    assert {"mine", "mine_too"} <= set(json.loads(capsys.readouterr().out))


def test_in_a_process_of_its_own(mine: str) -> None:
    command = [sys.executable, "-m", "vtoken", "plan", "test_vit", "fixed", "--load", mine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "   101        5     96" in done.stdout
