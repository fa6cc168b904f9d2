"""Runs that exhibits ask for: of the workload as it is, and on grids of one setting around its own value."""

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

Names = Iterable[str]


def each(
    workload: Workload, names: Names, seeds: int, watched: Names = (), measured: Names = (), replacement: bool = False
) -> list[Run]:
    """Return runs of some optimizers of a workload; attributes as in :class:`~msam_analysis.studies.runs.Run`."""
    known = replacement, frozenset(watched), frozenset(measured)
    return [Run(workload, name, seed, *known) for name in names for seed in range(seeds)]


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


def base(workload: Workload, name: str) -> Perturbation:
    """Return a workload's perturbation, around whose strength a grid is laid.

    Raises ValueError: The workload has no perturbation of that name.
    Raises TypeError: Its ρ is not a number.
    """
    perturbation = workload.perturbations.get(name)
    if perturbation is None:
        raise ValueError(f"a grid around the ρ of {name} needs that perturbation, got {list(workload.perturbations)}")
    if not isinstance(perturbation.rho, int | float):
        raise TypeError(f"a grid around the ρ of {name} needs a number, got {perturbation.rho!r}: give it a constant ρ")
    return perturbation


def scaled(value: Any, sixths: int) -> float:
    """Return ``value · 10^(sixths/6)`` to three digits, so that grids which meet in a point ask for one network."""
    return float(f"{value * 10 ** (sixths / 6):.3g}")


def plain(workload: Workload, seeds: int) -> list[Run]:
    """Return the runs without a perturbation."""
    return each(variant(workload, "SGD", None), ("SGD",), seeds)


def grid(
    workload: Workload, label: str, sixths: Iterable[int], seeds: int, watched: Names = (), **switches: Any
) -> list[Run]:
    """Return the runs of a perturbation, with other ``switches``, around its own strength, in sixths of a decade."""
    middle = dataclasses.replace(base(workload, label), **switches)
    strengths = [dataclasses.replace(middle, rho=scaled(middle.rho, sixth)) for sixth in sixths]
    tried = [variant(workload, label, strength) for strength in strengths]
    return [run for one in tried for run in each(one, (label,), seeds, watched=watched)]
