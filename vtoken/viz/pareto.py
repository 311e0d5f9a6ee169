"""Quality against cost, one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vtoken.accounting.compare import Row


def plot_pareto(rows: Sequence[Row], path: Path, *, quality: str, title: str) -> Path:
    """Write a PNG of `quality` (mean, with its spread over images as a bar) against GMACs, one line per method.

    Args:
        rows: from `vtoken.accounting.compare.compare`; the unpatched model is drawn as a star.
        quality: which figure of the rows.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib; install "vtoken[viz]"') from error
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = [row for row in rows if quality in row.quality]
    for name in dict.fromkeys(row.method.get("method") for row in drawn):
        line = sorted((row for row in drawn if row.method.get("method") == name), key=lambda row: row.gmacs)
        x = [row.gmacs for row in line]
        y, spread = [row.quality[quality].mean for row in line], [row.quality[quality].spread for row in line]
        if name is None:
            axes.plot(x, y, "k*", markersize=12, label="unpatched")
        else:
            axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, linewidth=1.5, elinewidth=0.8, label=name)
    axes.set_xlabel("GMACs per image (matching included)")
    axes.set_ylabel(quality)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
