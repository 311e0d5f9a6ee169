"""CONTRIBUTING.md: its map is the tree, its table the rules of tests/test_imports.py, what it names is there.

README.md leads to every page, by itself or by the pages that it leads to; so does the site's navigation.
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


def links(page: Path) -> list[tuple[Path, str]]:
    """Pages that a page links to, with the part of them that it names."""
    found = re.findall(r"\]\(([\w./]+\.md)?(?:#([\w-]+))?\)", page.read_text())
    return [((page.parent / path).resolve() if path else page, part) for path, part in found if path or part]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_leads_to_every_page() -> None:
    seen, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        for target, part in links(page):
            assert target.is_file(), (page, target)
            assert not part or part in anchors(target), (page, target, part)
            waiting += {target} - seen
    assert {*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"} <= seen


def test_the_sites_navigation_has_every_page_once() -> None:
    listed = re.findall(r"^ +- [^:]+: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    outside = re.findall(r'"([\w/]+\.md)": "(\w+\.md)"', (ROOT / "docs" / "hooks.py").read_text())
    assert len(outside) == 5
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*pages, *(site for _, site in outside)])


def test_the_site_describes_every_public_name_once() -> None:
    import vtoken
    import vtoken.hosting
    import vtoken.testing

    told = re.findall(
        r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.MULTILINE
    )
    parts = (vtoken, vtoken.ops, vtoken.nn, vtoken.train, vtoken.video, vtoken.serving, vtoken.hosting, vtoken.testing)
    public = {name for part in (*parts, vtoken.visualize) for name in part.__all__}
    assert sorted(name.rpartition(".")[2] for name in told) == sorted(
        public - {"nn", "ops", "train", "video", "visualize", "viz"}
    )
