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
from msam_analysis.studies.claims import CLAIMS
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.wanted import controls, networks
from msam_analysis.studies.measuring import LINES
from msam_analysis.studies.runs import Run
from msam_analysis.studies.store import DivergedError
from msam_analysis.studies.tables import FinishedRun, Tables, as_table, tabulate
from msam_analysis.studies.workloads import Workload

CURVATURES = tuple(f"curvature_{name}" for name in ("momentum", "gradient", "random"))
_EPOCH = ["optimizer", "seed", "epoch"]


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
    panels: dict[str, Mapping[str, list[Slice1D]]] = {}
    for name in LINES:
        curves: dict[str, list[Slice1D]] = {}
        for run in evidence.groups["networks"]:
            curves.setdefault(run.optimizer, []).append(cast(Slice1D, run.results[f"line-{name}"]))
        panels[name] = curves
    return plots.slice_1d_panels(panels, share_y=False)


def _planes(evidence: Evidence) -> dict[str, Slice2D]:
    """Return the planes of the first seed."""
    runs = evidence.groups["networks"]
    first = min(run.seed for run in runs)
    return {run.optimizer: cast(Slice2D, run.results["plane"]) for run in runs if run.seed == first}


def _plane_rises(tables: Tables) -> pd.DataFrame:
    return summarise(tables.runs, "optimizer", "rise_on_plane")


def _main(
    ids: tuple[str, ...],
    name: str,
    draw: Callable[[Tables, Evidence], Any],
    written: Callable[[Tables], pd.DataFrame],
) -> Exhibit:
    claims = tuple(claim for claim in CLAIMS if claim.exhibit in ids)
    return Exhibit(ids, name, _wanted, _tables, draw, claims, written=written, main=True)


CORE: tuple[Exhibit, ...] = (
    _main(
        ("T1",),
        "accuracy",
        lambda tables, _: pictures.accuracy(tables.runs),
        lambda tables: summarise(
            tables.runs, "optimizer", ["train_accuracy", "test_accuracy", "train_loss", "test_loss"]
        ),
    ),
    _main(("F2C",), "cosine", _draw_cosine, _cosines),
    _main(
        ("A12",),
        "perturbation_rise",
        lambda tables, _: pictures.perturbation_rise(_per_epoch(tables.steps, "loss_before", "loss_after"), x="epoch"),
        lambda tables: _summary(tables.steps, "loss_before", "loss_after"),
    ),
    _main(("A8",), "curvature", _draw_curvature, lambda tables: _summary(tables.steps, *CURVATURES)),
    _main(
        ("TA1",),
        "eigenvalues",
        lambda tables, _: pictures.eigenvalues(tables.eigenvalues),
        lambda tables: tables.eigenvalues,
    ),
    _main((), "ball_sharpness", lambda tables, _: pictures.ball_sharpness(tables.balls), lambda tables: tables.balls),
    _main(
        ("F4A", "F4B", "F4C"),
        "slices",
        _draw_lines,
        lambda tables: summarise(tables.lines, ["optimizer", "direction", "coordinate", "distance"], "loss"),
    ),
    _main(("A13",), "surface", lambda _, evidence: plots.slice_2d(_planes(evidence)), _plane_rises),
    _main((), "relief", lambda _, evidence: plots.surface_3d(_planes(evidence)), _plane_rises),
)
