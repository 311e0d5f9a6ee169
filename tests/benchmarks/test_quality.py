"""The figures of benchmarks/quality.py, and a small run of its classification half."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vtoken
from vtoken.accounting.compare import Quality
from vtoken.demo.clutter import DATA, WEIGHTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("quality")


@pytest.mark.parametrize(("successes", "low", "high"), [(8, 0.4902, 0.9433), (0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_wilson_interval(quality: ModuleType, successes: int, low: float, high: float) -> None:
    assert quality.wilson(successes, 10) == pytest.approx((low, high), abs=1e-4)


def test_top1(quality: ModuleType) -> None:
    base = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    right = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    figures = quality.top1(right, base)
    assert figures["top-1"] == Quality(0.375, pytest.approx(0.25 / 2**0.5))
    low, high = quality.wilson(3, 8)
    assert figures["top-1, 95 %"].mean - figures["top-1, 95 %"].spread == pytest.approx(low)
    assert figures["top-1, 95 %"].mean + figures["top-1, 95 %"].spread == pytest.approx(high)
    # Differences per canvas: 0 1 0 0, 1 1 0 -1; their variance is (8 * 4 - 4) / 8 / 7.
    assert figures["lost"] == Quality(0.25, pytest.approx(1.96 * (28 / 56 / 8) ** 0.5))
    assert quality.top1(base, base)["lost"] == Quality(0.0, 0.0)


def test_agreement(quality: ModuleType) -> None:
    cls, saliency = torch.randn(3, 8), torch.rand(3, 50)
    same = quality.agreement((cls, saliency), (cls, saliency))
    for name, expected in (("saliency corr", 1.0), ("saliency err", 0.0), ("CLS cosine", 1.0)):
        torch.testing.assert_close(same[name], torch.full((3,), expected))
    other = torch.rand(3, 50)
    found = quality.agreement((-cls, other), (cls, saliency))
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(other, saliency, strict=True)]
    torch.testing.assert_close(found["saliency corr"], torch.stack(pairs))
    torch.testing.assert_close(found["saliency err"], (other - saliency).abs().mean(1))
    torch.testing.assert_close(found["CLS cosine"], -torch.ones(3))


def test_only_drawing_methods_are_reseeded(quality: ModuleType) -> None:
    assert quality.reseeded(vtoken.RandomPrune(ratio=0.8), 5) == vtoken.RandomPrune(ratio=0.8, seed=5)
    assert quality.reseeded(vtoken.ToMe(ratio=0.8), 5) == vtoken.ToMe(ratio=0.8)


def test_missing_data_is_no_traceback(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    options = ["--small", "--measure", "clutter", "--data", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert quality.main(options) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not DATA.is_dir() or not WEIGHTS.is_file(), reason="needs dataset-fashion-mnist")
def test_small_classification(quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "file.json"
    methods = ["--method", "tome", "random_prune", "--ratio", "0.5"]
    assert quality.main(["--small", "--measure", "clutter", "--images", "40", *methods, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "file.json", "file_clutter.csv", "file_clutter.json", "file_clutter.png",
    ]  # fmt: skip
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["unpatched", "tome ratio=0.5", "random_prune ratio=0.5",
                          "low resolution 80 px", "low resolution 56 px"]  # fmt: skip
    assert {row["measure"] for row in rows.values()} == {"clutter"}
    assert [row["tokens"] for row in rows.values()] == [197, 2, 2, 101, 50]
    top1 = {name: row["quality"]["top-1"]["mean"] for name, row in rows.items()}
    assert top1["unpatched"] > 0.7
    assert rows["unpatched"]["quality"]["lost"] == {"mean": 0.0, "spread": 0.0}
    # What this task is for: with most tokens gone at random, the garment is gone.
    assert top1["random_prune ratio=0.5"] < top1["unpatched"] - 0.2
    for row in rows.values():
        assert row["quality"]["lost"]["mean"] == pytest.approx(top1["unpatched"] - row["quality"]["top-1"]["mean"])
    assert "2 seeds of 40 test canvases" in capsys.readouterr().out
