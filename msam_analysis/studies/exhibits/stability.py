"""Under other hyper-parameters: the cosine between momentum and gradient, MSAM's gain, and equal compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from msam_analysis.results.statistics import summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import NEGATIVE, SAME, Comparison, by_seed, compared, difference
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.grids import ACCURACIES, against, summary
from msam_analysis.studies.exhibits.wanted import base, each, scaled
from msam_analysis.studies.runs import Run, variant
from msam_analysis.studies.tables import as_table, of_training, outcomes, rows
from msam_analysis.studies.workloads import Workload

_LR = (-18, -12, -6, -3, 0, 3)
_DAMPING = (5.0, 2.0, 1.0, 0.5)
_BATCHES = (0.5, 1, 2, 4)
_BUDGETS = (0.25, 0.5, 1, 2)
# Learning rates within a decade, and what rounding does to its ends.
_NEAR = 1.01

SETTINGS = {"lr": r"learning rate $\eta$", "momentum": r"momentum $\mu$", "batch_size": "batch size"}
"""What is varied, one at a time, and its name on an axis."""
_SHORT = {"lr": "η", "momentum": "μ", "batch_size": "batch size"}
_LABEL = r"mean $\cos(v_{t-1},\, g_t)$"
_POINTS: Mapping[str, Any] = {"scale": 100, "unit": "points"}
_ORDER = {False: "every sample once an epoch", True: "drawn with replacement"}


def values(workload: Workload) -> Mapping[str, list[Any]]:
    """Return the values of every setting around the recipe's own; the grid of the momentum is one of ``1 − μ``."""
    recipe = workload.recipe
    return {
        "lr": [scaled(recipe.lr, sixths) for sixths in _LR],
        "momentum": [float(f"{1 - damping * (1 - recipe.momentum):.4g}") for damping in _DAMPING],
        "batch_size": [max(1, round(recipe.batch_size * factor)) for factor in _BATCHES],
    }


def _by_setting(evidence: Evidence, table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Stack a table by what is varied; the recipe's own run appears for every setting."""
    frames = []
    for name in SETTINGS:
        own = rows(table, **{other: getattr(evidence.workload.recipe, other) for other in SETTINGS if other != name})
        kept = own[["optimizer", "seed", "replacement", *columns]]
        frames.append(kept.assign(setting=name, value=own[name]))
    return as_table(pd.concat(frames, ignore_index=True))


def _draw(table: pd.DataFrame, name: str, label: str, **switches: bool) -> Any:
    """Draw a quantity against every setting."""
    panels = [
        panel
        for setting, own in table.groupby("setting", sort=False)
        for panel in against(own, "value", SETTINGS[str(setting)], {name: label}, log=setting != "momentum", **switches)
    ]
    return pictures.sweep(panels, share_y=True)


# A5, A6, A7: the cosine
def _cosine_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD at every value of every setting, in both orders; larger batches get more epochs, for as many steps."""
    own, settings = workload.recipe, values(workload)
    recipes: list[dict[str, Any]] = [{name: value} for name in ("lr", "momentum") for value in settings[name]]
    recipes += [
        {"batch_size": size, "epochs": max(1, round(own.epochs * size / own.batch_size))}
        for size in settings["batch_size"]
    ]
    tried = [variant(workload, "SGD", None, **recipe) for recipe in recipes]
    kinds = (False, True)
    return [run for one in tried for kind in kinds for run in each(one, ("SGD",), seeds, replacement=kind)]


def mid_training(steps: pd.DataFrame) -> float:
    """Return the mean cosine over the middle half of the steps."""
    quarter = len(steps) // 4
    # At the first step there is no momentum.
    return float(steps["cosine"].iloc[max(quarter, 1) : len(steps) - quarter].mean(skipna=False))


def _cosine_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per setting and run that varies it; ``train_accuracy`` tells how far the run came."""
    cosine = [of_training(run.steps, mid_training) for run in evidence.runs]
    return _by_setting(evidence, outcomes(evidence.runs).assign(cosine=cosine), "cosine", "train_accuracy")


def _shown_cosines(table: pd.DataFrame) -> pd.DataFrame:
    ordered, by = table.sort_values(["setting", "value"]), ["setting", "value", "replacement"]
    shown = summary(ordered, by, ["cosine", "train_accuracy"])
    return as_table(shown.assign(replacement=shown["replacement"].map(_ORDER)))


def _small_rates(table: pd.DataFrame, replacement: bool) -> list[Comparison]:
    own = rows(table, setting="lr", replacement=replacement)
    smallest = sorted(set(own["value"]))[:2]
    return [compared(f"cosine at η = {lr:g}", by_seed(own, "cosine", value=lr), **NEGATIVE) for lr in smallest]


def _rise(table: pd.DataFrame, setting: str, replacement: bool) -> list[Comparison]:
    """Compare the cosine at the two ends of a setting, of which it is said to be higher at one."""
    own = rows(table, setting=setting, replacement=replacement)
    lower, higher = sorted((own["value"].min(), own["value"].max()), reverse=setting == "batch_size")
    change = by_seed(own, "cosine", value=higher) - by_seed(own, "cosine", value=lower)
    return [compared(f"cosine at {_SHORT[setting]} {higher:g} − at {lower:g}", change)]


COSINE = Exhibit(
    "cosine_settings",
    wants=_cosine_runs,
    table=_cosine_table,
    draw=lambda table, _: _draw(
        table.assign(optimizer=table["replacement"].map(_ORDER)), "cosine", _LABEL, zero_line=True
    ),
    shown=_shown_cosines,
    comparisons={
        "small_rates": lambda table: _small_rates(table, replacement=False),
        "small_rates_control": lambda table: _small_rates(table, replacement=True),
        "momentum": lambda table: _rise(table, "momentum", replacement=False),
        "momentum_control": lambda table: _rise(table, "momentum", replacement=True),
        "batches": lambda table: _rise(table, "batch_size", replacement=False),
        "batches_control": lambda table: _rise(table, "batch_size", replacement=True),
    },
)


# A10: the gain
def _gain_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD and MSAM, at the same ρ throughout, at every learning rate and momentum."""
    recipes = [{setting: value} for setting in ("lr", "momentum") for value in values(workload)[setting]]
    base(workload, "MSAM")  # one number throughout, or an error
    tried = [variant(workload, "SGD", None, **recipe) for recipe in recipes]
    return [run for one in tried for run in each(one, ("SGD", "MSAM"), seeds)]


def _gain_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per setting and run that varies it, with accuracies; ``near``: within a decade of the recipe's."""
    table = _by_setting(evidence, outcomes(evidence.runs), "train_accuracy", "test_accuracy")
    table = rows(table, setting=("lr", "momentum")).drop(columns="replacement")
    decades = np.abs(np.log10(table["value"].to_numpy(dtype=np.float64) / evidence.workload.recipe.lr))
    return as_table(table.assign(near=(table["setting"] != "lr") | (decades < _NEAR)))


def _shown_gains(table: pd.DataFrame) -> pd.DataFrame:
    wide = 100 * table.pivot_table(index=["setting", "value", "seed"], columns="optimizer", values="test_accuracy")
    wide = wide.assign(gain=wide["MSAM"] - wide["SGD"]).reset_index()
    return as_table(summarise(wide, ["setting", "value"], ["SGD", "MSAM", "gain"]).drop(columns="count"))


def _gains(table: pd.DataFrame, near: bool) -> list[Comparison]:
    return [
        difference(own, "test_accuracy", "MSAM", "SGD", f"{_SHORT[str(setting)]} = {value:g}, {{pair}}", **_POINTS)
        for (setting, value), own in rows(table, near=near).groupby(["setting", "value"], sort=False)
    ]


GAIN = Exhibit(
    "stability",
    wants=_gain_runs,
    table=_gain_table,
    draw=lambda table, _: _draw(table, "test_accuracy", "test accuracy (%)"),
    shown=_shown_gains,
    facts=lambda _, evidence: {"rho": f"{base(evidence.workload, 'MSAM').rho:g}"},
    comparisons={"near": lambda table: _gains(table, near=True), "far": lambda table: _gains(table, near=False)},
)


# A11: equal compute
def _budget_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD, MSAM and, with half the epochs, SAM, for budgets around the recipe's own."""
    # Even, so that SAM's half is whole.
    budgets = [max(2, 2 * round(workload.recipe.epochs * factor / 2)) for factor in _BUDGETS]
    family = (("SGD", None, 1), ("MSAM", base(workload, "MSAM"), 1), ("SAM", base(workload, "SAM"), 2))
    return [
        run
        for budget in budgets
        for name, perturbation, cost in family
        for run in each(variant(workload, name, perturbation, epochs=budget // cost), (name,), seeds)
    ]


def _budget_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``budget`` is its gradients in epochs of one gradient a step."""
    columns = ["optimizer", "seed", "epochs", "gradients_per_step", "train_accuracy", "test_accuracy"]
    table = outcomes(evidence.runs)[columns]
    budget = (table["epochs"] * table["gradients_per_step"]).round().astype(int)
    return as_table(table.assign(budget=budget, short=budget < evidence.workload.recipe.epochs))


def _budgets(table: pd.DataFrame, short: bool, **region: Any) -> list[Comparison]:
    groups, label = rows(table, short=short).groupby("budget"), "{} epochs' gradients, {{pair}}"
    return [
        difference(own, "test_accuracy", "MSAM", "SAM", label.format(budget), **_POINTS, **region)
        for budget, own in groups
    ]


COMPUTE = Exhibit(
    "equal_compute",
    wants=_budget_runs,
    table=_budget_table,
    draw=lambda table, _: pictures.sweep(against(table, "budget", "gradients evaluated (epochs)", ACCURACIES)),
    shown=lambda table: summary(table.sort_values("budget"), ["budget", "optimizer", "epochs"], [*ACCURACIES]),
    comparisons={
        "short": lambda table: _budgets(table, short=True),
        "long": lambda table: _budgets(table, short=False, **SAME),
    },
)

STABILITY = (COSINE, GAIN, COMPUTE)
