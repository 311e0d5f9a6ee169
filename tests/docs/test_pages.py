"""The pages of docs: what docs/mechanism.md shows runs, what is cited is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path for path in (ROOT / "docs").rglob("*.md")}
#: Number of a section, and what joins several of them: "6, 8 and 9.2", "3 to 8".
_NUMBER = r"\d+(?:\.\d+)*"
_JOINED = rf"{_NUMBER}(?:(?:, (?:and )?| and | to ){_NUMBER})*"


def citing() -> list[Path]:
    """Every file that may cite a page."""
    folders = ("vtoken", "kernels", "tests", "benchmarks", "examples", "docs")
    found = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md") and "_cache" not in str(p)]
    return [*found, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def sections(page: Path) -> set[str]:
    """Numbers of the headings of a page."""
    return set(re.findall(rf"^##+ ({_NUMBER})\.? ", page.read_text(), re.MULTILINE))


def missing(text: str, *, short: bool) -> list[str]:
    """What a text cites that is not there; `short` names of pages count, too, as pages cite each other by them."""
    found = []
    prefix = r"docs/(?:(?:methods|extend|tasks|api)/)?"
    prefix = rf"(?:{prefix})?" if short else prefix
    for match in re.finditer(rf"(?<![\w/])({prefix})([a-z_]+\.md)(?:\s+({_JOINED}))?", text):
        folder, name, numbers = match.groups()
        if folder and not (ROOT / folder / name).is_file():
            found.append(match[0])
        elif name in PAGES:
            known = sections(PAGES[name])
            found += [f"{name} {n}" for n in re.findall(_NUMBER, numbers or "") if n not in known]
    return found


def test_the_toy_runs() -> None:
    (toy,) = re.findall(r"```python\n(.*?)```", PAGES["mechanism.md"].read_text(), re.DOTALL)
    exec(compile(toy, "docs/mechanism.md", "exec"), {"__name__": "toy"})


def test_every_name_on_a_model_is_in_the_glossary() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "vtoken").rglob("*.py"))
    used = set(re.findall(r"\b_vtoken\w*", text))
    told = set(re.findall(r"`(_vtoken\w*)`", PAGES["mechanism.md"].read_text()))
    assert used == told


def test_cited_pages_and_sections_exist() -> None:
    wrong = {}
    for path in citing():
        where = path.relative_to(ROOT)
        if path != Path(__file__):  # which cites what is not there, below
            wrong[str(where)] = missing(path.read_text(), short=where.parts[0] == "docs")
    assert {path: cited for path, cited in wrong.items() if cited} == {}


def test_no_page_outside_the_repository_is_cited() -> None:
    """Code names a page by its path from the root, and what it names is there (above)."""
    elsewhere = re.compile(r"(?<![\w/])(?!README|CHANGELOG|CONTRIBUTING)\w+\.md\b")
    for path in citing():
        if path.suffix == ".py" and path.parent.name != "docs":
            assert not elsewhere.findall(path.read_text()), path


@pytest.mark.parametrize(
    "text",
    [
        "see docs/methods/nowhere.md",
        "docs/extend/nowhere.md",
        "docs/extend/method.md 99",
        "docs/performance.md 99",
        "docs/methods/quota.md 6, 99",
    ],
)
def test_what_is_not_there_is_found(text: str) -> None:
    assert missing(text, short=False)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_sections_are_numbered_once(page: str) -> None:
    numbers = re.findall(rf"^##+ ({_NUMBER})\.? ", PAGES[page].read_text(), re.MULTILINE)
    assert len(numbers) == len(set(numbers))
