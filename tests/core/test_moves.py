"""How often Python goes from one file of vtoken to another, which a reader who follows the code does as well.

A move is a call that begins in another file than the call before it. Counts are upper bounds: they may fall.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import timm
import torch

import vtoken

ROOT = f"{Path(vtoken.__file__).parent}/"
#: Of a counter of operators, which torch calls at each.
METER = "accounting/meter.py"


def calls(run: Callable[[], Any]) -> list[tuple[str, str]]:
    """File (from the package on) and name of every function of vtoken that `run` calls, in order."""
    found: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT):
            found.append((code.co_filename.removeprefix(ROOT), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def moves(found: list[tuple[str, str]]) -> int:
    files = [file for file, _ in found if file != METER]
    return sum(a != b for a, b in itertools.pairwise(files))


@pytest.mark.parametrize(("config", "most"), [(vtoken.PiToMe(ratio=0.9), 24), (vtoken.ToMe(r=8), 23)], ids=str)
def test_the_trip_through_a_block(config: vtoken.MethodConfig, most: int) -> None:
    model, images = vtoken.apply(timm.create_model("test_vit").eval(), config), torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        model(images)
        found = calls(lambda: model(images))
    starts = [i for i, (_, name) in enumerate(found) if name == "BlockMixin.forward"]
    trips = [found[a : b + 1] for a, b in itertools.pairwise(starts)]  # into the next block
    assert len(trips) == 5
    assert all("Merging.reduce" in dict(map(reversed, trip)) for trip in trips)  # type: ignore[arg-type]
    assert max(map(moves, trips)) <= most


def test_a_report_checks_the_structure_once() -> None:
    model, config = timm.create_model("test_vit").eval(), vtoken.PiToMe(ratio=0.9)
    vtoken.report(model, config)
    found = calls(lambda: vtoken.report(model, config))
    assert [name for _, name in found].count("TimmAdapter.spec") == 1
    assert moves(found) <= 248
