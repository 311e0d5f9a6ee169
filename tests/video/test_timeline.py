"""What is read is what a player shows: containers, clocks, damage, turned pictures, against PyAV's own full decode."""

from __future__ import annotations

import io
import itertools
import math
import re
import tomllib
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.video.clips import coded, number_of
from vtoken.errors import InputError
from vtoken.video import read_frames, sample_frame_indices, video_info

av = pytest.importorskip("av")

H264 = {"bf": "3", "g": "25", "preset": "ultrafast", "b-adapt": "0"}
VP = {"g": "25", "deadline": "realtime", "cpu-used": "8"}
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "mp4": ("libx264", H264),
    "mov": ("mjpeg", {}),
    "matroska": ("libx264", H264),
    "webm": ("libvpx-vp9", VP),
    "avi": ("libx264", H264),
    "mpegts": ("libx264", H264),
    "mpeg": ("mpeg2video", {"bf": "2", "g": "25"}),
    "flv": ("libx264", H264),
    "nut": ("mpeg4", {"bf": "2", "g": "25"}),
    "gif": ("gif", {}),
}
UNEVEN = [0, *np.cumsum([25, 45, 33, 30, 140] * 20).tolist()][:100]


def made(
    form: str, count: int = 100, times: list[int] | None = None, first: int = 0, rate: Any = 25, **stream: Any
) -> bytes:
    """A video of numbered frames; `times` in milliseconds."""
    codec, options = KINDS[form]
    codec = stream.get("codec", codec)
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no encoder {codec}")
    file = io.BytesIO()
    with av.open(file, "w", format=form) as out:
        track = out.add_stream(codec, rate=rate, options=stream.get("options", options))
        track.width, track.height, track.bit_rate = 192, 64, 2_000_000
        track.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        base = Fraction(1, 1000) if times else Fraction(1) / rate
        if times:
            track.codec_context.time_base = track.time_base = base
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(coded(first + k), format="rgb24")
            frame.pts, frame.time_base = times[k] if times else k, base
            out.mux(track.encode(frame))
        out.mux(track.encode())
    return file.getvalue()


def decoded(video: bytes) -> list[tuple[float, int]]:
    """Times from the first frame on, and what is shown, by a full decode."""
    with av.open(io.BytesIO(video)) as container:
        frames = [(f.time, number_of(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)]
    return [(time - frames[0][0], number) for time, number in frames]


def numbers(video: Any, indices: Any) -> list[int]:
    return [number_of(frame) for frame in read_frames(video, indices)]


@pytest.mark.parametrize("form", KINDS)
def test_even_videos_are_read_exactly_from_memory(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    video = made(form)
    info = video_info(video)
    assert (info.frames, info.fps, info.duration) == (100, 25, 4)
    monkeypatch.setattr("vtoken.video.read._SEEK_GAP", 5)
    for indices in (list(range(100)), [99, 3, 3, 70, 42]):
        assert numbers(io.BytesIO(video), indices) == indices


@pytest.mark.parametrize("form", ["mp4", "matroska", "webm", "mpegts", "flv", "nut"])
def test_uneven_videos_show_what_is_on_screen(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    video = made(form, times=UNEVEN)
    info, shown = video_info(video), decoded(video)
    assert info.frames == len(shown) == 100
    assert info.duration == pytest.approx(UNEVEN[-1] / 1000, abs=0.2)
    wanted = [max(n for time, n in shown if round(time * info.fps) <= k) for k in range(100)]
    for gap in (5, 60):
        monkeypatch.setattr("vtoken.video.read._SEEK_GAP", gap)
        assert numbers(video, range(100)) == wanted
        assert numbers(video, [90, 8]) == [wanted[90], wanted[8]]


def test_slides_are_spread_over_their_minute_and_a_missing_rate_does_no_harm() -> None:
    times = [*range(0, 1000, 33), 20000, 40000, 60000]
    info = video_info(made("webm", len(times), times, rate=30))
    assert (info.frames, round(info.duration)) == (34, 60)
    raw = bytearray(made("webm", times=UNEVEN, rate=1000))
    at = raw.find(b"\x23\xe3\x83")  # DefaultDuration, which browsers do not write
    size = 4 + (raw[at + 3] & 127)
    raw[at : at + size] = bytes([0xEC, 0x80 | (size - 2)]) + bytes(size - 2)
    info = video_info(raw)
    assert (info.frames, round(info.duration, 1)) == (100, round((UNEVEN[-1] + 33) / 1000, 1))
    assert numbers(raw, sample_frame_indices(info.frames, 8))[-1] >= 95


def test_a_declared_rate_that_is_not_the_real_one() -> None:
    video = made("matroska", 100, [40 * k for k in range(100)], rate=60)
    info = video_info(video)
    assert (info.frames, info.duration) == (100, pytest.approx(4, rel=0.01))
    assert numbers(video, range(100)) == list(range(100))


def test_packets_that_an_edit_list_hides_are_no_frames(tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    with av.open(io.BytesIO(made("mp4"))) as source, av.open(str(cut), "w") as out:
        track = source.streams.video[0]
        copy = out.add_stream_from_template(track)
        tick = int(1 / (track.average_rate * track.time_base))
        for packet in source.demux(track):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - 30 * tick, packet.dts - 30 * tick, copy
                out.mux(packet)
    info = video_info(cut)
    assert info.frames == len(decoded(cut.read_bytes())) == 70
    assert info.duration == 2.8
    assert numbers(cut, range(70)) == list(range(30, 100))
    with pytest.raises(InputError, match="ends with frame 69"):
        read_frames(cut, [70])


@pytest.mark.parametrize("jump", [0, 7, 40_000])
def test_joined_pieces_follow_one_another(jump: int) -> None:
    """The clock starts again, or jumps on by half an hour and back."""
    first, second = made("mpegts", 30), made("mpegts", 50, [40 * k + 1000 * jump for k in range(50)], 30)
    video = first + second + made("mpegts", 20, None, 80)
    info = video_info(video)
    pause = 7 - 30 / 25 if jump == 7 else 0  # so short a gap is one, and the picture stays
    assert (info.frames, info.duration) == (100, pytest.approx(4 + pause, abs=0.1))
    shown = numbers(video, range(100))
    assert shown == sorted(shown)
    if not pause:
        assert shown == list(range(100))


@pytest.mark.parametrize("bframes", ["0", "3"])
def test_a_clock_that_jumps_ahead_jumps_at_the_picture(bframes: str) -> None:
    """Times of decoding jump later than those of showing where frames are stored in another order."""
    times = [40 * k + (30_000 if k > 30 else 0) for k in range(60)]
    video = made("mpegts", 60, times, options={"g": "20", "bf": bframes})
    info = video_info(video)
    assert (info.frames, info.duration) == (60, pytest.approx(2.4, abs=0.05))
    assert numbers(video, range(60)) == list(range(60))


def test_slides_of_twenty_seconds_are_no_jumps() -> None:
    video = made("mpegts", 5, [20_000 * k for k in range(5)])
    assert video_info(video).duration == pytest.approx(100, rel=0.05)
    assert numbers(video, range(5)) == list(range(5))


def test_a_damaged_packet_is_one_warning_that_names_the_place(tmp_path: Path) -> None:
    video = bytearray(made("mp4", codec="mpeg4", options={}))
    with av.open(io.BytesIO(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    place, size = packets[50]
    video[place : place + size] = bytes(size)
    with pytest.warns(UserWarning, match=r"damaged: at 2.00 s, frame 50, a packet cannot be decoded") as said:
        assert numbers(video, [49, 50, 99])[:2] == [49, 49]
    assert len(said) == 1
    for place, size in packets:
        video[place : place + size] = bytes(size)
    with pytest.raises(InputError, match="not one frame can be decoded"):
        read_frames(video, [3])


def test_a_cut_file_ends_where_it_is_cut() -> None:
    video = made("matroska", codec="mjpeg", options={})
    video = video[: len(video) // 2]
    info = video_info(video)
    assert 40 < info.frames < 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last packet is cut through
        assert numbers(video, [0, 10, info.frames - 2]) == [0, 10, info.frames - 2]


@pytest.mark.parametrize("level", [None, "VERBOSE"])
def test_no_thread_decodes_ahead_while_pyav_logs_to_python(level: str | None) -> None:
    from vtoken.video.read import _Reader
    from vtoken.video.timeline import Timeline

    before = av.logging.get_level()
    try:
        av.logging.set_level(level and getattr(av.logging, level))
        reader = _Reader(b"", Timeline(1, Fraction(1), Fraction(1), 0))
        assert reader.threads == ("AUTO" if level is None else "SLICE")
    finally:
        av.logging.set_level(before)


def test_file_objects_are_left_open_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(made("mp4", 10))
    with open(path, "rb") as file:
        file.read(100)
        assert numbers(file, [7]) == [7]
        assert video_info(file).frames == 10
        assert not file.closed
    for wrong, words in ((3, "got int"), (io.StringIO(), "must be binary"), (b"", "cannot be read as a video")):
        with pytest.raises(InputError, match=words):
            video_info(wrong)  # type: ignore[arg-type]


def test_frame_numbers_are_whole_and_no_number_is_too_large() -> None:
    video = made("mp4", 5)
    with pytest.raises(InputError, match="whole numbers"):
        read_frames(video, [0.5])  # type: ignore[list-item]
    with pytest.raises(InputError, match="ends with frame 4"):
        read_frames(video, [10**30])
    assert numbers(video, np.arange(3)) == [0, 1, 2]


def test_a_title_that_is_not_utf8_and_a_codec_that_nobody_knows() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        out.metadata["title"] = "Xitle"
        track = out.add_stream("mpeg4", rate=25)
        track.width, track.height, track.pix_fmt = 192, 64, "yuv420p"
        for k in range(5):
            out.mux(track.encode(av.VideoFrame.from_ndarray(coded(k), format="rgb24")))
        out.mux(track.encode())
    video = file.getvalue()
    assert video_info(video.replace(b"Xitle", b"\xe9itle")).frames == 5
    with pytest.raises(InputError, match="no decoder"):
        video_info(video.replace(b"FMP4", b"QQQQ"))


def test_hd_colours_are_the_files_own(tmp_path: Path) -> None:
    y, u, v = 150, 90, 120
    path = tmp_path / "hd.mp4"
    with av.open(str(path), "w") as out:
        track = out.add_stream("libx264", rate=10, options={"qp": "0"})
        track.width = track.height = 64
        track.pix_fmt, track.codec_context.colorspace, track.codec_context.color_range = "yuv444p", 1, 1
        for k in range(3):
            planes = np.stack([np.full((64, 64), c, np.uint8) for c in (y, u, v)])
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p", channel_last=False)
            frame.pts, frame.colorspace, frame.color_range = k, 1, 1
            out.mux(track.encode(frame))
        out.mux(track.encode())
    assert np.abs(read_frames(path, [2])[0, 32, 32].astype(int) - (142, 168, 76)).max() <= 1
    for a, b in itertools.pairwise(read_frames(path, [0, 1, 2])):
        assert math.isclose(float(np.abs(a.astype(int) - b).max()), 0, abs_tol=1)


def test_the_extras_ask_for_a_pyav_that_knows_colour_spaces() -> None:
    """PyAV before 17 gives HD colours as those of SD; what is installed here cannot show it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = [r for extra in project["optional-dependencies"].values() for r in extra if re.match(r"av\b", r)]
    assert asked
    assert all(int(re.fullmatch(r"av>=(\d+)", r)[1]) >= 17 for r in asked)  # type: ignore[index]


def test_mirrored_pictures_are_turned_back() -> None:
    video = bytearray(made("mp4", 3))
    at = video.find(b"tkhd") + 4 + 40
    for matrix, upright in (
        ((-65536, 0, 0, 0, 65536, 0), lambda f: f[:, ::-1]),
        ((65536, 0, 0, 0, -65536, 0), lambda f: f[::-1]),
        ((0, 65536, 0, 65536, 0, 0), lambda f: f.swapaxes(0, 1)),
    ):
        video[at : at + 24] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
        assert number_of(upright(read_frames(video, [2])[0])) == 2
