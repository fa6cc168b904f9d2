"""What can be recorded while a study trains, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from msam.schedules import as_schedule
from msam_analysis.measures.alignment import cosine, inner_products
from msam_analysis.measures.momentum import true_weights
from msam_analysis.monitor import Monitor
from msam_analysis.monitor.probes import (
    Curvature,
    HeldOutCosine,
    LossAlongMomentum,
    MomentumGradientCosine,
    PerturbationRise,
    Probe,
    SamAngle,
)
from msam_analysis.objective.objective import Objective
from msam_analysis.results.fingerprint import fingerprint
from msam_analysis.studies.workloads import Workload

if TYPE_CHECKING:
    from msam_analysis.studies.training import Training


class Watch(NamedTuple):
    """How a probe is made for a training under way, and how often it is called.

    ``version``: Raised by hand when the numbers that the probe records change: they are then recorded anew.
    ``every``: Steps between two records; ``None`` for the study's own interval.
    ``cost``: Rough cost of one record in training steps, for the progress bar alone.
    ``everything``: Whether the probe looks at the loss over all samples, or the part of them that a study chooses.
    ``beside``: Another optimizer of the workload whose perturbation the probe looks at.
    """

    make: Callable[[Training], Probe]
    version: int = 1
    every: int | None = None
    cost: float = 0.0
    everything: bool = False
    beside: str | None = None

    def identity(self, workload: Workload, every: int, samples: int | None) -> str:
        """Return a hash of what decides the records, beside the run; ``every`` and ``samples`` are the study's."""
        seen = samples if self.everything else None
        return fingerprint(self.version, self.every or every, seen, workload.perturbations.get(self.beside or ""))


OFFSETS = (-4.0, -3.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Distances along the unit momentum at which the loss is recorded; the last step went towards negative ones."""

STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Perturbation strengths ρ at which MSAM's gradient is compared with SAM's."""


class _HeldOutMomentum:
    """``own_cosine_fresh`` and ``own_cosine_fixed``: of held-out gradients and a momentum made of such alone (A4).

    On the way of the training, but with no part in it: ``cos(u_{t−1}, ∇L(w_t))``, then ``u ← μ u + ∇L(w_t)``. No step
    is taken along u, so that it cannot overshoot. Fresh batches are taken in turn, again and again; the fixed one is
    the first.
    """

    def __init__(self, batches: list[Objective], momentum: float) -> None:
        self.batches = batches
        self.momentum = momentum
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, optimizer: Optimizer, step: int) -> Mapping[str, float]:
        found = {}
        for name, objective in (("fresh", self.batches[step % len(self.batches)]), ("fixed", self.batches[0])):
            gradient = objective.gradient(objective.vector(true_weights(optimizer)))
            buffer = self.buffers.get(name, torch.zeros_like(gradient))
            found[f"own_cosine_{name}"] = cosine(inner_products({gradient: buffer}, {gradient: gradient}).values())
            self.buffers[name] = self.momentum * buffer + gradient
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"buffers": self.buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffers = dict(state["buffers"])


class _HeldOut:
    """``held_out_cosine_fresh`` and ``held_out_cosine_fixed``: of the training's momentum and held-out gradients."""

    def __init__(self, batches: list[Objective]) -> None:
        self.batches = batches
        self.asked = 0

    def __call__(self, optimizer: Optimizer, step: int) -> Mapping[str, float]:
        fresh = self.batches[self.asked % len(self.batches)]
        self.asked += 1
        return {
            f"held_out_cosine_{name}": HeldOutCosine(objective)(optimizer, step)["held_out_cosine"]
            for name, objective in (("fresh", fresh), ("fixed", self.batches[0]))
        }

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = int(state["asked"])


def _held_out(training: Training) -> list[Objective]:
    """Return the loss on batches of the test set, as large as those trained on; what fills no batch is left out."""
    inputs, labels = (torch.cat(parts) for parts in zip(*training.workload.test(), strict=True))
    size = min(training.recipe.batch_size, len(labels))
    batches = zip(inputs.split(size), labels.split(size), strict=True)
    return [training.loss_of(batch) for batch in batches if len(batch[1]) == size]


def _angle(training: Training) -> Probe:
    sam = training.workload.perturbations["SAM"]
    return SamAngle(training.batch, STRENGTHS, rho_sam=float(as_schedule(sam.rho if sam else 0.0)(0)))


WATCHES: Mapping[str, Watch] = {
    "rise": Watch(lambda training: PerturbationRise(training.batch), cost=2),
    "curvature": Watch(lambda training: Curvature(training.everything, training.seed), cost=60, everything=True),
    "along_momentum": Watch(lambda training: LossAlongMomentum(training.batch, OFFSETS), every=8, cost=5),
    "sam_angle": Watch(_angle, cost=10, beside="SAM"),
    "held_out": Watch(lambda training: _HeldOut(_held_out(training)), every=8, cost=2),
    "held_out_momentum": Watch(
        lambda training: _HeldOutMomentum(_held_out(training), training.recipe.momentum), every=1, cost=2
    ),
}
"""The slower probes. The momentum-gradient cosine of every step, before and after the buffer takes the gradient in,
comes without asking, as it costs next to nothing. ``sam_angle`` needs a workload that has SAM."""

SLOW = ("rise", "curvature")
"""What is recorded unless something else is asked for."""


def watch(training: Training, names: Sequence[str], every: int | None) -> dict[str, Monitor]:
    """Attach a monitor of the cosine at every step, named ``cosine``, and one for each of the named probes.

    ``every``: The study's interval in steps; ``None`` records the cosine alone.
    """
    unknown = [name for name in names if name not in WATCHES]
    if unknown:
        raise ValueError(f"unknown probe {unknown[0]!r}: expected some of {sorted(WATCHES)}")
    monitors = {"cosine": Monitor(training.optimizer, [MomentumGradientCosine(after=True)], every=1)}
    for name in names if every is not None else ():
        row = WATCHES[name]
        monitors[name] = Monitor(training.optimizer, [row.make(training)], every=row.every or every or 1)
    return monitors
