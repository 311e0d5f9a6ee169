"""benchmarks/video.py: ratios are quotients, FLOPs those of the formulas, and wrong tokens get no ratio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.test_scripts import ROOT, run, script
from vtoken.accounting.prefill import Decoder, prefill_flops
from vtoken.ops import assign
from vtoken.ops.frames.resample import Assigned


@pytest.mark.slow
def test_small_run(tmp_path: Path) -> None:
    values, text = run(tmp_path, "video", "--small")
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in values["rows"]:
        parts.setdefault(row["part"], []).append(row)
    assert [row["name"] for row in parts["resampling"]] == ["model's own", "bilinear", "pool", "merge", "stride"]
    for row in parts["allocation"] + parts["resampling"]:
        assert row["of_tower"] == pytest.approx(row["seconds"] / row["tower_seconds"])
        assert 0 < row["seconds_min"] <= row["seconds"]
    full, quarter = parts["prefill"]
    decoder = Decoder(layers=2, width=256, mlp_width=256 * 11 // 4, kv_width=64)
    for row in (full, quarter):
        assert row["checked"]
        cost = prefill_flops(decoder, row["tokens"] + 60, causal=True)
        assert row["gflops"] == pytest.approx(cost / 1e9)
        assert row["flops_ratio"] == pytest.approx(cost / prefill_flops(decoder, 4 * 196 + 60, causal=True))
        assert row["time_ratio"] == pytest.approx(row["seconds"] / full["seconds"])
    assert (full["tokens"], quarter["tokens"]) == (784, 196)
    base, *rest = parts["published"]
    assert base["prefill_tflops"] == pytest.approx(195.29, abs=0.01)
    assert base["tower_tflops"] == pytest.approx(64 * 0.6655, abs=0.01)
    equal = [row for row in rest if row["budget"] == 12544]
    assert all(row["of_baseline"] > 1 for row in equal), "at an equal budget nothing gets faster"
    assert "QuoTA, 96 frames" in text


def test_wrong_tokens_get_no_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = script("video")

    def shuffled(grid: Any, t: int, mode: str = "bilinear") -> Assigned:
        out = assign(grid, t, mode)
        return out._replace(tokens=out.tokens.flip(0)) if 0 < t < 196 else out

    monkeypatch.setattr(module, "assign", shuffled)
    out, threads = tmp_path / "video.json", torch.get_num_threads()
    small = ["--small", "--rounds", "1", "--frames", "1", "--prefill-frames", "2"]
    try:
        assert module.main([*small, "--out", str(out)]) == 1
    finally:
        torch.set_num_threads(threads)
    refused = [row for row in json.loads(out.read_text())["rows"] if not row.get("checked", True)]
    assert refused
    assert all("time_ratio" not in row for row in refused)
    assert "no ratio" in capsys.readouterr().out
