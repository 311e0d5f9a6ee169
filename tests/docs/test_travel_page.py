"""The programs of docs/travel.md run, one after the other, and its file is one that can be loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm

import vtoken

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "travel.md").read_text()


def test_its_programs_run() -> None:
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    found = []
    for program in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(program, "docs/travel.md", "exec"), names)
        found.append(vtoken.config_of(names["again"]) if "again" in names else None)
    assert found[-2:] == [vtoken.ToMe(r=8), vtoken.Sparsifiner()]
    assert {k: v.tolist() for k, v in names["again"].state_dict().items()} == {
        k: v.tolist() for k, v in names["vit"].state_dict().items()
    }


def test_its_file_is_read() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    model = vtoken.load_settings(timm.create_model("test_vit"), json.loads(text))
    assert vtoken.config_of(model) == vtoken.ToMe(r=8)
