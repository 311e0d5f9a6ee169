"""Settings of every test session."""

from __future__ import annotations

import torch

# Two cores: more threads only make small tensors slower, and results reproducible across machines of any size.
torch.set_num_threads(2)
