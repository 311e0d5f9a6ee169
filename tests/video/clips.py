"""Clips with the frame's number drawn into every frame as a bar code, made with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

BITS, CELL = 12, 16
WIDTH, HEIGHT = BITS * CELL, 64


def coded(number: int) -> Any:
    """The picture [64, 192, 3] of a number: 12 black or white columns above, a moving grey ramp below."""
    columns = [255 * (number >> bit & 1) for bit in range(BITS)]
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture[: HEIGHT // 2] = np.repeat(np.array(columns, dtype=np.uint8), CELL)[None, :, None]
    picture[HEIGHT // 2 :] = ((np.arange(WIDTH) + 3 * number) % 200)[None, :, None]
    return picture


def number_of(picture: Any) -> int:
    """The number that a decoded frame shows."""
    height, width = picture.shape[:2]
    line = picture[: height // 2].mean(axis=(0, 2)).reshape(BITS, width // BITS).mean(axis=1)
    return sum(1 << bit for bit in range(BITS) if line[bit] > 127)


def write_clip(
    path: Path,
    frames: int = 100,
    *,
    codec: str = "mpeg4",
    fps: int | Fraction = 25,
    pictures: Sequence[Any] | None = None,
    times: Sequence[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip of `frames` numbered frames (or of `pictures`), at `times` in 1 / fps seconds if given."""
    import av

    shown = [coded(i) for i in range(frames)] if pictures is None else pictures
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        stream.options = options or {}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1) / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
