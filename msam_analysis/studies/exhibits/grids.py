"""Grids of one setting around a workload's own value, and the best of a grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from msam import Perturbation
from msam_analysis.results.statistics import mean_interval, summarise
from msam_analysis.studies.claims import Comparison
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.runs import Run, gather, variant
from msam_analysis.studies.tables import as_table
from msam_analysis.studies.workloads import Workload

HALF_DECADES = (-6, -3, 0, 3, 6)
"""A coarse grid, in sixths of a decade around a workload's own value."""
SAME_ACCURACY = 1.0
"""A difference of fewer points of test accuracy counts as none."""


def base(workload: Workload, name: str) -> Perturbation:
    """Return a workload's perturbation, around whose strength a grid is laid.

    Raises ValueError: The workload has no perturbation of that name.
    Raises TypeError: Its ρ is not a number.
    """
    perturbation = workload.perturbations.get(name)
    if perturbation is None:
        raise ValueError(f"a grid around the ρ of {name} needs that perturbation, got {list(workload.perturbations)}")
    if not isinstance(perturbation.rho, int | float):
        raise TypeError(f"a grid around the ρ of {name} needs a number, got {perturbation.rho!r}: give it a constant ρ")
    return perturbation


def scaled(value: Any, sixths: int) -> float:
    """Return ``value · 10^(sixths/6)`` to three digits, so that grids which meet in a point ask for one network."""
    return float(f"{value * 10 ** (sixths / 6):.3g}")


def plain(workload: Workload, seeds: int) -> list[Run]:
    """Return the runs without a perturbation."""
    return [Run(variant(workload, "SGD", None), "SGD", seed) for seed in range(seeds)]


def grid(
    workload: Workload,
    label: str,
    sixths: Iterable[int],
    seeds: int,
    *,
    around: Perturbation | None = None,
    watched: Iterable[str] = (),
    **switches: Any,
) -> list[Run]:
    """Return the runs of a perturbation at strengths around its own, in sixths of a decade.

    The perturbation is ``around``, by default the workload's own under that label, with other ``switches``.
    """
    middle = dataclasses.replace(around or base(workload, label), **switches)
    strengths = [dataclasses.replace(middle, rho=scaled(middle.rho, sixth)) for sixth in sixths]
    return [
        Run(variant(workload, label, strength), label, seed, watched=frozenset(watched))
        for strength in strengths
        for seed in range(seeds)
    ]


def against_rho(frame: pd.DataFrame) -> Sweep:
    """Return the panel of test accuracy against ρ."""
    return Sweep(frame, "rho", "test_accuracy", r"$\rho$", "test accuracy (%)", percent=True)


def once(runs: Iterable[Run]) -> list[Run]:
    """Return every network once; rounding makes points of a grid meet where a workload is small."""
    return list(gather(runs).values())


def best(frame: pd.DataFrame, x: str = "rho", y: str = "test_accuracy") -> pd.DataFrame:
    """Return the rows at the ``x`` with the largest mean of ``y`` over seeds, the smallest such ``x``.

    A NaN of one seed is not outvoted by the others: where there is one, ``x`` comes last.
    """
    means = frame.groupby(x)[y].agg(lambda values: values.mean(skipna=False))
    return as_table(frame[frame[x] == means.fillna(-math.inf).idxmax()])


def best_of_each(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return a short table of the best ρ of every group: its mean accuracies with their intervals, in percent.

    ``at_grid_end`` marks a best ρ at an end of its grid, beyond which there may be a better one.
    """
    rows: list[dict[str, Any]] = []
    for key, part in frame.groupby(list(by), sort=False):
        chosen = best(part)
        percent = chosen.assign(**{name: 100 * chosen[name] for name in ("test_accuracy", "train_accuracy")})
        row = summarise(percent, ["rho"], ["test_accuracy", "train_accuracy"]).iloc[0].to_dict()
        tried = sorted(set(part["rho"]))
        at_end = len(tried) > 1 and row["rho"] in (tried[0], tried[-1])
        group: dict[str, Any] = dict(zip(by, key, strict=True))
        rows.append(
            {
                **group,
                **{str(name): value for name, value in row.items()},
                "tried": len(tried),
                "at_grid_end": "yes" if at_end else "no",
            }
        )
    return as_table(pd.DataFrame(rows).drop(columns="count"))


def paired(
    label: str,
    larger: pd.DataFrame,
    smaller: pd.DataFrame,
    column: str = "test_accuracy",
    *,
    above: float = 0.0,
    below: float = math.inf,
) -> Comparison:
    """Compare an accuracy of two settings, in points, paired by seed; each table has one row a seed."""
    values = 100 * (larger.set_index("seed")[column] - smaller.set_index("seed")[column])
    return Comparison(label, mean_interval(values.to_numpy(dtype=np.float64)), "points", above=above, below=below)


def plateau(x: npt.ArrayLike, y: npt.ArrayLike, drop: float) -> tuple[float, float]:
    """Return the range of ``x`` around the largest ``y`` in which ``y`` stays within ``drop`` of it.

    ``x``: Positive and increasing; ``y`` is interpolated linearly in its logarithm.
    ``y``: One number for each.
    ``drop``: How much less still counts.
    Returns: An end of the grid where it is not left before.
    """
    at, values = np.log(np.asarray(x, dtype=np.float64)), np.asarray(y, dtype=np.float64)
    peak, floor = int(values.argmax()), float(values.max()) - drop
    low = _crossing(at[peak::-1], values[peak::-1], floor)
    return math.exp(low), math.exp(_crossing(at[peak:], values[peak:], floor))


def _crossing(at: npt.NDArray[np.float64], values: npt.NDArray[np.float64], floor: float) -> float:
    below = np.flatnonzero(values < floor)
    if not below.size:
        return float(at[-1])
    first = int(below[0])
    share = (values[first - 1] - floor) / (values[first - 1] - values[first])
    return float(at[first - 1] + share * (at[first] - at[first - 1]))
