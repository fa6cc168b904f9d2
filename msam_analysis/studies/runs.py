"""The runs that exhibits ask for: by value, so that what two of them need is trained once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from msam import Perturbation
from msam_analysis.studies.workloads import Workload


@dataclass(frozen=True)
class Run:
    """One network to be trained, of a workload or a :func:`variant` of it, and what is to be known of it.

    ``replacement``: Whether samples are drawn independently, instead of each once an epoch.
    ``watched``: What is recorded while it trains: keys of :data:`~msam_analysis.studies.watching.WATCHES`.
    ``measured``: What is measured after it: keys of :data:`~msam_analysis.studies.measuring.MEASURES`.
    """

    workload: Workload
    optimizer: str
    seed: int
    replacement: bool = False
    watched: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()

    @property
    def identity(self) -> str:
        """What decides the trained network; runs that share it are one."""
        kind = "replacement" if self.replacement else "epochs"
        return f"{self.optimizer}-{self.seed}-{kind}-{self.workload.fingerprint(self.optimizer)}"

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.workload.recipe.steps(self.workload.training_samples)

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe and the perturbation's switches as the columns of a table; SGD has ρ = 0."""
        perturbation = self.workload.perturbations[self.optimizer]
        columns = {"workload": self.workload.name, "replacement": self.replacement, **vars(self.workload.recipe)}
        if perturbation is None:
            return columns | {"direction": "none", "rho": 0.0, "sign": 1, "normalize": "none", "scale": "none"}
        names = ("direction", "rho", "sign", "normalize", "scale")
        columns |= {name: getattr(perturbation, name) for name in names}
        return columns | {"subset": "all" if perturbation.subset == "all" else "some"}


def variant(workload: Workload, optimizer: str, perturbation: Perturbation | None, **recipe: Any) -> Workload:
    """Return a workload with another perturbation of one optimizer, other fields of its recipe, and no controls.

    The other perturbations decide nothing of its run, and stay: a run may be that of several exhibits, and one of them
    may have probes that look at another perturbation.

    Parameters
    ----------
    workload
        Where all the rest comes from.
    optimizer, perturbation
        Its name and what it stands for.
    **recipe
        Fields of :class:`~msam_analysis.studies.workloads.Recipe`.
    """
    changed = dataclasses.replace(workload.recipe, **recipe)
    perturbations = {**workload.perturbations, optimizer: perturbation}
    return dataclasses.replace(workload, recipe=changed, perturbations=perturbations, controls=())


def gather(wanted: Iterable[Run]) -> dict[str, Run]:
    """Return every network once, by its identity, with all that is wanted of it, in order of first appearance."""
    gathered: dict[str, Run] = {}
    for run in wanted:
        known = gathered.setdefault(run.identity, run)
        gathered[run.identity] = dataclasses.replace(
            known, watched=known.watched | run.watched, measured=known.measured | run.measured
        )
    return gathered
