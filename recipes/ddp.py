"""Data parallelism with two processes on this machine (gloo): what each optimizer communicates, and that ranks agree.

MSAM needs nothing beyond the averaged gradient: the momentum is the same on every rank, and so is the perturbation.
SAM has a choice for its first pass. Inside ``no_sync()`` every rank climbs the gradient of its own share of the batch
(m-sharpness, as in the SAM paper; no communication); without it all climb the averaged one.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from toy import accuracy, batches, network, report

import msam

EPOCHS = 10
RANKS = 2


def network_of(model: DistributedDataParallel) -> nn.Module:
    """The network without its wrapper, which would wait for the other ranks at every forward pass."""
    inner: nn.Module = model.module
    return inner


def train_msam(rank: int) -> nn.Module:
    """The ordinary loop."""
    model = DistributedDataParallel(network())
    optimizer = msam.MSAM(model.parameters(), lr=0.05, rho=0.3, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(EPOCHS):
        optimizer.zero_grad()
        cross_entropy(model(x[rank::RANKS]), y[rank::RANKS]).backward()
        optimizer.step()
    optimizer.eval()
    return network_of(model)


def train_sam(rank: int, own_ascent: bool) -> nn.Module:
    """Two passes; the second gradient is averaged in any case."""
    model = DistributedDataParallel(network())
    optimizer = msam.SAM(model.parameters(), lr=0.05, rho=0.05, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(EPOCHS):
        inputs, labels = x[rank::RANKS], y[rank::RANKS]
        optimizer.zero_grad()
        with model.no_sync() if own_ascent else nullcontext():
            cross_entropy(model(inputs), labels).backward()
        optimizer.first_step(zero_grad=True)
        with msam.frozen_batchnorm_statistics(model):
            cross_entropy(model(inputs), labels).backward()
        optimizer.second_step()
    return network_of(model)


def ranks_agree(model: nn.Module) -> bool:
    """Whether all ranks hold the same parameters, to the bit."""
    mine = nn.utils.parameters_to_vector(model.parameters()).detach()
    every = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(every, mine)
    return all(torch.equal(mine, other) for other in every)


def work(rank: int, meeting_point: str) -> None:
    """What one process does."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS)
    ways: dict[str, Callable[[], nn.Module]] = {
        "MSAM": lambda: train_msam(rank),
        "SAM, first pass in no_sync()": lambda: train_sam(rank, own_ascent=True),
        "SAM, first pass averaged": lambda: train_sam(rank, own_ascent=False),
    }
    for name, train in ways.items():
        model = train()
        dist.barrier()
        if not ranks_agree(model):
            raise RuntimeError(f"expected the same parameters on every rank after {name}, got different ones.")
        if rank == 0:
            report(name, accuracy(model))
    del model
    gc.collect()  # the wrappers: gloo's threads have to end before the process does
    dist.destroy_process_group()


def main() -> None:
    """Start the processes and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(str(Path(folder) / "meeting-point"),), nprocs=RANKS)


if __name__ == "__main__":
    main()
