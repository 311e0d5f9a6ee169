"""A matplotlib figure without its global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(size: tuple[float, float] = (7, 4.5), dpi: int = 150) -> Figure:
    """A figure of so many inches, drawn by Agg.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib; install "vtoken[viz]"') from error
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(title: str) -> Any:
    """Axes of a new figure; `axes.figure` is the figure."""
    axes = new_figure().add_subplot()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Write the figure, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
