"""Other perturbations: scaled by the weights, of the normalisation layers alone, and along other directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pandas as pd

from msam import NamedSubset, Perturbation, normalization_layers
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Comparison, PaperClaim
from msam_analysis.studies.exhibits.base import Evidence, Exhibit, Finding
from msam_analysis.studies.exhibits.sweeps import (
    HALF_DECADES,
    SAME_ACCURACY,
    base,
    best,
    best_of_each,
    grid,
    once,
    paired,
    plain,
)
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, outcomes
from msam_analysis.studies.workloads import Workload

_COARSE = (-6, -3, 0, 3)
# T² d / ‖T d‖ is about as long as a typical weight, and normalisation layers have few: both grids go further up.
_LONGER = (0, 3, 4, 6, 9)
# A random direction hardly has a component along which the loss is steep: the same rise takes a longer step.
_NOISE = (0, 3, 6, 9)
_LAST = (-6, -3, 0, 3)
_COLUMNS = ["optimizer", "seed", "rho", "sign", "scale", "train_accuracy", "test_accuracy", "train_loss", "test_loss"]
_FAMILIES = ("SAM", "MSAM")


# --- T3


def normalization_subset(problem: Workload) -> NamedSubset:
    """Return the normalisation layers' parameters by name: the same for every seed, and for every process."""
    with RandomStream(0):
        return dataclasses.replace(normalization_layers(problem.network()), parameters=())


def variant_runs(problem: Workload, seeds: int) -> list[Run]:
    """Return SAM and MSAM as they are, adaptive, relative and of the normalisation layers alone, on grids of ρ."""
    subset = normalization_subset(problem)
    runs = plain(problem, seeds)
    for name in _FAMILIES:
        perturbation = base(problem, name)
        runs += grid(problem, name, perturbation, HALF_DECADES, seeds)
        runs += grid(problem, name, dataclasses.replace(perturbation, scale="adaptive"), _LONGER, seeds)
        runs += grid(problem, name, dataclasses.replace(perturbation, scale="relative"), _COARSE, seeds)
        runs += grid(problem, name, dataclasses.replace(perturbation, subset=subset), _LONGER, seeds)
    return once(runs)


KINDS = ("vanilla", "adaptive", "relative", "normalisation layers")


def variant_table(runs: list[FinishedRun]) -> pd.DataFrame:
    """Return one row per run; ``variant`` is one of :data:`KINDS`, and of SGD empty."""
    table = outcomes(runs)
    name = table["scale"].replace("none", "vanilla").mask(table["subset"] == "some", "normalisation layers")
    found: pd.DataFrame = table[_COLUMNS].assign(variant=name.mask(table["optimizer"] == "SGD", ""))
    return found


def _variant(table: pd.DataFrame, family: str, name: str) -> pd.DataFrame:
    return best(table[(table["optimizer"] == family) & (table["variant"] == name)])


def _improves(table: pd.DataFrame) -> list[Comparison]:
    sgd = table[table["optimizer"] == "SGD"]
    return [
        paired(f"{family} {name} − SGD", _variant(table, family, name), sgd) for family in _FAMILIES for name in KINDS
    ]


def _carries_over(table: pd.DataFrame) -> list[Comparison]:
    comparisons = []
    for name in KINDS[1:]:
        changes = []
        for family in _FAMILIES:
            to, of = (_variant(table, family, which).set_index("seed")["test_accuracy"] for which in (name, "vanilla"))
            changes.append((to - of).rename("change").reset_index())
        label = f"{name}, its change of MSAM − that of SAM"
        comparisons.append(paired(label, changes[1], changes[0], "change", above=-SAME_ACCURACY))
    return comparisons


VARIANT = (
    PaperClaim(
        "T3",
        "Vanilla, adaptive, relative and of the normalisation layers alone, SAM and MSAM generalise better than SGD.",
        "all above SGD",
        _improves,
        note="Each at the ρ with the best mean test accuracy of its own grid.",
    ),
    PaperClaim(
        "T3",
        "The variants carry over from SAM to MSAM.",
        "the variants do for MSAM what they do for SAM",
        _carries_over,
        note="What a variant changes in MSAM's best test accuracy is no more than a point worse than what it changes "
        "in SAM's.",
    ),
)


def variants(evidence: Evidence) -> Finding:
    """Return what T3 finds."""
    table = variant_table(evidence.of(variant_runs(evidence.problem, evidence.seeds)))
    sgd = table[table["optimizer"] == "SGD"]
    panels = {
        family: Sweep(
            pd.concat([sgd, own.assign(optimizer=own["variant"])]),
            "rho",
            "test_accuracy",
            r"$\rho$",
            "test accuracy (%)",
            percent=True,
        )
        for family, own in table[table["variant"] != ""].groupby("optimizer", sort=False)
    }
    return Finding(
        lambda: pictures.sweep(panels, share_y=True),
        table,
        [claim.judge(table) for claim in VARIANT],
        best_of_each(table, ["optimizer", "variant"]),
        "Adaptive is ASAM's ρ T² d/‖T d‖ with T = |w|, relative the paper's ρ T d/‖T d‖ (appendix A.7). Where the best "
        "ρ is an end of its grid, a better one may lie beyond. The grids have half a decade from point to point, which "
        "may be more than the width of a peak: a few points between two variants may be the grid's doing.",
    )


# --- A9


def other_runs(problem: Workload, seeds: int) -> list[Run]:
    """Return MSAM, and displacements along noise and along the last gradient with both signs, on grids of ρ."""
    msam = base(problem, "MSAM")
    runs = plain(problem, seeds) + grid(problem, "MSAM", msam, HALF_DECADES, seeds)
    for scale in ("none", "relative"):
        noise = Perturbation(direction="random", rho=msam.rho, scale=scale)
        runs += grid(problem, "random", noise, _NOISE, seeds)
        for sign in (1, -1):
            last = Perturbation(direction="last_gradient", rho=msam.rho, scale=scale, sign=sign)
            runs += grid(problem, "last gradient", last, _LAST, seeds)
    return once(runs)


def other_table(runs: list[FinishedRun]) -> pd.DataFrame:
    """Return one row per run; ``kind`` tells the sign, and ``scale`` absolute from relative."""
    table = outcomes(runs)[_COLUMNS]
    last = table["optimizer"] == "last gradient"
    signs = table["sign"].map({1: "+ last gradient", -1: "− last gradient"})
    scale = table["scale"].replace("none", "absolute")
    found: pd.DataFrame = table.assign(kind=table["optimizer"].mask(last, signs), scale=scale)
    return found


def _others(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    others = table[~table["optimizer"].isin(("SGD", "MSAM"))]
    for (kind, scale), rows in others.groupby(["kind", "scale"], sort=False):
        yield f"{kind}, {scale}", best(rows)


def _as_good(table: pd.DataFrame) -> list[Comparison]:
    msam = best(table[table["optimizer"] == "MSAM"])
    return [paired(f"MSAM − ({name})", msam, rows) for name, rows in _others(table)]


def _noise_helps(table: pd.DataFrame) -> list[Comparison]:
    sgd = table[table["optimizer"] == "SGD"]
    return [paired(f"({name}) − SGD", rows, sgd) for name, rows in _others(table) if name.startswith("random")]


OTHER = (
    PaperClaim(
        "A9",
        "No random perturbation and none along the last gradient is as good as MSAM, at equal cost.",
        "none as good",
        _as_good,
        note="Each at the ρ with the best mean test accuracy of its own grid; one gradient a step for all.",
    ),
    PaperClaim(
        "A9",
        "Readers' question, not in the paper: a random perturbation generalises better than none.",
        "asked by readers",
        _noise_helps,
        control=True,
    ),
)


def others(evidence: Evidence) -> Finding:
    """Return what A9 finds."""
    table = other_table(evidence.of(other_runs(evidence.problem, evidence.seeds)))
    known = table[table["optimizer"].isin(("SGD", "MSAM"))]
    drawn = table.assign(optimizer=table["kind"])
    panels = {
        title: Sweep(
            pd.concat([known, drawn[(drawn["scale"] == scale) & ~drawn["optimizer"].isin(("SGD", "MSAM"))]]),
            "rho",
            "test_accuracy",
            r"$\rho$",
            "test accuracy (%)",
            percent=True,
        )
        for scale, title in (("absolute", "absolute"), ("relative", "relative to the weights"))
    }
    return Finding(
        lambda: pictures.sweep(panels, share_y=True),
        table,
        [claim.judge(table) for claim in OTHER],
        best_of_each(table, ["kind", "scale"]),
        "Noise is drawn anew at every step. + leads up the last batch's gradient, as SAM does with the next one's. "
        "MSAM, in both panels, is absolute. The grids have half a decade from point to point, which may be more than "
        "the width of a peak.",
    )


VARIANTS: tuple[Exhibit, ...] = (
    Exhibit(
        ("T3",),
        "variants",
        "Adaptive, relative, and normalisation layers alone",
        "Test accuracy against ρ of the variants of SAM and MSAM.",
        variant_runs,
        variants,
        claims=VARIANT,
    ),
    Exhibit(
        ("A9",),
        "other_directions",
        "Random directions and the last gradient",
        "Test accuracy against ρ of perturbations that cost no more than MSAM's.",
        other_runs,
        others,
        claims=OTHER,
    ),
)
