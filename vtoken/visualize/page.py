"""Results as one HTML file that needs nothing else: a table, a plot, pictures behind a choice and a slider.

The file holds the JSON of the results as it is and pictures as data URIs; the script in `page.html` draws both.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from PIL.Image import Image

_PLACE = "__DATA__"
_QUALITY = 85  # of the JPEGs, colours at full resolution: borders are thin


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a view.

    Args:
        picture: what is seen.
        caption: below it.
        values: numbers that go with it, by name; shown after the caption.
        share: a bar below, from 0 to 1; None: no bar.
    """

    picture: Image
    caption: str
    values: Mapping[str, float] = field(default_factory=dict)
    share: float | None = None


@dataclass(frozen=True, eq=False)
class View:
    """Pictures for every choice from a list and every step of a slider.

    Args:
        title, text: above.
        choice, choices: what the list chooses, and from what.
        slider, steps: what the slider moves, and its values from left to right.
        panels: row by row of choices, step by step, what is shown.

    Raises:
        ShapeError: if there are not panels for each step of each choice.
    """

    title: str
    text: str
    choice: str
    choices: Sequence[str]
    slider: str
    steps: Sequence[float]
    panels: Sequence[Sequence[Sequence[Panel]]]

    def __post_init__(self) -> None:
        given = [len(steps) for steps in self.panels]
        if not self.choices or not self.steps or given != [len(self.steps)] * len(self.choices):
            raise ShapeError(
                f"the view {self.title!r} has {len(self.choices)} choices of {len(self.steps)} steps, at least one "
                f"each, and panels for {given}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, for the JSON file of the results."""
        return {
            "title": self.title,
            "text": self.text,
            "choice": {"name": self.choice, "values": list(self.choices)},
            "slider": {"name": self.slider, "values": list(self.steps)},
            "panels": [
                [[{"caption": p.caption, "values": dict(p.values), "share": p.share} for p in panels] for panels in row]
                for row in self.panels
            ],
        }


def write_page(path: Path, results: Path, views: Sequence[View], *, title: str, about: str, legend: str) -> Path:
    """Write one HTML file that needs no network and no other file; returns its path.

    Args:
        path: of the page.
        results: the JSON file with "rows" as `vtoken.accounting.compare.write` wrote it, and with "views", the
            `to_dict()` of `views`; the page holds it as it is.
        views: the same with their pictures.
        title, about, legend: the heading, a line above the table, lines below it.

    Raises:
        ConfigError: if the JSON file has other views.
        ImportError: if pillow is missing.
    """
    # JSON has no NaN, which Python writes for a figure that is none; the page shows a dash.
    found = json.loads(results.read_text(), parse_constant=lambda _: None)
    if found.get("views") != json.loads(json.dumps([view.to_dict() for view in views])):
        raise ConfigError(f"{results} has other views than the page should show; write their to_dict() into it")
    pictures: dict[str, int] = {}  # the same picture in several places is kept once
    places = [
        [[[pictures.setdefault(_uri(p.picture), len(pictures)) for p in panels] for panels in row] for row in v.panels]
        for v in views
    ]
    data = {"results": found, "title": title, "about": about, "legend": legend,
            "pictures": list(pictures), "places": places}  # fmt: skip
    # Inside a script element only "<" could end it; the escape is the same text to a reader of JSON.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    head, _, tail = resources.files("vtoken.visualize").joinpath("page.html").read_text("utf-8").partition(_PLACE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + text + tail, encoding="utf-8")
    return path


def _uri(picture: Image) -> str:
    content = io.BytesIO()
    picture.convert("RGB").save(content, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
