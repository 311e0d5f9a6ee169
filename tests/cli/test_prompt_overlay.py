"""`overlay` of a folder with a multimodal model: the tokens drawn are those of the model's own call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vtoken
from vtoken.__main__ import main

np = pytest.importorskip("numpy")
PIL = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")

from tests.serving import tiny  # noqa: E402  (imports transformers)


def right(path: Path) -> torch.Tensor:
    """The right one of the two pictures, [H, W, 3]."""
    sheet = torch.from_numpy(np.asarray(PIL.open(path).convert("RGB")).copy()).long()
    return sheet[24:, (sheet.shape[1] - 8) // 2 + 8 :]


@pytest.mark.parametrize(
    ("kind", "words", "place"),
    [
        ("llava", ["divprune", "num_tokens=6"], "<image>"),
        ("qwen2_5_vl", ["vtc_cls", "keep_ratio=0.3", "scorer=received"], "<|image_pad|>"),
    ],
)
def test_the_tokens_of_the_models_own_call(
    kind: str, words: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(kind, tmp_path / "model")
    picture = tiny.image(3, (84, 56) if kind == "llava" else (84, 112))
    picture.save(tmp_path / "a.png")
    out = tmp_path / "b" / "o.png"
    call = ["overlay", str(tmp_path / "a.png"), str(folder), *words, "--question", "w3 w5", "--out", str(out)]
    assert main(call) == 0

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    given = transformers.AutoProcessor.from_pretrained(folder)(
        images=[picture], text=[f"{place} w3 w5"], return_tensors="pt"
    )
    settings = dict(word.split("=") for word in words[1:])
    config = vtoken.core.config.make_config(words[0], {k: v if k == "scorer" else float(v) if "." in v else int(v)
                                                       for k, v in settings.items()})  # fmt: skip
    with vtoken.applied(model, config), torch.inference_mode():
        _, record = vtoken.trace(model, **given)
    kept, grid = record.kept(), record.grid
    assert grid is not None
    assert 0 < len(kept) < grid[0] * grid[1]
    assert f"{words[0]}: {len(kept)} of {grid[0] * grid[1]} tokens" in capsys.readouterr().out
    # A pruned token is at most as bright as its lines; the middle of a kept one is the picture's own.
    if kind == "llava":  # cropped to its middle; the random picture has blocks of 14 pixels
        side = 56 // grid[0]
        seen = np.asarray(picture.crop((0, 14, 56, 70)))
    else:
        side = 28
        seen = np.asarray(picture.resize((grid[1] * side, grid[0] * side)))
    drawn = right(out)
    scale = drawn.shape[0] // (grid[0] * side)
    for token in range(grid[0] * grid[1]):
        y, x = token // grid[1] * side + 7, token % grid[1] * side + 7  # the middle of a block of 14 pixels
        same = (drawn[y * scale, x * scale] - torch.from_numpy(seen[y, x].copy()).long()).abs().max() <= 2
        bright = int(seen[y, x].max()) > 60
        assert not bright or bool(same) == (token in kept.tolist()), token


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pitome", "ratio=0.9"], "acts inside a tower"),
        (["vtc_cls", "num_tokens=6", "--img-size", "56"], "leave out the options for timm's"),
    ],
)
def test_what_cannot_be_drawn(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save("llava", tmp_path / "model")
    assert main(["overlay", "astronaut", str(folder), *words]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["overlay", "astronaut", str(tmp_path / "empty"), "vtc_cls", "num_tokens=6"]) == 2
    assert "holds no image-text model" in capsys.readouterr().err
