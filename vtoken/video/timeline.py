"""When the frames of a video stream are on screen, told from its packets and not from what the header promises."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, pairwise
from operator import itemgetter
from typing import Any

from vtoken.errors import InputError

_HEAD = 64  # packets that hold the first frame on screen, however the frames are reordered
_JUMP = 10  # seconds; FFmpeg's player, too, shows no picture for longer in a format whose clock may jump
_BACK = 1  # seconds; a longer step back of the decoding times is a clock that starts again
_RATE = 25  # frames per second where neither times nor a rate are told
_NEVER = -(2**63)  # the time of a packet that is not shown


@dataclass(frozen=True)
class Timeline:
    """The frames of a stream along time.

    Args:
        frames: that are shown.
        rate: frames per second, over all of the time that they are shown.
        tick: seconds of one unit of the stream's clock.
        start: clock time of the first frame; None if the stream has no times, only an order.
        joined: clock times start again or jump; `times` then holds the true time of every packet, in ticks from the
            first frame on, in the order in which they are stored.
    """

    frames: int
    rate: Fraction
    tick: Fraction
    start: int | None
    joined: bool = False
    times: array[int] = field(default_factory=lambda: array("q"))

    def number(self, time: int) -> int:
        """The number of a frame that comes on screen `time` ticks after the first one."""
        return round(time * self.tick * self.rate)

    def clock(self, number: float) -> int:
        """The stream's own time of a frame number."""
        return (self.start or 0) + round(Fraction(number) / self.rate / self.tick)


def packets(container: Any, stream: Any, damage: list[str]) -> Iterator[Any]:
    """The packets that have data; what ends the stream too early is noted in `damage`."""
    from av import FFmpegError

    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except FFmpegError as error:
            damage.append(f"the file ends early ({error.strerror})")
            return
        if packet is None:
            return
        if packet.size:  # AVI has empty ones: the picture stays
            yield packet


def timeline(container: Any, stream: Any, name: str) -> Timeline:
    """Where the container's index lists every packet at an even pace, its first packets; else all of them are read.

    Raises:
        InputError: if nothing of the stream is shown.
    """
    even = _even_index(container, stream)
    found = _scan(container, stream, name, _HEAD if even else None)
    if not even:
        return found
    frames, step = even
    return Timeline(frames, _rate(stream, frames, frames * step), found.tick, found.start)


def _even_index(container: Any, stream: Any) -> tuple[int, int] | None:
    """Frames and ticks from one to the next by the container's index; None where it does not tell everything.

    Only the times of decoding stand there; at an even pace those of showing follow.
    """
    index = stream.index_entries
    if not stream.frames or len(index) != stream.frames or _may_jump(container):
        return None
    size, step, last, pieces, hidden = container.size, None, None, 0, True
    shown = 0
    for entry in index:
        if not entry.size or entry.pos + entry.size > size:
            return None  # the picture stays, or the file is cut
        if last is not None and (step := step or entry.timestamp - last) != entry.timestamp - last:
            return None
        pieces += hidden and not entry.is_discard
        hidden, last = entry.is_discard, entry.timestamp
        shown += not hidden
    return (shown, step) if pieces == 1 and step is not None and step > 0 else None


def _may_jump(container: Any) -> bool:
    from av.format import Flags

    return bool(container.format.flags & Flags.ts_discont.value)


def _scan(container: Any, stream: Any, name: str, most: int | None) -> Timeline:
    """The timeline by the first packets, or by all."""
    clock = _Clock(stream.time_base)
    times, lengths, untimed = array("q"), array("q"), 0
    for packet in islice(packets(container, stream, []), most):
        if packet.is_discard or _unseen(stream, packet):
            times.append(_NEVER)
            continue
        untimed += packet.pts is None and packet.dts is None
        times.append(clock.time(packet))
        lengths.append(packet.duration or 0)
    frames = len(lengths)
    if not frames:
        raise InputError(f"{name} has no frame at all")
    if untimed == frames:
        rate = stream.average_rate or stream.guessed_rate or _RATE
        return Timeline(frames, Fraction(rate), stream.time_base, None)
    shown = sorted(zip((time for time in times if time != _NEVER), lengths, strict=True))
    jumps = _jumps(stream, shown) if _may_jump(container) else []
    if jumps:
        times = array("q", (time if time == _NEVER else time - _jumped(jumps, time) for time in times))
        shown = [(time - _jumped(jumps, time), length) for time, length in shown]
    first = shown[0][0]
    rate = _rate(stream, frames, shown[-1][0] - first + _held(stream, shown))
    if not (clock.joined or jumps):
        # AVI numbers packets as they are stored, which is no time of showing where frames are stored in another order.
        ordered = container.format.name == "avi" and stream.codec_context.has_b_frames and clock.ordered
        return Timeline(frames, rate, stream.time_base, None if ordered else first)
    true = array("q", (time if time == _NEVER else time - first for time in times))
    return Timeline(frames, rate, stream.time_base, first, True, true)


def _unseen(stream: Any, packet: Any) -> bool:
    """A VP8 frame that later ones refer to and that is not shown, as its first byte says."""
    return stream.codec_context.codec.name in ("vp8", "libvpx") and not memoryview(packet)[0] & 0x10


def _jumps(stream: Any, shown: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where the clock jumps ahead: the time after each jump, and the ticks that all jumps up to there are too long.

    Told by the times of showing: those of decoding jump some packets later.
    """
    longest, usual = _JUMP / stream.time_base, max(1, _usual(shown))
    found, total = [], 0
    for (before, _), (after, _) in pairwise(shown):
        if after - before > longest:
            total += after - before - usual
            found.append((after, total))
    return found


def _jumped(jumps: list[tuple[int, int]], time: int) -> int:
    """Ticks by which jumps have put off a time."""
    place = bisect_right(jumps, time, key=itemgetter(0))
    return jumps[place - 1][1] if place else 0


class _Clock:
    """Times that go on where the stream's clock starts again, as in files joined of pieces."""

    def __init__(self, tick: Fraction) -> None:
        self.joined, self.ordered = False, True  # ordered: every packet is shown after all those before it
        self._back = round(_BACK / tick)
        self._offset = self._step = 0  # of this piece to the first; from one decoding time to the next
        self._top: int | None = None  # the latest time of this piece
        self._last = 0  # decoding time

    def time(self, packet: Any) -> int:
        """The packet's time of showing, pieces joined."""
        dts = packet.dts
        when = packet.pts if packet.pts is not None else dts
        if when is None:
            when = 0 if self._top is None else self._top + self._step
        order = when if dts is None else dts
        step = 0 if self._top is None else order - self._last
        if self._top is not None and (
            (packet.is_keyframe and when < self._top)  # pictures before a key frame are never shown after it
            or -step > self._back
        ):
            self.joined = True
            self._offset += self._top + (self._step or packet.duration or 1) - when
            self._top, step = None, 0
        self.ordered &= self._top is None or when > self._top
        self._top = when if self._top is None else max(self._top, when)
        self._step, self._last = step if step > 0 else self._step, order
        return int(when) + self._offset


def _held(stream: Any, shown: list[tuple[int, int]]) -> int:
    """Ticks that the last picture stays: its packet's own where the packets' lengths are true, else the usual step."""
    usual = _usual(shown)
    said = sum(length for _, length in shown[:-1])
    if shown[-1][1] and abs(said - (shown[-1][0] - shown[0][0])) <= usual:
        return shown[-1][1]
    declared = round(1 / (stream.average_rate or 1) / stream.time_base)
    return usual or shown[-1][1] or max(1, declared)


def _usual(shown: list[tuple[int, int]]) -> int:
    """The median step from one time to the next, in ticks; 0 for one frame."""
    steps = sorted(b[0] - a[0] for a, b in pairwise(shown))
    return steps[len(steps) // 2] if steps else 0


def _rate(stream: Any, frames: int, span: int) -> Fraction:
    """Frames per second: what the header says where that fits the times to a quarter of a frame."""
    declared = stream.average_rate
    if declared and abs(declared * span * stream.time_base - frames) <= Fraction(1, 4):
        return Fraction(declared)
    return frames / (span * stream.time_base)
