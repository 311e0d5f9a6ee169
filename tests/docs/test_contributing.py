"""CONTRIBUTING.md: its map is the tree, its table the rules of tests/test_imports.py, what it names is there.

README.md leads to every page.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_imports import ALLOWED

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_map_is_the_table_of_imports() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| ([\w, ]*) ?\|$", TEXT, re.MULTILINE)
    told = {part: set(filter(None, allowed.strip().split(", "))) for part, allowed in rows}
    assert told == ALLOWED


def test_files_and_functions_that_it_names_are_there() -> None:
    paths = re.findall(r"`((?:vtoken|kernels|tests|benchmarks|docs|examples)/[\w./]*)`", TEXT)
    paths += re.findall(r"\]\(([\w./]+)\)", TEXT)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path
    named = re.findall(r"`(vtoken/[\w/]+\.py)`, `([\w.]+)`", TEXT)
    assert len(named) == 7
    for path, name in named:  # a function, a method or a table
        last = re.escape(name.rpartition(".")[2])
        made = rf"^\s*def {last}\(|^{last}(: [^=]+)? = "
        assert re.search(made, (ROOT / path).read_text(), re.MULTILINE), (path, name)


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w./]+\.md)(?:#[\w-]+)?\)", (ROOT / "README.md").read_text()))
    assert all((ROOT / path).is_file() for path in linked), linked
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")} | {"CONTRIBUTING.md"} <= linked
