"""Token counts over the layers, one line per setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vtoken.accounting.report import Report
from vtoken.core.spec import Plan
from vtoken.core.trace import Trace
from vtoken.errors import ShapeError
from vtoken.visualize.figure import new_axes, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Counts = Plan | Report | Trace


def plot_tokens(counts: Counts | Mapping[str, Counts], path: Path | str, *, title: str = "Tokens per layer") -> Path:
    """Write a PNG of the tokens before block 0 and after every block, prefix tokens included.

    Args:
        counts: what `vtoken.plan`, `report` or `trace` gave, or several by name.
        path: of the PNG; returned.

    Raises:
        ShapeError: if there is nothing to draw.
        ImportError: if matplotlib is missing.
    """
    return save(tokens_figure(counts if isinstance(counts, Mapping) else {"tokens": counts}, title), Path(path))


def tokens_figure(counts: Mapping[str, Counts], title: str) -> Figure:
    """The figure of `plot_tokens`."""
    lines = {name: list(found.tokens) for name, found in counts.items()}
    empty = [name for name, tokens in lines.items() if not tokens]
    if empty or not lines:
        raise ShapeError(f"no token counts to draw {empty}: pass plans, reports or traces of a forward that ran")
    axes = new_axes(title)
    for place, (name, tokens) in enumerate(lines.items()):
        # Equal counts are common: what is drawn first is larger, so that it shows behind what is drawn over it.
        size = 5 + 2 * (len(lines) - 1 - place)
        label = f"{name}: {tokens[0]} to {tokens[-1]}"
        axes.plot(range(len(tokens)), tokens, marker="o", markersize=size, linewidth=1.5, label=label)
    last = max(len(tokens) for tokens in lines.values()) - 1
    axes.set_xticks(range(0, last + 1, max(1, last // 16)))
    axes.set_xlabel("blocks passed")
    axes.set_ylabel("tokens, prefix included")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure: Figure = axes.figure
    return figure
