"""Quantities against a setting: a strength, a learning rate, a batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msam_analysis.plots.look import (
    AxesArray,
    Look,
    curve_of,
    draw_curve,
    given_axes,
    log_scale,
    log_ticks,
    look,
    name_curves,
    ordered,
    panels,
    require_columns,
    style,
    words,
)
from msam_analysis.results.statistics import LEVEL, summarise


@dataclass(frozen=True, eq=False)
class Sweep:
    """One panel: what is drawn against what.

    Attributes
    ----------
    frame
        Tidy table with the columns ``optimizer`` (whatever the curves compare), ``seed`` and the two below; one row per
        optimizer, seed and value of ``x``.
    x, y
        The setting, and the quantity.
    label_x, label_y
        Labels of the axes; by default the columns' names in words.
    log
        Logarithmic horizontal axis (default). Rows with ``x = 0``, no perturbation, are not on it: their mean
        and band are drawn from side to side.
    log_y
        Logarithmic vertical axis; means that are not positive are then holes.
    zero_line
        Draw a line at zero.
    percent
        ``y`` is a fraction, shown as a percentage.
    mirrored
        The axis runs leftwards and its numbers get a minus sign: for a negative sign of ρ.
    """

    frame: pd.DataFrame
    x: str
    y: str
    label_x: str | None = None
    label_y: str | None = None
    log: bool = True
    log_y: bool = False
    zero_line: bool = False
    percent: bool = False
    mirrored: bool = False


def sweep(
    drawn: Sweep | Sequence[Sweep] | Mapping[str, Sweep],
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    columns: int | None = None,
    share_y: bool = False,
    level: float = LEVEL,
    legend: bool = True,
) -> AxesArray:
    """Draw quantities against settings: the mean over seeds of every optimizer, with its interval.

    Parameters
    ----------
    drawn
        A panel, or several: a list, or a mapping from their titles.
    axes
        Axes to draw on, one for each panel; by default a new figure.
    columns
        Panels in a row of a new figure; by default as :func:`~msam_analysis.plots.panels` chooses.
    share_y
        Whether all panels of a new figure have one vertical scale.
    level
        Confidence of the bands, default 0.68; there is no band for one seed.
    legend
        Whether the curves are named; a name has the same look in every panel.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(panels,)``. Where a seed is NaN or infinite there is a hole.

    Raises
    ------
    ValueError
        There is no panel, a column is missing, a table is empty, a seed has two rows at one point, there are too few
        axes, or a logarithmic axis has nothing to the right of 0.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figures 2A, 2B, A1, A5 to A7, A10, A11, A15.
    """
    titles, parts = _titled(drawn)
    for part in parts:
        require_columns(part.frame, ["optimizer", "seed", part.x, part.y])
    looks = look(ordered(name for part in parts for name in part.frame["optimizer"]))
    with style():
        made = axes is None
        if axes is None:
            where = panels(len(parts), columns=columns, share_y=share_y)[1]
        else:
            where = given_axes(axes, len(parts))
        for ax, title, part in zip(where, titles, parts, strict=True):
            _panel(ax, part, looks, level)
            ax.set_title(title)
        _label(where, parts)
        if legend:
            name_curves(where, made=made)
    return where


def both_signs(
    frame: pd.DataFrame,
    quantities: Mapping[str, str],
    axes: Sequence[Axes] | AxesArray | None = None,
    *,
    x: str = "rho",
    sign: str = "sign",
    percent: bool = True,
    level: float = LEVEL,
    legend: bool = True,
) -> AxesArray:
    """Draw quantities against the strength ρ with both of its signs, which meet in the middle of the page.

    Parameters
    ----------
    frame
        As for :class:`Sweep`, with a column for the sign, 1 or −1. Rows with ``x = 0`` are drawn on both sides.
    quantities
        Column to label of the vertical axis, one row of panels each.
    axes
        Two for each quantity, negative ρ first; by default a new figure, 6.8 in wide.
    x, sign
        Columns with ρ ≥ 0 and with its sign.
    percent
        The quantities are fractions, shown as percentages (default).
    level
        Confidence of the bands, default 0.68.
    legend
        Whether the curves are named.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(2 · quantities,)``. Both of a quantity have one scale.

    Raises
    ------
    ValueError
        As :func:`sweep`, or a sign is missing.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure 2 A and B.
    """
    require_columns(frame, ["optimizer", "seed", x, sign, *quantities])
    sides = {value: frame[(frame[sign] == value) | (frame[x] == 0)] for value in (-1, 1)}
    if any((side[x] == 0).all() for side in sides.values()):
        raise ValueError(f"both signs of {x!r} are drawn, and the table has {sorted(set(frame[sign]))}; use sweep")
    parts = [
        Sweep(sides[value], x, name, r"$\rho$", label, percent=percent, mirrored=value < 0)
        for name, label in quantities.items()
        for value in (-1, 1)
    ]
    looks = look(ordered(frame["optimizer"]))
    with style():
        made = axes is None
        where = panels(len(parts), columns=2)[1] if axes is None else given_axes(axes, len(parts))
        for ax, part in zip(where, parts, strict=True):
            _panel(ax, part, looks, level)
        for pair in zip(where[::2], where[1::2], strict=True):
            low, high = zip(*(ax.get_ylim() for ax in pair), strict=True)
            for ax in pair:
                ax.set_ylim(min(low), max(high))
        _label(where, parts)
        if legend:
            name_curves(where, made=made)
    return where


def _titled(drawn: Sweep | Sequence[Sweep] | Mapping[str, Sweep]) -> tuple[list[str], list[Sweep]]:
    if isinstance(drawn, Mapping):
        return [*drawn], [*drawn.values()]
    parts = [drawn] if isinstance(drawn, Sweep) else [*drawn]
    return [""] * len(parts), parts


def _panel(ax: Axes, part: Sweep, looks: Mapping[str, Look], level: float) -> None:
    table = summarise(part.frame, ["optimizer", part.x], part.y, level)
    if part.log and not (table[part.x] > 0).any():
        raise ValueError(f"a logarithmic axis needs values of {part.x!r} above 0, got {sorted(set(table[part.x]))}")
    means = []
    for optimizer, appearance in looks.items():
        x, mean, half_width = curve_of(table, optimizer, part.x, part.y, positive=part.log_y)
        means.append(mean)
        known = np.isfinite(mean)
        aside = (x <= 0) & part.log
        for middle, half in zip(mean[aside & known], half_width[aside & known], strict=True):
            _across(ax, float(middle), float(half), appearance, optimizer)
        if aside.all():
            continue
        draw_curve(ax, x[~aside], mean[~aside], half_width[~aside], appearance, None)
        points: dict[str, Any] = {"color": appearance.color, "marker": appearance.marker, "markersize": 3.0}
        ax.plot(x[~aside & known], mean[~aside & known], linestyle="none", **points)
        ax.plot([], [], linestyle=appearance.linestyle, label=optimizer, **points)
    if part.log:
        ax.set_xscale("log")
        log_ticks(ax.xaxis, *sorted(ax.get_xlim()))
    if part.log_y:
        log_scale(ax, means)
    if part.zero_line:
        ax.axhline(0.0, color="#4d4d4d", linewidth=0.7, zorder=1.5)
    if part.mirrored:
        ax.invert_xaxis()
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"−{value:.4g}"))
    if part.percent:
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def _across(ax: Axes, mean: float, half_width: float, appearance: Look, label: str) -> None:
    ax.axhline(mean, color=appearance.color, linestyle=appearance.linestyle, label=label, zorder=2.2)
    if np.isfinite(half_width):
        ax.axhspan(mean - half_width, mean + half_width, color=appearance.color, alpha=0.17, linewidth=0, zorder=2.0)


def _label(axes: AxesArray, parts: Sequence[Sweep]) -> None:
    """Name the axes; what the panel below or the one to the left says already is left out."""
    columns = _columns(axes)
    for index, (ax, part) in enumerate(zip(axes, parts, strict=True)):
        below = parts[index + columns] if index + columns < len(parts) else None
        left = parts[index - 1] if index % columns else None
        if below is None or _label_x(below) != _label_x(part):
            ax.set_xlabel(_label_x(part))
        if left is None or _label_y(left) != _label_y(part):
            ax.set_ylabel(_label_y(part))


def _columns(axes: AxesArray) -> int:
    """Return how many panels are side by side; 1 where axes are not on one grid, so that each gets its own labels."""
    spot = axes[0].get_subplotspec()
    grid = spot.get_gridspec() if spot is not None else None
    return int(grid.ncols) if grid is not None and grid.nrows * grid.ncols >= len(axes) else 1


def _label_x(part: Sweep) -> str:
    return part.label_x or words(part.x)


def _label_y(part: Sweep) -> str:
    return part.label_y or words(part.y)
