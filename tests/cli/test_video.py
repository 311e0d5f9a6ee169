"""`python -m vtoken video` on a generated clip, through the real entry point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.video.clips import number_of, write_clip
from vtoken.__main__ import main
from vtoken.ops import allocate_tokens
from vtoken.video import CLIPScorer, Clue, read_frames

pytest.importorskip("av")

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as open_clip writes it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    made = open_clip.CLIP(**CONFIG)
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": about}))
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert main(["video", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_of_a_clip_model(clip: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Where is the red shoe? A. here B. there"
    name = f"local-dir:{model}"
    found = answer(capsys, clip, "--question", question, "--budget", 600, "--frames", 10, "--model", name)
    assert found["frames"] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert found["times"] == [i / 25 for i in found["frames"]]
    assert found["clue"] == {"kind": "objects", "items": ["red shoe"]}
    assert "cosines of open_clip" in found["scorer"]
    frames = read_frames(clip, found["frames"])
    assert [number_of(frame) for frame in frames] == found["frames"]
    weights, _, preprocess = open_clip.create_model_and_transforms(name)
    scorer = CLIPScorer(weights, open_clip.get_tokenizer(name), preprocess)
    expected = scorer.score(list(frames), Clue("objects", ("red shoe",), question)).tolist()
    assert found["scores"] == pytest.approx(expected)
    assert min(expected) == 0
    assert max(expected) == 1
    assert found["tokens"] == allocate_tokens(expected, 600, max_tokens=729)
    plain = answer(capsys, clip, "--question", question, "--frames", 10, "--model", name, "--decoupler", "none")
    assert plain["clue"] == {"kind": "query", "items": []}


def test_a_checkpoint_file_beside_an_architecture(
    clip: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny.json")
    file = model / "open_clip_model.safetensors"
    options = [clip, "--question", "the shoe", "--frames", 5, "--budget", "0.5"]
    found = answer(capsys, *options, "--model", "tiny", "--pretrained", file)
    assert len(set(found["scores"])) > 2
    assert found["budget_requested"] == 490
    assert main(["video", *map(str, options), "--model", "tiny"]) == 2
    assert "random weights would score at random" in capsys.readouterr().err
    assert main(["video", *map(str, options), "--model", "tiny", "--pretrained", "no_such_tag"]) == 2
    assert "--model tiny cannot be loaded" in capsys.readouterr().err
    assert main(["video", *map(str, options), "--model", f"local-dir:{model}", "--pretrained", "x"]) == 2
    assert "brings its own weights" in capsys.readouterr().err


def test_given_scores_in_three_forms_and_the_picture(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, out = [0.1, 0.9, 0.0, 0.5], tmp_path / "a" / "picture.png"
    (tmp_path / "list.json").write_text(json.dumps(scores))
    (tmp_path / "lines.txt").write_text("0.1\n0.9\n0.0, 0.5\n")
    options = [clip, "--question", "where?", "--frames", 4, "--budget", 500, "--out", out]
    first = answer(capsys, *options, "--scores", tmp_path / "list.json")
    assert first["scores"] == pytest.approx(scores)
    assert first["tokens"] == allocate_tokens(torch.tensor(scores), 500, max_tokens=729)
    assert sum(first["tokens"]) == 500
    (tmp_path / "own.json").write_text(json.dumps(first))
    for name in ("lines.txt", "own.json"):
        assert answer(capsys, *options, "--scores", tmp_path / name)["tokens"] == first["tokens"]
    picture = np.array(Image.open(out).convert("RGB"))
    assert picture.std() > 20
    assert main(["video", *map(str, options), "--scores", str(tmp_path / "list.json")]) == 0
    text = capsys.readouterr().out
    assert "scores: given in list.json" in text
    assert "500 tokens spent, 784 without a budget; 3 frames kept, 0 to" in text
    assert f"wrote {out}" in text
    held = answer(capsys, *options, "--scores", tmp_path / "list.json", "--min-tokens", 3, "--max-tokens", 200)
    assert held["tokens"] == allocate_tokens(torch.tensor(scores), 500, min_tokens=3, max_tokens=200)


def test_even_spreading_says_so(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, clip, "--question", "where?", "--uniform", "--max-fps", 2, "--budget", "1.0")
    assert found["tokens"] == [196] * 8
    assert found["rows"] == [14] * 8
    assert found["scorer"] == "none, the budget is spread evenly"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name a scorer"),
        (["--uniform", "--scores", "x"], "choose one of --scores, --uniform"),
        (["--scores", "/no/such/file"], "cannot be read"),
        (["--uniform", "--budget", "1.5"], "a share lies in"),
        (["--uniform", "--budget", "many"], "a number of tokens"),
        (["--uniform", "--budget", "0"], "budget=0"),
        (["--uniform", "--frames", "0"], "n=0"),
        (["--uniform", "--frames", "9", "--budget", "5", "--min-tokens", "1"], "9 frames x min_tokens=1"),
        (["--model", "local-dir:/no/such/folder"], "cannot be loaded"),
        (["--model", "ViT-B-99", "--pretrained", "openai"], "cannot be loaded"),
    ],
)
def test_wrong_calls_exit_with_2_and_say_why(
    clip: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["video", str(clip), "--question", "where?", *options]) == 2
    assert said in capsys.readouterr().err


def test_wrong_files(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["video", str(tmp_path / "none.mp4"), "--question", "?", "--uniform"]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "words.txt").write_text("high low")
    assert main(["video", str(clip), "--question", "?", "--frames", "2", "--scores", str(tmp_path / "words.txt")]) == 2
    assert "expected a JSON list of numbers" in capsys.readouterr().err
    (tmp_path / "three.json").write_text("[1, 2, 3]")
    assert main(["video", str(clip), "--question", "?", "--frames", "2", "--scores", str(tmp_path / "three.json")]) == 2
    assert "scores of shape (3,) for 2 frames" in capsys.readouterr().err
