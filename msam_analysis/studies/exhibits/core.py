"""The exhibits of the main study: one set of networks, fully watched and measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from msam_analysis import plots
from msam_analysis.results import Slice1D, Slice2D
from msam_analysis.results.statistics import summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import CLAIMS
from msam_analysis.studies.exhibits.base import Evidence, Exhibit, Finding, controls, networks
from msam_analysis.studies.measuring import LINES
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, Tables
from msam_analysis.studies.workloads import Workload

Draw = Callable[[Tables, Sequence[FinishedRun]], Any]


def _accuracy(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return pictures.accuracy(tables.runs)


CURVATURES = tuple(f"curvature_{name}" for name in ("momentum", "gradient", "random"))
_EPOCH = ["optimizer", "seed", "epoch"]


def _per_epoch(steps: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the mean over what each epoch of each run recorded; epochs without a record have no row.

    Those of a run that diverged have one, of NaN: its seed is not left out of a mean over seeds.
    """
    epochs = steps.assign(finite=np.isfinite(steps["train_batch_loss"])).groupby(_EPOCH, sort=False)
    finite = epochs["finite"].all()
    means = epochs[list(columns)].mean()
    means.loc[~finite] = math.nan
    kept: pd.DataFrame = means[means.notna().all(axis=1) | ~finite].reset_index()
    return kept


def _cosine(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    per_epoch = _per_epoch(tables.steps, "cosine")
    quantities = {"cosine": "every sample once an epoch"}
    if len(tables.controls):
        control = _per_epoch(tables.controls, "cosine").rename(columns={"cosine": "control"})
        per_epoch = per_epoch.merge(control, on=_EPOCH, how="left")
        quantities["control"] = "control: samples drawn with replacement"
    return pictures.over_training(
        per_epoch, quantities, x="epoch", zero_line=True, label=r"$\cos(v_{t-1},\, g_t)$, mean per epoch"
    )


def _rise(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return pictures.perturbation_rise(_per_epoch(tables.steps, "loss_before", "loss_after"), x="epoch")


def _curvature(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    quantities = {name: name.replace("curvature_", "along ") for name in CURVATURES}
    recorded = _per_epoch(tables.steps, *quantities)
    return pictures.over_training(recorded, quantities, x="epoch", log=True, label=r"$d^\top H d \,/\, d^\top d$")


def _eigenvalues(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return pictures.eigenvalues(tables.eigenvalues)


def _balls(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return pictures.ball_sharpness(tables.balls)


def _lines(_: Tables, runs: Sequence[FinishedRun]) -> Any:
    panels: dict[str, Mapping[str, list[Slice1D]]] = {}
    for name in LINES:
        curves: dict[str, list[Slice1D]] = {}
        for run in runs:
            curves.setdefault(run.optimizer, []).append(cast(Slice1D, run.results[f"line-{name}"]))
        panels[name] = curves
    return plots.slice_1d_panels(panels, share_y=False)


def _first_planes(runs: Sequence[FinishedRun]) -> dict[str, Slice2D]:
    first = min(run.seed for run in runs)
    return {run.optimizer: cast(Slice2D, run.results["plane"]) for run in runs if run.seed == first}


def _planes(_: Tables, runs: Sequence[FinishedRun]) -> Any:
    return plots.slice_2d(_first_planes(runs))


def _relief(_: Tables, runs: Sequence[FinishedRun]) -> Any:
    return plots.surface_3d(_first_planes(runs))


def _scores(tables: Tables) -> pd.DataFrame:
    return summarise(tables.runs, "optimizer", ["train_accuracy", "test_accuracy", "train_loss", "test_loss"])


def _epochs(*columns: str, also_control: bool = False) -> Callable[[Tables], pd.DataFrame]:
    """Return a function that gives mean and interval over seeds of every epoch's mean."""

    def table(tables: Tables) -> pd.DataFrame:
        sources = {"epochs": tables.steps} | ({"replacement": tables.controls} if also_control else {})
        parts = [
            summarise(_per_epoch(steps, *columns), ["optimizer", "epoch"], columns).assign(sampling=name)
            for name, steps in sources.items()
            if len(steps)
        ]
        together: pd.DataFrame = pd.concat(parts, ignore_index=True)
        return together if also_control else together.drop(columns="sampling")

    return table


def _rises(tables: Tables) -> pd.DataFrame:
    return summarise(tables.lines, ["optimizer", "direction", "coordinate", "distance"], "loss")


def _plane_rises(tables: Tables) -> pd.DataFrame:
    return summarise(tables.runs, "optimizer", "rise_on_plane")


def _runs(problem: Workload, seeds: int) -> list[Run]:
    return networks(problem, seeds) + controls(problem, seeds)


def _main(
    ids: tuple[str, ...],
    name: str,
    title: str,
    caption: str,
    draw: Draw,
    table: Callable[[Tables], pd.DataFrame],
    note: str = "",
) -> Exhibit:
    """Return an exhibit of the networks of the main table: its numbers are in the study's own tables too."""
    claims = tuple(claim for claim in CLAIMS if claim.exhibit in ids)

    def study(evidence: Evidence) -> Finding:
        judged = [claim.judge(evidence.tables) for claim in claims]
        drawn = functools.partial(draw, evidence.tables, evidence.networks)
        return Finding(drawn, table(evidence.tables), judged, note=note)

    return Exhibit(ids, name, title, caption, _runs, study, main=True, claims=claims)


CORE: tuple[Exhibit, ...] = (
    _main(
        ("T1",),
        "accuracy",
        "Where they end up",
        "Train and test accuracy. Where some training labels are wrong, they can only be memorised: there, a train "
        "accuracy near 1 is overfitting.",
        _accuracy,
        _scores,
        "Of the paper's seven optimizers LookSAM, ESAM and MESA are left out. None of them takes its gradient at one "
        "point w + ε(w, v, g): LookSAM adds a part of an earlier step's SAM gradient, ESAM perturbs a random part of "
        "the weights and keeps the samples whose loss rises most, MESA adds the distance to an average of past "
        "networks to the loss. Of maintained libraries only pytorch-optimizer (4.1) has one of them, LookSAM, and its "
        "documented use evaluates two gradients in every step, so that nothing of its speed is left to compare.",
    ),
    _main(
        ("F2C",),
        "cosine",
        "Momentum against gradient",
        "Cosine between the momentum buffer and the next batch's gradient. Below 0, the last step overshot; but where "
        "an epoch has few batches, showing every sample once an epoch also pushes it down: see the control.",
        _cosine,
        _epochs("cosine", also_control=True),
    ),
    _main(
        ("A12",),
        "perturbation_rise",
        "What the perturbation does to the loss",
        "Loss of the training batch at the true weights and at the point where the optimizer takes its gradient.",
        _rise,
        _epochs("loss_before", "loss_after"),
    ),
    _main(
        ("A8",),
        "curvature",
        "Curvature while training",
        "Curvature of the training loss per unit length along momentum, batch gradient and a random direction.",
        _curvature,
        _epochs(*CURVATURES),
    ),
    _main(
        ("TA1",),
        "eigenvalues",
        "The Hessian's largest eigenvalues",
        "Five largest eigenvalues of the training loss's Hessian, by Lanczos and by power iteration.",
        _eigenvalues,
        lambda tables: tables.eigenvalues,
    ),
    _main(
        (),
        "ball_sharpness",
        "The largest loss rise in a ball",
        "Largest rise of the training loss found within an L2 distance ρ of the weights, over several starts.",
        _balls,
        lambda tables: tables.balls,
    ),
    _main(
        ("F4A", "F4B", "F4C"),
        "slices",
        "Along three directions",
        "Rise of the training loss along the unit gradient, the unit momentum and a random filter-normalised "
        "direction.",
        _lines,
        _rises,
    ),
    _main(
        ("A13",),
        "surface",
        "Loss surfaces",
        "Training loss on a plane of two random filter-normalised directions, one colour scale, first seed.",
        _planes,
        _plane_rises,
    ),
    _main(
        (),
        "relief",
        "The same surfaces in relief",
        "The planes of A13 as surfaces on one height and colour scale, first seed.",
        _relief,
        _plane_rises,
    ),
)
