"""Quantities recorded while an optimizer runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict, overload

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from msam_analysis.plots.drawing import bottom_panels, draw_curve, log_scale, name_curves, several_panels, zero_line
from msam_analysis.plots.look import AxesArray, Look, Places, look, ordered, require_columns, style, words
from msam_analysis.results.statistics import LEVEL, summarise
from msam_analysis.studies.pictures.means import mean_curves

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BEFORE = Look("#9a9a9a", (0, (2.5, 1)), "o")


class _Options(TypedDict, total=False):
    x: str | None
    log: bool
    zero_line: bool | None
    level: float
    label: str | None
    legend: bool


@overload
def over_training(  # type: ignore[overload-overlap]  # a name is a sequence of names to the type checker only
    frame: pd.DataFrame, quantity: str, ax: Places = None, **options: Unpack[_Options]
) -> Axes: ...
@overload
def over_training(
    frame: pd.DataFrame, quantity: Sequence[str] | Mapping[str, str], ax: Places = None, **options: Unpack[_Options]
) -> AxesArray: ...
def over_training(
    frame: pd.DataFrame,
    quantity: str | Sequence[str] | Mapping[str, str],
    ax: Places = None,
    *,
    x: str | None = None,
    log: bool = False,
    zero_line: bool | None = None,
    level: float = LEVEL,
    label: str | None = None,
    legend: bool = True,
) -> Axes | AxesArray:
    """Draw recorded quantities against training time: the mean over seeds of every optimizer, with its interval.

    Becker et al., arXiv 2401.12033, figures 2C, A3 to A8.

    Parameters
    ----------
    frame
        Table with the column named by ``x`` and the quantities.
    quantity
        Name of a column; or several, drawn side by side on one vertical scale: a list, or a mapping from the column
        to the panel's title.
    ax, level, legend
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    x
        Column with the time; by default ``epoch`` where there is one, else ``step``.
    log
        Logarithmic vertical axis, for curvature; means that are not positive are then holes.
    zero_line
        Draw a line at zero; by default when the means have both signs.
    label
        Label of the vertical axis, by default the column's name in words.

    Returns
    -------
    matplotlib.axes.Axes or numpy.ndarray
        Axes for one name, an array of shape ``(quantities,)`` for several.
    """
    time = x or _time(frame)
    if isinstance(quantity, str):
        titles = {quantity: ""}
    else:
        titles = dict(quantity) if isinstance(quantity, Mapping) else {name: words(name) for name in quantity}
    require_columns(frame, ["optimizer", "seed", time, *titles])
    with style():
        height = 2.4 if isinstance(quantity, str) else 2.1
        drawn = several_panels(ax, len(titles), panel_height=height, share_y=True)
        for index, (axes, (name, title)) in enumerate(zip(drawn, titles.items(), strict=True)):
            _recorded(axes, frame, name, time, log=log, zero=zero_line, level=level)
            axes.set_title(title)
            axes.set_xlabel(words(time))
            if ax is not None or index == 0:
                axes.set_ylabel(label or words(name))
        if legend:
            name_curves(drawn, made=ax is None)
    first: Axes = drawn[0]
    return first if isinstance(quantity, str) else drawn


def _time(frame: pd.DataFrame) -> str:
    return "epoch" if "epoch" in frame.columns else "step"


def _recorded(
    ax: Axes, frame: pd.DataFrame, name: str, time: str, *, log: bool, zero: bool | None, level: float
) -> None:
    means = []
    for curve in mean_curves(summarise(frame, ["optimizer", time], name, level), time, name, log=log):
        means.append(curve.mean)
        draw_curve(ax, curve.x, curve.mean, curve.half_width, curve.look, curve.optimizer)
    values = np.concatenate(means)
    values = values[np.isfinite(values)]
    if zero is None:
        zero = bool(values.size) and values.min() < 0 < values.max()
    if log:
        log_scale(ax, means)
    elif zero:
        zero_line(ax)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def perturbation_rise(
    frame: pd.DataFrame,
    axes: Places = None,
    *,
    x: str | None = None,
    before: str = "loss_before",
    after: str = "loss_after",
    log: bool = False,
    level: float = LEVEL,
) -> AxesArray:
    """Draw the loss before and after each optimizer's perturbation, one panel per optimizer on one scale.

    Becker et al., arXiv 2401.12033, figure A12. The difference of the two with its own interval, which is narrower than
    the bands suggest as both losses share the seed, is a column for :func:`over_training`.

    Parameters
    ----------
    frame
        Table with the columns named by ``x``, ``before`` and ``after``.
    axes, level
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    x
        Column with the time; by default ``epoch`` where there is one, else ``step``.
    before, after
        Columns with the loss at the weights and at the perturbed weights.
    log
        Logarithmic loss axis.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(optimizers,)``: SGD, NAG, SAM, MSAM, then others as they appear.
    """
    time = x or _time(frame)
    require_columns(frame, ["optimizer", "seed", time, before, after])
    table = summarise(frame, ["optimizer", time], [before, after], level)
    looks = look(ordered(table["optimizer"]))
    drawn = several_panels(axes, len(looks), panel_height=1.9, share_x=True, share_y=True)
    with style():
        means = []
        for name, only, zorder in ((after, None, 2.5), (before, _BEFORE, 2.6)):
            for ax, curve in zip(drawn, mean_curves(table, time, name, log=log), strict=True):
                means.append(curve.mean)
                drawn_as = only or curve.look._replace(linestyle="-")
                draw_curve(ax, curve.x, curve.mean, curve.half_width, drawn_as, words(name), zorder=zorder)
                ax.set_title(curve.optimizer)
                ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for ax in drawn:
            if log:
                log_scale(ax, means)
            if axes is not None or ax in bottom_panels(drawn):
                ax.set_xlabel(words(time))
            if axes is not None or ax.get_subplotspec() is None or ax.get_subplotspec().is_first_col():
                ax.set_ylabel("loss")
        handles = {
            "before perturbing": Line2D([], [], color=_BEFORE.color, linestyle=_BEFORE.linestyle),
            "after perturbing": tuple(Line2D([], [], color=item.color) for item in looks.values()),
        }
        name_curves(drawn if axes is None else drawn[:1], made=axes is None, handles=handles)
    return drawn
