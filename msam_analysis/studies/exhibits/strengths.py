"""Accuracy against the strength ρ: both signs, how sensitive ρ is, and the way from MSAM to NAG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from msam import Perturbation
from msam_analysis.results.statistics import mean_interval, summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Comparison, Values, times
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.grids import (
    SAME_ACCURACY,
    base,
    best,
    best_of_each,
    grid,
    once,
    paired,
    plain,
    plateau,
    scaled,
)
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, as_table, of_training, outcomes
from msam_analysis.studies.workloads import Workload

POSITIVE = (-9, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6)
"""Grid of a positive ρ of SAM and of MSAM, in sixths of a decade around the workload's own."""
_NEGATIVE = (-6, -4, -3, -2, 0)
# NAG's ρ is a factor of the step, and its displacement far shorter than MSAM's: the grid goes to longer ones.
_NAG_POSITIVE = (0, 3, 6, 8, 9, 10, 11, 12, 15)
_NAG_NEGATIVE = (0, 3, 6, 10)
_UNNORMALISED = (0, 3, 6, 8, 9, 10, 11, 12)
_COLUMNS = [
    "optimizer",
    "seed",
    "rho",
    "sign",
    "normalize",
    "train_accuracy",
    "test_accuracy",
    "train_loss",
    "test_loss",
]

GAIN = 2.0
"""The paper's gain of a positive ρ, in points of test accuracy."""
DECADES = 0.5
"""Width of the range of ρ within a point of the best, in decades, from which on ρ is called forgiving."""


# --- F2AB and A15: accuracy against ρ


def strength_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD, and SAM, MSAM and NAG's displacement −ρ η v on grids of ρ with both signs."""
    runs = plain(workload, seeds)
    for name in ("SAM", "MSAM"):
        runs += grid(workload, name, POSITIVE, seeds, watched=("rise",))
        runs += grid(workload, name, _NEGATIVE, seeds, sign=-1)
    runs += grid(workload, "NAG", _NAG_POSITIVE, seeds)
    runs += grid(workload, "NAG", _NAG_NEGATIVE, seeds, sign=-1)
    return once(runs)


def strength_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Return one row per run: ρ and its sign, accuracies, losses, and the mean rise L(w + ε) − L(w) where recorded."""
    rises = [
        of_training(run.steps, lambda steps: steps["rise"].mean()) if "rise" in run.steps else math.nan for run in runs
    ]
    return as_table(outcomes(runs)[_COLUMNS].assign(rise=rises))


def part(table: pd.DataFrame, optimizer: str, sign: int = 1) -> pd.DataFrame:
    """Return an optimizer's rows with one sign of ρ."""
    return as_table(table[(table["optimizer"] == optimizer) & (table["sign"] == sign)])


def _gains(table: pd.DataFrame) -> list[Comparison]:
    sgd = part(table, "SGD")
    return [
        paired(f"{name} at its best ρ − SGD, test accuracy", best(part(table, name)), sgd, above=GAIN)
        for name in ("SAM", "MSAM")
    ]


def _costs(table: pd.DataFrame) -> list[Comparison]:
    sgd = part(table, "SGD")
    return [
        paired(f"SGD − {name} at its best ρ, train accuracy", sgd, best(part(table, name)), "train_accuracy")
        for name in ("SAM", "MSAM")
    ]


def _negative(table: pd.DataFrame) -> list[Comparison]:
    sgd = part(table, "SGD")
    return [
        paired(f"{name} at ρ = −{rho:g}, gain over SGD", rows, sgd, above=-math.inf, below=0.0)
        for name in ("SAM", "MSAM")
        for rho, rows in part(table, name, -1).groupby("rho")
    ]


def _nesterov(table: pd.DataFrame) -> list[Comparison]:
    nag = part(table, "NAG")
    own = nag[nag["rho"] == nag["rho"].min()]
    return [
        times("train loss of SGD / of NAG at ρ = μ", _losses(part(table, "SGD")), _losses(own)),
        paired("best MSAM − NAG at ρ = μ, test accuracy", best(part(table, "MSAM")), own, above=GAIN),
    ]


def _losses(rows: pd.DataFrame) -> Values:
    losses: Values = rows.sort_values("seed")["train_loss"].to_numpy(dtype=np.float64)
    return losses


def _ranges(table: pd.DataFrame, optimizer: str) -> tuple[Values, Values]:
    """Return, for every seed, the ends of the range of positive ρ within a point of its best test accuracy."""
    ends = [
        plateau(own["rho"], own["test_accuracy"], SAME_ACCURACY / 100)
        for _, own in part(table, optimizer).sort_values("rho").groupby("seed")
    ]
    low, high = np.array(ends, dtype=np.float64).T
    return low, high


def _tenfold(table: pd.DataFrame) -> list[Comparison]:
    sam, msam = (np.log(low * high) / 2 for low, high in (_ranges(table, name) for name in ("SAM", "MSAM")))
    interval = mean_interval(msam - sam)
    return [Comparison("MSAM / SAM, best ρ", interval, factor=True, above=math.log(5), below=math.log(20))]


def _forgiving(table: pd.DataFrame) -> list[Comparison]:
    widths = {name: np.log10(high / low) for name in ("SAM", "MSAM") for low, high in [_ranges(table, name)]}
    return [
        Comparison(f"{name}, range of ρ", mean_interval(width), "decades", above=DECADES)
        for name, width in widths.items()
    ]


def _best_strengths(table: pd.DataFrame) -> pd.DataFrame:
    shown = best_of_each(table, ["optimizer", "sign"]).drop(columns="tried")
    keys = zip(shown["optimizer"], shown["sign"], strict=True)
    return as_table(shown.assign(within_a_point=[_range_in_words(part(table, *key)) for key in keys]))


def _range_in_words(rows: pd.DataFrame) -> str:
    means = summarise(rows, ["rho"], "test_accuracy").sort_values("rho")
    if len(means) == 1:
        return "–"
    low, high = plateau(means["rho"], means["test_accuracy"], SAME_ACCURACY / 100)
    return f"{low:.2g} to {high:.2g}"


STRENGTH = Exhibit(
    ("F2AB", "A15"),
    "strength",
    wants=strength_runs,
    table=lambda evidence: strength_table(evidence.runs),
    draw=lambda table, _: pictures.both_signs(
        table, {"test_accuracy": "test accuracy (%)", "train_accuracy": "train accuracy (%)"}
    ),
    shown=_best_strengths,
    comparisons={
        "gains": _gains,
        "costs": _costs,
        "negative": _negative,
        "nesterov": _nesterov,
        "tenfold": _tenfold,
        "forgiving": _forgiving,
    },
)


# --- A1: from MSAM to NAG


def step_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return the runs of −ρ v/‖v‖, −ρ v and −ρ η v, with positive ρ; the first and the last are those of F2AB."""
    # At the peak learning rate as long as Nesterov's.
    rho = scaled(base(workload, "NAG").rho, 0) * workload.recipe.lr
    unnormalised = Perturbation(direction="momentum", normalize="none", rho=rho)
    runs = plain(workload, seeds) + grid(workload, "MSAM", POSITIVE, seeds)
    runs += grid(workload, "MSAM", _UNNORMALISED, seeds, around=unnormalised)
    return once(runs + grid(workload, "NAG", _NAG_POSITIVE, seeds))


_STEPS = {"l2": "−ρ v/‖v‖", "none": "−ρ v", "lr": "−ρ η v"}


def _step_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``step`` is the displacement, ``SGD`` for none."""
    table = outcomes(evidence.runs)[_COLUMNS]
    return as_table(table.assign(step=table["normalize"].map(_STEPS).where(table["optimizer"] != "SGD", "SGD")))


def _draw_steps(table: pd.DataFrame, _: Evidence) -> Any:
    drawn = table.assign(optimizer=table["step"])
    labels = {"test_accuracy": "test accuracy (%)", "train_accuracy": "train accuracy (%)", "train_loss": "train loss"}
    return pictures.sweep(
        [
            Sweep(drawn, "rho", name, r"$\rho$", label, percent=name.endswith("accuracy"), log_y=name.endswith("loss"))
            for name, label in labels.items()
        ]
    )


def _step(table: pd.DataFrame, normalize: str) -> pd.DataFrame:
    return as_table(table[table["step"] == _STEPS[normalize]])


def _only_shifts(table: pd.DataFrame) -> list[Comparison]:
    pair = best(_step(table, "none")), best(_step(table, "l2"))
    return [paired("−ρ v − MSAM, best test accuracy", *pair, above=-SAME_ACCURACY, below=SAME_ACCURACY)]


def _loses(table: pd.DataFrame) -> list[Comparison]:
    tied = _step(table, "lr")
    lowest = best(tied.assign(negative=-tied["train_loss"]), y="negative")
    sgd = table[table["step"] == "SGD"]
    return [
        paired("−ρ v − (−ρ η v), best test accuracy", best(_step(table, "none")), best(tied), above=SAME_ACCURACY),
        times("train loss of SGD / lowest of −ρ η v", _losses(sgd), _losses(lowest)),
    ]


NORMALISATION = Exhibit(
    ("A1",),
    "normalisation",
    wants=step_runs,
    table=_step_table,
    draw=_draw_steps,
    shown=lambda table: best_of_each(table, ["step"]),
    comparisons={"shifts": _only_shifts, "loses": _loses},
)

STRENGTHS = (STRENGTH, NORMALISATION)
