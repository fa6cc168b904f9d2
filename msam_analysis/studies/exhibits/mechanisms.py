"""Why momentum is an ascent direction: the loss along it, and its angles to the next gradient and to SAM's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from msam_analysis.studies import pictures
from msam_analysis.studies.claims import NEGATIVE, Compare, Comparison, over_seeds
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import constant, each, unperturbed, with_recipe
from msam_analysis.studies.tables import COSINE, FinishedRun, as_table, mean_of, negative_share, of_training, statistics
from msam_analysis.studies.watching import OFFSETS, STRENGTHS
from msam_analysis.studies.workloads import Workload

RATES = (0.1, 1.0, 3.0)
"""Learning rates at which the change of the loss is shown, as multiples of the recipe's."""
CLOSE = 2.0
"""Within this factor a strength counts as close."""
_BOTH = ("SGD", "MSAM")


# A2 and A12: the loss along momentum, and its change at the perturbed weights
def _rise_from(steps: pd.DataFrame, offset: float, *, after: float = -math.inf) -> float:
    """Return the mean change of the loss at an offset, of a whole run or after an epoch."""

    def rise(whole: pd.DataFrame) -> float:
        # At the first step there is no momentum, and at most of the others nothing was asked.
        later = whole.iloc[1:]
        asked = later[(later["epoch"] > after) & later.filter(like="loss_along/").notna().any(axis=1)]
        return float((asked[f"loss_along/{offset:g}"] - asked["loss_along/0"]).mean(skipna=False))

    return of_training(steps, rise)


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
    found = [
        {"optimizer": name, "seed": seed, "at": minimum(run["offset"].to_list(), run["change"].to_list())}
        for (name, seed), run in table.groupby(["optimizer", "seed"], sort=False)
    ]
    return over_seeds("minimum at a", "at", "optimizer", where={"optimizer": names})(as_table(found))


ALONG = Exhibit(
    "along_momentum",
    wants=lambda workload, seeds: each(workload, workload.perturbations, seeds, watched=("along_momentum", "rise")),
    table=lambda evidence: as_table(
        [
            {**run.whose, "lr": run.settings["lr"], "offset": offset, "change": _rise_from(run.steps, offset)}
            for run in evidence.runs
            for offset in sorted((*OFFSETS, 0.0))
        ]
    ),
    draw=lambda table, _: pictures.along_momentum(table),
    comparisons={
        "behind": lambda table: _minima(table, "SGD"),
        "behind_control": lambda table: _minima(table, "NAG", "SAM", "MSAM"),
    },
)


def _rates_table(evidence: Evidence) -> pd.DataFrame:
    # The recorded distance that is nearest to MSAM's ρ, by ratio.
    best = constant(evidence.workload.perturbations["MSAM"])
    rho = min((-offset for offset in OFFSETS if offset < 0), key=lambda value: abs(math.log(value / best)))
    found = [
        {
            **run.whose,
            "lr": run.settings["lr"],
            "learning_rate": f"η = {run.settings['lr']:g}",
            "rho": rho,
            "virtual_rise": _rise_from(run.steps, -rho),
            "virtual_rise_last_quarter": _rise_from(run.steps, -rho, after=0.75 * run.steps["epoch"].max()),
            "own_rise": of_training(run.steps, mean_of("rise")),
            "small_rise": _rise_from(run.steps, -0.1),
            "cosine": of_training(run.steps, COSINE["cosine"]),
            "test_accuracy": 100 * run.scores["test_accuracy"],
        }
        for run in evidence.runs
    ]
    return as_table(found)


RISE_RATES = Exhibit(
    "rise_by_learning_rate",
    wants=lambda workload, seeds: [
        run
        for one in (with_recipe(workload, lr=factor * workload.recipe.lr) for factor in RATES)
        for run in each(one, _BOTH, seeds, watched=("along_momentum", "rise"))
    ],
    table=_rates_table,
    draw=lambda table, _: pictures.by_group(
        table,
        {
            "virtual_rise": f"$L(w+\\epsilon) - L(w)$ (nats), ρ = {table['rho'].iloc[0]:g}",
            "small_rise": "the same at ρ = 0.1",
            "cosine": r"$\cos(v_{t-1},\, g_t)$",
        },
        "learning_rate",
    ),
    comparisons={
        "every_rate": over_seeds("mean L(w − ρ v/‖v‖) − L(w)", "virtual_rise", "optimizer", "learning_rate"),
        "small_move": over_seeds("mean L(w − 0.1 v/‖v‖) − L(w)", "small_rise", "optimizer", "learning_rate"),
    },
)


# F3: the angle between MSAM and SAM
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
        known = (run.steps.iloc[-1:] if recorded.empty else recorded)[["step", "epoch", "rho_0"]]
        roots.append(known.assign(**run.whose, best_rho=best, finished=finished))
    return as_table(pd.concat(roots, ignore_index=True))


def _draw_angle(table: pd.DataFrame, evidence: Evidence) -> Any:
    medians = [
        {**run.whose, "rho": rho, "angle": recorded[f"sam_angle/{rho:g}"].median() if finished else math.nan}
        for run in evidence.runs
        for recorded, finished in [_recorded(run)]
        for rho in (0.0, *STRENGTHS)
    ]
    per_epoch = table.groupby(["optimizer", "seed", "epoch"], sort=False)["rho_0"].mean().reset_index()
    return pictures.zero_angle(as_table(medians), per_epoch, float(table["best_rho"].iloc[0]))


def _near_best(table: pd.DataFrame) -> list[Comparison]:
    near = table["rho_0"].between(table["best_rho"] / CLOSE, table["best_rho"] * CLOSE)
    # What came before a run diverged is no share of its training.
    known = table.assign(near=(100.0 * near).where(table["finished"]))
    shares = known.groupby(["optimizer", "seed"], sort=False)["near"].mean().reset_index()
    label = f"records with ρ₀ within a factor {CLOSE:g} of the best ρ"
    return over_seeds(label, "near", "optimizer", unit="%", above=50.0)(shares)


ANGLE = Exhibit(
    "sam_angle",
    wants=lambda workload, seeds: each(workload, _BOTH, seeds, watched=("sam_angle",)),
    table=_angle_table,
    draw=_draw_angle,
    facts=lambda table, _: {"longest": f"{max(STRENGTHS):g}", "best": f"{table['best_rho'].iloc[0]:g}"},
    comparisons={"close": _near_best},
)

# A3 and A4: the cosine across models and tasks, and under what conditions it is negative
_AFTER = mean_of("cosine_after", skipna=False)


def _workloads(workload: Workload) -> dict[str, Workload]:
    return {workload.name: workload, **workload.relatives}


def _mostly_negative(table: pd.DataFrame) -> list[Comparison]:
    compare = over_seeds("steps with a negative cosine", "negative", "problem", "optimizer", unit="%", above=50.0)
    return compare(table) if table["problem"].nunique() > 1 else []


MODELS = Exhibit(
    "cosine_models",
    wants=lambda workload, seeds: {
        name: each(one, dict.fromkeys((unperturbed(one), "MSAM")), seeds) for name, one in _workloads(workload).items()
    },
    table=lambda evidence: as_table(
        [
            {**run.whose, "problem": name, **statistics(run.steps, **COSINE, after_update=_AFTER)}
            for name, run in evidence.named
        ]
    ),
    draw=lambda table, _: pictures.by_group(
        table,
        {
            "cosine": r"$\cos(v_{t-1},\, g_t)$, mean",
            "negative": "steps with a negative cosine (%)",
            "after_update": r"$\cos(v_t,\, g_t)$, mean",
        },
        "problem",
    ),
    facts=lambda _, evidence: {
        "descriptions": ". ".join(f"{name}: {one.description}" for name, one in _workloads(evidence.workload).items())
    },
    comparisons={
        "negative": _mostly_negative,
        "after_update": over_seeds("mean cos(v_t, g_t)", "after_update", "problem", "optimizer", above=0.25, below=0.5),
    },
)

_SERIES = {
    "cosine": "next batch",
    "cosine_after": "after the update",
    "held_out_cosine_fresh": "unseen batches",
    "held_out_cosine_fixed": "one unseen batch",
    "own_cosine_fresh": "unseen, momentum of their own",
    "own_cosine_fixed": "one unseen batch, momentum of its own",
}


def _means(steps: pd.DataFrame, column: str) -> dict[str, float]:
    late = steps["epoch"] > 0.75 * steps["epoch"].max()
    return statistics(
        steps,
        mean=mean_of(column),
        negative=lambda whole: negative_share(whole[column].dropna()),
        last_quarter=lambda whole: whole.loc[late, column].mean(),
    )


def _draw_conditions(table: pd.DataFrame, _: Evidence) -> Any:
    where = table["quantity"].map(_SERIES) + table["schedule"].map({"constant": ", constant η", "decay": ""})
    quantities = {"mean": "cosine, mean over training", "last_quarter": "in the last quarter"}
    return pictures.by_group(table.assign(where=where), quantities, "where")


def _cosine(quantity: str, schedule: str, what: str, column: str, **region: float) -> Compare:
    return over_seeds(what, column, "optimizer", where={"quantity": quantity, "schedule": schedule}, **region)


CONDITIONS = Exhibit(
    "cosine_conditions",
    wants=lambda workload, seeds: {
        "decay": each(workload, _BOTH, seeds, watched=("held_out", "held_out_momentum")),
        "constant": each(with_recipe(workload, schedule="constant"), _BOTH, seeds),
    },
    table=lambda evidence: as_table(
        [
            {**run.whose, "schedule": schedule, "quantity": name, **_means(run.steps, name)}
            for schedule, run in evidence.named
            for name in _SERIES
            if name in run.steps
        ]
    ),
    draw=_draw_conditions,
    comparisons={
        "constant": _cosine("cosine", "constant", "cosine in the last quarter", "last_quarter", **NEGATIVE),
        "fresh": _cosine("own_cosine_fresh", "decay", "mean cosine", "mean"),
        "fixed": _cosine("own_cosine_fixed", "decay", "mean cosine", "mean", above=0.8),
        "training_momentum": _cosine("held_out_cosine_fresh", "decay", "mean cosine", "mean", **NEGATIVE),
    },
)

MECHANISMS = (ANGLE, ALONG, RISE_RATES)
COSINES = (MODELS, CONDITIONS)
