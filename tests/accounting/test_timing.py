"""The timing frame: every variant runs the same number of times, the order rotates, warm-ups do not count."""

from __future__ import annotations

import pytest
import torch

from vtoken.accounting import compare, timing
from vtoken.accounting.ideal import Ideal
from vtoken.accounting.shadow import shared_copy
from vtoken.accounting.timing import interleaved
from vtoken.methods.merging.pitome import PiToMe


def test_rounds_are_interleaved_and_rotated() -> None:
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(variants, rounds=4, warmup=1)
    assert len(order) == 15
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))
    assert len({tuple(order[i : i + 3]) for i in range(0, 15, 3)}) == 3
    assert all(t.samples == 4 and t.minimum <= t.median for t in times.values())


def test_several_calls_make_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10000, 6))
    monkeypatch.setattr(timing.time, "thread_time", lambda: next(clock))
    count: list[int] = []
    times = interleaved({"a": lambda: count.append(1)}, rounds=3, warmup=0, calls=4)
    assert len(count) == 12
    assert times["a"] == timing.Timing(1.5, 1.5, 3)


def test_samples_of_a_busy_machine_are_dropped_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every run takes 1 s of wall time; the process waits for 0.03 s of the first and third run, 0.01 s of the others.
    wall, waits = iter(range(100)), [0.03, 0.01, 0.03, *[0.01] * 20]
    readings = iter([value for i, wait in enumerate(waits) for value in (sum(waits[:i]), sum(waits[:i]) + wait)])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(wall)))
    monkeypatch.setattr(timing, "run_delay", lambda: next(readings))
    monkeypatch.setattr(timing, "stopwatch_for", lambda device: timing._wall_time)
    assert interleaved({"a": lambda: None}, rounds=3, warmup=0)["a"] == timing.Timing(1.0, 1.0, 3, 2)


def test_a_machine_that_is_always_busy_gives_no_clean_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    delay = iter(range(1000))
    monkeypatch.setattr(timing, "run_delay", lambda: float(next(delay)))
    monkeypatch.setattr(timing, "stopwatch_for", lambda device: timing._wall_time)
    found = interleaved({"a": lambda: None}, rounds=3, warmup=0)["a"]
    assert (found.samples, found.dropped) == (0, 6)
    assert found.median > 0


def test_the_clock_fits_the_device() -> None:
    assert torch.get_num_threads() == 1
    assert timing.stopwatch_for(torch.device("cpu")) is timing._cpu_time
    assert timing.stopwatch_for(torch.device("cuda")) is timing._device_time
    torch.set_num_threads(2)
    try:
        assert timing.stopwatch_for(torch.device("cpu")) is timing._wall_time
    finally:
        torch.set_num_threads(1)
    assert timing.run_delay() >= 0


def test_a_shared_copy_costs_no_memory_and_is_patched_alone() -> None:
    import timm

    import vtoken

    model = timm.create_model("test_vit").eval()
    copied = shared_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    vtoken.apply(copied, PiToMe(ratio=0.8))
    assert not vtoken.is_applied(model)


def test_compare_leaves_the_model_alone_and_rows_are_consistent(tmp_path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = model(images)

    def quality(config: object) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"error": (model(images) - before).abs().mean(1)}

    rows = compare.compare(model, [PiToMe(ratio=0.8), PiToMe(ratio=1.0)], images, rounds=2, quality=quality)
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert [row.name for row in rows] == ["unpatched", "pitome ratio=0.8", "pitome ratio=1"]
    assert rows[0].quality["error"].mean == 0 == rows[2].quality["error"].mean
    assert rows[1].quality["error"].mean > 0
    assert rows[1].efficiency * rows[1].flops_factor == pytest.approx(rows[1].speedup)
    assert rows[1].tokens < rows[0].tokens
    paths = compare.write(rows, tmp_path, "stem", {"command": "test"})
    assert [p.suffix for p in paths] == [".json", ".csv"]
    assert len(paths[1].read_text().splitlines()) == 4
    assert "unpatched" in compare.table(rows)


def test_ideal_has_the_same_token_counts() -> None:
    import timm

    import vtoken

    model = timm.create_model("test_vit").eval()
    narrow = Ideal(removed=vtoken.plan(model, PiToMe(ratio=0.8)).removed)
    assert vtoken.plan(model, narrow) == vtoken.plan(model, PiToMe(ratio=0.8))
    ideal, real = vtoken.report(model, narrow), vtoken.report(model, PiToMe(ratio=0.8))
    assert ideal.macs_after == real.macs_after - real.matching_macs
    assert "ideal" not in vtoken.methods()
