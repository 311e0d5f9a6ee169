"""Quality against cost, one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtoken.accounting.compare import Row, read
from vtoken.errors import ConfigError
from vtoken.visualize.figure import new_axes, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_pareto(rows: Sequence[Row] | Path | str, path: Path | str, *, quality: str, title: str) -> Path:
    """Write a PNG of `quality` (mean, with its spread over images as a bar) against GMACs, one line per method.

    Args:
        rows: from `vtoken.accounting.compare.compare`, or the JSON file that `bench` or `demo` wrote; the unpatched
            model is drawn as a star.
        path: of the PNG; returned.
        quality: which figure of the rows.

    Raises:
        ConfigError: if no row has that figure, or the file is not such a JSON file.
        ImportError: if matplotlib is missing.
    """
    found = read(Path(rows)) if isinstance(rows, (str, Path)) else rows
    return save(pareto_figure(found, quality, title), Path(path))


def pareto_figure(rows: Sequence[Row], quality: str, title: str) -> Figure:
    """The figure of `plot_pareto`."""
    drawn = [row for row in rows if quality in row.quality]
    if not drawn:
        known = sorted({name for row in rows for name in row.quality})
        raise ConfigError(f"quality={quality!r}: the {len(rows)} rows have {', '.join(known) or 'no figures'}")
    axes = new_axes(title)
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
    axes.legend()
    figure: Figure = axes.figure
    return figure
