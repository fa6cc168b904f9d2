"""Several results in one: those of the layers of a network, and all metrics of one objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import pandas as pd

from msam_analysis.results.base import Reading, Result
from msam_analysis.results.checking import is_number

Measured = TypeVar("Measured", bound=Result)


def layer_frame(results: Mapping[str, Result], *, name: str = "layer") -> pd.DataFrame:
    """Return the tables of all groups below one another, the group's name in the first column.

    Parameters
    ----------
    results
        Name to result, such as what :func:`by_layer` returned.
    name
        Name of the first column.

    Returns
    -------
    pandas.DataFrame
        Rows and other columns as in the results' own ``to_frame()``.

    Raises
    ------
    ValueError
        There are no results.
    """
    if not results:
        raise ValueError("there are no results to put into a table: expected those of by_layer")
    frames = [result.to_frame() for result in results.values()]
    for group, frame in zip(results, frames, strict=True):
        frame.insert(0, name, group)
    return pd.concat(frames, ignore_index=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByLayer(Result, Mapping[str, Measured], Generic[Measured]):
    """Results of one kind, one for each group of parameters: a mapping from the name of the group to its result.

    Attributes
    ----------
    results
        Name of the group to result.
    """

    results: Mapping[str, Measured]

    def _disagreement(self) -> str:
        return "" if self.results else "it has no results, expected one or more"

    def __getitem__(self, name: str) -> Measured:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def converged(self) -> bool:
        """Whether the measurement of every group did."""
        return all(getattr(result, "converged", True) for result in self.results.values())

    def readings(self) -> list[Reading]:
        """Return the readings of all groups, each with the name of its group."""
        found = ((name, reading) for name, result in self.results.items() for reading in result.readings())
        return [reading._replace(name=f"{name}: {reading.name}") for name, reading in found]

    def to_frame(self) -> pd.DataFrame:
        """Return the tables of all groups below one another, the name of the group in the column ``layer``."""
        return layer_frame(self)


# The columns of a measurement's rows, and what each holds.
_ROW: dict[str, Callable[[Any], bool]] = {
    "metric": lambda value: isinstance(value, str),
    "value": is_number,
    "uncertainty": is_number,
    "converged": lambda value: value is None or isinstance(value, bool),
    "meaning": lambda value: isinstance(value, str),
}

EXAMINATION = "examination"
"""Name of the row that says what the objective's examination found: it is no metric."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Result):
    """The sharpness metrics of one objective, in one table, with the results behind it.

    Attributes
    ----------
    rows
        The rows of the table, see :meth:`to_frame`.
    results
        The results behind it, by name.
    """

    rows: tuple[Mapping[str, Any], ...]
    results: Mapping[str, Result]

    def _disagreement(self) -> str:
        whole = all(isinstance(row, Mapping) and row.keys() == _ROW.keys() for row in self.rows)
        if not self.rows or not whole:
            return f"it lacks rows, or one of them has not the columns {', '.join(_ROW)}"
        bad = next(
            ((name, row[name]) for row in self.rows for name, holds in _ROW.items() if not holds(row[name])), None
        )
        return f"a row of it has the {bad[0]} {bad[1]!a:.60}, which is no such thing" if bad else ""

    @property
    def table(self) -> pd.DataFrame:
        """What :meth:`to_frame` returns."""
        return self.to_frame()

    @property
    def converged(self) -> bool:
        """Whether every iterative solver did."""
        return all(row["converged"] is not False for row in self.rows)

    def readings(self) -> list[Reading]:
        """Return the value of every metric with its uncertainty."""
        return [
            Reading(row["metric"], row["value"], row["uncertainty"], row["converged"] is not False)
            for row in self.rows
            if row["metric"] != EXAMINATION
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per number.

        Columns: ``metric``, ``value``, ``uncertainty`` (a residual, a standard error or a bracket's farther end;
        NaN for exact or lower-bound values), ``converged`` (of an iterative solver; else missing), ``meaning``.
        """
        frame: pd.DataFrame = pd.DataFrame(list(self.rows)).astype({"converged": "boolean"})
        return frame
