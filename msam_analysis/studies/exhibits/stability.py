"""Under other hyper-parameters: the cosine between momentum and gradient, MSAM's gain, and equal compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from msam_analysis.results.statistics import mean_interval, summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Compare, Comparison
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.grids import SAME_ACCURACY, base, once, paired, scaled
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.runs import Run, variant
from msam_analysis.studies.tables import as_table, of_training, outcomes
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
_ORDER = {False: "every sample once an epoch", True: "drawn with replacement"}


def values(workload: Workload) -> Mapping[str, list[Any]]:
    """Return the values of every setting around the recipe's own; the grid of the momentum is one of ``1 − μ``."""
    recipe = workload.recipe
    return {
        "lr": [scaled(recipe.lr, sixths) for sixths in _LR],
        "momentum": [float(f"{1 - damping * (1 - recipe.momentum):.4g}") for damping in sorted(_DAMPING, reverse=True)],
        "batch_size": [max(1, round(recipe.batch_size * factor)) for factor in _BATCHES],
    }


def _by_setting(evidence: Evidence, table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Stack a table by what is varied; the recipe's own run appears for every setting."""
    frames = []
    for name in SETTINGS:
        others = [other for other in SETTINGS if other != name]
        own = (table[others] == [getattr(evidence.workload.recipe, other) for other in others]).all(axis=1)
        frames.append(
            table.loc[own, ["optimizer", "seed", "replacement", *columns]].assign(setting=name, value=table[name])
        )
    return as_table(pd.concat(frames, ignore_index=True))


# --- A5, A6, A7: the cosine


def _cosine_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD at every value of every setting, with every sample once an epoch and with replacement.

    Larger batches get more epochs, for the same number of steps.
    """
    own, settings = workload.recipe, values(workload)
    recipes: list[dict[str, Any]] = [{name: value} for name in ("lr", "momentum") for value in settings[name]]
    recipes += [
        {"batch_size": size, "epochs": max(1, round(own.epochs * size / own.batch_size))}
        for size in settings["batch_size"]
    ]
    return once(
        Run(variant(workload, "SGD", None, **recipe), "SGD", seed, replacement=replacement)
        for recipe in recipes
        for replacement in (False, True)
        for seed in range(seeds)
    )


def mid_training(steps: pd.DataFrame) -> float:
    """Return the mean cosine over the middle half of the steps."""
    quarter = len(steps) // 4
    # At the first step there is no momentum.
    return float(steps["cosine"].iloc[max(quarter, 1) : len(steps) - quarter].mean(skipna=False))


def _cosine_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per setting and run that varies it: ``setting``, its ``value``, and the mean ``cosine``.

    ``train_accuracy`` tells how far the run came.
    """
    cosine = [of_training(run.steps, mid_training) for run in evidence.runs]
    return _by_setting(evidence, outcomes(evidence.runs).assign(cosine=cosine), ["cosine", "train_accuracy"])


def _draw_cosines(table: pd.DataFrame, _: Evidence) -> Any:
    drawn, label = table.assign(optimizer=table["replacement"].map(_ORDER)), r"mean $\cos(v_{t-1},\, g_t)$"
    panels = [
        Sweep(drawn[drawn["setting"] == name], "value", "cosine", words, label, log=name != "momentum", zero_line=True)
        for name, words in SETTINGS.items()
    ]
    return pictures.sweep(panels, share_y=True)


def _shown_cosines(table: pd.DataFrame) -> pd.DataFrame:
    percent = table.sort_values(["setting", "value"]).assign(train_accuracy=100 * table["train_accuracy"])
    shown = summarise(percent, ["setting", "value", "replacement"], ["cosine", "train_accuracy"]).drop(columns="count")
    return as_table(shown.assign(replacement=shown["replacement"].map(_ORDER)))


def _at(table: pd.DataFrame, setting: str, value: float, replacement: bool) -> pd.Series[float]:
    """Return the cosines at a value of a setting, by seed."""
    rows = table[(table["setting"] == setting) & (table["replacement"] == replacement) & (table["value"] == value)]
    cosines: pd.Series[float] = rows.set_index("seed")["cosine"]
    return cosines


def _tried(table: pd.DataFrame, setting: str) -> list[float]:
    return sorted(set(table.loc[table["setting"] == setting, "value"]))


def _rises_with(setting: str, toward: int, replacement: bool) -> Compare:
    """Compare the cosine at the two ends of a setting; ``toward`` is the end where it is said to be higher."""

    def compare(table: pd.DataFrame) -> list[Comparison]:
        low, *_, high = _tried(table, setting)
        higher, lower = (high, low) if toward > 0 else (low, high)
        change = _at(table, setting, higher, replacement) - _at(table, setting, lower, replacement)
        label = f"cosine at {_SHORT[setting]} {higher:g} − at {lower:g}"
        return [Comparison(label, mean_interval(change.to_numpy(dtype=np.float64)))]

    return compare


def _small_rates(replacement: bool) -> Compare:
    """Compare the cosine at the two smallest learning rates with 0."""

    def compare(table: pd.DataFrame) -> list[Comparison]:
        return [
            Comparison(
                f"cosine at η = {value:g}",
                mean_interval(_at(table, "lr", value, replacement).to_numpy(dtype=np.float64)),
                above=-math.inf,
                below=0.0,
            )
            for value in _tried(table, "lr")[:2]
        ]

    return compare


COSINE = Exhibit(
    ("A5", "A6", "A7"),
    "cosine_settings",
    wants=_cosine_runs,
    table=_cosine_table,
    draw=_draw_cosines,
    shown=_shown_cosines,
    comparisons={
        "small_rates": _small_rates(False),
        "small_rates_control": _small_rates(True),
        "momentum": _rises_with("momentum", 1, False),
        "momentum_control": _rises_with("momentum", 1, True),
        "batches": _rises_with("batch_size", -1, False),
        "batches_control": _rises_with("batch_size", -1, True),
    },
)


# --- A10: the gain


def _gain_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD and MSAM, at the same ρ throughout, at every learning rate and momentum."""
    msam = base(workload, "MSAM")
    return once(
        Run(variant(workload, name, perturbation, **{setting: value}), name, seed)
        for setting in ("lr", "momentum")
        for value in values(workload)[setting]
        for name, perturbation in (("SGD", None), ("MSAM", msam))
        for seed in range(seeds)
    )


def _gain_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per setting and run that varies it, with accuracies; ``near``: within a decade of the recipe's."""
    table = _by_setting(evidence, outcomes(evidence.runs), ["train_accuracy", "test_accuracy"])
    table = table[table["setting"] != "batch_size"].drop(columns="replacement")
    decades = np.abs(np.log10(table["value"].to_numpy(dtype=np.float64) / evidence.workload.recipe.lr))
    return as_table(table.assign(near=(table["setting"] != "lr") | (decades < _NEAR)))


def _draw_gains(table: pd.DataFrame, _: Evidence) -> Any:
    quantity: dict[str, Any] = {"y": "test_accuracy", "label_y": "test accuracy (%)", "percent": True}
    rows = {name: table[table["setting"] == name] for name in ("lr", "momentum")}
    panels = [Sweep(part, "value", label_x=SETTINGS[name], log=name == "lr", **quantity) for name, part in rows.items()]
    return pictures.sweep(panels, share_y=True)


def _shown_gains(table: pd.DataFrame) -> pd.DataFrame:
    wide = table.pivot_table(index=["setting", "value", "seed"], columns="optimizer", values="test_accuracy")
    wide = (100 * wide).assign(gain=lambda frame: frame["MSAM"] - frame["SGD"]).reset_index()
    return as_table(summarise(wide, ["setting", "value"], ["SGD", "MSAM", "gain"]).drop(columns="count"))


def _gains(table: pd.DataFrame, near: bool) -> list[Comparison]:
    return [
        paired(
            f"{_SHORT[str(setting)]} = {value:g}, MSAM − SGD",
            rows[rows["optimizer"] == "MSAM"],
            rows[rows["optimizer"] == "SGD"],
        )
        for (setting, value), rows in table[table["near"] == near].groupby(["setting", "value"], sort=False)
    ]


GAIN = Exhibit(
    ("A10",),
    "stability",
    wants=_gain_runs,
    table=_gain_table,
    draw=_draw_gains,
    shown=_shown_gains,
    facts=lambda _, evidence: {"rho": f"{base(evidence.workload, 'MSAM').rho:g}"},
    comparisons={"near": lambda table: _gains(table, near=True), "far": lambda table: _gains(table, near=False)},
)


# --- A11: equal compute


def _budget_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD, MSAM and, with half the epochs, SAM, for budgets around the recipe's own."""
    # Even, so that SAM's half is whole.
    budgets = [max(2, 2 * round(workload.recipe.epochs * factor / 2)) for factor in _BUDGETS]
    family = (("SGD", None, 1), ("MSAM", base(workload, "MSAM"), 1), ("SAM", base(workload, "SAM"), 2))
    return once(
        Run(variant(workload, name, perturbation, epochs=budget // cost), name, seed)
        for budget in budgets
        for name, perturbation, cost in family
        for seed in range(seeds)
    )


def _budget_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``budget`` is its gradients in epochs of one gradient a step."""
    columns = ["optimizer", "seed", "epochs", "gradients_per_step", "train_accuracy", "test_accuracy"]
    table = outcomes(evidence.runs)[columns]
    budget = (table["epochs"] * table["gradients_per_step"]).round().astype(int)
    return as_table(table.assign(budget=budget, short=budget < evidence.workload.recipe.epochs))


def _shown_budgets(table: pd.DataFrame) -> pd.DataFrame:
    accuracies = ["test_accuracy", "train_accuracy"]
    percent = table.assign(**{name: 100 * table[name] for name in accuracies}).sort_values("budget")
    return as_table(summarise(percent, ["budget", "optimizer", "epochs"], accuracies).drop(columns="count"))


def _budgets(table: pd.DataFrame, short: bool, above: float = 0.0, below: float = math.inf) -> list[Comparison]:
    chosen = table[table["short"] == short]
    msam, sam = (dict([*chosen[chosen["optimizer"] == name].groupby("budget")]) for name in ("MSAM", "SAM"))
    return [
        paired(f"{budget} epochs' gradients, MSAM − SAM", msam[budget], sam[budget], above=above, below=below)
        for budget in sorted(msam.keys() & sam.keys())
    ]


COMPUTE = Exhibit(
    ("A11",),
    "equal_compute",
    wants=_budget_runs,
    table=_budget_table,
    draw=lambda table, _: pictures.sweep(
        [
            Sweep(table, "budget", name, "gradients evaluated (epochs)", label, percent=True)
            for name, label in (("test_accuracy", "test accuracy (%)"), ("train_accuracy", "train accuracy (%)"))
        ]
    ),
    shown=_shown_budgets,
    comparisons={
        "short": lambda table: _budgets(table, short=True),
        "long": lambda table: _budgets(table, short=False, above=-SAME_ACCURACY, below=SAME_ACCURACY),
    },
)

STABILITY = (COSINE, GAIN, COMPUTE)
