"""The training script of the small LLaVA: a few steps, going on after a stop, its tower on parts of a canvas."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vtoken.demo.questions import KINDS, load_small_llava

pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_llava", ROOT / "examples" / "train_llava.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_small_llava(folder / "model").state_dict())


def test_small_run_writes_a_model_and_a_stopped_one_goes_on(
    example: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--small", "--save-every", "1", "--test", "4", "--data", str(data), "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert example.main([*arguments, str(whole)]) == 0
    about = json.loads((whole / "model" / "training.json").read_text())
    assert about["command"] == f"python examples/train_llava.py --small --save-every 1 --test 4 --data {data}"
    assert about["right"].keys() == {"naming", "seeing", "seeing digits", *KINDS}
    assert "4/4 grid 14" in capsys.readouterr().out
    trained = weights(whole)
    torch.manual_seed(0)  # where training began
    start = example.build().state_dict()
    same = [name for name, value in trained.items() if torch.equal(value, start[name].half().float())]
    assert not [name for name in same if name.endswith("weight") and "layers" in name and "norm" not in name]

    stock = example.accuracy

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "accuracy", stop)  # asked for behind every checkpoint
    with pytest.raises(KeyboardInterrupt):
        example.main([*arguments, str(parts)])
    assert not (parts / "model").exists()
    monkeypatch.setattr(example, "accuracy", stock)
    assert example.main([*arguments, str(parts)]) == 0
    assert "1/4" not in capsys.readouterr().out.split("held-back")[-1]
    again = weights(parts)
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


def test_missing_data_is_no_traceback(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert example.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err


def test_a_whole_picture_goes_through_the_tower_as_in_the_model(example: ModuleType) -> None:
    tower = example.build().model.vision_tower.eval()
    pictures = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(
            example.tower_rows(tower, pictures, torch.zeros(1, 2, dtype=torch.long)),
            tower(pixel_values=pictures).last_hidden_state,
        )


def test_a_part_of_the_canvas_takes_the_positions_of_its_corner(example: ModuleType) -> None:
    tower = example.build().model.vision_tower
    used = torch.zeros(14, 14, dtype=torch.bool)
    used[3:9, 5:11] = True
    example.tower_rows(tower, torch.rand(2, 3, 48, 48), torch.tensor([[3, 5]])).square().sum().backward()
    gradient = tower.embeddings.position_embedding.weight.grad
    assert gradient[0].abs().sum() > 0, "the class token's position"
    assert torch.equal(gradient[1:].abs().sum(-1).view(14, 14) > 0, used)


def test_every_parameter_has_one_optimiser(example: ModuleType) -> None:
    model, heads = example.build(), example.Heads(128)
    owned = [[id(p) for group in opt.param_groups for p in group["params"]] for opt in example.optimisers(model, heads)]
    assert sorted(owned[0] + owned[1]) == sorted(id(p) for p in (*model.parameters(), *heads.parameters()))
