"""Frames of a video by number, through PyAV (docs/methods/quota.md 3)."""

from __future__ import annotations

import io
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vtoken.errors import InputError
from vtoken.video.timeline import Timeline, packets, timeline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Video = Path | str | bytes | bytearray | memoryview | BinaryIO

_SEEK_GAP = 60  # frames; decoding so many is about as dear as a seek and the frames from its key frame on
_BACK = (0, 2, 10, 60)  # seconds before the place; some files' seeking goes too far


@dataclass(frozen=True)
class VideoInfo:
    """The first video stream as a player shows it: frames, frames per second, coded size in pixels.

    `fps` is frames / seconds, over all of the time that they are shown, the last one too; at an uneven pace it is the
    mean.
    """

    frames: int
    fps: float
    width: int
    height: int

    @property
    def duration(self) -> float:
        """Seconds, from the first frame to the end of the last."""
        return self.frames / self.fps


def video_info(path: Video) -> VideoInfo:
    """Frame count, frame rate and size of a video.

    Frames that the file says not to show (edit lists) are not counted. The container's index is believed where it lists
    every frame at an even pace; else the packets are read through, without decoding them. Where the clock starts again
    or jumps (joined pieces), the pieces follow one another.

    Args:
        path: of the file; or its content, as bytes or as a binary file object that can seek.

    Raises:
        InputError: if it is no readable video. ImportError: if PyAV is missing.

    Example:
        >>> import av, io, numpy, vtoken
        >>> file = io.BytesIO()
        >>> with av.open(file, "w", format="mp4") as container:
        ...     stream = container.add_stream("mpeg4", rate=10)
        ...     stream.width, stream.height = 64, 48
        ...     for value in (0, 60, 120, 180):
        ...         frame = av.VideoFrame.from_ndarray(numpy.full((48, 64, 3), value, numpy.uint8))
        ...         container.mux(stream.encode(frame))
        ...     container.mux(stream.encode())
        >>> vtoken.video.video_info(file)
        VideoInfo(frames=4, fps=10.0, width=64, height=48)
    """
    with _opened(path, "SLICE") as (container, stream, name):
        line = timeline(container, stream, name)
        return VideoInfo(line.frames, float(line.rate), stream.codec_context.width, stream.codec_context.height)


def read_frames(path: Video, indices: Sequence[int], *, max_side: int | None = None) -> NDArray[np.uint8]:
    """Frames of a video, one per requested number, in the order of the request.

    A frame's number is its presentation time, counted from the first frame, times `video_info(path).fps`, rounded.
    Where no frame has a number (uneven pace, damaged packets), the one that is on screen then is taken. Gaps are
    decoded, or jumped to the last key frame before the next request; one frame is held at a time. Frames that the file
    says to show turned or mirrored are. Packets that cannot be decoded are passed over with one warning.

    Args:
        path: of the file; or its content, as bytes or as a binary file object that can seek.
        indices: frame numbers from 0, in any order, with repetitions if wanted.
        max_side: scale frames down to at most so many pixels on the longer side; None keeps their size.

    Returns:
        RGB, uint8 [n, h, w, 3].

    Raises:
        InputError: if it is no readable video or has no such frame. ImportError: if PyAV is missing.

    Example:
        >>> import av, io, numpy, vtoken
        >>> file = io.BytesIO()
        >>> with av.open(file, "w", format="mp4") as container:
        ...     stream = container.add_stream("mpeg4", rate=10)
        ...     stream.width, stream.height = 64, 48
        ...     for value in (0, 60, 120, 180):
        ...         frame = av.VideoFrame.from_ndarray(numpy.full((48, 64, 3), value, numpy.uint8))
        ...         container.mux(stream.encode(frame))
        ...     container.mux(stream.encode())
        >>> vtoken.video.read_frames(file, [0, 3]).shape
        (2, 48, 64, 3)
    """
    import numpy as np

    if max_side is not None and (isinstance(max_side, bool) or not isinstance(max_side, Integral) or max_side < 1):
        raise InputError(f"max_side={max_side!r} must be a whole number of pixels, at least 1")
    try:
        requested = list(indices)
    except TypeError:
        raise InputError(f"frames {indices!r} asked for; pass a list of frame numbers") from None
    places: dict[int, list[int]] = {}
    for place, index in enumerate(requested):
        places.setdefault(_whole(index), []).append(place)
    wanted = sorted(places)
    if wanted and wanted[0] < 0:
        raise InputError(f"frame {wanted[0]} asked for; frames are numbered from 0")
    with _opened(path, "SLICE") as (container, stream, name):
        line = timeline(container, stream, name)
        size = _fitted(stream.codec_context.width, stream.codec_context.height, max_side)
    if not wanted:
        return np.zeros((0, size[1], size[0], 3), dtype=np.uint8)
    if wanted[-1] >= line.frames:
        raise InputError(f"frame {wanted[-1]} asked for, but {name} ends with frame {line.frames - 1}")
    found: Any = None
    taken: Any = None
    pixels: Any = None
    with _Reader(path, line) as reader:
        for index in wanted:
            frame = reader.frame_at(index)
            if frame is not taken:
                taken, pixels = frame, _upright(frame, frame.to_ndarray(format="rgb24", width=size[0], height=size[1]))
            if found is None:
                found = np.empty((sum(map(len, places.values())), *pixels.shape), dtype=np.uint8)
            elif pixels.shape != found.shape[1:]:
                raise InputError(f"{name}: frame {index} is turned otherwise than those before; read the parts apart")
            found[places[index]] = pixels
    if reader.damage:
        more = f" and {len(reader.damage) - 1} more" if len(reader.damage) > 1 else ""
        warnings.warn(
            f"{name} is damaged: {reader.damage[0]}{more}; the last frame that can be decoded is taken there",
            stacklevel=2,
        )
    return found  # type: ignore[no-any-return]


def _whole(index: object) -> int:
    try:
        if isinstance(index, bool):  # a mask is no list of numbers
            raise TypeError
        return operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"frame {index!r} asked for; frame numbers are whole numbers") from None


class _Reader:
    """A position in a video that moves forward, by decoding or by seeking."""

    def __init__(self, path: Video, line: Timeline) -> None:
        import av

        self.path, self.line = path, line
        self.damage: list[str] = []
        self.shown: tuple[int, Any] | None = None  # the last frame that was passed, by its number
        self.ahead: tuple[int, Any] | None = None  # and the one after it
        self.decoded: Iterator[tuple[int, Any]] = iter(())
        self.open = ExitStack()
        self.seeks = line.start is not None and not line.joined
        # Threads that decode ahead take Python's lock when they log to Python, and whoever waits for them may hold it.
        self.threads = "AUTO" if av.logging.get_level() is None else "SLICE"

    def __enter__(self) -> _Reader:
        self._begin()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.open.__exit__(*error)

    def frame_at(self, index: int) -> Any:
        """The frame with this number, or the last before it, or the first that can be had."""
        if self.seeks and self.ahead is not None and index - self.ahead[0] > _SEEK_GAP:
            self._seek(index)
        try:
            self._pass_to(index)
        except _Ahead:
            self._again(self.shown[0] if self.shown else index)
            self._pass_to(index)
        if self.shown is None:
            raise InputError(f"{self.name}: not one frame can be decoded" + "".join(f"; {d}" for d in self.damage[:1]))
        return self.shown[1]

    def _pass_to(self, index: int) -> None:
        while self.ahead is not None and (self.shown is None or self.ahead[0] <= index):
            self.shown, self.ahead = self.ahead, next(self.decoded, None)

    def _again(self, index: int) -> None:
        """Come to the frame with this number once more, with no thread ahead."""
        self.threads = "SLICE"
        self._begin()
        if self.seeks and self.ahead is not None and index - self.ahead[0] > _SEEK_GAP:
            self._seek(index)

    def _begin(self) -> None:
        """Go to the start of the file."""
        self.open.close()
        self.damage.clear()
        self.container, self.stream, self.name = self.open.enter_context(_opened(self.path, self.threads))
        self.stream.codec_context.copy_opaque = self.line.joined
        self.shown = None
        self.decoded = self._decode(wait=False)
        try:
            self.ahead = next(self.decoded, None)
        except _Ahead:
            self._again(0)

    def _seek(self, index: int) -> None:
        """Go to a key frame at or before `index`; to the start of the file if its seeking cannot be relied on."""
        import av

        for back in _BACK:
            place = max(self.line.clock(0), self.line.clock(index) - round(back / self.line.tick))
            try:
                self.container.seek(place, stream=self.stream)
            except av.FFmpegError:
                break
            self.decoded = self._decode(wait=True)
            try:
                self.shown, self.ahead = None, next(self.decoded, None)
            except _Ahead:
                return self._again(index)
            if self.ahead is not None and self.ahead[0] <= index:
                return
        self.seeks = False
        self._begin()

    def _decode(self, *, wait: bool) -> Iterator[tuple[int, Any]]:
        """Frames and their numbers from here on, or from the next key frame on."""
        self.count, self.last, first = 0, 0, None
        for stored, packet in enumerate(packets(self.container, self.stream, self.damage)):
            if wait and first is None:
                if not packet.is_keyframe:
                    continue
                first = packet.pts
            if self.line.joined:
                packet.opaque = self.line.times[stored]
            for frame in self._pictures(packet):
                if first is None or frame.pts is None or frame.pts >= first:  # earlier ones need what was not decoded
                    yield self._number(frame), frame
        for frame in self._pictures(None):
            yield self._number(frame), frame

    def _pictures(self, packet: Any) -> list[Any]:
        import av

        try:
            return self.stream.codec_context.decode(packet)  # type: ignore[no-any-return]
        except av.FFmpegError as error:
            if self.threads != "SLICE":
                raise _Ahead from error
            number = self.last
            if packet is not None and packet.pts is not None and self.seeks:
                number = self.line.number(packet.pts - (self.line.start or 0))
            seconds = float(number / self.line.rate)
            self.damage.append(f"at {seconds:.2f} s, frame {number}, a packet cannot be decoded ({error.strerror})")
            return []

    def _number(self, frame: Any) -> int:
        if self.line.start is None:
            self.last, self.count = self.count, self.count + 1
        elif self.line.joined and frame.opaque is not None:
            self.last = self.line.number(frame.opaque)
        elif not self.line.joined and frame.pts is not None:
            self.last = self.line.number(frame.pts - self.line.start)
        return self.last


class _Ahead(Exception):
    """Damage met by threads that decode ahead: which packet it was, and the frames before it, are lost."""


def _upright(frame: Any, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turned and mirrored as the file says; telephones film sideways."""
    import numpy as np

    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].astype(np.int64)  # [x, y] -> [a x + c y, b x + d y]
    if abs(a) < abs(b):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _fitted(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(width, height) <= max_side:
        return width, height
    factor = max_side / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))


@contextmanager
def _opened(video: Video, threads: str) -> Iterator[tuple[Any, Any, str]]:
    """The container, its first video stream and a name for messages; PyAV's errors inside become InputErrors."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading videos needs PyAV; install "vtoken[video]"') from error
    file, name = _source(video)
    try:
        with av.open(file, metadata_errors="replace") as container:
            stream = _stream(container, name)
            stream.thread_type = threads
            yield container, stream, name
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{name} cannot be read as a video: {error}") from error


def _stream(container: Any, name: str) -> Any:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise InputError(f"{name} has no video stream" + (", only a cover" if container.streams.video else ""))
    if streams[0].codec_context is None:
        raise InputError(f"{name}: this PyAV has no decoder for its video stream; re-encode it, to H.264 for instance")
    return streams[0]


def _source(video: Video) -> tuple[Any, str]:
    """What PyAV opens, and a name for messages."""
    if isinstance(video, bytes | bytearray | memoryview):
        return io.BytesIO(video), "the video in memory"
    if isinstance(video, str | Path):
        if not Path(video).exists():
            raise InputError(f"{video}: no such file")
        return str(video), str(video)
    if not hasattr(video, "read"):
        raise InputError(f"a video is a path, bytes or a binary file object, got {type(video).__name__}")
    name = str(getattr(video, "name", "the video in memory"))
    if not (hasattr(video, "seekable") and video.seekable()) or not isinstance(video.read(0), bytes):
        raise InputError(f"{name}: a file object must be binary and able to seek; give what it reads, as bytes")
    video.seek(0)
    return video, name
