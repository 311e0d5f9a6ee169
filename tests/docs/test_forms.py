"""What hosting sites and citation tools read: it parses, and says what the package says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import vtoken

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted(path.name for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(found), "what the format asks for"
    assert found["version"] == vtoken.__version__
    assert found["title"] == project["name"]
    assert found["license"] == project["license"]


def test_the_changelog_begins_with_this_version() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert heading is not None
    assert heading[1] == vtoken.__version__


@pytest.mark.parametrize("name", FORMS)
def test_an_issue_form_is_one(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(names) == len(set(names)) > 0
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "checkboxes"}
    for page in re.findall(r"docs/[\w./-]+\w", str(form)):
        assert (ROOT / page).exists(), page
