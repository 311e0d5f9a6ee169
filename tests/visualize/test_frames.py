"""The picture of a video's budget holds every score and count, and mosaics have one colour per token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vtoken.errors import ShapeError
from vtoken.ops import row_widths
from vtoken.visualize import plot_frames
from vtoken.visualize.frames import frames_figure, mosaic

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")


def noise(count: int, height: int = 54, width: int = 81) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def test_every_frame_has_its_bars_and_the_best_their_thumbnails() -> None:
    frames, tokens = noise(12), [0, 5, 9, 700, 2, 1, 0, 0, 30, 1, 2, 3]
    scores = [t / 700 for t in tokens]
    times = [i * 0.5 for i in range(12)]
    figure = frames_figure(frames, scores, tokens, times=times, grid=(27, 27), title="title", columns=4)
    thumbnails, (score, count) = figure.axes[:8], figure.axes[8:]
    assert [axes.get_title() for axes in thumbnails[:4]] == ["1.0 s", "1.5 s", "4.0 s", "5.5 s"]
    assert [axes.get_title() for axes in thumbnails[4:]] == ["9 tokens", "700 tokens", "30 tokens", "3 tokens"]
    assert torch.equal(torch.as_tensor(thumbnails[1].images[0].get_array()), frames[3])
    assert [bar.get_height() for bar in count.patches] == tokens
    assert [bar.get_height() for bar in score.patches] == scores
    assert [bar.get_x() + bar.get_width() / 2 for bar in count.patches] == pytest.approx(times)
    assert [i for i, bar in enumerate(count.patches) if bar.get_alpha() == 1] == [2, 3, 8, 11]
    assert figure.get_suptitle() == "title"


@pytest.mark.parametrize("tokens", [1, 7, 23, 100, 729])
def test_a_mosaic_has_one_cell_per_token(tokens: int) -> None:
    ramp = torch.arange(270) * 255 // 269  # red grows downwards, green to the right: every cell has its own colour
    picture = torch.stack([ramp[:, None].expand(270, 270), ramp.expand(270, 270), torch.zeros(270, 270)], -1)
    picture = picture.to(torch.uint8)
    painted = mosaic(picture, tokens, (27, 27))
    assert painted.shape == picture.shape
    assert len(painted.flatten(0, 1).unique(dim=0)) == tokens
    widths = row_widths(tokens, 27, 27)
    for r, width in enumerate(widths):
        line = painted[(2 * r + 1) * 270 // (2 * len(widths))]
        assert len(line.unique_consecutive(dim=0)) == width


def test_a_mosaic_shows_the_mean_colours() -> None:
    picture = torch.zeros(54, 54, 3, dtype=torch.uint8)
    picture[:, 27:] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    painted = mosaic(picture, 4, (2, 2))
    assert torch.equal(painted, picture)
    assert mosaic(picture, 1, (2, 2))[0, 0].tolist() == [100, 50, 25]
    empty = mosaic(picture, 0, (2, 2))
    assert set(empty.unique().tolist()) == {200, 240}


def test_file_and_errors(tmp_path: Path) -> None:
    path = plot_frames(noise(3).numpy(), torch.tensor([0.5, 0.0, 1.0]), [10, 0, 3], tmp_path / "a" / "b.png")
    assert image.open(path).size[0] == 1320
    assert image.open(plot_frames(noise(1), [0.5], [3], tmp_path / "one.png")).size[0] == 1320
    with pytest.raises(ShapeError, match="3 frames, 2 scores, 3 token counts"):
        plot_frames(noise(3), [0.1, 0.2], [1, 2, 3], tmp_path / "never.png")
    with pytest.raises(ShapeError, match="uint8"):
        plot_frames(noise(3).float(), [0.1] * 3, [1, 2, 3], tmp_path / "never.png")
    with pytest.raises(ShapeError, match="a frame has 900 tokens, its grid 27 x 27"):
        plot_frames(noise(1), [0.1], [900], tmp_path / "never.png")
    with pytest.raises(ShapeError, match="0 frames"):
        plot_frames(noise(0), [], [], tmp_path / "never.png")
