"""The timing frame: every variant runs the same number of times, the order rotates, warm-ups do not count."""

from __future__ import annotations

import torch

from vtoken.accounting import compare
from vtoken.accounting.ideal import Ideal
from vtoken.accounting.timing import interleaved
from vtoken.methods.pitome import PiToMe


def test_rounds_are_interleaved_and_rotated() -> None:
    order: list[str] = []
    prepared: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(variants, rounds=4, warmup=1, prepare=prepared.append)
    assert order == prepared
    assert len(order) == 15
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))
    assert len({tuple(order[i : i + 3]) for i in range(0, 15, 3)}) == 3
    assert all(t.samples == 4 and t.minimum <= t.median for t in times.values())


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
    assert rows[1].efficiency * rows[1].flops_factor == rows[1].speedup
    assert rows[1].tokens < rows[0].tokens
    paths = compare.write(rows, tmp_path, "stem", {"command": "test"})
    assert [p.suffix for p in paths] == [".json", ".csv"]
    assert len(paths[1].read_text().splitlines()) == 4
    assert "unpatched" in compare.table(rows)


def test_ideal_has_the_same_token_counts() -> None:
    import timm

    import vtoken

    model = timm.create_model("test_vit").eval()
    assert vtoken.plan(model, Ideal(ratio=0.8)) == vtoken.plan(model, PiToMe(ratio=0.8))
    ideal, real = vtoken.report(model, Ideal(ratio=0.8)), vtoken.report(model, PiToMe(ratio=0.8))
    assert ideal.macs_after == real.macs_after - real.matching_macs
    assert "ideal" not in vtoken.methods()
