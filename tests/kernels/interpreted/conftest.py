"""Tests of the kernels themselves, in Triton's interpreter: TRITON_INTERPRET=1 must be set before Python starts.

`tests/kernels/test_interpreted.py` does that; by hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """New memory holds NaN (whole numbers: the largest), so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
