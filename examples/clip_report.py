"""The table, the result rows and the picture of `train_clip.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def summary(
    rows: Sequence[Mapping[str, Any]], steps: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """Mean and deviation over seeds of every task, setting and budget that has a run.

    Args:
        rows: results of runs.
        steps: "time", "time_min" and "macs" of a step relative to plain CLIP's, by task and setting.
    """
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["setting"], row["budget"]), []).append(row)
    return [
        {
            "task": task, "setting": setting, "budget": budget, "steps": runs[0]["steps"],
            "relative_macs": runs[0]["relative_macs"], "seeds": len(runs),
            "accuracy_mean": statistics.mean(run["accuracy"] for run in runs),
            "accuracy_sd": statistics.stdev(run["accuracy"] for run in runs) if len(runs) > 1 else None,
            "accuracies": [run["accuracy"] for run in runs],
            **{f"step_{key}": value for key, value in steps[task][setting].items()},
        }
        for (task, setting, budget), runs in found.items()
    ]  # fmt: skip


def show(table: Sequence[Mapping[str, Any]]) -> None:
    """One line per setting: accuracy at equal steps and at equal multiply-adds (steps in brackets), cost of a step."""
    for task in dict.fromkeys(row["task"] for row in table):
        print(f"\n{task}: zero-shot accuracy, mean +- deviation over seeds (steps); a masked step's share of CLIP's")
        print(f"{'':<38}{'equal steps':>22}{'equal multiply-adds':>22}{'time':>7}{'(min)':>7}{'MACs':>7}")
        for setting in dict.fromkeys(row["setting"] for row in table if row["task"] == task):
            cells = {row["budget"]: row for row in table if (row["task"], row["setting"]) == (task, setting)}
            texts = [_cell(cells[budget]) if budget in cells else "" for budget in ("steps", "FLOPs")]
            row = next(iter(cells.values()))
            cost = f"{row['step_time']:>7.2f}{row['step_time_min']:>7.2f}{row['step_macs']:>7.2f}"
            print(f"{setting:<38}{texts[0]:>22}{texts[1]:>22}{cost}")


def _cell(row: Mapping[str, Any]) -> str:
    spread = "" if row["accuracy_sd"] is None else f" +- {row['accuracy_sd']:.3f}"
    return f"{row['accuracy_mean']:.3f}{spread} ({row['steps']})"


def plot(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against the multiply-adds of the whole training, a panel per task, a line per setting."""
    tasks = list(dict.fromkeys(row["task"] for row in table))
    colours = {setting: f"C{n}" for n, setting in enumerate(dict.fromkeys(row["setting"] for row in table))}
    figure = Figure(figsize=(5.5 * len(tasks), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        settings = list(dict.fromkeys(row["setting"] for row in table if row["task"] == task))
        for number, setting in enumerate(settings):
            line = sorted(
                (row for row in table if (row["task"], row["setting"]) == (task, setting)),
                key=lambda row: row["relative_macs"],
            )
            # At equal multiply-adds all points would lie on each other.
            x = [row["relative_macs"] + 0.008 * (number - len(settings) / 2) for row in line]
            y, spread = [row["accuracy_mean"] for row in line], [row["accuracy_sd"] or 0 for row in line]
            marker = "*" if setting == "CLIP" else "o"
            axes.errorbar(x, y, yerr=spread, marker=marker, color=colours[setting], capsize=3, label=setting)
        axes.set_title(task)
        axes.set_xlabel("multiply-adds of the training, plain CLIP = 1")
        axes.set_ylabel("zero-shot accuracy, mean and deviation over seeds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
