"""Finished runs as tidy tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from msam_analysis.results import BallSharpness, Eigenpairs, Result, Slice1D, Slice2D, atomic_path
from msam_analysis.results.statistics import summarise
from msam_analysis.studies.measuring import LINES


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """One trained and measured network.

    ``optimizer``, ``seed``: Name of the optimizer, and the seed.
    ``scores``: Losses, accuracies and gradients per step.
    ``steps``: Records of the training, one row a step.
    ``results``: Results of the measurements after training, by name.
    ``settings``: The recipe and the perturbation, as columns of a table.
    """

    optimizer: str
    seed: int
    scores: Mapping[str, float]
    steps: pd.DataFrame
    results: Mapping[str, Result]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whose(self) -> dict[str, Any]:
        """Optimizer and seed, as columns of a table."""
        return {"optimizer": self.optimizer, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class Tables:
    """Tidy tables over all runs; every one has the columns ``optimizer`` and ``seed``, but ``optimizers``.

    ``runs``: One row per run: scores, λ1..λk with residuals, sharpness per radius with how far it is from stationary,
        whether the solvers converged, mean loss rise on every line and on the plane.
    ``optimizers``: One row per optimizer: mean and 68 % Student-t half width of every column of ``runs``; of yes and
        no, the fraction of yes.
    ``steps``: One row per training step.
    ``eigenvalues``: One row per run, method and index: ``value``, ``residual``, ``converged``.
    ``balls``: One row per run and radius; ``converged`` and ``stationarity`` tell how good the ascent was.
    ``lines``, ``planes``: One row per run and point of each slice.
    ``controls``: ``steps`` of the runs on batches drawn with replacement.
    """

    runs: pd.DataFrame
    optimizers: pd.DataFrame
    steps: pd.DataFrame
    eigenvalues: pd.DataFrame
    balls: pd.DataFrame
    lines: pd.DataFrame
    planes: pd.DataFrame
    controls: pd.DataFrame

    @property
    def solvers(self) -> pd.Series[bool]:
        """Whether they converged, of all solver runs: eigenvalues by each method, and the largest rise in each ball."""
        pairs = self.eigenvalues.drop_duplicates(["optimizer", "seed", "method"])
        together: pd.Series[bool] = pd.concat([pairs["converged"], self.balls["converged"]])
        return together

    def write(self, directory: Path) -> None:
        """Write every table as CSV, see :func:`write_table`."""
        for name, frame in vars(self).items():
            write_table(frame, directory / f"{name}.csv")


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV; floats in their shortest exact form, so equal numbers are equal bytes."""
    with atomic_path(path) as partial:
        frame.to_csv(partial, index=False, lineterminator="\n")


def as_table(data: Any) -> pd.DataFrame:
    """Return a table of rows, or a table that pandas gives back without its type."""
    table: pd.DataFrame = pd.DataFrame(data)
    return table


def rows(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """Return the rows that have these values in these columns; a tuple stands for any of its values."""
    for name, value in where.items():
        table = table[table[name].isin(value) if isinstance(value, tuple) else table[name] == value]
    return table


def outcomes(runs: Iterable[FinishedRun]) -> pd.DataFrame:
    """Return one row per run: optimizer, seed, its settings (see ``Run.settings``) and its scores."""
    return as_table([{**run.whose, **run.settings, **run.scores} for run in runs])


def of_training(steps: pd.DataFrame, statistic: Callable[[pd.DataFrame], float]) -> float:
    """Return a statistic of a run's records; NaN where its loss, which every step records, was ever not finite.

    Slow probes record NaN at the steps at which they are not asked, and a statistic may skip those. A run that diverged
    records NaN from there on, and what came before is no statistic of its training.
    """
    return float(statistic(steps)) if np.isfinite(steps["train_batch_loss"]).all() else math.nan


def mean_of(column: str, *, skipna: bool = True) -> Callable[[pd.DataFrame], float]:
    """Return the statistic that is the mean of a column; by default of what is recorded there."""
    return lambda steps: float(steps[column].mean(skipna=skipna))


def statistics(steps: pd.DataFrame, **each: Callable[[pd.DataFrame], float]) -> dict[str, float]:
    """Return several statistics of a run's records by name, see :func:`of_training`."""
    return {name: of_training(steps, statistic) for name, statistic in each.items()}


def cosines(steps: pd.DataFrame) -> pd.Series[float]:
    """Return the cosine of momentum and gradient of every step but the first, at which there is no momentum."""
    recorded: pd.Series[float] = steps["cosine"].iloc[1:]
    return recorded


def negative_share(values: pd.Series[float]) -> float:
    """Return how many of some numbers are negative, in percent; NaN where one of them is."""
    return math.nan if values.isna().any() or values.empty else 100 * float((values < 0).mean())


COSINE: Mapping[str, Callable[[pd.DataFrame], float]] = {
    "cosine": lambda steps: float(cosines(steps).mean(skipna=False)),
    "negative": lambda steps: negative_share(cosines(steps)),
}
"""Statistics of the cosine of momentum and gradient: its mean, and the share of steps at which it is negative."""


def tabulate(runs: Sequence[FinishedRun], controls: Sequence[FinishedRun] = ()) -> Tables:
    """Return the tables of finished runs, and of control runs, in the order given."""
    rows = [_row(run) for run in runs]
    frame = pd.DataFrame(rows)
    quantities = [name for name in frame.columns if name not in ("optimizer", "seed")]
    return Tables(
        runs=frame,
        optimizers=summarise(frame, "optimizer", quantities),
        steps=_stack(runs, lambda run: [run.steps]),
        eigenvalues=_stack(runs, lambda run: [run.results[name].to_frame() for name in ("lanczos", "power")]),
        balls=_stack(runs, lambda run: [ball.to_frame() for ball in _balls(run)]),
        lines=_stack(
            runs, lambda run: [run.results[f"line-{name}"].to_frame().assign(direction=name) for name in LINES]
        ),
        planes=_stack(runs, lambda run: [run.results["plane"].to_frame()]),
        controls=_stack(controls, lambda run: [run.steps]),
    )


def _balls(run: FinishedRun) -> list[BallSharpness]:
    return [result for result in run.results.values() if isinstance(result, BallSharpness)]


def _row(run: FinishedRun) -> dict[str, object]:
    row: dict[str, object] = {**run.whose, **run.scores}
    pairs = cast(Eigenpairs, run.results["lanczos"])
    for index, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True), 1):
        row |= {f"lambda_{index}": value, f"lambda_{index}_residual": residual}
    row["lambda_converged"] = pairs.converged
    for ball in _balls(run):
        name = f"sharpness_{ball.rho:g}"
        row |= {name: ball.sharpness, f"{name}_stationarity": ball.stationarity, f"{name}_converged": ball.converged}
    for name in LINES:
        line = cast(Slice1D, run.results[f"line-{name}"])
        row[f"rise_along_{name}"] = float(line.loss.mean()) - line.center_loss
    plane = cast(Slice2D, run.results["plane"])
    row["rise_on_plane"] = float(plane.loss.mean()) - plane.center_loss
    return row


def _stack(runs: Sequence[FinishedRun], frames: Callable[[FinishedRun], Iterable[pd.DataFrame]]) -> pd.DataFrame:
    parts = [frame.assign(**run.whose) for run in runs for frame in frames(run)]
    first = ["optimizer", "seed"]
    table: pd.DataFrame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=first)
    return as_table(table[first + [column for column in table.columns if column not in first]])
