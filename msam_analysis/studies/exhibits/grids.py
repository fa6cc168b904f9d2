"""What is found on a grid of one setting: the best, and what is as good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from msam_analysis.results.statistics import summarise
from msam_analysis.studies.claims import Compare, Comparison, by_seed, compared
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.tables import as_table, rows

Where = Mapping[str, Any]
ACCURACIES = {"test_accuracy": "test accuracy (%)", "train_accuracy": "train accuracy (%)"}
"""Columns, and their names on an axis."""


def best(frame: pd.DataFrame, x: str = "rho", y: str = "test_accuracy") -> pd.DataFrame:
    """Return the rows at the ``x`` with the largest mean of ``y`` over seeds, the smallest such ``x``.

    A NaN of one seed is not outvoted by the others: where there is one, ``x`` comes last.
    """
    means = frame.groupby(x)[y].agg(lambda values: values.mean(skipna=False))
    return as_table(frame[frame[x] == means.fillna(-math.inf).idxmax()])


def summary(table: pd.DataFrame, by: Sequence[str], quantities: Sequence[str]) -> pd.DataFrame:
    """Return means with their intervals over seeds, accuracies in percent: a short table for the report."""
    percent = table.assign(**{name: 100 * table[name] for name in quantities if name.endswith("accuracy")})
    return as_table(summarise(percent, by, quantities).drop(columns="count"))


def best_of_each(frame: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Return a short table of the best ρ of every group: its mean accuracies with their intervals, in percent.

    ``at_grid_end`` marks a best ρ at an end of its grid, beyond which there may be a better one.
    """
    found = []
    for _, part in frame.groupby([*by], sort=False):
        row, tried = summary(best(part), [*by, "rho"], [*ACCURACIES]), sorted(set(part["rho"]))
        at_end = len(tried) > 1 and row["rho"].iloc[0] in (tried[0], tried[-1])
        found.append(row.assign(tried=len(tried), at_grid_end="yes" if at_end else "no"))
    return as_table(pd.concat(found, ignore_index=True))


def against(table: pd.DataFrame, x: str, label_x: str, y: Mapping[str, str], **switches: Any) -> list[Sweep]:
    """Return a panel for every quantity and its label, against a setting."""
    return [
        Sweep(table, x, name, label_x, label, percent=name.endswith("accuracy"), **switches)
        for name, label in y.items()
    ]


def paired(
    label: str, larger: pd.DataFrame, smaller: pd.DataFrame, column: str = "test_accuracy", **region: Any
) -> Comparison:
    """Compare an accuracy of two settings, in points, paired by seed; each table has one row a seed."""
    return compared(label, 100 * (by_seed(larger, column) - by_seed(smaller, column)), unit="points", **region)


def gains(pairs: Sequence[tuple[str, Where, Where]], column: str = "test_accuracy", **region: Any) -> Compare:
    """Return a function that compares two settings, each at the ρ of its best test accuracy, by label and ``rows``."""
    return lambda table: [
        paired(label, best(rows(table, **larger)), best(rows(table, **smaller)), column, **region)
        for label, larger, smaller in pairs
    ]


def plateau(x: npt.ArrayLike, y: npt.ArrayLike, drop: float) -> tuple[float, float]:
    """Return the range of ``x`` around the largest ``y`` in which ``y`` stays within ``drop`` of it, or the ends.

    ``x`` is positive and increasing; ``y`` is interpolated linearly in its logarithm.
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
