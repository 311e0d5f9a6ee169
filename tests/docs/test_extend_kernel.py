"""The program of docs/extend/kernel.md runs, in a process whose kernels are interpreted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend" / "kernel.md"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")
def test_the_program_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    script = tmp_path / "kernel.py"  # a file, because Triton reads the source of functions
    script.write_text(program)
    settings = {
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    outside = {name: value for name, value in os.environ.items() if name != "VTOKEN_TEST_BACKEND"}
    done = subprocess.run([sys.executable, script], env=outside | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "torch: the tensors are on 'cpu'; kernels need a GPU\n"
