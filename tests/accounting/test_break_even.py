"""Models that are too small for a method: said by counts in a report, by the clock in a bench."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vtoken
from vtoken.__main__ import main
from vtoken.accounting import break_even as part
from vtoken.accounting import compare
from vtoken.accounting.timing import Timing
from vtoken.ops.merging import native

PITOME = vtoken.PiToMe(ratio=0.8)


def clock(
    monkeypatch: pytest.MonkeyPatch, plain: float, step: float, image: float, *, lucky: bool = False
) -> list[int]:
    """Times of a machine on which a method takes `step` a batch and `image` an image, the model `plain` an image."""
    seen: list[int] = []
    batches: list[int] = []
    monkeypatch.setattr(part, "runner", lambda model, config, images: batches.append(len(images)))

    def times(runs: Any, **options: Any) -> dict[str, Timing]:
        size = batches[-1]
        seen.append(size)
        stock, patched = plain * size, step + image * size
        return {"plain": Timing(stock / (2 if lucky else 1), stock, 5), "patched": Timing(patched, patched, 5)}

    monkeypatch.setattr(part, "interleaved", times)
    return seen


def row(speedup: float = 0.8, speedup_min: float = 0.8, factor: float = 1.5, ideal: float | None = 0.8) -> compare.Row:
    return compare.Row("tome r=8", {}, 5, 1.0, factor, speedup, speedup_min, speedup / factor, ideal, 1.0, {})


@pytest.mark.parametrize(("step", "batch"), [(9.0, 32), (13.0, 32), (15.0, 32), (17.0, 64)])
def test_the_first_batch_that_pays_for_the_step(step: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # n images save n / 2: more than the step from n = 2 * step on; batches are 16, 32, 64 ...
    seen = clock(monkeypatch, plain=0.01, step=step / 100, image=0.005)
    found = part.break_even(torch.nn.Identity(), PITOME, torch.zeros(8, 3, 4, 4))
    first = next(n for n in (16, 32, 64) if n > 2 * step)
    assert first == batch
    assert found.batch == batch
    assert seen == [n for n in (16, 32, 64) if n <= batch]
    assert found.tried[-1] == (batch, pytest.approx(0.01 * batch / (step / 100 + 0.005 * batch)))


def test_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = clock(monkeypatch, plain=0.001, step=0.1, image=0.001)
    assert part.break_even(torch.nn.Identity(), PITOME, torch.zeros(2, 3, 4, 4)).batch is None
    assert seen == [4, 8, 16, 32]
    seen = clock(monkeypatch, plain=0.3, step=0.1, image=0.4)
    assert part.break_even(torch.nn.Identity(), PITOME, torch.zeros(2, 3, 4, 4)).batch is None
    assert seen == [4], "a batch that takes more than a second is the last"
    seen = clock(monkeypatch, plain=0.01, step=0.0, image=0.009, lucky=True)
    assert part.break_even(torch.nn.Identity(), PITOME, torch.zeros(2, 3, 4, 4)).batch is None, "minima disagree"


def test_what_counts_as_slower() -> None:
    assert part.is_slower(row())
    assert not part.is_slower(row(speedup_min=1.1))
    assert not part.is_slower(row(speedup=1.1))
    assert not part.is_slower(row(factor=1.0)), "nothing was to be saved"


def test_the_sentence() -> None:
    found = part.BreakEven(((16, 0.9), (32, 1.04)), 32)
    assert part.told(row(), 8, found) == (
        "tome r=8 is slower than the model itself at batch 8 (x0.80, plain narrowing x1.20): there is too little "
        "arithmetic to save there for what the method costs. Measured: first faster at batch 32 (x1.04)"
    )
    never = part.told(row(ideal=None), 8, part.BreakEven(((16, 0.9),), None))
    assert "(x0.80): there" in never
    assert "not faster up to batch 16 (x0.90)" in never


def test_a_real_run_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    model = timm.create_model("test_vit").eval()
    monkeypatch.setattr(part, "DOUBLINGS", 1)
    found = part.break_even(model, PITOME, torch.randn(1, 3, 160, 160), rounds=1)
    assert [size for size, _ in found.tried] == [2]
    assert not vtoken.is_applied(model)
    monkeypatch.setattr("vtoken.cli.bench.is_slower", lambda row: True)
    monkeypatch.setattr("vtoken.cli.bench.break_even", lambda *args, **options: part.BreakEven(((4, 1.5),), 4))
    command = f"bench --model test_vit --method tome --ratio 0.8 --batch 2 --rounds 1 --out {tmp_path}"
    assert main(shlex.split(command)) == 0
    assert "tome ratio=0.8 is slower than the model itself at batch 2" in capsys.readouterr().out
    values = json.loads((tmp_path / "test_vit.json").read_text())
    assert values["break_even"] == {"tome ratio=0.8": {"tried": [[4, 1.5]], "batch": 4}}


def test_a_report_tells_small_models_by_what_a_block_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    small = vtoken.report(timm.create_model("test_vit"), vtoken.PiToMe(ratio=0.95))
    narrowed = [layer for layer in small.layers if layer.tokens_out < layer.tokens_in]
    each = (small.macs_before - small.macs_after) / len(narrowed) / 1e6
    assert 0 < each < 2
    assert small.note.startswith(f"small: a block that loses tokens saves {each:.1f} MMACs an image")
    assert small.note in str(small)
    assert small.to_dict()["note"] == small.note
    large = vtoken.report(timm.create_model("deit_tiny_patch16_224"), PITOME)
    assert large.note == ""
    assert "small" not in str(large)
    between = vtoken.report(timm.create_model("test_vit"), PITOME)
    if not native.MISSING and native.native.INSTRUCTIONS:
        assert between.note == ""
    monkeypatch.setattr(native, "MISSING", "left out")  # a step by torch takes four times as long
    assert "below about 8" in between.note


def test_a_report_tells_where_nothing_can_be_won() -> None:
    model = timm.create_model("test_vit")
    nothing = vtoken.report(model, vtoken.ToMe(r=0))
    assert nothing.macs_after == nothing.macs_before
    assert nothing.note == ""
    dear = vtoken.report(model, vtoken.PiToMe(r=1, layers=[5]))
    assert dear.macs_after >= dear.macs_before, "one token fewer behind the last attention, and all pairs compared"
    assert dear.note == "nothing can be won: the method spends as many multiply-adds as it saves, or more"
