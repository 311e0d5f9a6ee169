"""The CLIP training example: a small run of everything, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("train_clip")


def call(example: ModuleType, data: Path, out: Path, *options: str) -> dict[str, Any]:
    arguments = ["--small", "--task", "garments", "--data", str(data), "--out", str(out), *options]
    assert example.main(arguments) == 0
    values: dict[str, Any] = json.loads((out / "train_clip.json").read_text())
    return values


def test_small_run(
    example: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    values = call(example, data, tmp_path, "--seed", "0", "1", "--steps", "5")
    text = capsys.readouterr().out
    rows = {(row["setting"], row["budget"]): row for row in values["rows"]}
    assert list(dict.fromkeys(setting for setting, _ in rows)) == list(example.SETTINGS)
    for (setting, budget), row in rows.items():
        assert row["seeds"] == 2
        assert row["accuracy_mean"] == pytest.approx(sum(row["accuracies"]) / 2)
        assert row["accuracy_sd"] == pytest.approx(abs(row["accuracies"][0] - row["accuracies"][1]) / 2**0.5)
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracies"])
        assert 0 < row["step_time_min"] < 10
        assert setting in text
        if budget == "steps":
            assert row["steps"] == 5
    # The cost of a masked step by docs/methods/attentive_clip.md 12: width 48, 2 blocks, 65 or 33 tokens; the teacher
    # sees 65 or 17.
    blocks = {n: 2 * (12 * n * 48**2 + 2 * n * n * 48) for n in (65, 33, 17)}
    embed, text_tower = 64 * 3 * 64 * 48, 12 * 8 * 32**2 + 2 * 8 * 8 * 32
    plain = 3 * blocks[65] + 2 * embed + 3 * text_tower
    random = 3 * blocks[33] + 2 * embed + 3 * text_tower
    for setting, cost in {
        "CLIP": plain, "random": random, "attentive": random + blocks[65] + embed,
        "attentive, half-size teacher": random + blocks[17] + embed / 4, "random, phases": random,
        "attentive, phases": random + blocks[65] + embed,
    }.items():  # fmt: skip
        share = cost / plain
        row = rows[setting, "steps"]
        assert row["step_macs"] == pytest.approx(share, rel=1e-9)
        unmasked = 2 if setting.endswith("phases") else 0
        assert row["relative_macs"] == pytest.approx((unmasked + (5 - unmasked) * share) / 5, rel=1e-9)
        if (setting, "FLOPs") in rows:
            equal = rows[setting, "FLOPs"]
            assert equal["steps"] == unmasked + round((5 - unmasked) / share)
            assert abs(equal["relative_macs"] - 1) <= 0.5 * share / 5 + 1e-9
    assert (tmp_path / "train_clip.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} == {".json"}, "checkpoints of finished runs are gone"


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("setting", ["random, phases", "attentive, phases"])
def test_a_killed_run_goes_on(
    setting: str, example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten steps: unmasked are the first two and the last two. Killed in the seventh, after a checkpoint of six.
    task = example.garment_task(data, test=20)
    (run,) = (r for r in example.runs_of(task, [setting], 3, 10, 8) if r.budget == "steps")
    assert (run.first, run.last) == (2, 2)
    lasting: list[Any] = []
    stock, accuracy = example.learn, example.zero_shot_accuracy

    def keep(model: Any, task: Any) -> float:
        lasting.append({name: value.clone() for name, value in model.state_dict().items()})
        return float(accuracy(model, task))

    monkeypatch.setattr(example, "zero_shot_accuracy", keep)
    for name in ("whole", "killed"):
        (tmp_path / name / "runs").mkdir(parents=True)
    whole = example.train(task, run, tmp_path / "whole", 3)

    calls: list[int] = []

    def dies(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 7:
            raise _KilledError
        return float(stock(*args))

    monkeypatch.setattr(example, "learn", dies)
    with pytest.raises(_KilledError):
        example.train(task, run, tmp_path / "killed", 3)
    assert [path.suffix for path in (tmp_path / "killed" / "runs").iterdir()] == [".pt"]
    torch.manual_seed(99)  # another process starts elsewhere
    resumed = example.train(task, run, tmp_path / "killed", 3)
    assert len(calls) == 7 + 4
    assert resumed == whole
    for name, value in lasting[0].items():
        assert torch.equal(value, lasting[1][name]), name
    # What is finished is not trained again.
    assert example.train(task, run, tmp_path / "killed", 3) == whole
    assert len(calls) == 11


def test_masks_follow_the_phases(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    task = example.garment_task(data, test=20)
    (run,) = (r for r in example.runs_of(task, ["attentive, phases"], 0, 10, 4) if r.budget == "steps")
    (tmp_path / "runs").mkdir()
    seen: list[int] = []
    stock = example.learn

    def watch(model: Any, opt: Any, images: Tensor, captions: Tensor) -> float:
        blocks = model.unwrap().visual.transformer.resblocks
        handle = blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
        try:
            return float(stock(model, opt, images, captions))
        finally:
            handle.remove()

    monkeypatch.setattr(example, "learn", watch)
    example.train(task, run, tmp_path, 100)
    assert seen == [65] * 2 + [33] * 6 + [65] * 2


def test_learning_rate(example: ModuleType) -> None:
    rates = [example.learning_rate(step, 150) for step in range(150)]
    assert rates[0] == pytest.approx(example.RATE / 20)
    assert max(rates) == pytest.approx(example.RATE)
    assert rates[-1] == pytest.approx(example.RATE / 20, rel=0.01)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_missing_data_is_no_traceback(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(["--task", "garments", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert example.main(["--task", "digits", "--out", str(tmp_path / "out")]) == 2
    assert "vtoken[demo]" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
def test_digits_are_learned(example: ModuleType, tmp_path: Path) -> None:
    """Sixty steps on half of the patches name far more than a tenth of the digits."""
    options = ["--task", "digits", "--setting", "mix", "--seed", "0", "--steps", "60", "--batch", "32"]
    assert example.main([*options, "--rounds", "1", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "train_clip.json").read_text())["rows"]
    assert row["accuracy_mean"] > 0.2
