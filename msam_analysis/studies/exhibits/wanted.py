"""Runs that several exhibits ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from msam import Jump, Perturbation
from msam.schedules import as_schedule
from msam_analysis.studies.measuring import SHARPNESS
from msam_analysis.studies.runs import Run, variant
from msam_analysis.studies.watching import SLOW
from msam_analysis.studies.workloads import Workload


def each(
    workload: Workload,
    names: Iterable[str],
    seeds: int,
    *,
    watched: Iterable[str] = (),
    measured: Iterable[str] = (),
    replacement: bool = False,
) -> list[Run]:
    """Return runs of some optimizers of a workload; attributes as in :class:`~msam_analysis.studies.runs.Run`."""
    return [
        Run(workload, name, seed, replacement, frozenset(watched), frozenset(measured))
        for name in names
        for seed in range(seeds)
    ]


def networks(workload: Workload, seeds: int) -> list[Run]:
    """Return the networks of the main tables: every optimizer, fully watched and measured."""
    return each(workload, workload.perturbations, seeds, watched=SLOW, measured=SHARPNESS)


def controls(workload: Workload, seeds: int) -> list[Run]:
    """Return the controls, which draw samples with replacement."""
    return each(workload, workload.controls, seeds, replacement=True)


def unperturbed(workload: Workload) -> str:
    """Return the name of the optimizer without a perturbation: SGD, or AdamW."""
    return next(name for name, perturbation in workload.perturbations.items() if perturbation is None)


def with_recipe(workload: Workload, **changes: Any) -> Workload:
    """Return the workload with another recipe and all of its optimizers."""
    return dataclasses.replace(workload, recipe=dataclasses.replace(workload.recipe, **changes))


def after_warmup(workload: Workload, name: str) -> Workload:
    """Return the workload with one optimizer that does not perturb before the warm-up is over."""
    perturbation = workload.perturbations[name]
    if perturbation is None:
        return workload
    warm = workload.recipe.steps(workload.training_samples, workload.recipe.warmup)
    return variant(workload, name, dataclasses.replace(perturbation, rho=Jump(constant(perturbation), warm)))


def constant(perturbation: Perturbation | None) -> float:
    """Return ρ at the first step, which is that of every step where it is no schedule; 0 without a perturbation."""
    return 0.0 if perturbation is None else float(as_schedule(perturbation.rho)(0))
