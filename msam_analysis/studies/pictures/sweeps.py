"""Quantities against a setting: a strength, a learning rate, a batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msam_analysis.plots.drawing import draw_curve, log_scale, log_ticks, name_curves, points, several_panels, zero_line
from msam_analysis.plots.look import AxesArray, Look, Places, look, ordered, require_columns, style, words
from msam_analysis.results.statistics import LEVEL, summarise
from msam_analysis.studies.pictures.means import mean_curves


@dataclass(frozen=True, eq=False)
class Sweep:
    """One panel: what is drawn against what.

    Attributes
    ----------
    frame
        Table with the two columns below, see :mod:`msam_analysis.studies.pictures`.
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
    axes: Places = None,
    *,
    columns: int | None = None,
    share_y: bool = False,
    level: float = LEVEL,
    legend: bool = True,
) -> AxesArray:
    """Draw quantities against settings: the mean over seeds of every optimizer, with its interval.

    Becker et al., arXiv 2401.12033, figures 2A, 2B, A1, A5 to A7, A10, A11, A15.

    Parameters
    ----------
    drawn
        A panel, or several: a list, or a mapping from their titles.
    axes, level, legend
        See :mod:`msam_analysis.studies.pictures`. A name has the same look in every panel.
    columns
        Panels in a row of a new figure; by default as :func:`~msam_analysis.plots.panels` chooses.
    share_y
        Whether all panels of a new figure have one vertical scale.

    Raises
    ------
    ValueError
        There is no panel, or a logarithmic axis has nothing to the right of 0.
    """
    parts = [drawn] if isinstance(drawn, Sweep) else [*(drawn.values() if isinstance(drawn, Mapping) else drawn)]
    titles = [*drawn] if isinstance(drawn, Mapping) else [""] * len(parts)
    for part in parts:
        require_columns(part.frame, ["optimizer", "seed", part.x, part.y])
    looks = look(ordered(name for part in parts for name in part.frame["optimizer"]))
    where = _draw(parts, looks, axes, level=level, legend=legend, columns=columns, share_y=share_y)
    with style():
        for ax, title in zip(where, titles, strict=True):
            ax.set_title(title)
    return where


def both_signs(
    frame: pd.DataFrame,
    quantities: Mapping[str, str],
    axes: Places = None,
    *,
    x: str = "rho",
    sign: str = "sign",
    percent: bool = True,
    level: float = LEVEL,
    legend: bool = True,
) -> AxesArray:
    """Draw quantities against the strength ρ with both of its signs, which meet in the middle of the page.

    Becker et al., arXiv 2401.12033, figure 2 A and B.

    Parameters
    ----------
    frame
        As for :class:`Sweep`, with a column for the sign, 1 or −1. Rows with ``x = 0`` are drawn on both sides.
    quantities
        Column to label of the vertical axis, one row of panels each.
    axes, level, legend
        See :mod:`msam_analysis.studies.pictures`. There are two axes for each quantity, negative ρ first.
    x, sign
        Columns with ρ ≥ 0 and with its sign.
    percent
        The quantities are fractions, shown as percentages (default).

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(2 · quantities,)``. Both of a quantity have one scale.

    Raises
    ------
    ValueError
        A sign is missing.
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
    where = _draw(parts, look(ordered(frame["optimizer"])), axes, level=level, legend=legend, columns=2)
    for pair in zip(where[::2], where[1::2], strict=True):
        low, high = zip(*(ax.get_ylim() for ax in pair), strict=True)
        for ax in pair:
            ax.set_ylim(min(low), max(high))
    return where


def _draw(
    parts: Sequence[Sweep], looks: Mapping[str, Look], axes: Places, *, level: float, legend: bool, **new: Any
) -> AxesArray:
    """Draw panels on axes, or on those of a new figure, which has the options ``new``."""
    with style():
        where = several_panels(axes, len(parts), **new)
        for ax, part in zip(where, parts, strict=True):
            _panel(ax, part, looks, level)
        _label(where, parts)
        if legend:
            name_curves(where, made=axes is None)
    return where


def _panel(ax: Axes, part: Sweep, looks: Mapping[str, Look], level: float) -> None:
    table = summarise(part.frame, ["optimizer", part.x], part.y, level)
    if part.log and not (table[part.x] > 0).any():
        raise ValueError(f"a logarithmic axis needs values of {part.x!r} above 0, got {sorted(set(table[part.x]))}")
    means = []
    for optimizer, appearance, x, mean, half_width in mean_curves(table, part.x, part.y, log=part.log_y, looks=looks):
        means.append(mean)
        known = np.isfinite(mean)
        aside = (x <= 0) & part.log
        for middle, half in zip(mean[aside & known], half_width[aside & known], strict=True):
            ax.axhline(middle, color=appearance.color, linestyle=appearance.linestyle, label=optimizer, zorder=2.2)
            if np.isfinite(half):
                band: dict[str, Any] = {"color": appearance.color, "alpha": 0.17, "linewidth": 0, "zorder": 2.0}
                ax.axhspan(middle - half, middle + half, **band)
        if aside.all():
            continue
        draw_curve(ax, x[~aside], mean[~aside], half_width[~aside], appearance, None)
        ax.plot(x[~aside & known], mean[~aside & known], **points(appearance, 3.0))
        ax.plot([], [], **points(appearance, 3.0, linestyle=appearance.linestyle), label=optimizer)
    if part.log:
        ax.set_xscale("log")
        log_ticks(ax.xaxis, *sorted(ax.get_xlim()))
    if part.log_y:
        log_scale(ax, means)
    if part.zero_line:
        zero_line(ax)
    if part.mirrored:
        ax.invert_xaxis()
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"−{value:.4g}"))
    if part.percent:
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def _label(axes: AxesArray, parts: Sequence[Sweep]) -> None:
    """Name the axes; what the panel below or the one to the left says already is left out."""
    # One column where axes are not on one grid, so that each gets its own labels.
    spot = axes[0].get_subplotspec()
    grid = spot.get_gridspec() if spot is not None else None
    columns = int(grid.ncols) if grid is not None and grid.nrows * grid.ncols >= len(axes) else 1
    x_labels = [part.label_x or words(part.x) for part in parts]
    y_labels = [part.label_y or words(part.y) for part in parts]
    for index, ax in enumerate(axes):
        if x_labels[index] not in x_labels[index + columns : index + columns + 1]:
            ax.set_xlabel(x_labels[index])
        if index % columns == 0 or y_labels[index] != y_labels[index - 1]:
            ax.set_ylabel(y_labels[index])
