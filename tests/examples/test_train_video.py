"""The training script of the small video model: a few steps, going on after a stop, and what it trains on."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtoken.demo.questions import load_small_llava
from vtoken.demo.scenes import SMALL_KINDS, Material
from vtoken.demo.videos import FRAMES, KINDS, load_small_video, prompt

pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_video", ROOT / "examples" / "train_video.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_small_video(folder / "model").state_dict())


@pytest.mark.slow
def test_small_run_writes_a_model_and_a_stopped_one_goes_on(
    example: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--small", "--save-every", "1", "--data", str(data), "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert example.main([*arguments, str(whole)]) == 0
    about = json.loads((whole / "model" / "training.json").read_text())
    for part in ("model", "scorer"):
        assert about[part]["command"] == " ".join(["python examples/train_video.py", *arguments[:-1]])
    assert about["scorer"]["needle scores highest"].keys() == KINDS.keys()
    trained, llava = weights(whole), load_small_llava().state_dict()
    for name, value in llava.items():
        if name.startswith("model.vision_tower."):
            torch.testing.assert_close(trained[name], value, msg="the tower stays as it is")
        elif name.endswith("proj.weight"):
            assert not torch.equal(trained[name], value.half().float()), "the language model learns"
    clip = load_file(whole / "model" / "scorer.safetensors")
    assert clip
    assert not [name for name in clip if name.startswith("tower.")]

    stock = example.accuracy

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "accuracy", stop)  # asked for behind every checkpoint
    with pytest.raises(KeyboardInterrupt):
        example.main([*arguments, str(parts), "--what", "model"])
    assert not (parts / "model" / "config.json").exists()
    monkeypatch.setattr(example, "accuracy", stock)
    assert example.main([*arguments, str(parts), "--what", "model"]) == 0
    again = weights(parts)
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


def test_missing_data_is_no_traceback(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert example.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err


def test_the_model_before_training_is_the_small_llava(example: ModuleType) -> None:
    """A text without a picture gets the same answer of both, from words that both know."""
    llava = load_small_llava()
    model = example.build(llava).eval()
    ids = torch.tensor([[1, 7, 9, 20, 33]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :54], llava(ids).logits)
        pixels = torch.rand(1, 2, 3, 112, 112)
        assert model(prompt(ids, 98), pixel_values_videos=pixels).logits.shape == (1, 1 + 98 + 5, 56)


def test_tokens_are_spread_without_regard_to_the_needle(example: ModuleType) -> None:
    rng, ways = random.Random(0), set()
    for budget in example.BUDGETS:
        for _ in range(50):
            counts = example.spread(budget, rng)
            assert len(counts) == FRAMES
            assert sum(counts) == budget
            assert min(counts) >= 0
            assert max(counts) <= 196
            ways.add(("even" if len(set(counts)) <= 2 else "uneven", 0 in counts))
        few = example.spread(196, rng, [1, 4, 6, 7, 9])
        assert sum(few) == 196
        assert {i for i, t in enumerate(few) if t} <= {1, 4, 6, 7, 9}
    assert len(ways) == 4


def test_stored_frames_make_videos_as_planned(example: ModuleType, data: Path) -> None:
    tower = load_small_llava().model.vision_tower
    frames = example.Frames(tower, Material("test", data), example.FEWEST, torch.Generator().manual_seed(0))
    picked = frames.videos(20, torch.Generator().manual_seed(1))
    facts = {name: value[picked] for name, value in frames.facts.items()}
    for video in range(20):
        for name, most in (("garment", 6), ("colour", 4)):
            shown = [value for value in facts[name][video].tolist() if value >= 0]
            assert len(shown) == len(set(shown)) == most
        for name in SMALL_KINDS:
            assert (facts[name][video] > 0).sum() == 1
    bears = (facts["garment"] >= 0) | torch.stack([facts[name] > 0 for name in SMALL_KINDS]).any(0)
    assert torch.equal(frames.bearing[picked], bears)
    seen = torch.rand(20, FRAMES, generator=torch.Generator().manual_seed(2)) > 0.5
    for asked in example.questions(facts, seen, torch.Generator().manual_seed(3)):
        there = (asked.needles >= 0) & seen.gather(1, asked.needles.clamp(min=0)[:, None])[:, 0]
        assert torch.equal((asked.labels >= 0).any(1), there)
