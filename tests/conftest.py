"""Shared by all tests: one thread, so that sums have one order, and no example that fails for being slow."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# What --hypothesis-profile=ci, the choice of `make tests`, has as well: a loaded machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
