"""Metrics of several checkpoints: a panel for each, against the step or the label."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from msam_analysis import results
from msam_analysis.plots.drawing import given_axes, panels
from msam_analysis.plots.look import AxesArray, style, wrapped
from msam_analysis.plots.points import Point, draw_points


def compare(
    result: results.Comparison, axes: Axes | Sequence[Axes] | AxesArray | None = None, *, metrics: Sequence[str] = ()
) -> AxesArray:
    """Draw the metrics of several checkpoints, a panel for each metric.

    Parameters
    ----------
    result
        What :func:`~msam_analysis.compare` returned.
    axes
        Where to draw, one for each metric; by default a new figure, 6.8 in wide.
    metrics
        Names of the metrics to draw, as in the column ``metric``; default all.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(panels,)``: against the step where all have one, else against the epoch, else the label; bars
        are residuals or standard errors, open markers did not converge.

    Raises
    ------
    ValueError
        A metric was not measured, or there are fewer axes than panels.
    """
    frame = result.to_frame()
    known = list(dict.fromkeys(frame["metric"]))
    missing = [name for name in metrics if name not in known]
    if missing:
        raise ValueError(f"metrics must be of {', '.join(known)}; got {missing[0]!r}")
    wanted = list(metrics) or known
    drawn = panels(len(wanted), panel_height=2.0)[1] if axes is None else given_axes(axes, len(wanted))
    steps = dict(zip(result, result.steps, strict=True))
    numbered = all(math.isfinite(step) for step in steps.values()) and len(set(steps.values())) == len(steps) > 1
    for ax, metric in zip(drawn, wanted, strict=True):
        rows = [
            Point(str(row["label"]), value, value - error, value + error, row["converged"] is not False)
            for row in frame[frame["metric"] == metric].to_dict("records")
            for value, error in [(float(row["value"]), float(row["uncertainty"]))]
        ]
        if numbered:
            _curve(ax, [steps[point.at] for point in rows], rows)
            ax.set_xlabel("step" if result.sources[next(iter(result))].get("step") is not None else "epoch")
        else:
            draw_points({"": rows}, ax, metric, log=None, legend=False, grouped=True)
        ax.set_ylabel(wrapped(metric.replace("_", " "), 1.6))
    return drawn


def _curve(ax: Axes, x: Sequence[float], points: Sequence[Point]) -> None:
    """Draw the points against numbers, joined by a line."""
    with style():
        values = np.array([point.value for point in points])
        errors = np.array([[point.value - point.low, point.high - point.value] for point in points]).T
        bars = np.where(np.isfinite(errors), errors, 0.0)
        line = ax.errorbar(x, values, bars, color="C0", linewidth=1.2, elinewidth=1.2, capsize=3)
        for place, point in zip(x, points, strict=True):
            face = "C0" if point.converged else "white"
            ax.plot(place, point.value, "o", color="C0", markersize=4, markerfacecolor=face, zorder=3)
        line.lines[0].set_zorder(2)
        if np.nanmin(values) > 0 and np.nanmax(values) >= 20 * np.nanmin(values):
            ax.set_yscale("log")
