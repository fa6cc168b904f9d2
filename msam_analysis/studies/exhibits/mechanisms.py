"""Why momentum is an ascent direction: the loss along it, the loss at the perturbed weights, and its angle to SAM's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from msam_analysis.results.statistics import mean_interval
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Comparison, over_seeds
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import constant, each, with_recipe
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, as_table, mean_cosine, of_training, per_run
from msam_analysis.studies.watching import OFFSETS, STRENGTHS
from msam_analysis.studies.workloads import Workload

RATES = (0.1, 1.0, 3.0)
"""Learning rates at which the change of the loss is shown, as multiples of the recipe's."""
CLOSE = 2.0
"""Within this factor a strength counts as close."""

# ------------------------------------------------------------------------------------------ A2, the loss along momentum


def _rise_from(steps: pd.DataFrame, offset: float, *, after: float = -math.inf) -> float:
    """Return the mean change of the loss at an offset, of a whole run or after an epoch."""

    def rise(whole: pd.DataFrame) -> float:
        # At the first step there is no momentum, and at most of the others nothing was asked.
        later = whole.iloc[1:]
        asked = later[(later["epoch"] > after) & later.filter(like="loss_along/").notna().any(axis=1)]
        return float((asked[f"loss_along/{offset:g}"] - asked["loss_along/0"]).mean(skipna=False))

    return of_training(steps, rise)


def _along_table(evidence: Evidence) -> pd.DataFrame:
    """Return the mean change of the next batch's loss at every offset: one row per run and offset."""
    rows = [
        {
            "optimizer": run.optimizer,
            "seed": run.seed,
            "lr": run.settings["lr"],
            "offset": offset,
            "change": _rise_from(run.steps, offset),
        }
        for run in evidence.runs
        for offset in sorted((*OFFSETS, 0.0))
    ]
    return as_table(rows)


def minimum(offsets: Sequence[float], changes: Sequence[float]) -> float:
    """Return where a curve is lowest: the vertex of the parabola through the lowest point and its two neighbours.

    NaN where a change is not a number or infinite: the curve may be lower there.
    """
    if not np.isfinite(changes).all():
        return math.nan
    at = int(np.argmin(changes))
    if at in (0, len(offsets) - 1):
        return float(offsets[at])
    a, b, _ = np.polyfit(offsets[at - 1 : at + 2], changes[at - 1 : at + 2], 2)
    return float(-b / (2 * a))


def _minima(table: pd.DataFrame, *names: str) -> list[Comparison]:
    found = []
    for optimizer, runs in table[table["optimizer"].isin(names)].groupby("optimizer", sort=False):
        values = [minimum(run["offset"].to_list(), run["change"].to_list()) for _, run in runs.groupby("seed")]
        found.append(Comparison(f"{optimizer}, minimum at a", mean_interval(values)))
    return found


ALONG = Exhibit(
    ("A2",),
    "along_momentum",
    wants=lambda workload, seeds: each(workload, workload.perturbations, seeds, watched=("along_momentum", "rise")),
    table=_along_table,
    draw=lambda table, _: pictures.along_momentum(table),
    comparisons={
        "behind": lambda table: _minima(table, "SGD"),
        "behind_control": lambda table: _minima(table, "NAG", "SAM", "MSAM"),
    },
)

# --------------------------------------------------------------------------- A12, the change of the loss itself, for η


def _rates_runs(workload: Workload, seeds: int) -> list[Run]:
    rates = [with_recipe(workload, lr=factor * workload.recipe.lr) for factor in RATES]
    return [run for one in rates for run in each(one, ("SGD", "MSAM"), seeds, watched=("along_momentum", "rise"))]


def _rates_table(evidence: Evidence) -> pd.DataFrame:
    # The recorded distance that is nearest to MSAM's ρ, by ratio.
    best = constant(evidence.workload.perturbations["MSAM"])
    rho = min((-offset for offset in OFFSETS if offset < 0), key=lambda value: abs(math.log(value / best)))

    def rises(run: FinishedRun) -> dict[str, object]:
        return {
            "lr": run.settings["lr"],
            "learning_rate": f"η = {run.settings['lr']:g}",
            "rho": rho,
            "virtual_rise": _rise_from(run.steps, -rho),
            "virtual_rise_last_quarter": _rise_from(run.steps, -rho, after=0.75 * run.steps["epoch"].max()),
            "own_rise": of_training(run.steps, lambda steps: steps["rise"].mean()),
            "small_rise": _rise_from(run.steps, -0.1),
            "cosine": of_training(run.steps, mean_cosine),
            "test_accuracy": 100 * run.scores["test_accuracy"],
        }

    return per_run(evidence.runs, rises)


def _draw_rates(table: pd.DataFrame, _: Evidence) -> Any:
    quantities = {
        "virtual_rise": f"$L(w+\\epsilon) - L(w)$ (nats), ρ = {table['rho'].iloc[0]:g}",
        "small_rise": "the same at ρ = 0.1",
        "cosine": r"$\cos(v_{t-1},\, g_t)$",
    }
    return pictures.by_group(table, quantities, "learning_rate")


RISE_RATES = Exhibit(
    ("A12",),
    "rise_by_learning_rate",
    wants=_rates_runs,
    table=_rates_table,
    draw=_draw_rates,
    comparisons={
        "every_rate": over_seeds("mean L(w − ρ v/‖v‖) − L(w)", "virtual_rise", "optimizer", "learning_rate"),
        "small_move": over_seeds("mean L(w − 0.1 v/‖v‖) − L(w)", "small_rise", "optimizer", "learning_rate"),
    },
)

# ---------------------------------------------------------------------------------- F3, the angle between MSAM and SAM


def _recorded(run: FinishedRun) -> tuple[pd.DataFrame, bool]:
    """Return the records of the angle, and whether there are some and the run did not diverge."""
    # At the first step there is no momentum.
    later = run.steps.iloc[1:]
    recorded = later[later.filter(like="sam_angle/").notna().any(axis=1)]
    return recorded, math.isfinite(of_training(run.steps, lambda _: 0.0)) and not recorded.empty


def _angle_table(evidence: Evidence) -> pd.DataFrame:
    best = constant(evidence.workload.perturbations["MSAM"])
    roots = []
    for run in evidence.runs:
        recorded, finished = _recorded(run)
        # A run without a record is not left out.
        rows = (run.steps.iloc[-1:] if recorded.empty else recorded)[["step", "epoch", "rho_0"]]
        roots.append(rows.assign(optimizer=run.optimizer, seed=run.seed, best_rho=best, finished=finished))
    return as_table(pd.concat(roots, ignore_index=True))


def _draw_angle(table: pd.DataFrame, evidence: Evidence) -> Any:
    angles = []
    for run in evidence.runs:
        recorded, finished = _recorded(run)
        for rho in (0.0, *STRENGTHS):
            angle = recorded[f"sam_angle/{rho:g}"].median() if finished else math.nan
            angles.append({"optimizer": run.optimizer, "seed": run.seed, "rho": rho, "angle": angle})
    per_epoch = table.groupby(["optimizer", "seed", "epoch"], sort=False)["rho_0"].mean().reset_index()
    return pictures.zero_angle(pd.DataFrame(angles), per_epoch, float(table["best_rho"].iloc[0]))


def _near_best(table: pd.DataFrame) -> list[Comparison]:
    near = table["rho_0"].between(table["best_rho"] / CLOSE, table["best_rho"] * CLOSE)
    # What came before a run diverged is no share of its training.
    known = table.assign(near=(100.0 * near).where(table["finished"]))
    shares = known.groupby(["optimizer", "seed"], sort=False)["near"].mean().reset_index()
    label = f"records with ρ₀ within a factor {CLOSE:g} of the best ρ"
    return over_seeds(label, "near", "optimizer", unit="%", above=50.0)(shares)


ANGLE = Exhibit(
    ("F3",),
    "sam_angle",
    wants=lambda workload, seeds: each(workload, ("SGD", "MSAM"), seeds, watched=("sam_angle",)),
    table=_angle_table,
    draw=_draw_angle,
    facts=lambda table, _: {"longest": f"{max(STRENGTHS):g}", "best": f"{table['best_rho'].iloc[0]:g}"},
    comparisons={"close": _near_best},
)

MECHANISMS = (ANGLE, ALONG, RISE_RATES)
