"""docs/models.md says what is true: its tables of classes here, its names of timm in tests/hosts/test_timm_names.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "make_models.py"


def test_the_tables_of_classes_are_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = SCRIPT.with_name("models.md").read_text()
    tables = script.tables()
    told = {title: text for title, text in tables.items() if f"## {title}\n" in page}
    if not told:
        pytest.skip(f"the page was written for other versions than {', '.join(tables)}")
    for title, text in told.items():
        assert f"## {title}\n\n{text}\n" in page, "python docs/make_models.py writes the page anew"
    assert len(tables) == 2
