"""The exhibits of the main study: one set of networks, fully watched and measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pandas as pd

from msam_analysis import plots
from msam_analysis.results import Slice1D, Slice2D
from msam_analysis.results.statistics import mean_interval, summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Compare, Comparison, Values, by_seed, difference, ratio, times
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import controls, networks
from msam_analysis.studies.measuring import LINES
from msam_analysis.studies.runs import Run
from msam_analysis.studies.store import DivergedError
from msam_analysis.studies.tables import FinishedRun, Tables, as_table, cosines, negative_share, of_training, tabulate
from msam_analysis.studies.workloads import Workload

CURVATURES = tuple(f"curvature_{name}" for name in ("momentum", "gradient", "random"))
_EPOCH = ["optimizer", "seed", "epoch"]

MUCH = 3.0
"""How many times larger counts as "much larger" where the paper gives no number."""
FADED = 0.05
"""A cosine smaller than this counts as gone to 0."""
SAME_COST = 0.05
"""A difference of fewer gradients per step counts as none."""


def main_tables(workload: Workload, seeds: int, finished: Mapping[str, FinishedRun]) -> Tables | None:
    """Return the tables of the main runs and of their controls; None where a network diverged."""
    try:
        return _tables(CORE[0].evidence(workload, seeds, finished))
    except DivergedError:
        return None


def _wanted(workload: Workload, seeds: int) -> dict[str, list[Run]]:
    return {"networks": networks(workload, seeds), "controls": controls(workload, seeds)}


def _tables(evidence: Evidence) -> Tables:
    return _tabulated(*(tuple(evidence.groups[name]) for name in ("networks", "controls")))


# The same runs for all exhibits of the main study.
_tabulated = functools.lru_cache(maxsize=1)(tabulate)


def _per_epoch(steps: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the mean over what each epoch of each run recorded; epochs without a record have no row.

    Those of a run that diverged have one, of NaN: its seed is not left out of a mean over seeds.
    """
    epochs = steps.assign(finite=np.isfinite(steps["train_batch_loss"])).groupby(_EPOCH, sort=False)
    finite = epochs["finite"].all()
    means = epochs[list(columns)].mean()
    means.loc[~finite] = math.nan
    return as_table(means[means.notna().all(axis=1) | ~finite].reset_index())


def _summary(steps: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return mean and interval over seeds of every epoch's mean."""
    return summarise(_per_epoch(steps, *columns), ["optimizer", "epoch"], columns)


def _cosines(tables: Tables) -> pd.DataFrame:
    sources = {"epochs": tables.steps} | ({"replacement": tables.controls} if len(tables.controls) else {})
    parts = [_summary(steps, "cosine").assign(sampling=name) for name, steps in sources.items()]
    return as_table(pd.concat(parts, ignore_index=True))


def _draw_cosine(tables: Tables, _: Evidence) -> Any:
    per_epoch = _per_epoch(tables.steps, "cosine")
    quantities = {"cosine": "every sample once an epoch"}
    if len(tables.controls):
        control = _per_epoch(tables.controls, "cosine").rename(columns={"cosine": "control"})
        per_epoch = per_epoch.merge(control, on=_EPOCH, how="left")
        quantities["control"] = "control: samples drawn with replacement"
    return pictures.over_training(
        per_epoch, quantities, x="epoch", zero_line=True, label=r"$\cos(v_{t-1},\, g_t)$, mean per epoch"
    )


def _draw_curvature(tables: Tables, _: Evidence) -> Any:
    quantities = {name: name.replace("curvature_", "along ") for name in CURVATURES}
    recorded = _per_epoch(tables.steps, *quantities)
    return pictures.over_training(recorded, quantities, x="epoch", log=True, label=r"$d^\top H d \,/\, d^\top d$")


def _draw_lines(_: Tables, evidence: Evidence) -> Any:
    panels: dict[str, dict[str, list[Slice1D]]] = {name: {} for name in LINES}
    for run in evidence.groups["networks"]:
        for name, curves in panels.items():
            curves.setdefault(run.optimizer, []).append(cast(Slice1D, run.results[f"line-{name}"]))
    return plots.slice_1d_panels(panels, share_y=False)


def _planes(evidence: Evidence) -> dict[str, Slice2D]:
    """Return the planes of the first seed."""
    runs = evidence.groups["networks"]
    first = min(run.seed for run in runs)
    return {run.optimizer: cast(Slice2D, run.results["plane"]) for run in runs if run.seed == first}


def _plane_rises(tables: Tables) -> pd.DataFrame:
    return summarise(tables.runs, "optimizer", "rise_on_plane")


# What is tested


def _per_seed(steps: pd.DataFrame, optimizer: str, statistic: Callable[[pd.DataFrame], float]) -> Values:
    part = steps[steps["optimizer"] == optimizer]
    return np.array([of_training(run, statistic) for _, run in part.groupby("seed")], dtype=np.float64)


def _same_cost(tables: Tables) -> list[Comparison]:
    sgd, sam, msam = (by_seed(tables.runs, name, "gradients_per_step") for name in ("SGD", "SAM", "MSAM"))
    return [
        Comparison(f"{label}, gradients a step", mean_interval(values), above=-SAME_COST, below=SAME_COST)
        for label, values in (("MSAM − SGD", msam - sgd), ("SAM − 2 SGD", sam - 2 * sgd))
    ]


def _each(
    steps: pd.DataFrame, what: str, statistic: Callable[[pd.DataFrame], float], **region: Any
) -> list[Comparison]:
    """Compare a statistic of every run's records, one comparison per optimizer."""
    names = dict.fromkeys(steps["optimizer"])
    return [Comparison(f"{name}, {what}", mean_interval(_per_seed(steps, name, statistic)), **region) for name in names]


def _mostly_negative(steps: pd.DataFrame) -> list[Comparison]:
    return _each(steps, "steps with a negative cosine", lambda run: negative_share(cosines(run)), unit="%", above=50.0)


def _fades_out(tables: Tables) -> list[Comparison]:
    last = int(tables.steps["epoch"].max())

    def size(run: pd.DataFrame, first: float, end: float) -> float:
        return abs(float(cosines(run)[run["epoch"].between(first, end)].mean(skipna=False)))

    def left(run: pd.DataFrame) -> float:
        return size(run, last, last)

    def fall(run: pd.DataFrame) -> float:
        return size(run, 0.25 * last, 0.75 * last) - left(run)

    return [
        *_each(tables.steps, "|cosine| mid-training − last epoch", fall),
        *_each(tables.steps, "|cosine| in the last epoch", left, above=-math.inf, below=FADED),
    ]


def _rises(tables: Tables) -> list[Comparison]:
    perturbed = tables.steps[tables.steps["optimizer"].isin(("SAM", "MSAM"))]
    return _each(perturbed, "mean L(w + ε) − L(w)", lambda run: float(run["rise"].mean()))


def _curvature(steps: pd.DataFrame, optimizer: str, direction: str) -> Values:
    return _per_seed(steps, optimizer, lambda run: float(run[f"curvature_{direction}"].mean()))


def _momentum_curvature(tables: Tables) -> list[Comparison]:
    return [
        times(
            f"{name}, momentum / random",
            _curvature(tables.steps, name, "momentum"),
            _curvature(tables.steps, name, "random"),
            MUCH,
        )
        for name in dict.fromkeys(tables.steps["optimizer"])
    ]


def _msam_lowest_curvature(tables: Tables) -> list[Comparison]:
    return [
        times(
            f"{other} / MSAM along {direction}",
            _curvature(tables.steps, other, direction),
            _curvature(tables.steps, "MSAM", direction),
        )
        for direction in ("random", "momentum")
        for other in ("SGD", "NAG", "SAM")
    ]


def _flattest(column: str, best: str) -> Compare:
    return lambda tables: [
        ratio(tables.runs, column, other, best) for other in ("SGD", "NAG", "SAM", "MSAM") if other != best
    ]


def _ordered(column: str) -> Compare:
    return lambda tables: [ratio(tables.runs, column, "SGD", "SAM"), ratio(tables.runs, column, "SAM", "MSAM")]


# What is shown


def _main(
    ids: tuple[str, ...],
    name: str,
    draw: Callable[[Tables, Evidence], Any],
    written: Callable[[Tables], pd.DataFrame],
    constants: Mapping[str, object] | None = None,
    **comparisons: Compare,
) -> Exhibit:
    return Exhibit(
        ids, name, _wanted, _tables, draw, comparisons, written=written, main=True, constants=constants or {}
    )


CORE: tuple[Exhibit, ...] = (
    _main(
        ("T1",),
        "accuracy",
        lambda tables, _: pictures.accuracy(tables.runs),
        lambda tables: summarise(
            tables.runs, "optimizer", ["train_accuracy", "test_accuracy", "train_loss", "test_loss"]
        ),
        better=lambda tables: [
            difference(tables.runs, "test_accuracy", "MSAM", other, scale=100, unit="points")
            for other in ("SGD", "NAG")
        ],
        cost=_same_cost,
    ),
    _main(
        ("F2C",),
        "cosine",
        _draw_cosine,
        _cosines,
        negative=lambda tables: _mostly_negative(tables.steps),
        negative_control=lambda tables: _mostly_negative(tables.controls),
        fades=_fades_out,
    ),
    _main(
        ("A12",),
        "perturbation_rise",
        lambda tables, _: pictures.perturbation_rise(_per_epoch(tables.steps, "loss_before", "loss_after"), x="epoch"),
        lambda tables: _summary(tables.steps, "loss_before", "loss_after"),
        rises=_rises,
    ),
    _main(
        ("A8",),
        "curvature",
        _draw_curvature,
        lambda tables: _summary(tables.steps, *CURVATURES),
        {"much": f"{MUCH:g}"},
        momentum=_momentum_curvature,
        lowest=_msam_lowest_curvature,
    ),
    _main(
        ("TA1",),
        "eigenvalues",
        lambda tables, _: pictures.eigenvalues(tables.eigenvalues),
        lambda tables: tables.eigenvalues,
        falls=_ordered("lambda_1"),
    ),
    _main((), "ball_sharpness", lambda tables, _: pictures.ball_sharpness(tables.balls), lambda tables: tables.balls),
    _main(
        ("F4A", "F4B", "F4C"),
        "slices",
        _draw_lines,
        lambda tables: summarise(tables.lines, ["optimizer", "direction", "coordinate", "distance"], "loss"),
        gradient=_flattest("rise_along_gradient", "SAM"),
        momentum=_flattest("rise_along_momentum", "MSAM"),
        random=_flattest("rise_along_random", "MSAM"),
    ),
    _main(
        ("A13",),
        "surface",
        lambda _, evidence: plots.slice_2d(_planes(evidence)),
        _plane_rises,
        ordered=_ordered("rise_on_plane"),
    ),
    _main((), "relief", lambda _, evidence: plots.surface_3d(_planes(evidence)), _plane_rises),
)
