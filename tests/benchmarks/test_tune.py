"""benchmarks/tune.py: tuning and test images are apart, and intervals are paired over what is drawn together."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.benchmarks.test_scripts import ROOT, run


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tune")


def test_intervals_are_paired(tune: ModuleType) -> None:
    assert tune.grouped(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).tolist() == [2.0, 5.0]
    changes = [{"tuned": torch.tensor([1.0, 2.0]), "constant ratio": torch.tensor([2.0, 4.0]),
                "constant r": torch.tensor([1.0, 2.0])}] * 2  # fmt: skip
    figures = {name: {"flops": 0.5, "change": 1.0} for name in ("constant ratio", "constant r", "tuned")}
    found = tune.summary("tome", 0.5, [{"form": "falling", "figures": figures}] * 2, changes)
    assert found["units"] == 4
    assert found["against"]["constant ratio"] == pytest.approx(
        {"quotient": 0.5, "difference": -1.5, "half": 1.96 * (1 / 3) ** 0.5 / 2}
    )
    assert found["against"]["constant r"] == {"quotient": 1.0, "difference": 0.0, "half": 0.0}


def test_whole_photographs_are_for_tuning_or_for_the_test(tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs that are one grey each tell which a crop comes from."""
    grey = torch.arange(11.0)[:, None, None, None].expand(11, 3, 448, 448)
    monkeypatch.setattr(tune, "load_photographs", lambda side: ([], grey))
    monkeypatch.setattr(tune, "normalise", lambda images: images)
    found = tune.dense(argparse.Namespace(crops=2), 0)
    tuning, test = (images[:, 0, 0, 0].round().int().tolist() for images in found[:2])
    assert found.tuning.shape == (14, 3, 224, 224)
    assert not set(tuning) & set(test)
    assert set(tuning) | set(test) == set(range(11))
    assert [len(set(test[i : i + 2])) for i in (0, 2, 4, 6)] == [1, 1, 1, 1]
    assert found.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_small_run(tune: ModuleType, tmp_path: Path) -> None:
    if not tune.DATA.is_dir():
        pytest.skip("needs Fashion-MNIST")
    values, text = run(tmp_path, "tune", "--small")
    parts = [row["part"] for row in values["rows"]]
    assert parts == ["seed", "seed", "summary"]
    for row in values["rows"][:2]:
        tuned = row["figures"]["tuned"]
        assert tuned["tuning"] <= min(row["figures"][name]["tuning"] for name in tune.CONSTANT)
        assert tuned["flops"] <= 0.5
    assert "of constant r's change" in text
