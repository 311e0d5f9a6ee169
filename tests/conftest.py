"""Settings of every test session."""

from __future__ import annotations

import torch

# The models here are tiny: more threads only fight over the cores, and one gives the same bits everywhere.
torch.set_num_threads(1)
