"""The page of results: it holds what the JSON file holds, needs nothing else, and a real browser draws it."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import browser
from tests.visualize.pages import read_page
from vtoken.accounting.compare import Quality, Row, write
from vtoken.errors import ConfigError, ShapeError
from vtoken.visualize.page import Panel, View, write_page

image = pytest.importorskip("PIL.Image")

#: Ends a script or an attribute, opens an element, and says so in the title of the page if it runs.
NASTY = """</script><img src=x onerror="document.title='ran'">"'&<!--"""
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 200, 0))


def row(name: str, gmacs: float, value: float, speedup: float = 1.234) -> Row:
    method = {} if name == "unpatched" else {"method": name.partition(" ")[0]}
    quality = {"q": Quality(value, 0.1), NASTY: Quality(value / 2, 0.0)}
    return Row(name, method, 5, gmacs, 1.5, speedup, 1.1, 0.9, None, 12.34, quality)


ROWS = [row("unpatched", 4.0, 1.0), row("pitome 0.9", 3.0, 0.9), row("pitome 0.8", 2.0, 0.8), row(NASTY, 2.5, 0.7)]


def view(title: str = "Groups") -> View:
    """Two choices of two steps: a picture of a colour of its own, and one that all share."""
    panels = [
        [[Panel(image.new("RGB", (16, 16), COLOURS[2 * i + j]), f"cell {i} {j}", {"groups": 10 * i + j}, j / 4),
          Panel(image.new("RGB", (8, 8), "white"), NASTY)] for j in range(2)]
        for i in range(2)
    ]  # fmt: skip
    return View(title, NASTY, "photograph", ["first", NASTY], "ratio", [0.95, 0.9], panels)


def page(folder: Path, rows: list[Row] = ROWS) -> Path:
    views = [view(), view("Second")]
    [results, _] = write(rows, folder, "demo", {"command": "demo", "views": [v.to_dict() for v in views]})
    return write_page(folder / "new" / "index.html", results, views, title=NASTY, about="about", legend="legend")


def test_the_page_holds_what_the_json_holds_and_nothing_of_it_is_markup(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    data, tags = read_page(page(tmp_path))
    assert data["results"] == json.loads((tmp_path / "demo.json").read_text())
    assert [found["name"] for found in data["results"]["rows"]] == [r.name for r in ROWS]
    assert data["title"] == NASTY
    rows = [replace(r, name="a", quality={}) for r in ROWS]
    [results, _] = write(rows, plain, "demo", {"views": []})
    _, without = read_page(write_page(plain / "i.html", results, [], title="", about="", legend=""))
    assert tags == without, "the page has the elements of its template, whatever it shows"


def test_pictures_lie_in_the_page_once_each(tmp_path: Path) -> None:
    data, _ = read_page(page(tmp_path))
    assert len(data["pictures"]) == 5 == len(set(data["pictures"]))
    for i in range(2):
        for j in range(2):
            for places in data["places"]:
                own, shared = places[i][j]
                kind, _, content = data["pictures"][own].partition(",")
                assert kind == "data:image/jpeg;base64"
                pixel = image.open(io.BytesIO(base64.b64decode(content))).getpixel((8, 8))
                assert max(abs(a - b) for a, b in zip(pixel, COLOURS[2 * i + j], strict=True)) < 8
                assert shared == data["places"][0][0][0][1]


def test_a_figure_that_is_none_is_shown_as_none(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], quality={"q": Quality(math.nan, math.inf)})]
    data, _ = read_page(page(tmp_path, rows))
    assert data["results"]["rows"][0]["quality"]["q"] == {"mean": None, "spread": None}


def test_views_that_do_not_fit(tmp_path: Path) -> None:
    whole = view()
    with pytest.raises(ShapeError, match=r"'Groups' has 2 choices of 2 steps.*panels for \[2\]"):
        replace(whole, panels=whole.panels[:1])
    with pytest.raises(ShapeError, match=r"at least one each, and panels for \[\]"):
        replace(whole, choices=[], panels=[])
    [results, _] = write(ROWS, tmp_path, "demo", {})
    with pytest.raises(ConfigError, match=r"demo\.json has other views"):
        write_page(tmp_path / "index.html", results, [whole], title="", about="", legend="")
    assert not (tmp_path / "index.html").exists()


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if browser.PROGRAM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with browser.Browser() as found:
        yield found


@pytest.fixture
def opened(chromium: browser.Browser, tmp_path: Path) -> Iterator[browser.Browser]:
    """A browser with the page of `ROWS`; whatever a test did there, nothing was asked of a network or went wrong."""
    chromium.requested.clear()
    path = page(tmp_path)
    chromium.open(path)
    yield chromium
    assert chromium.run("document.title") == NASTY, "text of the data ran as a script"
    assert [url for url in chromium.requested if not url.startswith("data:")] == [path.as_uri()]
    assert not chromium.errors


def test_a_browser_shows_every_row(opened: browser.Browser) -> None:
    head = opened.run("[...document.querySelectorAll('th')].map(e => e.textContent)")
    body = opened.run("[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(e => e.textContent))")
    assert [line[0] for line in body] == [r.name for r in ROWS]
    for line, r in zip(body, ROWS, strict=True):
        cells = dict(zip(head, line, strict=True))
        assert cells["tokens"] == "5"
        assert cells["ideal"] == "\N{EN DASH}"
        for name, value in {
            "GMACs": r.gmacs,
            "FLOPs x": 1.5,
            "speed x": r.speedup,
            "(min)": 1.1,
            "effic.": 0.9,
        }.items():
            assert float(cells[name]) == pytest.approx(value, abs=0.0051)
        for name, quality in r.quality.items():
            mean, _, spread = cells[name].partition(" ± ")
            assert [float(mean), float(spread)] == pytest.approx([quality.mean, quality.spread], abs=0.00051)


def test_a_browser_tells_a_point_under_the_mouse_and_by_keyboard(opened: browser.Browser) -> None:
    points = "[...document.querySelectorAll('#pareto circle.point')]"
    names = [title.partition(": q")[0] for title in opened.run(f"{points}.map(e => e.textContent)")]
    assert sorted(names) == sorted(r.name for r in ROWS)
    told = "document.getElementById('told').textContent"
    assert opened.run(told) == ""
    for number, name in enumerate(names):
        opened.move_to(f"{points}[{number}]")
        [r] = [r for r in ROWS if r.name == name]
        assert opened.run(told).startswith(f"{name}: q {r.quality['q'].mean:.3f} ± 0.100, {r.gmacs:.2f} GMACs, 12.3 ms")
    opened.run(f"{points}[0].focus()")
    assert opened.run(told).startswith(names[0])
    # The lines are where the figures are: cheaper is further left, better further up.
    places = opened.run(f"{points}.map(e => [+e.getAttribute('cx'), +e.getAttribute('cy')])")
    order = sorted(range(len(names)), key=lambda i: next(r.gmacs for r in ROWS if r.name == names[i]))
    assert order == sorted(order, key=lambda i: places[i][0])
    order = sorted(range(len(names)), key=lambda i: next(r.quality["q"].mean for r in ROWS if r.name == names[i]))
    assert order == sorted(order, key=lambda i: -places[i][1])
    choose = "(s => (s.selectedIndex = 1, s.dispatchEvent(new Event('change'))))(document.getElementById('quality'))"
    opened.run(choose)
    assert opened.run(f"{points}[0].textContent").startswith(f"{names[0]}: {NASTY} 0.500")


def test_a_browser_moves_the_slider_and_shows_its_pictures(opened: browser.Browser, tmp_path: Path) -> None:
    data, _ = read_page(tmp_path / "new" / "index.html")
    section = "document.querySelectorAll('#views section')[0]"
    shown = f"[...{section}.querySelectorAll('figure')].map(e => [e.querySelector('img').src, e.innerText.trim()])"
    other = shown.replace("[0]", "[1]")
    untouched = opened.run(other)
    for i in range(2):
        opened.run(
            f"(s => (s.selectedIndex = {i}, s.dispatchEvent(new Event('change'))))({section}.querySelector('select'))"
        )
        for key, code, j in (("Home", 36, 0), ("ArrowRight", 39, 1)):
            opened.run(f"{section}.querySelector('input').focus()")
            opened.press(key, code)
            assert opened.run(f"{section}.querySelector('output').textContent") == ("0.95", "0.9")[j]
            own, shared = opened.run(shown)
            picture, other_picture = data["places"][0][i][j]
            assert own == [data["pictures"][picture], f"cell {i} {j}: groups {10 * i + j}"]
            assert shared == [data["pictures"][other_picture], NASTY]
            assert opened.run(f"[...{section}.querySelectorAll('meter')].map(e => e.value)") == [j / 4]
    assert opened.run(other) == untouched
    assert opened.run("[...document.images].every(e => e.complete && e.naturalWidth > 0)")


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_needs_no_scrolling_sideways(opened: browser.Browser, width: int) -> None:
    opened.call("Emulation.setDeviceMetricsOverride", **(opened.size | {"width": width}))
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    opened.call("Emulation.setDeviceMetricsOverride", **opened.size)
