"""The example that asks about a clip: it runs whole, and its clip and its judgement are what they claim to be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vtoken.demo.clutter import DATA
from vtoken.video import read_frames, video_info

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not DATA.exists() or any(importlib.util.find_spec(name) is None for name in ("av", "skimage", "matplotlib")),
    reason="needs PyAV, vtoken[demo] and Debian's dataset-fashion-mnist",
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("video_question", ROOT / "examples" / "video_question.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_small_run(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    shares = example.main(["--small", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert "named right" in text
    assert "looked for (objects): ankle boot" in text
    assert (tmp_path / "video.png").stat().st_size > 50_000
    assert shares["frames"] == pytest.approx(0.2, abs=0.02)  # two of ten scenes
    found = json.loads((tmp_path / "scores.json").read_text())
    assert sum(found["tokens"]) == found["budget_requested"] == 0.25 * 196 * 96
    # With scores that know the answer all tokens go there; with even ones as many as the frames' share.
    truth = example.write_clip(tmp_path / "garments.mp4", DATA)
    asked = ["video", str(tmp_path / "garments.mp4"), "--question", "the ankle boot?", "--budget", "0.25"]
    (tmp_path / "known.json").write_text(json.dumps([float(truth[i] == 9) for i in found["frames"]]))
    known = [*asked, "--scores", str(tmp_path / "known.json")]
    assert example.judge(known, truth, "the ankle boot?", tmp_path / "x.json")["tokens"] == 1
    even = example.judge([*asked, "--uniform"], truth, "the ankle boot?", tmp_path / "x.json")
    assert even["tokens"] == pytest.approx(even["frames"], abs=0.005)


def test_the_clip_shows_what_it_says(example: ModuleType, tmp_path: Path) -> None:
    clip = tmp_path / "a" / "clip.mp4"
    truth = example.write_clip(clip, DATA, seconds=0.5)
    assert truth == [label for label in example.SCENES for _ in range(6)]
    assert video_info(clip).frames == len(truth)
    frames = torch.from_numpy(read_frames(clip, range(len(truth)))).float()
    # Without a garment the picture is the panned photograph alone; with one they differ a lot.
    photos = example.load_photographs(160 + 48, example.HELD_OUT)[1]
    for number, label in enumerate(example.SCENES):
        plain = photos[number % len(photos)][:, 24:184, :160].permute(1, 2, 0) * 255
        gap = float((frames[number * 6] - plain).abs().mean())
        assert (gap < 6) == (label is None), f"scene {number}: {gap}"
