"""A workload that trains in a moment, in a module that worker processes can import.

Two environment variables, which worker processes inherit: ``TOY_LOG`` names a file that gets a line for every network
that is trained, and ``TOY_TROUBLE=3:RuntimeError`` raises when a process trains its third, or a later one.
"""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import os
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from msam import Perturbation
from msam_analysis.studies.measuring import Protocol
from msam_analysis.studies.workloads import DIGITS, Recipe, Workload

SAMPLES, TESTED, FEATURES, CLASSES = 60, 21, 5, 3
begun_here = itertools.count(1)


def normal(*shape: int, seed: int) -> Tensor:
    """Return float32 normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels; the first input is the sample's number, which the network does not look at."""
    inputs = normal(count, FEATURES, seed=seed)
    labels = (inputs[:, 1:4] + 0.5 * normal(count, CLASSES, seed=seed + 1)).argmax(dim=1)
    inputs[:, 0] = torch.arange(count)
    return inputs, labels


def split(inputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def train_data() -> list[tuple[Tensor, Tensor]]:
    """Return the training set in batches of 25, 25 and 10."""
    return split(*samples(SAMPLES, seed=1), 25)


def test_data() -> list[tuple[Tensor, Tensor]]:
    """Return the test set in batches of 16 and 5."""
    return split(*samples(TESTED, seed=3), 16)


class Features(nn.Module):
    """Everything but the sample's number."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:]


class Eventful(Features):
    """Tells when its training begins, or ends it there, as the environment says."""

    begun = False

    def forward(self, x: Tensor) -> Tensor:
        # Measurements look at private copies, in eval mode.
        if self.training and torch.is_grad_enabled() and not self.begun:
            self.begun = True
            begin()
        return super().forward(x)


def begin() -> None:
    trouble = os.environ.get("TOY_TROUBLE", "")
    if trouble:
        when, _, kind = trouble.partition(":")
        if next(begun_here) >= int(when):
            raise cast(type[BaseException], getattr(builtins, kind))("trouble with the toy")
    if "TOY_LOG" in os.environ:
        with Path(os.environ["TOY_LOG"]).open("a") as log:
            log.write(f"{os.getpid()}\n")


def network() -> nn.Module:
    """Return 4 -> 6 -> 3 with BatchNorm between."""
    return nn.Sequential(Eventful(), nn.Linear(FEATURES - 1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


TOY: Workload = dataclasses.replace(
    DIGITS,
    name="toy",
    description="60 points of three classes; a perceptron with BatchNorm",
    network=network,
    train=train_data,
    test=test_data,
    recipe=Recipe(epochs=2, batch_size=16, lr=0.1, momentum=0.9, weight_decay=5e-3),
    perturbations={
        "SGD": None,
        "NAG": Perturbation(direction="momentum", normalize="lr", rho=0.9),
        "SAM": Perturbation(direction="gradient", rho=0.1),
        "MSAM": Perturbation(direction="momentum", rho=0.3),
    },
    relatives={},
)
STEPS = 2 * 4  # epochs of 16 + 16 + 16 + 12 samples


COARSE = Protocol(
    eigenvalues=2,
    power_tolerance=1e-2,
    radii=(0.05, 0.5),
    ball_iterations=5,
    line_points=5,
    plane_points=3,
    plane_refine=None,
)
