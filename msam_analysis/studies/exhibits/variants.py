"""Other perturbations: scaled by the weights, of the normalisation layers alone, and along other directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pandas as pd

from msam import NamedSubset, Perturbation, normalization_layers
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Comparison
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.grids import (
    HALF_DECADES,
    SAME_ACCURACY,
    against_rho,
    base,
    best,
    best_of_each,
    grid,
    once,
    paired,
    plain,
)
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import as_table, outcomes
from msam_analysis.studies.workloads import Workload

_COARSE = (-6, -3, 0, 3)
# T² d / ‖T d‖ is about as long as a typical weight, and normalisation layers have few: both grids go further up.
_LONGER = (0, 3, 4, 6, 9)
# A random direction hardly has a component along which the loss is steep: the same rise takes a longer step.
_NOISE = (0, 3, 6, 9)
_COLUMNS = ["optimizer", "seed", "rho", "sign", "scale", "train_accuracy", "test_accuracy", "train_loss", "test_loss"]
_FAMILIES = ("SAM", "MSAM")


# --- T3


def normalization_subset(workload: Workload) -> NamedSubset:
    """Return the normalisation layers' parameters by name: the same for every seed, and for every process."""
    with RandomStream(0):
        return dataclasses.replace(normalization_layers(workload.network()), parameters=())


def _variant_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SAM and MSAM as they are, adaptive, relative and of the normalisation layers alone, on grids of ρ."""
    subset = normalization_subset(workload)
    runs = plain(workload, seeds)
    for name in _FAMILIES:
        runs += grid(workload, name, HALF_DECADES, seeds)
        runs += grid(workload, name, _LONGER, seeds, scale="adaptive")
        runs += grid(workload, name, _COARSE, seeds, scale="relative")
        runs += grid(workload, name, _LONGER, seeds, subset=subset)
    return once(runs)


KINDS = ("vanilla", "adaptive", "relative", "normalisation layers")
"""The variants."""


def _variant_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``variant`` is one of :data:`KINDS`, and empty for SGD."""
    table = outcomes(evidence.runs)
    name = table["scale"].replace("none", "vanilla").mask(table["subset"] == "some", "normalisation layers")
    return as_table(table[_COLUMNS].assign(variant=name.mask(table["optimizer"] == "SGD", "")))


def _draw_variants(table: pd.DataFrame, _: Evidence) -> Any:
    sgd = table[table["optimizer"] == "SGD"]
    families = table[table["variant"] != ""].groupby("optimizer", sort=False)
    panels = {
        str(family): against_rho(pd.concat([sgd, own.assign(optimizer=own["variant"])])) for family, own in families
    }
    return pictures.sweep(panels, share_y=True)


def _variant(table: pd.DataFrame, family: str, name: str) -> pd.DataFrame:
    return best(table[(table["optimizer"] == family) & (table["variant"] == name)])


def _improves(table: pd.DataFrame) -> list[Comparison]:
    sgd = table[table["optimizer"] == "SGD"]
    return [
        paired(f"{family} {name} − SGD", _variant(table, family, name), sgd) for family in _FAMILIES for name in KINDS
    ]


def _carries_over(table: pd.DataFrame) -> list[Comparison]:
    def change(family: str, name: str) -> pd.DataFrame:
        to, of = (_variant(table, family, which).set_index("seed")["test_accuracy"] for which in (name, "vanilla"))
        return as_table((to - of).rename("change").reset_index())

    return [
        paired(
            f"{name}, its change of MSAM − that of SAM",
            change("MSAM", name),
            change("SAM", name),
            "change",
            above=-SAME_ACCURACY,
        )
        for name in KINDS[1:]
    ]


VARIANT = Exhibit(
    ("T3",),
    "variants",
    wants=_variant_runs,
    table=_variant_table,
    draw=_draw_variants,
    shown=lambda table: best_of_each(table, ["optimizer", "variant"]),
    comparisons={"better": _improves, "carry_over": _carries_over},
)


# --- A9


def _other_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return MSAM, and displacements along noise and along the last gradient with both signs, on grids of ρ."""
    rho = base(workload, "MSAM").rho
    runs = plain(workload, seeds) + grid(workload, "MSAM", HALF_DECADES, seeds)
    for scale in ("none", "relative"):
        noise = Perturbation(direction="random", rho=rho, scale=scale)
        runs += grid(workload, "random", _NOISE, seeds, around=noise)
        for sign in (1, -1):
            last = Perturbation(direction="last_gradient", rho=rho, scale=scale, sign=sign)
            runs += grid(workload, "last gradient", _COARSE, seeds, around=last)
    return once(runs)


def _other_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``kind`` tells the sign, and ``scale`` absolute from relative."""
    table = outcomes(evidence.runs)[_COLUMNS]
    last = table["optimizer"] == "last gradient"
    signs = table["sign"].map({1: "+ last gradient", -1: "− last gradient"})
    scale = table["scale"].replace("none", "absolute")
    return as_table(table.assign(kind=table["optimizer"].mask(last, signs), scale=scale))


def _draw_others(table: pd.DataFrame, _: Evidence) -> Any:
    known = table["optimizer"].isin(("SGD", "MSAM"))
    others = table[~known].assign(optimizer=table["kind"])
    panels = {
        title: against_rho(pd.concat([table[known], others[others["scale"] == scale]]))
        for scale, title in (("absolute", "absolute"), ("relative", "relative to the weights"))
    }
    return pictures.sweep(panels, share_y=True)


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


OTHER = Exhibit(
    ("A9",),
    "other_directions",
    wants=_other_runs,
    table=_other_table,
    draw=_draw_others,
    shown=lambda table: best_of_each(table, ["kind", "scale"]),
    comparisons={"none_as_good": _as_good, "noise": _noise_helps},
)

VARIANTS = (VARIANT, OTHER)
