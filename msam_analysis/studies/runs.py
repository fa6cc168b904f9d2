"""The runs that exhibits ask for: by value, so that what two of them need is trained once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from msam import Perturbation
from msam_analysis.studies import measuring, store, watching
from msam_analysis.studies.computing import PLAIN, Computing
from msam_analysis.studies.measuring import Protocol
from msam_analysis.studies.workloads import Recipe, Workload


@dataclass(frozen=True)
class Run:
    """One network to be trained, and what is to be known of it.

    Attributes
    ----------
    workload, optimizer, seed
        Which network. A variant is the same workload with another recipe or perturbation: see :func:`variant`.
    replacement
        Whether samples are drawn independently, instead of each once an epoch.
    watched
        What is recorded while it trains: keys of :data:`~msam_analysis.studies.watching.WATCHES`.
    measured
        What is measured after it: keys of :data:`~msam_analysis.studies.measuring.MEASURES`.
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
        columns: dict[str, Any] = {"workload": self.workload.name, "replacement": self.replacement}
        columns |= {field.name: getattr(self.workload.recipe, field.name) for field in dataclasses.fields(Recipe)}
        if perturbation is None:
            return columns | {"direction": "none", "rho": 0.0, "sign": 1, "normalize": "none", "scale": "none"}
        names = ("direction", "rho", "sign", "normalize", "scale")
        columns |= {name: getattr(perturbation, name) for name in names}
        return columns | {"subset": "all" if perturbation.subset == "all" else "some"}


@dataclass(frozen=True)
class Task:
    """A run with its place on disk and the settings of its probes: what a worker process gets."""

    run: Run
    directory: Path
    protocol: Protocol
    every: int
    computing: Computing = PLAIN

    @property
    def cost(self) -> float:
        """Rough cost in training steps, for the progress bar alone."""
        return self.run.steps * self.cost_of_a_step + measuring.cost(self.run.measured, self.protocol)

    @property
    def cost_of_a_step(self) -> float:
        """Rough mean cost of a training step and of what is recorded at it, in steps without records."""
        watched = [watching.WATCHES[name] for name in self.run.watched]
        return 1.0 + sum(watch.cost / (watch.every or self.every) for watch in watched)


def variant(problem: Workload, optimizer: str, perturbation: Perturbation | None, **recipe: Any) -> Workload:
    """Return a workload with another perturbation of one optimizer, other fields of its recipe, and no controls.

    The other perturbations decide nothing of its run, and stay: a run may be that of several exhibits, and one of them
    may have probes that look at another perturbation.

    Parameters
    ----------
    problem
        Where all the rest comes from.
    optimizer, perturbation
        Its name and what it stands for.
    **recipe
        Fields of :class:`~msam_analysis.studies.workloads.Recipe`.
    """
    changed = dataclasses.replace(problem.recipe, **recipe)
    perturbations = {**problem.perturbations, optimizer: perturbation}
    return dataclasses.replace(problem, recipe=changed, perturbations=perturbations, controls=())


def gather(wanted: Iterable[Run]) -> dict[str, Run]:
    """Return every network once, by its identity, with all that is wanted of it, in order of first appearance."""
    gathered: dict[str, Run] = {}
    for run in wanted:
        known = gathered.setdefault(run.identity, run)
        gathered[run.identity] = dataclasses.replace(
            known, watched=known.watched | run.watched, measured=known.measured | run.measured
        )
    return gathered


def _toolbox() -> str | None:
    """Return the version of what makes the strongest attack, if it is installed."""
    try:
        return version("adversarial-robustness-toolbox")
    except PackageNotFoundError:
        return None


def place(run: Run, folder: Path, protocol: Protocol, every: int, computing: Computing = PLAIN) -> Task:
    """Return the task of a run; another device or precision, or other settings of probes, have another place."""
    fingerprint = run.workload.fingerprint(
        run.optimizer,
        run.replacement,
        sorted(run.watched),
        sorted(run.measured),
        protocol if run.measured else protocol.samples if run.watched else None,
        every,
        computing.identity,
        torch.__version__,
        _toolbox() if "robustness" in run.measured else None,
    )
    name = f"control-{run.optimizer}" if run.replacement else run.optimizer
    return Task(run, store.run_directory(folder, name, run.seed, fingerprint), protocol, every, computing)
