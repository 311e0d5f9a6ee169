"""The site is the repository: pages that lie outside docs/ are part of it, and links between pages work on both.

mkdocs.yml names this file. On GitHub a link is a path from the file that it stands in; here it becomes the path on the
site. A link to anything else in the repository has no page, which `make docs` reports as an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: Pages of the repository outside docs/, and where the site has them. README is the way in.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "kernels/README.md": "kernels.md",
}
_INSIDE = {site: path for path, site in OUTSIDE.items()}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside docs/."""
    for path, site in OUTSIDE.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    return fitted(markdown, page.file.src_uri)


def fitted(text: str, site: str) -> str:
    """The text of the page `site` (a path on the site), its links to pages and pictures made fit for there."""
    here = Path(_INSIDE.get(site, f"docs/{site}")).parent

    def fitting(match: re.Match[str]) -> str:
        opening, target, end = match.groups()
        path = os.path.normpath(here / target)
        there = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if "://" in target or not there or not (ROOT / path).is_file():
            return match[0]
        return opening + os.path.relpath(there, Path(site).parent) + end

    return _LINK.sub(fitting, text)
