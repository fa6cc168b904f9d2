"""The curves of a table of means: one for each optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from msam_analysis.plots.look import Array, Look, look, ordered


class MeanCurve(NamedTuple):
    """The means of one optimizer with the half widths of their intervals, in the order of ``x``."""

    optimizer: str
    look: Look
    x: Array
    mean: Array
    half_width: Array


def mean_curves(
    table: pd.DataFrame, x: str, y: str, *, log: bool = False, looks: Mapping[str, Look] | None = None
) -> Iterator[MeanCurve]:
    """Give the curves of what ``summarise`` returned; for a logarithmic axis a mean that is not positive is a hole."""
    for optimizer, appearance in (look(ordered(table["optimizer"])) if looks is None else looks).items():
        part = table[table["optimizer"] == optimizer].sort_values(x)
        at, mean, half_width = (part[name].to_numpy(dtype=np.float64) for name in (x, y, f"{y}_half_width"))
        yield MeanCurve(optimizer, appearance, at, np.where(mean > 0, mean, np.nan) if log else mean, half_width)
