"""docs/extend: the programs there run as they are written, and none is longer than a page can show."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtoken.core import config, host

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "extend"
#: Kernels need a process of their own: test_extend_kernel.py.
PAGES = sorted({path.name for path in FOLDER.glob("*.md")} - {"kernel.md"})


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is forgotten after it."""
    methods, adapters = dict(config._registry), list(host._registered)
    yield
    config._registry.clear()
    config._registry.update(methods)
    host._registered[:] = adapters


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run(page: str, registries: None) -> None:
    programs = re.findall(r"```python\n(.*?)```", (FOLDER / page).read_text(), re.DOTALL)
    assert programs
    module = types.ModuleType(f"docs_extend_{page.partition('.')[0]}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        for program in programs:
            assert len([line for line in program.splitlines() if line.strip()]) <= 40
            exec(compile(program, f"docs/extend/{page}", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
