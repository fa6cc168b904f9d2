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
from msam_analysis.results.statistics import summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Compare, Comparison, by_seed, compared, difference, over_seeds, ratio, times
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import controls, networks
from msam_analysis.studies.measuring import LINES
from msam_analysis.studies.runs import Run
from msam_analysis.studies.store import DivergedError
from msam_analysis.studies.tables import COSINE, FinishedRun, Tables, as_table, cosines, mean_of, statistics, tabulate
from msam_analysis.studies.workloads import Workload

CURVATURES = {f"curvature_{name}": f"along {name}" for name in ("momentum", "gradient", "random")}
MUCH = 3.0
"""How many times larger counts as "much larger" where the paper gives no number."""
FADED = 0.05
"""A cosine smaller than this counts as gone to 0."""
SAME_COST = 0.05
"""A difference of fewer gradients per step counts as none."""

_EPOCH = ["optimizer", "seed", "epoch"]
_LOSSES = ("loss_before", "loss_after")
_SCORES = ["train_accuracy", "test_accuracy", "train_loss", "test_loss"]


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
    drawn, quantities = _per_epoch(tables.steps, "cosine"), {"cosine": "every sample once an epoch"}
    if len(tables.controls):
        control = _per_epoch(tables.controls, "cosine").rename(columns={"cosine": "control"})
        drawn = drawn.merge(control, on=_EPOCH, how="left")
        quantities["control"] = "control: samples drawn with replacement"
    label = r"$\cos(v_{t-1},\, g_t)$, mean per epoch"
    return pictures.over_training(drawn, quantities, x="epoch", zero_line=True, label=label)


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


def _trained(steps: pd.DataFrame) -> pd.DataFrame:
    """Return what the records say of every training, one row per run."""
    last = steps["epoch"].max() if len(steps) else math.nan

    def size(run: pd.DataFrame, first: float, end: float) -> float:
        return abs(float(cosines(run)[run["epoch"].between(first, end)].mean(skipna=False)))

    asked: dict[str, Callable[[pd.DataFrame], float]] = {
        "negative": COSINE["negative"],
        "left": lambda run: size(run, last, last),
        "fall": lambda run: size(run, 0.25 * last, 0.75 * last) - size(run, last, last),
    }
    asked |= {name: mean_of(name) for name in ("rise", *CURVATURES) if name in steps}
    groups = steps.groupby(["optimizer", "seed"], sort=False)
    rows = [{"optimizer": name, "seed": seed, **statistics(run, **asked)} for (name, seed), run in groups]
    return as_table(rows) if rows else steps


def _of_training(*compares: Compare) -> Compare:
    return lambda tables: [found for compare in compares for found in compare(_trained(tables.steps))]


def _of_runs(compare: Callable[..., Comparison], column: str, *pairs: tuple[str, str], **region: Any) -> Compare:
    return lambda tables: [compare(tables.runs, column, *pair, **region) for pair in pairs]


def _cost(tables: Tables) -> list[Comparison]:
    sgd, sam, msam = (by_seed(tables.runs, "gradients_per_step", optimizer=name) for name in ("SGD", "SAM", "MSAM"))
    costs = {"MSAM − SGD": msam - sgd, "SAM − 2 SGD": sam - 2 * sgd}
    return [
        compared(f"{name}, gradients a step", cost, above=-SAME_COST, below=SAME_COST) for name, cost in costs.items()
    ]


def _much_larger(runs: pd.DataFrame) -> list[Comparison]:
    return [
        times(f"{name}, momentum / random", by_seed(own, "curvature_momentum"), by_seed(own, "curvature_random"), MUCH)
        for name, own in runs.groupby("optimizer", sort=False)
    ]


def _lowest(runs: pd.DataFrame) -> list[Comparison]:
    along = [(of, *pair, f"{{pair}} along {of}") for of in ("random", "momentum") for pair in _ABOVE_MSAM]
    return [ratio(runs, f"curvature_{of}", *pair) for of, *pair in along]


_NEGATIVE = over_seeds("steps with a negative cosine", "negative", "optimizer", unit="%", above=50.0)
_FALLING = (("SGD", "SAM"), ("SAM", "MSAM"))
_ABOVE_SAM = (("SGD", "SAM"), ("NAG", "SAM"), ("MSAM", "SAM"))
_ABOVE_MSAM = (("SGD", "MSAM"), ("NAG", "MSAM"), ("SAM", "MSAM"))


def _main(
    name: str,
    draw: Callable[[Tables, Evidence], Any],
    written: Callable[[Tables], pd.DataFrame],
    constants: Mapping[str, object] | None = None,
    **comparisons: Compare,
) -> Exhibit:
    return Exhibit(name, _wanted, _tables, draw, comparisons, written=written, main=True, constants=constants or {})


CORE: tuple[Exhibit, ...] = (
    _main(
        "accuracy",
        lambda tables, _: pictures.accuracy(tables.runs),
        lambda tables: summarise(tables.runs, "optimizer", _SCORES),
        better=_of_runs(difference, "test_accuracy", ("MSAM", "SGD"), ("MSAM", "NAG"), scale=100, unit="points"),
        cost=_cost,
    ),
    _main(
        "cosine",
        _draw_cosine,
        _cosines,
        negative=_of_training(_NEGATIVE),
        negative_control=lambda tables: _NEGATIVE(_trained(tables.controls)),
        fades=_of_training(
            over_seeds("|cosine| mid-training − last epoch", "fall", "optimizer"),
            over_seeds("|cosine| in the last epoch", "left", "optimizer", above=-math.inf, below=FADED),
        ),
    ),
    _main(
        "perturbation_rise",
        lambda tables, _: pictures.perturbation_rise(_per_epoch(tables.steps, *_LOSSES)),
        lambda tables: _summary(tables.steps, *_LOSSES),
        rises=_of_training(
            over_seeds("mean L(w + ε) − L(w)", "rise", "optimizer", where={"optimizer": ("SAM", "MSAM")})
        ),
    ),
    _main(
        "curvature",
        lambda tables, _: pictures.over_training(
            _per_epoch(tables.steps, *CURVATURES), CURVATURES, log=True, label=r"$d^\top H d \,/\, d^\top d$"
        ),
        lambda tables: _summary(tables.steps, *CURVATURES),
        {"much": f"{MUCH:g}"},
        momentum=_of_training(_much_larger),
        lowest=_of_training(_lowest),
    ),
    _main(
        "eigenvalues",
        lambda tables, _: pictures.eigenvalues(tables.eigenvalues),
        lambda tables: tables.eigenvalues,
        falls=_of_runs(ratio, "lambda_1", *_FALLING),
    ),
    _main("ball_sharpness", lambda tables, _: pictures.ball_sharpness(tables.balls), lambda tables: tables.balls),
    _main(
        "slices",
        _draw_lines,
        lambda tables: summarise(tables.lines, ["optimizer", "direction", "coordinate", "distance"], "loss"),
        gradient=_of_runs(ratio, "rise_along_gradient", *_ABOVE_SAM),
        momentum=_of_runs(ratio, "rise_along_momentum", *_ABOVE_MSAM),
        random=_of_runs(ratio, "rise_along_random", *_ABOVE_MSAM),
    ),
    _main(
        "surface",
        lambda _, evidence: plots.slice_2d(_planes(evidence)),
        _plane_rises,
        ordered=_of_runs(ratio, "rise_on_plane", *_FALLING),
    ),
    _main("relief", lambda _, evidence: plots.surface_3d(_planes(evidence)), _plane_rises),
)
