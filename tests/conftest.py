"""Settings of every test session."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

# The models here are tiny: more threads only fight over the cores, and one gives the same bits everywhere.
torch.set_num_threads(1)

# No test fails because the machine is busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
