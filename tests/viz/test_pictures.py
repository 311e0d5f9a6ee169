"""Pictures are checked by their pixels: group means where groups are, borders where they meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vtoken
from vtoken.accounting.compare import Quality, Row
from vtoken.core.trace import Trace
from vtoken.viz import draw_groups, plot_pareto

pytest.importorskip("PIL")


def made_trace(groups: list[list[int]]) -> Trace:
    cells = torch.tensor(groups)
    dest = torch.cat([torch.zeros(1, dtype=torch.int64), cells.flatten() + 1])[None]
    return Trace(num_forwards=1, num_prefix=1, tokens=[5, 3], dest=dest, layer_dest=[dest], grid=tuple(cells.shape))


def test_groups_have_their_mean_colour_and_a_border() -> None:
    image = torch.zeros(3, 8, 8)
    image[0, :, :4] = 1.0  # left half red
    image[2, :4, 4:] = 0.6  # upper right quarter blue
    pixels = np.asarray(draw_groups(image, made_trace([[0, 1], [0, 1]])))
    assert tuple(pixels[1, 1]) == (255, 0, 0)
    assert abs(int(pixels[1, 6][2]) - 255 * 0.3) <= 1, "mean of blue 0.6 and black"
    assert tuple(pixels[6, 6]) == tuple(pixels[1, 6]), "one group, one colour"
    assert tuple(pixels[1, 3]) == (255, 255, 255), "border between the columns"
    assert tuple(pixels[3, 1]) == (255, 0, 0), "no border inside a group"


def test_scale_and_layer_and_errors() -> None:
    trace = made_trace([[0, 1], [2, 1]])
    assert draw_groups(torch.rand(3, 8, 8), trace, scale=3, layer=0).size == (24, 24)
    with pytest.raises(vtoken.ShapeError, match="one image"):
        draw_groups(torch.rand(1, 3, 8, 8), trace)
    with pytest.raises(vtoken.ShapeError, match="no group map"):
        draw_groups(torch.rand(3, 8, 8), Trace())


def test_pareto_plot_is_a_picture(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")

    def row(name: str, gmacs: float, value: float) -> Row:
        method = {} if name == "unpatched" else {"method": name}
        return Row(name, method, 5, gmacs, 1.0, 1.0, 1.0, 1.0, None, 1.0, {"q": Quality(value, 0.1)})

    rows = [row("unpatched", 4.0, 1.0), row("pitome", 2.0, 0.8), row("pitome", 3.0, 0.9), row("tome", 2.0, 0.7)]
    path = plot_pareto(rows, tmp_path / "a" / "plot.png", quality="q", title="t")
    pixels = np.asarray(image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 20
