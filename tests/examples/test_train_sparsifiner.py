"""The training script of Sparsifiner: a few steps of it, its controls, and a run that goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vtoken
from vtoken.demo.clutter import clutter_vit, load_clutter_vit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_sparsifiner", ROOT / "examples" / "train_sparsifiner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_run_and_going_on(
    example: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "RATIOS", (1.0, 0.5, 0.1))
    out = tmp_path / "new" / "result.json"
    arguments = ["--small", "--test", "6", "--data", str(data), "--out", str(out)]
    assert example.main([*arguments, "--save", str(tmp_path)]) == 0
    text, about = capsys.readouterr().out, json.loads(out.read_text())
    (run,) = about["runs"]
    assert about["ratios"] == [1.0, 0.5, 0.1]
    assert about["settings"]["test"] == "6"
    rows = ["dense", "random", "random, tuned", "learned", "learned, tuned"]
    assert list(run["top1"]) == rows
    assert all(len(cells) == 3 and all(0 <= cell <= 100 for cell in cells) for cells in run["top1"].values())
    assert run["top1"]["random"][0] == run["top1"]["learned"][0] == run["top1"]["dense"][0], "all keys kept"
    assert run["reconstruction_loss"] > 0
    assert all(f"\n{name} " in text for name in rows)

    # Phase 1 moved the predictors and phase 2 the backbone; what was saved loads into a patched model.
    model = vtoken.apply(clutter_vit(), vtoken.Sparsifiner())
    start = {name: p.clone() for name, p in model.state_dict().items()}
    model.load_state_dict(load_file(tmp_path / "sparsifiner_0.safetensors"))
    dense = load_clutter_vit().state_dict()
    for name, value in model.state_dict().items():
        if name.endswith((".w_down", ".w_up", "attn.qkv.weight")):
            assert not torch.equal(value, start[name] if "predictor" in name else dense[name]), name

    monkeypatch.setattr(example, "one_seed", lambda args, seed, images, labels: run | {"seed": seed})
    assert example.main([*arguments, "--seeds", "2", "0", "1"]) == 0
    assert [found["seed"] for found in json.loads(out.read_text())["runs"]] == [0, 1, 2]
    before = out.read_bytes()
    monkeypatch.setattr(example, "one_seed", lambda *_: pytest.fail("all seeds are done"))
    assert example.main([*arguments, "--seeds", "0", "1", "2"]) == 0
    assert example.main([*arguments, "--batch", "3"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_missing_data_is_no_traceback(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert example.main(["--data", str(tmp_path), "--out", str(tmp_path / "r.json")]) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_differences_are_paired(example: ModuleType) -> None:
    """Seeds differ by 40 points, learned minus random does not."""

    def run(seed: int, gap: float) -> dict[str, Any]:
        base = 40.0 * seed
        rows = {"learned": [base + gap] * 5, "random": [base] * 5}
        tuned = {f"{name}, tuned": cells for name, cells in rows.items()}
        return {"seed": seed, "top1": rows | tuned, "disagreements": {"": [8] * 5, ", tuned": [0] * 5}}

    lines = list(example.table([run(0, 2.0), run(1, 4.0)], 50))
    assert lines[-2].split()[1:3] == ["+3.00", "+-1.00/4.00"]  # spread 2 ** 0.5 over 2 ** 0.5; 4 of 100 canvases
    assert lines[-1].split()[2:4] == ["+3.00", "+-1.00/0.00"]


def test_learned_and_random_are_tuned_on_the_same_canvases(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, int, float, int]] = []

    def record(model: Any, teacher: Any, stream: Any, steps: int, rate: float, seed: int) -> None:
        seen.append((next(stream)[0], steps, rate, seed))

    monkeypatch.setattr(example, "fine_tune", record)
    monkeypatch.setattr(example, "sweep", lambda model, canvases, labels, name, ratios: torch.zeros(len(ratios), 2) > 0)
    out = tmp_path / "r.json"
    assert example.main(["--small", "--test", "2", "--data", str(data), "--out", str(out)]) == 0
    random, learned = seen
    assert torch.equal(random[0], learned[0])
    assert random[1:] == learned[1:]
