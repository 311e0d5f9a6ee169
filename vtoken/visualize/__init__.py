"""Pictures of what a method did; needs pillow, plots also matplotlib (`pip install "vtoken[viz]"`).

`draw_*` return a pillow image, `plot_*` write a PNG. Images are tensors [3, H, W] as they were before normalisation.
"""

from vtoken.visualize.frames import plot_frames
from vtoken.visualize.groups import draw_groups
from vtoken.visualize.kept import draw_kept
from vtoken.visualize.pareto import plot_pareto
from vtoken.visualize.pixels import draw_heat, draw_image, side_by_side
from vtoken.visualize.tokens import plot_tokens

__all__ = [
    "draw_groups",
    "draw_heat",
    "draw_image",
    "draw_kept",
    "plot_frames",
    "plot_pareto",
    "plot_tokens",
    "side_by_side",
]
