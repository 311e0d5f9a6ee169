"""Data for the training examples."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few images of noise in the files of Fashion-MNIST."""
    folder, draw = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for split, count in (("train", 300), ("t10k", 60)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            high = 256 if kind.startswith("images") else 10
            head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            values = torch.randint(high, shape, generator=draw).to(torch.uint8).numpy().tobytes()
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values))
    return folder
