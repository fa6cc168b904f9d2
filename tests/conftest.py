"""Shared by all tests: one thread, so that sums have one order."""

import torch

torch.set_num_threads(1)
