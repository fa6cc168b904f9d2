"""The networks that are found: the rank of their features, and their accuracy on disturbed inputs."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pandas as pd

from msam_analysis.results import FeatureRank, RobustAccuracy
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import FAR, Comparison, difference, ratio
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import each
from msam_analysis.studies.measuring import DISTURBANCES
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.tables import FinishedRun, as_table, per_run

# ------------------------------------------------------------------------------------------------ A6r, rank of features


def _ranks(run: FinishedRun) -> dict[str, object]:
    found = cast(FeatureRank, run.results["features"])
    names = ("rank", "threshold", "effective_rank", "stable_rank", "numerical_rank", "samples", "dimension")
    return {name: getattr(found, name) for name in names}


def _draw_ranks(table: pd.DataFrame, _: Evidence) -> Any:
    quantities = {
        "rank": f"components for {table['threshold'].iloc[0]:.0%} of the variance",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
    }
    return pictures.by_group(table.assign(features=f"of {table['dimension'].iloc[0]}"), quantities, "features")


RANK = Exhibit(
    ("A6r",),
    "feature_rank",
    wants=lambda workload, seeds: each(workload, workload.perturbations, seeds, measured=("features",)),
    table=lambda evidence: per_run(evidence.runs, _ranks),
    draw=_draw_ranks,
    facts=lambda table, _: {"dimension": table["dimension"].iloc[0], "samples": f"{table['samples'].iloc[0]:,}"},
    comparisons={"falls": lambda table: [ratio(table, "rank", "SGD", "SAM"), ratio(table, "rank", "SAM", "MSAM")]},
)

# ------------------------------------------------------------------------------------------------ TA4, disturbed inputs


def _robust_table(evidence: Evidence) -> pd.DataFrame:
    rows = []
    for run in evidence.runs:
        for attack, shares in DISTURBANCES.items():
            found = cast(RobustAccuracy, run.results[f"robustness-{attack}"])
            whose = {"optimizer": run.optimizer, "seed": run.seed, "attack": attack}
            for share, accuracy in zip((0.0, *shares), [found.clean, *found.accuracies.tolist()], strict=True):
                rows.append({**whose, "share": share, "test_accuracy": 100 * accuracy})
    return as_table(rows)


def _title(attack: str) -> str:
    return "noise" if attack == "noise" else attack.upper()


def _against_size(table: pd.DataFrame, attack: str) -> Sweep:
    mine = table[table["attack"] == attack]
    x, label, factor = ("sigma", r"$\sigma$", 1) if attack == "noise" else ("epsilon", r"255 $\epsilon$", 255)
    return Sweep(mine.assign(**{x: factor * mine["share"]}), x, "test_accuracy", label, "test accuracy (%)", log=False)


def _words(attack: str, share: float) -> str:
    return f"{_title(attack)} at " + (f"σ = {share:g}" if attack == "noise" else f"ε = {255 * share:.0f}/255")


def _above_sgd(table: pd.DataFrame, size: int, by: float) -> list[Comparison]:
    """Compare MSAM and SAM with SGD, under every disturbance of one size: 0 for the smallest, −1 for the largest."""
    found = []
    for name in ("MSAM", "SAM"):
        for attack, shares in DISTURBANCES.items():
            share = shares[size]
            rows = table[(table["attack"] == attack) & np.isclose(table["share"], share)]
            gain = difference(rows, "test_accuracy", name, "SGD", unit="points")
            label = f"{gain.label} ({_words(attack, share)}), gain"
            found.append(dataclasses.replace(gain, label=label, above=by))
    return found


DISTURBED = Exhibit(
    ("TA4",),
    "robustness",
    wants=lambda workload, seeds: each(workload, workload.perturbations, seeds, measured=("robustness",)),
    table=_robust_table,
    draw=lambda table, _: pictures.sweep(
        {_title(attack): _against_size(table, attack) for attack in DISTURBANCES},
        columns=len(DISTURBANCES),
        share_y=True,
    ),
    constants={"far": f"{FAR:g}"},
    comparisons={
        "small": lambda table: _above_sgd(table, 0, by=FAR),
        "strong": lambda table: _above_sgd(table, -1, by=0.0),
    },
)

SOLUTIONS = (RANK, DISTURBED)
