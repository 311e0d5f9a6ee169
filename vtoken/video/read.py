"""Frames of a video file by number, through PyAV (quota.md section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SEEK_GAP = 60  # frames; decoding so many is about as dear as a seek and the frames from its key frame on


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its first video stream: frames, frames per second, coded size in pixels."""

    frames: int
    fps: float
    width: int
    height: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps


def video_info(path: Path | str) -> VideoInfo:
    """Frame count, frame rate and size of a video file; packets are counted where it does not tell the frame count.

    Raises:
        InputError: if it is no readable video. ImportError: if PyAV is missing.
    """
    with _opened(path) as (container, stream):
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return VideoInfo(frames, float(stream.average_rate), stream.codec_context.width, stream.codec_context.height)


def read_frames(path: Path | str, indices: Sequence[int], *, max_side: int | None = None) -> NDArray[np.uint8]:
    """Frames of a video file, one per requested number, in the order of the request.

    A frame's number is its presentation time, counted from the first frame, times the average frame rate, rounded.
    Where no frame has a number (variable frame rate), the one that is on screen then is taken. Gaps are decoded, or
    jumped to the last key frame before the next request. Frames that the file says to show turned are turned.

    Args:
        path: of the file.
        indices: frame numbers from 0, in any order, with repetitions if wanted.
        max_side: scale frames down to at most so many pixels on the longer side; None keeps their size.

    Returns:
        RGB, uint8 [n, h, w, 3].

    Raises:
        InputError: if the file is no readable video or has no such frame. ImportError: if PyAV is missing.
    """
    import numpy as np

    wanted = sorted({int(index) for index in indices})
    if wanted and wanted[0] < 0:
        raise InputError(f"frame {wanted[0]} asked for; frames are numbered from 0")
    with _opened(path) as (container, stream):
        size = _fitted(stream.codec_context.width, stream.codec_context.height, max_side)
        reader, found = _Reader(container, stream, path), {}
        for index in wanted:
            frame = reader.frame_at(index)
            pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
            found[index] = np.rot90(pixels, round(frame.rotation / 90))  # telephones film sideways
    if not found:
        return np.zeros((0, size[1], size[0], 3), dtype=np.uint8)
    return np.stack([found[int(index)] for index in indices])


class _Reader:
    """A position in a stream that moves forward, by decoding or by seeking."""

    def __init__(self, container: Any, stream: Any, path: Path | str) -> None:
        self.container, self.stream, self.path = container, stream, path
        self.rate = stream.average_rate
        self.frames = container.decode(stream)
        self.shown = self.ahead = next(self.frames, None)  # the last frame that was passed, and the one after it
        self.timed = self.shown is not None and self.shown.pts is not None
        # Not the stream's own start: in AVI, frames that are shown in another order than stored begin after it.
        self.start = self.shown.pts if self.shown is not None and self.timed else 0
        self.count = 0  # of frames decoded before `ahead`, which numbers them where they have no time

    def frame_at(self, index: int) -> Any:
        """The frame with this number, or the last before it."""
        if self.timed and self.ahead is not None and index - self._number(self.ahead) > _SEEK_GAP:
            self._seek(index)
        while self.ahead is not None and self._number(self.ahead) <= index:
            self.shown, self.ahead = self.ahead, next(self.frames, None)
            self.count += 1
        if self.shown is None or (self.ahead is None and index > self._last(self.shown)):
            last = "has no frame at all" if self.shown is None else f"ends with frame {self._last(self.shown)}"
            raise InputError(f"frame {index} asked for, but {self.path} {last}")
        return self.shown

    def _number(self, frame: Any) -> int:
        if not self.timed or frame.pts is None:
            return self.count
        return round((frame.pts - self.start) * self.stream.time_base * self.rate)

    def _last(self, frame: Any) -> int:
        """The last number that the last frame stands for: as long as it is shown, and what the file's header counts
        (headers are off by a frame or two), but at most a second."""
        held = round((frame.duration or 0) * self.stream.time_base * self.rate) if self.timed else 1
        number = self._number(frame) if self.timed else self.count - 1
        return max(number, number + held - 1, min(self.stream.frames - 1, number + math.ceil(self.rate)))

    def _seek(self, index: int) -> None:
        """Go to a key frame at or before `index`; some files' seeking goes too far, so earlier places are tried too."""
        for back in (0, 100, 1000, index):
            place = max(0, index - back)
            self.container.seek(self.start + round(place / self.rate / self.stream.time_base), stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.shown = self.ahead = next(self.frames, None)
            if self.ahead is not None and self.ahead.pts is not None and self._number(self.ahead) <= index:
                return
        raise InputError(f"{self.path}: cannot go to frame {index}; re-encode the file, or cut it")


def _fitted(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(width, height) <= max_side:
        return width, height
    if max_side < 1:
        raise InputError(f"max_side={max_side} must be at least 1 pixel")
    factor = max_side / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; PyAV's errors inside become InputErrors."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading videos needs PyAV; install "vtoken[video]"') from error
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream")
            stream = container.streams.video[0]
            if not stream.average_rate:
                raise InputError(f"{path} does not tell its frame rate")
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video: {error}") from error
