"""The README's training sample runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import vtoken
from tests.clip.models import TEXT
from tests.helpers import images

README = Path(__file__).resolve().parents[2] / "README.md"


def test_sample_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    [snippet] = [text for text in snippets if "AttentiveMaskCLIP" in text]
    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    model = open_clip.CLIP(16, vision, TEXT)
    crop = vtoken.MultiViewCrop(64)
    batch = torch.utils.data.default_collate([crop(x) for x in images((3, 90, 80), 3)])
    names: dict[str, Any] = {"model": model, "steps": 9, "batch": batch, "text": torch.ones(3, 8, dtype=torch.int64)}
    exec(compile(snippet, "README.md", "exec"), names | {"torch": torch, "vtoken": vtoken}, names)
    assert names["clip"].unwrap() is model
    assert int(names["clip"].ema_step) == 1
    assert names["out"]["image_features"].shape == (3, 2, 16)
    assert float(capsys.readouterr().out) > 1
