"""The training loop of docs/tasks/train_clip.md does what the page says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/tasks/train_clip.md"


def test_its_loop_trains(capsys: pytest.CaptureFixture[str]) -> None:
    loop = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[0]
    names: dict[str, Any] = {}
    exec(compile(loop, str(PAGE), "exec"), names)
    assert names["clip"].unwrap() is names["model"]
    assert int(names["clip"].ema_step) == 2
    assert names["out"]["image_features"].shape == (3, 2, 16)
    assert float(capsys.readouterr().out) > 1
