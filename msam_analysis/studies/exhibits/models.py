"""Other models and other tasks: a vision transformer's warm-up, and what holds outside vision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import pandas as pd

from msam_analysis.results import Eigenpairs
from msam_analysis.results.statistics import mean_interval
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import FAR, Compare, Comparison, difference, ratio
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import after_warmup, each, unperturbed
from msam_analysis.studies.measuring import SOME
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, as_table, cosines, mean_cosine, negative_share, of_training
from msam_analysis.studies.workloads import Workload

OUTSIDE = ("text", "table")
"""Relatives that have nothing to do with images."""

_PERTURBED = ("SAM", "MSAM")


def _scores(run: FinishedRun) -> dict[str, float | str | int]:
    return {
        "optimizer": run.optimizer,
        "seed": run.seed,
        "train_accuracy": 100 * run.scores["train_accuracy"],
        "test_accuracy": 100 * run.scores["test_accuracy"],
        "test_loss": run.scores["test_loss"],
    }


# ----------------------------------------------------------------------------------------------- TA2, the warm-up phase


def _warmup_runs(workload: Workload, seeds: int) -> dict[str, list[Run]]:
    """Return the runs of the transformer beside the workload; none where there is none."""
    one = workload.relatives.get("transformer")
    if one is None:
        return {}
    groups = {"throughout": each(one, (unperturbed(one), *_PERTURBED), seeds)}
    if one.recipe.warmup:
        late = [each(after_warmup(one, name), (name,), seeds) for name in _PERTURBED]
        groups["after warm-up only"] = [*late[0], *late[1]]
    return groups


def _warmup_table(evidence: Evidence) -> pd.DataFrame:
    rows = [{"perturbed": when, **_scores(run)} for when, runs in evidence.groups.items() for run in runs]
    return as_table(rows)


def _above_base(table: pd.DataFrame) -> list[Comparison]:
    whole = table[table["perturbed"] == "throughout"]
    base = next(name for name in whole["optimizer"] if name not in _PERTURBED)
    gains = (difference(whole, "test_accuracy", name, base, unit="points") for name in _PERTURBED)
    return [dataclasses.replace(gain, label=f"{gain.label}, gain", above=FAR) for gain in gains]


def _later(table: pd.DataFrame, name: str) -> list[Comparison]:
    mine = table[table["optimizer"] == name].sort_values("seed")
    late, always = (
        mine.loc[mine["perturbed"] == when, "test_accuracy"].to_numpy(dtype=np.float64)
        for when in ("after warm-up only", "throughout")
    )
    if not len(late):
        return []
    return [Comparison(f"{name} after warm-up only − throughout", mean_interval(late - always), "points")]


WARMUP = Exhibit(
    ("T2", "TA2"),
    "warmup",
    wants=_warmup_runs,
    table=_warmup_table,
    draw=lambda table, _: pictures.by_group(
        table, {"test_accuracy": "test accuracy (%)", "train_accuracy": "train accuracy (%)"}, "perturbed"
    ),
    constants={"far": f"{FAR:g}"},
    comparisons={
        "above": _above_base,
        "msam_later": lambda table: _later(table, "MSAM"),
        "sam_later": lambda table: _later(table, "SAM"),
    },
)

# -------------------------------------------------------------------------------------------------- outside of vision


def _outside_runs(workload: Workload, seeds: int) -> dict[str, list[Run]]:
    beside = {name: workload.relatives[name] for name in OUTSIDE if name in workload.relatives}
    return {
        name: each(one, (unperturbed(one), *_PERTURBED), seeds, measured=("lambda1",)) for name, one in beside.items()
    }


def _outside_table(evidence: Evidence) -> pd.DataFrame:
    rows = []
    for name, runs in evidence.groups.items():
        for run in runs:
            pairs = cast(Eigenpairs, run.results["lambda1"])
            rows.append(
                {
                    "problem": name,
                    **_scores(run),
                    "lambda_1": float(pairs.values[0]),
                    "lambda_1_residual": float(pairs.residuals[0]),
                    "lambda_1_converged": pairs.converged,
                    "cosine": of_training(run.steps, mean_cosine),
                    "negative": of_training(run.steps, lambda steps: negative_share(cosines(steps))),
                }
            )
    return as_table(rows)


def _everywhere(compare: Callable[[pd.DataFrame, str], Comparison]) -> Compare:
    """Compare every workload's optimizer that does not perturb with another one."""

    def compared(table: pd.DataFrame) -> list[Comparison]:
        found = []
        for workload, part in table.groupby("problem", sort=False):
            base = next(name for name in part["optimizer"] if name not in _PERTURBED)
            comparison = compare(part, base)
            found.append(dataclasses.replace(comparison, label=f"{workload}, {comparison.label}"))
        return found

    return compared


OUTSIDE_VISION = Exhibit(
    (),
    "outside_vision",
    wants=_outside_runs,
    table=_outside_table,
    draw=lambda table, _: pictures.by_group(
        table,
        {
            "test_accuracy": "test accuracy (%)",
            "test_loss": "test loss (nats)",
            "lambda_1": r"$\lambda_1$",
            "cosine": r"$\cos(v_{t-1},\, g_t)$",
        },
        "problem",
        log=("lambda_1",),
    ),
    constants={"samples": SOME},
    comparisons={
        "msam_loss": _everywhere(lambda part, base: difference(part, "test_loss", base, "MSAM", unit="nats")),
        "msam_flat": _everywhere(lambda part, base: ratio(part, "lambda_1", base, "MSAM")),
        "sam_loss": _everywhere(lambda part, base: difference(part, "test_loss", base, "SAM", unit="nats")),
        "sam_flat": _everywhere(lambda part, base: ratio(part, "lambda_1", base, "SAM")),
    },
)

MODELS_AND_TASKS = (WARMUP, OUTSIDE_VISION)
