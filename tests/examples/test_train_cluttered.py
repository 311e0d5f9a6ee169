"""The training script of the cluttered ViT: a few steps of it, and its forward on small canvases."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from vtoken.demo.clutter import clutter_vit, load_clutter_vit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_cluttered", ROOT / "examples" / "train_cluttered.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_run_writes_weights_that_load(
    example: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "tiny.safetensors"
    arguments = ["--small", "--data", str(data), "--out", str(path)]
    assert example.main(arguments) == 0
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert about["command"] == " ".join(["python examples/train_cluttered.py", *arguments])
    assert about["test"] == "load_test_canvases(50, seed=0)"
    assert 0 <= float(about["accuracy"]) <= 1
    assert about.keys() == {"command", "accuracy", "test", "minutes", "date", "versions"}
    assert f"top-1 {about['accuracy']}" in capsys.readouterr().out
    torch.manual_seed(0)  # where training began
    start, trained = clutter_vit().state_dict(), load_clutter_vit(path).state_dict()
    same = [name for name, value in trained.items() if torch.allclose(value, start[name].to(value.dtype), atol=1e-3)]
    assert not [name for name in same if name.endswith("weight") and "blocks" in name and "norm" not in name]


def test_missing_data_is_no_traceback(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert example.main(["--data", str(tmp_path), "--out", str(tmp_path / "w")]) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_whole_canvas_goes_through_as_in_the_model(example: ModuleType) -> None:
    model = clutter_vit().eval()
    torch.nn.init.normal_(model.pos_embed)
    torch.nn.init.normal_(model.cls_token)
    canvases = torch.rand(2, 1, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(example.logits(model, canvases, (0, 0)), model(canvases))


def test_a_small_canvas_takes_the_positions_of_its_corner(example: ModuleType) -> None:
    model = clutter_vit().eval()
    canvases = torch.rand(2, 1, 48, 48)
    used = torch.zeros(14, 14, dtype=torch.bool)
    used[3:9, 5:11] = True
    example.logits(model, canvases, (3, 5)).sum().backward()
    gradient = model.pos_embed.grad
    assert gradient is not None
    assert gradient[0, 0].abs().sum() > 0, "the class token's position"
    assert torch.equal(gradient[0, 1:].abs().sum(-1).view(14, 14) > 0, used)


def test_every_parameter_has_one_optimiser(example: ModuleType) -> None:
    model = clutter_vit()
    muon, adamw = example.optimisers(model)
    owned = [[id(p) for group in opt.param_groups for p in group["params"]] for opt in (muon, adamw)]
    assert sorted(owned[0] + owned[1]) == sorted(id(p) for p in model.parameters())
    assert len(owned[0]) == 4 * len(model.blocks)
