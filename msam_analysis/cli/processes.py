"""The processes that torchrun starts: one of them speaks, each has a device of its own, all leave together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank() -> int:
    """Return which process of torchrun's this is; 0 without torchrun. Only the first prints and draws."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def group() -> Iterator[bool]:
    """Join the other processes inside, if torchrun started any; say whether it did.

    They exchange numbers that lie in main memory, so gloo serves them on GPUs as well.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield False
        return
    dist.init_process_group("gloo")
    try:
        yield True
    finally:
        dist.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """Return the device of this process: of several GPUs each process takes its own, in turn."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
