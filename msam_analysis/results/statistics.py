"""Means over seeds with Student-t intervals, for the tables and the bands of the figures.

The intervals are those of the paper (arXiv 2401.12033, section 4): the mean of ``n`` independent values and the
half width ``t · s / sqrt(n)``, with ``s`` the sample standard deviation (divisor ``n − 1``) and ``t`` the quantile
``(1 + level) / 2`` of Student's t with ``n − 1`` degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtrit

Array = npt.NDArray[np.float64]

LEVEL = 0.68
"""Confidence of an interval where none is asked for; the paper's."""


class Interval(NamedTuple):
    """A mean and how well it is known.

    Attributes
    ----------
    mean
        Arithmetic mean of the values, in their unit.
    half_width
        The interval is ``mean ± half_width``; NaN when one value, or one that is not finite, leaves it unknown.
    n
        How many values there were.
    """

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    @property
    def deviation(self) -> float:
        """Standard deviation of the values (divisor ``n − 1``); this interval must be at :data:`LEVEL`."""
        return self.half_width * math.sqrt(self.n) / _quantile(self.n, LEVEL) if self.n > 1 else math.nan

    def at(self, level: float) -> Interval:
        """Return the interval of the same values at another level; this one must be at :data:`LEVEL`."""
        if self.n < 2:
            return self
        return self._replace(half_width=self.half_width * _quantile(self.n, level) / _quantile(self.n, LEVEL))


def _checked_level(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1 (0.68 for a 68 % interval), got {level!r}")
    return level


def _over_seeds(values: npt.ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 1 or array.shape[0] == 0:
        raise ValueError(f"expected at least one seed along the first axis, got an array of shape {array.shape}")
    return array


def _quantile(count: int, level: float) -> float:
    """Return Student's t with ``count − 1`` degrees of freedom, of a two-sided level."""
    return float(stdtrit(count - 1, (1.0 + level) / 2.0))


def _intervals(values: Array, level: float) -> tuple[Array, Array]:
    """Return mean and half width along the first axis."""
    count = values.shape[0]
    with np.errstate(all="ignore"):  # infinity minus infinity is NaN, which is the answer
        mean = values.mean(axis=0)
        if count < 2:
            return mean, np.full_like(mean, np.nan)
        return mean, _quantile(count, level) * values.std(axis=0, ddof=1) / np.sqrt(count)


def bands(values: npt.ArrayLike, level: float = LEVEL) -> tuple[Array, Array]:
    """Return mean and half width of a curve repeated over seeds, point by point.

    Parameters
    ----------
    values
        Shape ``(seeds, ...)``, at least one seed.
    level
        Confidence of the interval. Default :data:`LEVEL`.

    Returns
    -------
    mean, half_width : numpy.ndarray
        Each of shape ``(...)``, float64. A point that is NaN or infinite for any seed stays so in the mean and has a
        NaN half width: averaging only the seeds that survived would be an average of something else.

    Raises
    ------
    ValueError
        No seed was given, or ``level`` does not lie between 0 and 1.
    """
    return _intervals(_over_seeds(values), _checked_level(level))


def quantile_bands(values: npt.ArrayLike, level: float = LEVEL) -> tuple[Array, Array, Array]:
    """Return the median of a curve repeated over seeds, and the range of its middle seeds, point by point.

    This is the spread of the seeds, which stays as it is with more of them; the interval of :func:`bands` is the
    uncertainty of their mean, which shrinks.

    Parameters
    ----------
    values
        As for :func:`bands`, also for the errors.
    level
        Part of the seeds inside the band, default 0.68: from quantile 0.16 to 0.84, interpolated between seeds.

    Returns
    -------
    median, low, high : numpy.ndarray
        Each of shape ``(...)``, float64. A seed at infinity counts as the largest; a point that is NaN for any seed is
        NaN. One seed has a NaN band.
    """
    array = _over_seeds(values)
    outside = (1.0 - _checked_level(level)) / 2.0
    low, median, high = (_quantile_of_sorted(np.sort(array, axis=0), part) for part in (outside, 0.5, 1.0 - outside))
    if array.shape[0] < 2:
        low, high = np.full_like(median, np.nan), np.full_like(median, np.nan)
    return median, low, high


def _quantile_of_sorted(values: Array, part: float) -> Array:
    """Interpolate along the first axis as numpy.quantile does, but for infinity, of which that makes NaN."""
    below, share = divmod(part * (len(values) - 1), 1.0)
    first = values[int(below)]
    with np.errstate(invalid="ignore"):
        between = first + share * (values[min(int(below) + 1, len(values) - 1)] - first) if share else first
    found: Array = np.where(np.isnan(values).any(axis=0), np.nan, between)
    return found


def mean_interval(values: npt.ArrayLike, level: float = LEVEL) -> Interval:
    """Return the mean of independent values with its Student-t interval.

    Parameters
    ----------
    values
        Shape ``(n,)`` with ``n >= 1``: one number per seed.
    level
        As for :func:`bands`.

    Returns
    -------
    Interval
        ``half_width`` is NaN for one value. A value that is NaN or infinite is never dropped: the mean becomes NaN or
        infinite and the half width NaN.

    Raises
    ------
    ValueError
        ``values`` is empty or not one-dimensional, or ``level`` does not lie between 0 and 1.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a list of at least one number, got an array of shape {array.shape}")
    mean, half_width = _intervals(array, _checked_level(level))
    return Interval(float(mean), float(half_width), array.size)


def paired_interval(a: npt.ArrayLike, b: npt.ArrayLike, level: float = LEVEL) -> Interval:
    """Return the mean of ``a − b`` with its interval as :func:`mean_interval` does, for values that share their seed.

    What the seeds have in common (initial weights, wrong labels, order of the batches) cancels, so that this interval
    is usually narrower than the two of :func:`mean_interval` suggest.

    Parameters
    ----------
    a, b
        Shape ``(n,)``, in the same order of seeds.
    level
        As for :func:`bands`.

    Raises
    ------
    ValueError
        The lists differ in length, or as :func:`mean_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values must match seed by seed, got shapes {first.shape} and {second.shape}")
    with np.errstate(all="ignore"):
        difference = first - second
    return mean_interval(difference, level)


def summarise(
    frame: pd.DataFrame, by: str | Sequence[str], columns: str | Sequence[str], level: float = LEVEL
) -> pd.DataFrame:
    """Return mean and interval of every group of a tidy table.

    Parameters
    ----------
    frame
        One row per seed and group. If it has a column ``seed`` (and that is not grouped by), each group may hold a
        seed only once: rows of one seed are not independent and would make the interval too narrow.
    by
        Column or columns that make a group, for example ``["optimizer", "epoch"]``.
    columns
        Column or columns of numbers to summarise.
    level
        As for :func:`bands`.

    Returns
    -------
    pandas.DataFrame
        One row per group, in the order of first appearance: the columns of ``by``; for every quantity ``q`` its mean
        ``q`` and ``q_half_width``; and ``count``, the rows of the group. NaN and infinity as in :func:`mean_interval`.

    Raises
    ------
    ValueError
        A column is missing, a seed appears twice in a group, or ``level`` does not lie between 0 and 1.
    """
    keys = [by] if isinstance(by, str) else list(by)
    names = [columns] if isinstance(columns, str) else list(columns)
    _checked_level(level)
    missing = [name for name in (*keys, *names) if name not in frame.columns]
    if missing:
        raise ValueError(f"the table has no column {missing}; it has {list(frame.columns)}")
    if "seed" in frame.columns and "seed" not in keys and frame.duplicated([*keys, "seed"]).any():
        raise ValueError(
            f"a group of {keys} holds one seed several times; group by what tells these rows apart, "
            "or average them within the seed first"
        )
    rows: list[dict[str, object]] = []
    for group, part in frame.groupby(keys, sort=False, dropna=False):
        row: dict[str, object] = dict(zip(keys, group, strict=True))
        mean, half_width = _intervals(part[names].to_numpy(dtype=np.float64), level)
        for name, middle, half in zip(names, mean, half_width, strict=True):
            row |= {name: float(middle), f"{name}_half_width": float(half)}
        rows.append(row | {"count": len(part)})
    header = [*keys, *(column for name in names for column in (name, f"{name}_half_width")), "count"]
    table: pd.DataFrame = pd.DataFrame(rows, columns=header)
    return table
