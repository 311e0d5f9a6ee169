"""Frames read from generated clips are the frames that were asked for, whatever the codec and the order."""

from __future__ import annotations

import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.video.clips import coded, number_of, write_clip
from vtoken.errors import InputError
from vtoken.video import frame_times, read_frames, sample_frame_indices, video_info

av = pytest.importorskip("av")

H264 = {"bf": "3", "g": "48", "preset": "ultrafast", "b-adapt": "0"}
CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("clip.mp4", {"codec": "libx264", "options": H264}),
    "h264_open_gop": ("clip.mkv", {"codec": "libx264", "options": H264 | {"x264-params": "open-gop=1:bframes=3"}}),
    "h264_ntsc": ("clip.mp4", {"codec": "libx264", "options": H264, "fps": Fraction(30000, 1001)}),
    "mpeg4": ("clip.mp4", {"codec": "mpeg4"}),
    "mpeg4_b": ("clip.avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "40"}}),
    "raw_h264": ("clip.h264", {"codec": "libx264", "options": H264}),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (file, options) in CLIPS.items():
        if options["codec"] in av.codecs_available:
            made[name] = write_clip(tmp_path_factory.mktemp(name) / file, 400, **options)
    return made


@pytest.mark.parametrize("gap", [1, 60])
@pytest.mark.parametrize("name", CLIPS)
def test_every_order_gives_the_frames_asked_for(
    clips: dict[str, Path], name: str, gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in clips:
        pytest.skip(f"PyAV has no encoder {CLIPS[name][1]['codec']}")
    monkeypatch.setattr("vtoken.video.read._SEEK_GAP", gap)  # 1: every frame is reached by a seek of its own
    rng = random.Random(1)
    even = sample_frame_indices(400, 64)
    orders = [even, [7], [399], [0], rng.sample(range(400), 40), [5, 5, 390, 5, 390], [398, 399, 1, 0], [150, 230, 231]]
    for indices in orders:
        frames = read_frames(clips[name], indices)
        assert frames.dtype == np.uint8
        assert frames.shape == (len(indices), 64, 192, 3)
        assert [number_of(frame) for frame in frames] == indices
        assert float(np.abs(frames[0].astype(int) - coded(indices[0]).astype(int)).mean()) < 12


def test_the_clips_have_what_they_are_meant_to_test(clips: dict[str, Path]) -> None:
    """B-frames, and several key frames, or the test above would say little."""
    for name in ("h264", "h264_ntsc", "mpeg4_b"):
        if name in clips:
            with av.open(str(clips[name])) as container:
                kinds = [frame.pict_type for frame in container.decode(video=0)]
            assert sum(kind == av.video.frame.PictureType.B for kind in kinds) > 50
            assert 2 <= sum(kind == av.video.frame.PictureType.I for kind in kinds) < 40


def test_a_long_gap_is_jumped_not_decoded(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from vtoken.video import read

    passed = []
    numbered = read._Reader._number
    monkeypatch.setattr(read._Reader, "_number", lambda self, f: passed.append(numbered(self, f)) or passed[-1])
    assert number_of(read_frames(clips["mpeg4"], [390])[0]) == 390
    assert len(set(passed)) < 60
    passed.clear()
    assert [number_of(f) for f in read_frames(clips["mpeg4"], [10, 40, 65])] == [10, 40, 65]
    assert set(range(66)) <= set(passed)


def test_info(clips: dict[str, Path], tmp_path: Path) -> None:
    info = video_info(clips["mpeg4"])
    assert (info.frames, info.fps, info.width, info.height, info.duration) == (400, 25, 192, 64, 16)
    if "h264_ntsc" in clips:
        info = video_info(clips["h264_ntsc"])
        assert info.frames == 400
        assert info.fps == pytest.approx(30000 / 1001)
    matroska = write_clip(tmp_path / "clip.mkv", 37)  # does not state a count
    assert video_info(matroska).frames == 37
    assert frame_times([0, 25, 30], 25) == [0, 1, 1.2]


def test_frames_on_screen_are_taken_where_the_rate_varies(tmp_path: Path) -> None:
    """60 frames, every third one shown twice as long: at each time the picture that is on screen then."""
    times, at = [], 0
    for i in range(60):
        times.append(at)
        at += 2 if i % 3 == 2 else 1
    clip = write_clip(tmp_path / "clip.mp4", 60, times=times, options={"bf": "0"})
    rate = video_info(clip).fps
    assert rate == pytest.approx(25 * 60 / at, rel=0.05)
    numbers = [round(t / 25 * rate) for t in times]
    wanted = list(range(0, numbers[-1] + 1))
    expected = [max(i for i, n in enumerate(numbers) if n <= w) for w in wanted]
    got = [number_of(frame) for frame in read_frames(clip, wanted)]
    assert got == expected


def test_smaller_frames_and_none(clips: dict[str, Path]) -> None:
    frames = read_frames(clips["mpeg4"], [300, 2], max_side=96)
    assert frames.shape == (2, 32, 96, 3)
    assert [number_of(frame) for frame in frames] == [300, 2]
    assert read_frames(clips["mpeg4"], [3], max_side=1000).shape == (1, 64, 192, 3)
    assert read_frames(clips["mpeg4"], []).shape == (0, 64, 192, 3)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_clip_filmed_sideways_is_turned(tmp_path: Path, rotation: int) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    clip = write_clip(tmp_path / "clip.mp4", 5, rotation=rotation)
    frame = read_frames(clip, [4])[0]
    assert frame.shape[:2] == ((64, 192) if rotation == 180 else (192, 64))
    upright = [np.rot90(frame, k) for k in range(4)]
    right = [k for k, picture in enumerate(upright) if picture.shape == (64, 192, 3) and number_of(picture) == 4]
    expected = {180: 2, 90: 3, -90: 1}[rotation]
    assert expected in right


def test_errors_name_file_and_numbers(clips: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"frame 4000 asked for, but .*clip.mp4 ends with frame 399"):
        read_frames(clips["mpeg4"], [3, 4000])
    with pytest.raises(InputError, match="frame -1 asked for"):
        read_frames(clips["mpeg4"], [-1])
    with pytest.raises(InputError, match="no such file"):
        read_frames(tmp_path / "none.mp4", [0])
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(InputError, match=r"noise.mp4 cannot be read as a video"):
        video_info(noise)
    with pytest.raises(InputError, match="max_side=0"):
        read_frames(clips["mpeg4"], [0], max_side=0)
    for wrong in ("64", 2.5, True, -1):
        with pytest.raises(InputError, match="must be a whole number of pixels"):
            read_frames(clips["mpeg4"], [], max_side=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pass a list of frame numbers"):
        read_frames(clips["mpeg4"], 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="frame True asked for"):
        read_frames(clips["mpeg4"], [True, False])
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match="no video stream"):
        read_frames(sound, [0])


def test_without_pyav_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['av'] = None\n"
        "import vtoken\n"
        "try: vtoken.video.read_frames('x.mp4', [0])\n"
        "except ImportError as error: assert 'vtoken[video]' in str(error)\n"
        "else: sys.exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
