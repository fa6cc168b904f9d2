"""Quantities recorded while an optimizer runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from msam_analysis.plots.look import (
    AxesArray,
    Look,
    bottom_panels,
    curve_of,
    draw_curve,
    given_axes,
    log_scale,
    look,
    name_curves,
    one_panel,
    ordered,
    panels,
    require_columns,
    style,
    words,
)
from msam_analysis.results.statistics import LEVEL, summarise


@overload
def over_training(  # type: ignore[overload-overlap]  # a name is a sequence of names to the type checker only
    frame: pd.DataFrame,
    quantity: str,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    x: str | None = None,
    log: bool = False,
    zero_line: bool | None = None,
    level: float = LEVEL,
    label: str | None = None,
    legend: bool = True,
) -> Axes: ...
@overload
def over_training(
    frame: pd.DataFrame,
    quantity: Sequence[str] | Mapping[str, str],
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    x: str | None = None,
    log: bool = False,
    zero_line: bool | None = None,
    level: float = LEVEL,
    label: str | None = None,
    legend: bool = True,
) -> AxesArray: ...
def over_training(
    frame: pd.DataFrame,
    quantity: str | Sequence[str] | Mapping[str, str],
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    x: str | None = None,
    log: bool = False,
    zero_line: bool | None = None,
    level: float = LEVEL,
    label: str | None = None,
    legend: bool = True,
) -> Axes | AxesArray:
    """Draw recorded quantities against training time: the mean over seeds of every optimizer, with its interval.

    Parameters
    ----------
    frame
        Tidy table with the columns ``optimizer``, ``seed``, the one named by ``x``, and the quantities; one row per
        optimizer, seed and time.
    quantity
        Name of a column; or several, drawn side by side on one vertical scale: a list, or a mapping from the column
        to the panel's title.
    ax
        Axes to draw on, or one per quantity; by default a new figure.
    x
        Column with the time; by default ``epoch`` where there is one, else ``step``.
    log
        Logarithmic vertical axis, for curvature; means that are not positive are then holes.
    zero_line
        Draw a line at zero; by default when the means have both signs.
    level
        Confidence of the band, default 0.68; there is no band for one seed.
    label
        Label of the vertical axis, by default the column's name in words.
    legend
        Whether the curves are named.

    Returns
    -------
    matplotlib.axes.Axes or numpy.ndarray
        Axes for one name, an array of shape ``(quantities,)`` for several. Where a seed is NaN or infinite there is a
        hole.

    Raises
    ------
    ValueError
        A column is missing, the table is empty, a seed has two rows at one time, or there are too few axes.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figures 2C, A3 to A8.
    """
    time = x or ("epoch" if "epoch" in frame.columns else "step")
    titles = {quantity: ""} if isinstance(quantity, str) else _titles(quantity)
    require_columns(frame, ["optimizer", "seed", time, *titles])
    with style():
        if ax is not None:
            drawn = given_axes(ax, len(titles))
        elif isinstance(quantity, str):
            drawn = given_axes(one_panel(None), 1)
        else:
            drawn = panels(len(titles), share_y=True)[1]
        above = ax is None and len(drawn) > 1
        for axes, (name, title) in zip(drawn, titles.items(), strict=True):
            _recorded(axes, frame, name, time, log=log, zero_line=zero_line, level=level)
            axes.set_title(title)
            axes.set_xlabel(words(time))
            if not above or axes is drawn[0]:
                axes.set_ylabel(label or words(name))
        if legend:
            name_curves(drawn, made=ax is None)
    first: Axes = drawn[0]
    return first if isinstance(quantity, str) else drawn


def _titles(quantities: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(quantities, Mapping):
        return dict(quantities)
    return {name: words(name) for name in quantities}


def _recorded(
    ax: Axes, frame: pd.DataFrame, name: str, time: str, *, log: bool, zero_line: bool | None, level: float
) -> None:
    table = summarise(frame, ["optimizer", time], name, level)
    means = []
    for optimizer, appearance in look(ordered(table["optimizer"])).items():
        at, mean, half_width = curve_of(table, optimizer, time, name, positive=log)
        means.append(mean)
        draw_curve(ax, at, mean, half_width, appearance, optimizer)
    values = np.concatenate(means)
    values = values[np.isfinite(values)]
    if zero_line is None:
        zero_line = bool(values.size) and values.min() < 0 < values.max()
    if zero_line and not log:
        ax.axhline(0.0, color="#4d4d4d", linewidth=0.7, zorder=1.5)
    if log:
        log_scale(ax, means)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def perturbation_rise(
    frame: pd.DataFrame,
    axes: Sequence[Axes] | AxesArray | None = None,
    *,
    x: str | None = None,
    before: str = "loss_before",
    after: str = "loss_after",
    log: bool = False,
    level: float = LEVEL,
) -> AxesArray:
    """Draw the loss before and after each optimizer's perturbation, one panel per optimizer on one scale.

    Parameters
    ----------
    frame
        Tidy table with the columns ``optimizer``, ``seed``, the one named by ``x``, ``before`` and ``after``; one row
        per optimizer, seed and time.
    axes
        One axes per optimizer; by default a new figure, 6.8 in wide.
    x
        Column with the time; by default ``epoch`` where there is one, else ``step``.
    before, after
        Columns with the loss at the weights and at the perturbed weights.
    log
        Logarithmic loss axis.
    level
        Confidence of the bands, default 0.68.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(optimizers,)``: SGD, NAG, SAM, MSAM, then others as they appear.

    Raises
    ------
    ValueError
        A column is missing, the table is empty, a seed has two rows at one time, or there are too few axes.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure A12. The difference of the two with its own interval, which is narrower than
    the bands suggest as both losses share the seed, is a column for :func:`over_training`.
    """
    time = x or ("epoch" if "epoch" in frame.columns else "step")
    require_columns(frame, ["optimizer", "seed", time, before, after])
    table = summarise(frame, ["optimizer", time], [before, after], level)
    looks = look(ordered(table["optimizer"]))
    if axes is None:
        width = None if len(looks) > 1 else 3.3
        drawn = panels(len(looks), width=width, panel_height=1.9, share_x=True, share_y=True)[1]
    else:
        drawn = given_axes(axes, len(looks))
    with style():
        means = []
        for ax, (optimizer, appearance) in zip(drawn, looks.items(), strict=True):
            for name, drawn_as, zorder in ((after, appearance._replace(linestyle="-"), 2.5), (before, _BEFORE, 2.6)):
                at, mean, half_width = curve_of(table, optimizer, time, name, positive=log)
                means.append(mean)
                draw_curve(ax, at, mean, half_width, drawn_as, words(name), zorder=zorder)
            ax.set_title(optimizer)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for ax in drawn:
            if log:
                log_scale(ax, means)
            if axes is not None or ax in bottom_panels(drawn):
                ax.set_xlabel(words(time))
            if axes is not None or ax.get_subplotspec() is None or ax.get_subplotspec().is_first_col():
                ax.set_ylabel("loss")
        lines = [Line2D([], [], color=item.color) for item in looks.values()]
        grey = Line2D([], [], color=_BEFORE.color, linestyle=_BEFORE.linestyle)
        name_curves(
            drawn if axes is None else drawn[:1],
            made=axes is None,
            handles={"before perturbing": grey, "after perturbing": tuple(lines)},
        )
    return drawn


_BEFORE = Look("#9a9a9a", (0, (2.5, 1)), "o")
