"""The programs of the README and of the pages run as they stand, each page from its top to its end."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^(?:<!-- given: ([^(]+?) \(([^)]+)\) -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: Pages whose programs have tests of their own, which say more about them; vLLM is needed for docs/serving.md.
ELSEWHERE = {
    "docs/ecosystem.md": "tests/docs/test_ecosystem_page.py", "docs/mechanism.md": "tests/docs/test_pages.py",
    "docs/travel.md": "tests/docs/test_travel_page.py", "docs/serving.md": "tests/serving/test_vllm.py",
    "docs/methods/attentive_clip.md": "tests/clip/test_trainer.py",
}  # fmt: skip
for _name in ("method", "host"):
    ELSEWHERE[f"docs/extend/{_name}.md"] = "tests/docs/test_extend.py"
ELSEWHERE["docs/extend/kernel.md"] = "tests/docs/test_extend_kernel.py"
for _name in ("prompt_method", "multimodal"):
    ELSEWHERE[f"docs/extend/{_name}.md"] = "tests/docs/test_extend_prompts.py"


def pages() -> dict[str, str]:
    """Text of the README and of every page, by path."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in found}


PROGRAMS = {path: text for path, text in pages().items() if "```python" in text and path not in ELSEWHERE}


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in PROGRAMS[page]:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch._dynamo.reset()
    names: dict[str, Any] = {"__name__": "page"}
    ran = 0
    for given, _, program in _BLOCK.findall(PROGRAMS[page]):
        if not given:
            exec(compile(program, page, "exec"), names)
            ran += 1
    assert ran


@pytest.mark.parametrize("page", PROGRAMS)
def test_what_needs_names_is_run_by_the_tests_that_it_names(page: str) -> None:
    text = PROGRAMS[page]
    assert len(_BLOCK.findall(text)) == text.count("```python"), "a comment of another form stands over a program"
    for given, tests, _ in _BLOCK.findall(text):
        for test in tests.split(", ") if given else ():
            assert Path(page).name in (ROOT / test).read_text(), f"{test} does not read {page}"


def test_pages_with_tests_of_their_own_are_read_by_them() -> None:
    for page, test in ELSEWHERE.items():
        assert "```python" in (ROOT / page).read_text(), page
        assert Path(page).stem in (ROOT / test).read_text(), f"{test} does not know {page}"


def test_code_is_marked() -> None:
    """A block is a program, or plain text (commands, formulas, what was printed), or data."""
    for page, text in pages().items():
        for language in re.findall(r"^```(\w*)\n.*?^```$", text, re.DOTALL | re.MULTILINE):
            assert language in ("", "python", "json"), (page, language)


def test_readme_is_one_screen_and_its_program_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 80
    [(given, _, program)] = _BLOCK.findall(text)
    assert not given
    assert len(program.splitlines()) == 9


def test_the_hook_of_the_site_keeps_links() -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs (make docs)")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for text, site, wanted in (
        ("[a](docs/tasks/long_video.md#x)", "index.md", "[a](tasks/long_video.md#x)"),
        ("[a](../../benchmarks/README.md#x)", "tasks/long_video.md", "[a](../benchmarks.md#x)"),
        ("[a](../docs/extend/kernel.md)", "kernels.md", "[a](extend/kernel.md)"),
        ("![a](docs/images/groups.png)", "index.md", "![a](images/groups.png)"),
        ("names[a](images)", "start.md", "names[a](images)"),
        ("[a](https://example.org/docs/start.md)", "index.md", "[a](https://example.org/docs/start.md)"),
    ):
        assert hooks.fitted(text, site) == wanted
