"""Panels, curves with bands, logarithmic axes and legends: what the pictures draw with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from msam_analysis.plots.look import COLUMN_WIDTH, PAGE_WIDTH, Array, AxesArray, Look, Places, style, style_settings

GREY = "#4d4d4d"
"""The colour of lines and markers that belong to no curve."""


def panels(
    count: int,
    *,
    columns: int | None = None,
    width: float | None = None,
    panel_height: float = 2.1,
    share_x: bool = False,
    share_y: bool = False,
    layout: Literal["constrained", "compressed"] = "constrained",
) -> tuple[Figure, AxesArray]:
    """Make a figure with panels in the package's style.

    Parameters
    ----------
    count
        How many panels.
    columns
        Panels in a row. By default up to four; five and six go in rows of three.
    width
        Width of the figure in inches, by default 3.3 for one panel and 6.8 for several.
    panel_height
        Height of one row in inches.
    share_x, share_y
        Whether all panels have the same axis limits.
    layout
        ``"compressed"`` keeps panels of fixed aspect close together.

    Returns
    -------
    figure, axes
        ``axes`` of shape ``(count,)``, row by row.

    Raises
    ------
    ValueError
        ``count`` is less than 1.
    """
    if count < 1:
        raise ValueError(f"expected at least one panel, got {count}")
    columns = columns or (count if count <= 4 else 3 if count <= 6 else 4)
    rows = -(-count // columns)
    with style():
        size = (width or (COLUMN_WIDTH if count == 1 else PAGE_WIDTH), rows * panel_height)
        shared: dict[str, Any] = {"sharex": share_x, "sharey": share_y, "squeeze": False}
        figure, grid = plt.subplots(rows, columns, figsize=size, layout=layout, **shared)
        axes = grid.ravel()
        make_ticks(axes)
        for ax in axes[count:]:
            ax.remove()
        for ax in bottom_panels(axes[:count]) if share_x else ():
            ax.tick_params(labelbottom=True)
    return figure, axes[:count]


def make_ticks(axes: Iterable[Axes]) -> None:
    """Make the ticks now: left alone they are made when first read, with the rcParams of that moment."""
    for ax in axes:
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_ticks(1)
            axis.get_minor_ticks(1)


def bottom_panels(axes: AxesArray) -> AxesArray:
    """Return those of a grid's axes that have none below them, all where the axes are not on one grid."""
    place = axes[0].get_subplotspec()
    columns = place.get_gridspec().ncols if place is not None and place.get_gridspec() is not None else len(axes)
    return axes[max(len(axes) - columns, 0) :]


@contextmanager
def one_panel(
    ax: Axes | None, handles: Mapping[str, Any] | None = None, *, legend: bool = True, height: float = 2.4
) -> Iterator[Axes]:
    """Give ``ax``, or the axes of a new figure, to draw on in the package's style; then name the curves.

    ``handles`` replace the labels of what was drawn, as they are by then; there is no legend where they are empty.
    """
    with style():
        drawn: Axes = panels(1, panel_height=height)[1][0] if ax is None else ax
        yield drawn
        if legend and handles != {}:
            name_curves([drawn], made=ax is None, handles=handles)


def several_panels(axes: Places, count: int, **options: Any) -> AxesArray:
    """Return the user's axes as an array, one for each panel; or new :func:`panels`, with their options."""
    if axes is None:
        return panels(count, **options)[1]
    flat = np.atleast_1d(np.asarray(axes, dtype=np.object_)).ravel()
    if len(flat) < count:
        raise ValueError(f"{count} panels need {count} axes, got {len(flat)}")
    return flat[:count]


def name_curves(axes: Sequence[Axes] | AxesArray, *, made: bool, handles: Mapping[str, Any] | None = None) -> None:
    """Add the legend: above all panels, where it covers nothing, if the figure was made here, else inside each axes.

    Every label appears once; ``handles`` replaces those of the artists drawn.
    """
    if not made:
        for ax in axes:
            if handles is not None:
                ax.legend(list(handles.values()), list(handles), handler_map=_SIDE_BY_SIDE)
            elif ax.get_legend_handles_labels()[1]:
                ax.legend()
        return
    if handles is None:
        found = [item for ax in axes for item in zip(*ax.get_legend_handles_labels(), strict=True)]
        handles = {label: handle for handle, label in reversed(found)}
        handles = {label: handles[label] for _, label in found}
    if handles:
        figure: Any = axes[0].figure
        columns = _legend_columns(list(handles), 72.0 * figure.get_figwidth(), 4 if figure.get_figwidth() < 5 else 8)
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=columns, handler_map=_SIDE_BY_SIDE
        )


def _legend_columns(labels: Sequence[str], width: float, most: int) -> int:
    """Return how many columns of labels fit into ``width`` points, in as few rows as that takes."""
    size = float(style_settings()["legend.fontsize"])
    # line, gaps and letters in units of the font size; matplotlib fills column by column
    widths = [size * (5.2 + 0.56 * len(label)) for label in labels]
    for rows in range(1, len(labels)):
        columns = -(-len(labels) // rows)
        total = sum(max(widths[start : start + rows]) for start in range(0, len(labels), rows))
        if columns <= most and total <= width:
            return columns
    return 1


_SIDE_BY_SIDE = {tuple: HandlerTuple(ndivide=None, pad=0)}


def draw_curve(
    ax: Axes, x: Array, mean: Array, half_width: Array | float, look: Look, label: str | None, *, zorder: float = 2.5
) -> None:
    """Draw a mean with its band, none for NaN; what is not finite is a hole, and a point between two holes a dot."""
    draw_banded(ax, x, mean, (mean - half_width, mean + half_width), look, label, zorder=zorder)


def draw_banded(
    ax: Axes, x: Array, middle: Array, band: tuple[Array, Array], look: Look, label: str | None, *, zorder: float = 2.5
) -> None:
    """Draw a curve between the two ends of a band; holes and dots as :func:`draw_curve` makes them."""
    middle = np.where(np.isfinite(middle), middle, np.nan)
    known = np.isfinite(middle)
    padded = np.concatenate([[False], known, [False]])
    alone = np.flatnonzero(known & ~padded[:-2] & ~padded[2:])
    width = None if len(x) <= 80 else 0.9
    ax.plot(x, middle, color=look.color, linestyle=look.linestyle, linewidth=width, label=label, zorder=zorder)
    if alone.size:
        ax.plot(x[alone], middle[alone], linestyle="none", marker=".", color=look.color, zorder=zorder)
    low, high = (np.where(np.isfinite(end) & known, end, np.nan) for end in band)
    if np.isfinite(high - low).any():
        ax.fill_between(x, low, high, color=look.color, alpha=0.17, linewidth=0, zorder=zorder - 0.5)


def log_scale(ax: Axes, drawn: Sequence[Array]) -> None:
    """Make the y axis logarithmic, with limits set by the means ``drawn`` and not by where a band touches zero."""
    positive = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in drawn])
    ax.set_yscale("log", nonpositive="clip")
    if positive.size:
        low, high = positive.min(), positive.max()
        margin = max((high / low) ** 0.06, 1.25)
        # what was drawn before, here or on axes that share this scale, stays in sight
        family = [*ax.get_shared_y_axes().get_siblings(ax)]
        seen = [getattr(member, _LIMITS) for member in family if hasattr(member, _LIMITS)]
        limits = (min([low / margin, *(pair[0] for pair in seen)]), max([high * margin, *(pair[1] for pair in seen)]))
        setattr(ax, _LIMITS, limits)
        ax.set_ylim(*limits, auto=None)
        log_ticks(ax.yaxis, *limits)


_LIMITS = "_msam_analysis_log_limits"


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers where these are short: 1-2-5 over two decades or less."""
    if high / low <= 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    if low >= 1e-3 and high < 2e4:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def points(appearance: Look, size: float, **changes: Any) -> dict[str, Any]:
    """Return how points without a line are drawn."""
    return {"linestyle": "none", "marker": appearance.marker, "markersize": size, "color": appearance.color, **changes}


def zero_line(ax: Axes) -> None:
    """Draw a thin line at 0."""
    ax.axhline(0.0, color=GREY, linewidth=0.7, zorder=1.5)
