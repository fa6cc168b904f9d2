"""Runs that several exhibits of mechanisms, models and robustness ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from msam import Jump, Perturbation
from msam.schedules import as_schedule
from msam_analysis.studies.runs import Run, variant
from msam_analysis.studies.workloads import Workload

RATES = (0.1, 1.0, 3.0)
"""Learning rates at which the change of the loss is shown, as multiples of the recipe's."""

OUTSIDE = ("text", "table")
"""Relatives that have nothing to do with images."""


def unperturbed(problem: Workload) -> str:
    """Return the name of the optimizer without a perturbation: SGD, or AdamW."""
    return next(name for name, perturbation in problem.perturbations.items() if perturbation is None)


def with_recipe(problem: Workload, **changes: Any) -> Workload:
    """Return the problem with another recipe and all of its optimizers."""
    return dataclasses.replace(problem, recipe=dataclasses.replace(problem.recipe, **changes))


def each(
    problem: Workload,
    names: Iterable[str],
    seeds: int,
    *,
    watched: Iterable[str] = (),
    measured: Iterable[str] = (),
) -> list[Run]:
    """Return runs of some optimizers of a problem."""
    return [
        Run(problem, name, seed, watched=frozenset(watched), measured=frozenset(measured))
        for name in names
        for seed in range(seeds)
    ]


def after_warmup(problem: Workload, name: str) -> Workload:
    """Return the problem with one optimizer that does not perturb before the warm-up is over."""
    perturbation = problem.perturbations[name]
    if perturbation is None:
        return problem
    warm = problem.recipe.steps(problem.training_samples, problem.recipe.warmup)
    return variant(problem, name, dataclasses.replace(perturbation, rho=Jump(constant(perturbation), warm)))


def constant(perturbation: Perturbation | None) -> float:
    """Return ρ at the first step, which is that of every step where it is no schedule; 0 without a perturbation."""
    return 0.0 if perturbation is None else float(as_schedule(perturbation.rho)(0))
