"""Pictures of what a method did; needs matplotlib and pillow (`pip install "vtoken[viz]"`)."""

from vtoken.viz.groups import draw_groups
from vtoken.viz.pareto import plot_pareto

__all__ = ["draw_groups", "plot_pareto"]
