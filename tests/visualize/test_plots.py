"""Plots are checked by what they hold: every point, label and tick, and no global matplotlib state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm

import vtoken
from vtoken.accounting.compare import Quality, Row, read, write
from vtoken.visualize import plot_pareto, plot_tokens
from vtoken.visualize.pareto import pareto_figure
from vtoken.visualize.tokens import tokens_figure

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")


def row(name: str, gmacs: float, value: float, spread: float = 0.1) -> Row:
    method = {} if name == "unpatched" else {"method": name}
    return Row(name, method, 5, gmacs, 1.0, 1.0, 1.0, 1.0, None, 1.0, {"q": Quality(value, spread)})


ROWS = [row("unpatched", 4.0, 1.0, 0.0), row("pitome", 3.0, 0.9), row("pitome", 2.0, 0.8), row("tome", 2.0, 0.7)]


def test_tokens_are_one_line_per_setting() -> None:
    model = timm.create_model("test_vit")
    plan, report = vtoken.plan(model, vtoken.ToMe(r=8)), vtoken.report(model, vtoken.PiToMe(ratio=0.9))
    [axes] = tokens_figure({"a": plan, "b": report}, "title").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [list(plan.tokens), list(report.tokens)]
    assert list(axes.lines[0].get_xdata()) == list(range(len(plan.tokens)))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"a: 101 to {plan.tokens[-1]}", f"b: 101 to {report.tokens[-1]}"]
    assert axes.lines[0].get_markersize() > axes.lines[1].get_markersize(), "visible behind an equal line"
    assert axes.get_title() == "title"
    assert axes.get_ylim()[0] == 0
    assert list(axes.get_xticks()) == list(range(len(plan.tokens)))


def test_tokens_of_a_single_trace_and_of_nothing(tmp_path: Path) -> None:
    trace = vtoken.Trace(num_forwards=1, tokens=[5, 4, 2])
    path = plot_tokens(trace, str(tmp_path / "a" / "tokens.png"))
    assert path == tmp_path / "a" / "tokens.png"
    assert image.open(path).size == (1050, 675)
    for nothing in (vtoken.Trace(), {}):
        with pytest.raises(vtoken.ShapeError, match="no token counts"):
            plot_tokens(nothing, tmp_path / "never.png")


def test_pareto_has_every_row_with_its_spread() -> None:
    [axes] = pareto_figure(ROWS, "q", "title").axes
    drawn = {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    assert set(drawn) == {"unpatched", "pitome", "tome"}
    assert drawn["unpatched"].get_marker() == "*"
    assert drawn["unpatched"].get_xydata().tolist() == [[4.0, 1.0]]
    points, _, [bars] = drawn["pitome"]
    assert points.get_xydata().tolist() == [[2.0, 0.8], [3.0, 0.9]], "ordered by cost"
    assert [part.tolist() for part in bars.get_segments()] == [
        [[2.0, pytest.approx(0.7)], [2.0, pytest.approx(0.9)]],
        [[3.0, pytest.approx(0.8)], [3.0, pytest.approx(1.0)]],
    ]
    assert drawn["tome"][0].get_xydata().tolist() == [[2.0, 0.7]]
    assert (axes.get_ylabel(), axes.get_title()) == ("q", "title")
    assert axes.get_xlabel().startswith("GMACs")


def test_pareto_of_a_results_file_is_that_of_its_rows(tmp_path: Path) -> None:
    results, _ = write(ROWS, tmp_path, "results", {"command": "bench"})
    assert read(results) == ROWS
    first = plot_pareto(ROWS, tmp_path / "rows.png", quality="q", title="t")
    second = plot_pareto(results, tmp_path / "b" / "file.png", quality="q", title="t")
    assert image.open(first).tobytes() == image.open(second).tobytes()
    assert len(image.open(first).convert("RGB").getcolors(1 << 20)) > 20


def test_pareto_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(vtoken.ConfigError, match="quality='Q': the 4 rows have q"):
        plot_pareto(ROWS, tmp_path / "x.png", quality="Q", title="t")
    with pytest.raises(vtoken.ConfigError, match="no such file"):
        plot_pareto(tmp_path / "none.json", tmp_path / "x.png", quality="q", title="t")
    for text in ("{", "[]", '{"rows": [1]}', '{"rows": [{"quality": {}}], "schema": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(vtoken.ConfigError, match="is not a result"):
            plot_pareto(tmp_path / "bad.json", tmp_path / "x.png", quality="q", title="t")
    (tmp_path / "old.json").write_text('{"rows": [], "schema": 0}')
    with pytest.raises(vtoken.ConfigError, match="schema 0"):
        plot_pareto(str(tmp_path / "old.json"), tmp_path / "x.png", quality="q", title="t")
    assert not (tmp_path / "x.png").exists()


def test_pyplot_and_its_global_state_stay_out(tmp_path: Path) -> None:
    code = f"""
import sys, vtoken
vtoken.visualize.plot_tokens(vtoken.Plan((3, 2), 1), {str(tmp_path / "x.png")!r})
print("matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
