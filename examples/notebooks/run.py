"""Run the notebooks beside this file and keep their outputs in them: `python examples/notebooks/run.py [NAME ...]`.

Kept is what a reader looks at: printed text and pictures, each once, as JPEG; no warnings, times or versions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Of all notebooks here."""
    return sorted(path.name for path in FOLDER.glob("*.ipynb"))


def execute(name: str, parameters: Mapping[str, Any] | None = None, seconds: int = 300) -> Any:
    """The notebook as it is after it ran from its first cell to its last.

    Args:
        name: of a notebook in this folder.
        parameters: values that take the place of those in the cell with the tag "parameters".
        seconds: that one cell may take.

    Raises:
        KeyError: if the notebook has no such cell, or the cell no such parameter.
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(FOLDER / name, as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for key, value in (parameters or {}).items():
        lines = [line for cell in tagged for line in cell.source.splitlines() if line.startswith(f"{key} = ")]
        if len(lines) != 1:
            raise KeyError(f"{name} has {len(lines)} parameters {key}")
        tagged[0].source = tagged[0].source.replace(lines[0], f"{key} = {value!r}")
    place = {"metadata": {"path": FOLDER}}
    NotebookClient(notebook, timeout=seconds, kernel_name="python3", record_timing=False, resources=place).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_lean(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def _lean(output: Any) -> Any:
    """An output without the second form of a picture."""
    if "image/jpeg" in output.get("data", {}):
        output["data"] = {"image/jpeg": output["data"]["image/jpeg"]}
        output["metadata"] = {}
    return output


if __name__ == "__main__":
    for name in sys.argv[1:] or names():
        nbformat.write(execute(name), FOLDER / name)
        print(f"{name}: {(FOLDER / name).stat().st_size / 1024:.0f} KiB")
