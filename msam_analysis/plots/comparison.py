"""Metrics of several checkpoints: a panel for each, against the step or the label."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from msam_analysis import results
from msam_analysis.plots.drawing import name_curves, several_panels
from msam_analysis.plots.look import AxesArray, Look, Named, look, require_some, size_of, style, wrapped
from msam_analysis.plots.points import Point, draw_points, handles_of

_LONGEST = 28  # characters of a label
_INCHES, _PER_INCH = 0.05, 14  # of a character, upright; characters beside one another
_LARGE_RANGE = 20  # largest over smallest value from which on an axis is logarithmic


def compare(
    result: Named[results.Comparison],
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    metrics: Sequence[str] = (),
) -> AxesArray:
    """Draw the metrics of several checkpoints, a panel for each metric.

    Parameters
    ----------
    result
        What :func:`~msam_analysis.compare` returned, or one for each name, such as an optimizer's.
    axes
        Where to draw, one for each metric; by default a new figure, 6.8 in wide.
    metrics
        Names of the metrics to draw, as in the column ``metric``; default all.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(panels,)``: against the step where all have one, else against the epoch, else the label; bars
        are residuals, brackets or standard errors, open markers did not converge, what is NaN or infinite is a hole in
        a curve.

    Raises
    ------
    ValueError
        A metric was not measured, there is nothing to draw, or there are fewer axes than panels.
    TypeError
        Something that is not the result of the measure.
    """
    several = require_some(result, results.Comparison)
    frames = {name: item.to_frame() for name, item in several.items()}
    known = list(dict.fromkeys(metric for item in several.values() for metric in item.metrics))
    missing = [name for name in metrics if name not in known]
    if missing:
        raise ValueError(f"metrics must be of {', '.join(known)}; got {missing[0]!r}")
    wanted = list(metrics) or known
    steps = {name: dict(zip(item, item.steps, strict=True)) for name, item in several.items()}
    numbered = all(_in_order(list(found.values())) for found in steps.values())
    labels = _shortened(list(dict.fromkeys(label for item in several.values() for label in item)))
    height = 2.0 + (0.0 if numbered else _INCHES * max(map(len, labels.values()), default=0))
    drawn = several_panels(axes, len(wanted), panel_height=height)
    handles: dict[str, Line2D] = {}
    for ax, metric in zip(drawn, wanted, strict=True):
        points = {name: _points(frame, metric) for name, frame in frames.items()}
        label = metric.replace("_", " ")
        if numbered:
            _curves(ax, steps, points)
            ax.set_xlabel(" or ".join(sorted({_counter(item) for item in several.values()})))
            ax.set_ylabel(wrapped(label, 0.8 * size_of(ax)[1]))
        else:
            draw_points(points, ax, label, log=None, legend=False, grouped=True)
            _name_labels(ax, list(dict.fromkeys(point.at for rows in points.values() for point in rows)), labels)
        handles |= handles_of(points)
    with style():
        name_curves(drawn if axes is None else drawn[:1], made=axes is None, handles=handles)
    return drawn


def _points(frame: pd.DataFrame, metric: str) -> list[Point]:
    return [
        Point(str(row["label"]), value, value - error, value + error, row["converged"] is not False)
        for row in frame[frame["metric"] == metric].to_dict("records")
        for value, error in [(float(row["value"]), float(row["uncertainty"]))]
    ]


def _counter(result: results.Comparison) -> str:
    return "step" if all(source.get("step") is not None for source in result.sources.values()) else "epoch"


def _shortened(labels: Sequence[str]) -> dict[str, str]:
    """Return labels without the words with which all begin and end, and not longer than a picture bears."""
    words = {label: re.split(r"(?<=[-_/ ])|(?=[-_/ ])", label) for label in labels}
    same = _alike(list(words.values()))
    behind = _alike([list(reversed(parts[same:])) for parts in words.values()])
    short = {label: "".join(parts[same : len(parts) - behind]).strip("-_/ ") for label, parts in words.items()}
    if len(labels) < 2 or not all(short.values()) or len(set(short.values())) < len(labels):
        short = {label: label for label in labels}
    return {label: text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for label, text in short.items()}


def _alike(words: Sequence[Sequence[str]]) -> int:
    """Return with how many words all begin."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    return sum(1 for _ in columns)


def _name_labels(ax: Axes, ticks: Sequence[str], labels: Mapping[str, str]) -> None:
    """Name the ticks: upright where the names do not fit beside one another."""
    texts = [labels[tick] for tick in ticks]
    beside = max(map(len, texts), default=0) * len(texts) <= _PER_INCH * size_of(ax)[0]
    ax.set_xticks(range(len(texts)), texts, rotation=0 if beside else 90, ha="center", rotation_mode="default")


def _in_order(steps: Sequence[float]) -> bool:
    return all(map(math.isfinite, steps)) and len(set(steps)) == len(steps) > 1


def _curves(ax: Axes, steps: Mapping[str, Mapping[str, float]], points: Mapping[str, Sequence[Point]]) -> None:
    """Draw the points of each name against numbers, joined by a line."""
    with style():
        for name, appearance in look(points).items():
            rows = sorted(points[name], key=lambda point: steps[name][point.at])
            _curve(ax, [steps[name][point.at] for point in rows], rows, appearance)
        values = [point.value for rows in points.values() for point in rows if math.isfinite(point.value)]
        if values and min(values) > 0 and max(values) >= _LARGE_RANGE * min(values):
            ax.set_yscale("log")
        ax.margins(x=0.06)


def _curve(ax: Axes, x: Sequence[float], points: Sequence[Point], appearance: Look) -> None:
    values = [point.value if math.isfinite(point.value) else math.nan for point in points]  # a hole
    errors = np.array([[point.value - point.low, point.high - point.value] for point in points]).T
    bars = np.where(np.isfinite(errors), errors, 0.0).reshape(2, -1)
    shape: dict[str, Any] = {"color": appearance.color, "linewidth": 1.2, "elinewidth": 1.2, "capsize": 3}
    ax.errorbar(x, values, bars, zorder=2, **shape)
    for place, value, point in zip(x, values, points, strict=True):
        face = appearance.color if point.converged else "white"
        marker: dict[str, Any] = {"marker": appearance.marker, "markersize": 4, "markerfacecolor": face}
        ax.plot(place, value, color=appearance.color, zorder=3, linestyle="none", **marker)
