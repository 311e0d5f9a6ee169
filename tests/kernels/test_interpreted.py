"""Runs tests/kernels/interpreted, file by file, in processes whose kernels are interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[2]
#: A plan, attention with sizes, and whole models; the others take a minute each.
QUICK = ("test_plan", "test_attention", "test_models")


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in QUICK else (pytest.mark.slow,)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="pytest collects them itself here")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=_marks(p.stem)) for p in sorted(FOLDER.glob("test_*.py"))]
)
def test_in_the_interpreter(path: Path, tmp_path: Path) -> None:
    settings = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    # Not the settings of an outer pytest-xdist worker.
    outer = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=outer | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
