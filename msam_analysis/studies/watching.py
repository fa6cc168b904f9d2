"""What can be recorded while a study trains, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.optim import Optimizer

from msam_analysis.monitor import Monitor
from msam_analysis.objective import Objective
from msam_analysis.probes import Curvature, MomentumGradientCosine, PerturbationRise, Probe
from msam_analysis.studies.workloads import Workload


@dataclass(frozen=True)
class Scene:
    """What a probe may look at.

    Attributes
    ----------
    workload, seed
        What is trained.
    everything
        The training loss over all samples; BatchNorm with each batch's own statistics, as in the training step.
    batch
        Returns the loss of the batch that is being trained on.
    """

    workload: Workload
    seed: int
    everything: Objective
    batch: Callable[[], Objective]


class Watch(NamedTuple):
    """How a probe is made and how often it is called.

    Attributes
    ----------
    make
        From the scene.
    every
        Steps between two records; ``None`` for the study's own interval.
    cost
        Rough cost of one record in training steps, for the progress bar alone.
    """

    make: Callable[[Scene], Probe]
    every: int | None = None
    cost: float = 0.0


WATCHES: Mapping[str, Watch] = {
    "rise": Watch(lambda scene: PerturbationRise(scene.batch), cost=2),
    "curvature": Watch(lambda scene: Curvature(scene.everything, scene.seed), cost=60),
}
"""The slower probes. The momentum-gradient cosine of every step comes without asking, as it costs next to nothing."""

SLOW = ("rise", "curvature")
"""What is recorded unless something else is asked for."""


def watch(optimizer: Optimizer, scene: Scene, names: Sequence[str], every: int | None) -> list[Monitor]:
    """Attach monitors: the cosine at every step, and one for each interval among the named probes.

    Parameters
    ----------
    optimizer, scene
        What is watched.
    names
        Keys of :data:`WATCHES`.
    every
        The study's interval in steps; ``None`` records the cosine alone.

    Raises
    ------
    ValueError
        A name is unknown.
    """
    unknown = [name for name in names if name not in WATCHES]
    if unknown:
        raise ValueError(f"unknown probe {unknown[0]!r}: expected some of {sorted(WATCHES)}")
    by_interval: dict[int, list[Probe]] = {1: [MomentumGradientCosine()]}
    for name in names if every is not None else ():
        by_interval.setdefault(WATCHES[name].every or every or 1, []).append(WATCHES[name].make(scene))
    return [Monitor(optimizer, probes, every=interval) for interval, probes in by_interval.items()]


__all__ = ["SLOW", "WATCHES", "Scene", "Watch", "watch"]
