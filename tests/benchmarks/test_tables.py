"""The figures of the pages that benchmarks/tables.py names are those of the files under benchmarks/results."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.fixture
def copy(tmp_path: Path, tables: Any) -> Path:
    """The pages and all result files, to be changed."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for page in tables.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def texts(tables: Any, root: Path) -> list[str]:
    return [(root / page).read_text() for page in tables.PAGES]


def test_pages_say_what_the_result_files_say(tables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr()


def test_no_line_starts_with_a_figure(tables: Any) -> None:
    """Markdown would end the paragraph there."""
    for text in texts(tables, ROOT):
        assert "\n<!-- figure" not in text


def test_rewriting_what_is_right_changes_nothing(tables: Any, copy: Path) -> None:
    before = texts(tables, copy)
    assert tables.main([], copy) == 0
    assert texts(tables, copy) == before


@pytest.mark.parametrize(
    ("page", "right", "wrong"),
    [
        ("docs/results.md", "| learned masks | 85.3 |", "| learned masks | 85.4 |"),
        ("docs/results.md", "<!-- figure: grouped-1025 -->2.4<!--", "<!-- figure: grouped-1025 -->2.5<!--"),
        ("README.md", "<!-- figure: pitome-speed -->1.78<!--", "<!-- figure: pitome-speed -->1.85<!--"),
        ("README.md", "<!-- figure: prefill-64 -->0.190<!--", "<!-- figure: prefill-64 -->0.019<!--"),
        ("benchmarks/README.md", "| 2305 | 10% | 3.67 (9.9)", "| 2305 | 10% | 3.76 (9.9)"),
    ],
)
def test_a_changed_figure_of_a_page_is_found_and_mended(
    tables: Any, copy: Path, capsys: pytest.CaptureFixture[str], page: str, right: str, wrong: str
) -> None:
    path = copy / page
    good = path.read_text()
    assert good.count(right) == 1
    path.write_text(good.replace(right, wrong))
    assert tables.main(["--check"], copy) == 1
    printed = capsys.readouterr().out
    assert any(line.startswith("-") and wrong in line for line in printed.splitlines())
    assert any(line.startswith("+") and right in line for line in printed.splitlines())
    assert wrong in path.read_text()
    assert tables.main([], copy) == 0
    assert path.read_text() == good


def test_a_changed_figure_of_a_file_is_found(tables: Any, copy: Path) -> None:
    path = copy / "benchmarks" / "results" / "training.json"
    result = json.loads(path.read_text())
    result["rows"][1]["time_ratio"] += 0.1
    path.write_text(json.dumps(result))
    assert tables.main(["--check"], copy) == 1
    assert tables.main([], copy) == 0
    assert tables.main(["--check"], copy) == 0


@pytest.mark.parametrize("options", [["--check"], []])
def test_unknown_names_missing_and_unused_files_are_found(
    tables: Any, copy: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    results, page = copy / "benchmarks" / "results", copy / "README.md"
    good = page.read_text()

    (results / "stray.json").write_text("{}")
    assert tables.main(options, copy) == 1
    told = capsys.readouterr().err
    assert "stray.json is used on no page" in told
    assert "stray.json does not say its command, date, threads, torch" in told
    (results / "stray.json").unlink()

    page.write_text(good + "<!-- table: none -->\n<!-- end -->\n")
    assert tables.main(options, copy) == 1
    assert "no such table" in capsys.readouterr().err

    page.write_text(good.replace("<!-- end -->", "", 1))
    assert tables.main(["--check"], copy) == 1
    assert "not closed" in capsys.readouterr().err
    page.write_text(good)

    (results / "training.json").unlink()
    assert tables.main(options, copy) == 1
    assert "training.json does not exist" in capsys.readouterr().err


def test_answers_are_marked_where_they_differ_from_a_uniform_grid(tables: Any) -> None:
    def row(
        name: str, budget: int, tokens: int, right: float, gap: float | None, positions: str = "compact"
    ) -> dict[str, Any]:  # fmt: skip
        found: dict[str, Any] = {"right": right}
        if gap is not None:
            found["over_uniform"] = {"mean": gap, "half": 0.02}
        costs = {"prefill_gmacs": tokens / 100, "call_gmacs": tokens / 50, "time_ratio": tokens / 196}
        return {
            "name": name,
            "budget": budget,
            "tokens": tokens,
            "positions": positions,
            "kinds": {"digit": found},
            "guess": {"digit": 0.1},
            **costs,
        }

    rows = [
        row("whole image", 196, 196, 0.9, None), row("uniform grid", 49, 49, 0.5, None),
        row("VTC-CLS", 49, 49, 0.4, -0.1), row("DivPrune", 49, 49, 0.6, 0.1), row("random", 49, 49, 0.51, 0.01),
        row("lower resolution", 49, 64, 0.3, -0.2), row("VTC-CLS", 22, 22, 0.2, 0.0),
        row("VTC-CLS", 49, 49, 0.45, 0.01, "original"),
    ]  # fmt: skip
    lines = tables.answers(49)({"rows": rows}).strip().split("\n")
    cells = {line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")[1:]] for line in lines}
    assert "| 10.0 |" in next(line for line in lines if "most frequent" in line)
    assert cells["whole image"] == ["196", "90.0", "1.00", "1.00, 1.00"]
    assert cells["uniform grid"][1] == "50.0"
    assert cells["VTC-CLS"] == ["49", "40.0 -", "0.25", "0.25, 0.25"]
    assert cells["DivPrune"][1] == "60.0 +"
    assert cells["random"][1] == "51.0"
    assert cells["lower resolution"][:2] == ["64", "30.0 -"]
    assert cells["VTC-CLS, places kept"][1] == "45.0"
    assert len(lines) == 2 + 1 + 7
