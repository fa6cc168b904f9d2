"""The exhibits: what each shows, its picture and the claims it carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd

from msam_analysis import plots
from msam_analysis.results import Slice1D, Slice2D
from msam_analysis.studies.claims import CLAIMS, PaperClaim
from msam_analysis.studies.measuring import LINES
from msam_analysis.studies.tables import FinishedRun, Tables


@dataclass(frozen=True)
class Exhibit:
    """One picture of the report.

    Attributes
    ----------
    ids
        The paper's exhibits that it answers to; empty for an addition of ours.
    name
        Of its file.
    title, caption
        For the report.
    draw
        Tables and runs to matplotlib axes.
    """

    ids: tuple[str, ...]
    name: str
    title: str
    caption: str
    draw: Callable[[Tables, Sequence[FinishedRun]], Any]

    @property
    def claims(self) -> tuple[PaperClaim, ...]:
        """The paper's claims about it."""
        return tuple(claim for claim in CLAIMS if claim.exhibit in self.ids)


def _accuracy(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return plots.accuracy(tables.runs)


_EPOCH = ["optimizer", "seed", "epoch"]


def _per_epoch(steps: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the mean over what each epoch of each run recorded; epochs without a record have no row."""
    means: pd.DataFrame = steps.groupby(_EPOCH, sort=False)[list(columns)].mean().dropna().reset_index()
    return means


def _cosine(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    per_epoch = _per_epoch(tables.steps, "cosine")
    quantities = {"cosine": "every sample once an epoch"}
    if len(tables.controls):
        control = _per_epoch(tables.controls, "cosine").rename(columns={"cosine": "control"})
        per_epoch = per_epoch.merge(control, on=_EPOCH, how="left")
        quantities["control"] = "control: samples drawn with replacement"
    return plots.over_training(
        per_epoch, quantities, x="epoch", zero_line=True, label=r"$\cos(v_{t-1},\, g_t)$, mean per epoch"
    )


def _rise(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return plots.perturbation_rise(_per_epoch(tables.steps, "loss_before", "loss_after"), x="epoch")


def _curvature(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    quantities = {f"curvature_{name}": f"along {name}" for name in ("momentum", "gradient", "random")}
    recorded = _per_epoch(tables.steps, *quantities)
    return plots.over_training(recorded, quantities, x="epoch", log=True, label=r"$d^\top H d \,/\, d^\top d$")


def _eigenvalues(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return plots.eigenvalues(tables.eigenvalues)


def _balls(tables: Tables, _: Sequence[FinishedRun]) -> Any:
    return plots.ball_sharpness(tables.balls)


def _lines(_: Tables, runs: Sequence[FinishedRun]) -> Any:
    panels: dict[str, Mapping[str, list[Slice1D]]] = {}
    for name in LINES:
        curves: dict[str, list[Slice1D]] = {}
        for run in runs:
            curves.setdefault(run.optimizer, []).append(cast(Slice1D, run.results[f"line-{name}"]))
        panels[name] = curves
    return plots.slice_1d_panels(panels, share_y=False)


def _planes(_: Tables, runs: Sequence[FinishedRun]) -> Any:
    first = min(run.seed for run in runs)
    return plots.slice_2d({run.optimizer: cast(Slice2D, run.results["plane"]) for run in runs if run.seed == first})


EXHIBITS: tuple[Exhibit, ...] = (
    Exhibit(
        ("T1",),
        "accuracy",
        "Where they end up",
        "Train and test accuracy. Wrong labels can only be memorised: a train accuracy near 1 is overfitting here.",
        _accuracy,
    ),
    Exhibit(
        ("F2C",),
        "cosine",
        "Momentum against gradient",
        "Cosine between the momentum buffer and the next batch's gradient. Below 0, the last step overshot; but where "
        "an epoch has few batches, showing every sample once an epoch also pushes it down: see the control.",
        _cosine,
    ),
    Exhibit(
        ("A12",),
        "perturbation_rise",
        "What the perturbation does to the loss",
        "Loss of the training batch at the true weights and at the point where the optimizer takes its gradient.",
        _rise,
    ),
    Exhibit(
        ("A8",),
        "curvature",
        "Curvature while training",
        "Curvature of the training loss per unit length along momentum, batch gradient and a random direction.",
        _curvature,
    ),
    Exhibit(
        ("TA1",),
        "eigenvalues",
        "The Hessian's largest eigenvalues",
        "Five largest eigenvalues of the training loss's Hessian, by Lanczos and by power iteration.",
        _eigenvalues,
    ),
    Exhibit(
        (),
        "ball_sharpness",
        "The largest loss rise in a ball",
        "Largest rise of the training loss found within an L2 distance ρ of the weights, over several starts.",
        _balls,
    ),
    Exhibit(
        ("F4A", "F4B", "F4C"),
        "slices",
        "Along three directions",
        "Rise of the training loss along the unit gradient, the unit momentum and a random filter-normalised "
        "direction.",
        _lines,
    ),
    Exhibit(
        ("A13",),
        "surface",
        "Loss surfaces",
        "Training loss on a plane of two random filter-normalised directions, one colour scale, first seed.",
        _planes,
    ),
)


def choose(ids: Sequence[str] | None) -> tuple[Exhibit, ...]:
    """Return the exhibits with any of the given ids or names, in the report's order; all for ``None``.

    ``F4`` stands for ``F4A``, ``F4B`` and ``F4C``.

    Raises
    ------
    ValueError
        An id is unknown, or none is given.
    """
    if ids is None:
        return EXHIBITS
    if not ids:
        raise ValueError("no exhibit was chosen: name some, as in F2C,TA1, or all")
    chosen = []
    for exhibit in EXHIBITS:
        keys = {*exhibit.ids, exhibit.name, *(key[:2] for key in exhibit.ids if key.startswith("F4"))}
        if keys & set(ids):
            chosen.append(exhibit)
    known = {key for exhibit in EXHIBITS for key in (*exhibit.ids, exhibit.name)} | {"F4"}
    unknown = [key for key in ids if key not in known]
    if unknown:
        raise ValueError(f"unknown exhibit {unknown[0]!r}: expected some of {sorted(known)}")
    return tuple(chosen)
