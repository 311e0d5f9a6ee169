"""Reading a page of `vtoken.visualize.page` the way a browser does."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"] and self.scripts:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.tags.append("/script")


def read_page(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What the page was given, and its tags in order; an error if it points anywhere outside itself."""
    text = path.read_text("utf-8")
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert not re.search(r"https?:|//[\w-]+\.|@import|url\(", text), "the page names an address"
    assert all(link.startswith("data:") for link in parser.links), parser.links
    data, script = parser.scripts
    for word in ("fetch(", "XMLHttpRequest", "import(", "innerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in script
    return json.loads(data), parser.tags
