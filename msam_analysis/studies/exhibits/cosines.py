"""The cosine of momentum and gradient: across models and tasks, and under what conditions it is negative."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Compare, Comparison, over_seeds
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import each, unperturbed, with_recipe
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import (
    FinishedRun,
    as_table,
    cosines,
    mean_cosine,
    negative_share,
    of_training,
    per_run,
)
from msam_analysis.studies.workloads import Workload

# ----------------------------------------------------------------------------------------------- A3, models and tasks


def _workloads(workload: Workload) -> dict[str, Workload]:
    return {workload.name: workload, **workload.relatives}


def _models_table(evidence: Evidence) -> pd.DataFrame:
    parts = [per_run(runs, _three, problem=name) for name, runs in evidence.groups.items()]
    return as_table(pd.concat(parts, ignore_index=True))


def _three(run: FinishedRun) -> dict[str, float]:
    return {
        "cosine": of_training(run.steps, mean_cosine),
        "negative": of_training(run.steps, lambda steps: negative_share(cosines(steps))),
        "after_update": of_training(run.steps, lambda steps: steps["cosine_after"].mean(skipna=False)),
    }


def _mostly_negative(table: pd.DataFrame) -> list[Comparison]:
    compare = over_seeds("steps with a negative cosine", "negative", "problem", "optimizer", unit="%", above=50.0)
    return compare(table) if table["problem"].nunique() > 1 else []


MODELS = Exhibit(
    ("A3", "A4"),
    "cosine_models",
    wants=lambda workload, seeds: {
        name: each(one, dict.fromkeys((unperturbed(one), "MSAM")), seeds) for name, one in _workloads(workload).items()
    },
    table=_models_table,
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

# ------------------------------------------------------------------------------------------------------- A4, conditions

_SERIES = {
    "cosine": "next batch",
    "cosine_after": "after the update",
    "held_out_cosine_fresh": "unseen batches",
    "held_out_cosine_fixed": "one unseen batch",
    "own_cosine_fresh": "unseen, momentum of their own",
    "own_cosine_fixed": "one unseen batch, momentum of its own",
}


def _conditions_runs(workload: Workload, seeds: int) -> dict[str, list[Run]]:
    names, watched = ("SGD", "MSAM"), ("held_out", "held_out_momentum")
    return {
        "decay": each(workload, names, seeds, watched=watched),
        "constant": each(with_recipe(workload, schedule="constant"), names, seeds),
    }


def _means(steps: pd.DataFrame, column: str) -> dict[str, float]:
    return {
        "mean": of_training(steps, lambda whole: whole[column].mean()),
        "negative": of_training(steps, lambda whole: negative_share(whole[column].dropna())),
        "last_quarter": of_training(
            steps, lambda whole: whole.loc[whole["epoch"] > 0.75 * whole["epoch"].max(), column].mean()
        ),
    }


def _conditions_table(evidence: Evidence) -> pd.DataFrame:
    rows = [
        {
            "optimizer": run.optimizer,
            "seed": run.seed,
            "schedule": schedule,
            "quantity": name,
            **_means(run.steps, name),
        }
        for schedule, runs in evidence.groups.items()
        for run in runs
        for name in _SERIES
        if name in run.steps
    ]
    return as_table(rows)


def _draw_conditions(table: pd.DataFrame, _: Evidence) -> Any:
    where = [
        _SERIES[name] + (", constant η" if kind == "constant" else "")
        for name, kind in zip(table["quantity"], table["schedule"], strict=True)
    ]
    quantities = {"mean": "cosine, mean over training", "last_quarter": "in the last quarter"}
    return pictures.by_group(table.assign(where=where), quantities, "where")


def _cosine(
    quantity: str,
    schedule: str = "decay",
    what: str = "mean cosine",
    column: str = "mean",
    *,
    above: float = 0.0,
    below: float = math.inf,
) -> Compare:
    where = {"quantity": quantity, "schedule": schedule}
    return over_seeds(what, column, "optimizer", where=where, above=above, below=below)


CONDITIONS = Exhibit(
    ("A4",),
    "cosine_conditions",
    wants=_conditions_runs,
    table=_conditions_table,
    draw=_draw_conditions,
    comparisons={
        "constant": _cosine(
            "cosine", "constant", "cosine in the last quarter", "last_quarter", above=-math.inf, below=0.0
        ),
        "fresh": _cosine("own_cosine_fresh"),
        "fixed": _cosine("own_cosine_fixed", above=0.8),
        "training_momentum": _cosine("held_out_cosine_fresh", above=-math.inf, below=0.0),
    },
)

COSINES = (MODELS, CONDITIONS)
