"""Results that are curves: rises along a line, angles over strengths, shares over components, accuracies over sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from msam_analysis.plots.drawing import GREY, draw_curve, name_curves, one_panel, zero_line
from msam_analysis.plots.look import Array, Look, Named, look, require_some, size_of, style, wrapped
from msam_analysis.plots.scale import as_array
from msam_analysis.results import DirectionalSharpness, FeatureRank, Result, RobustAccuracy, SamMsamAngle

_LITTLE = 0.1  # share of a gradient within a plane from which on its angle there says little
_NONE: dict[str, Any] = {"linestyle": "none"}


def directional_sharpness(result: Named[DirectionalSharpness], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the rise of the loss along a direction, with what rounding can make of it.

    Parameters
    ----------
    result
        A result, or one for each name, such as an optimizer's.
    ax
        Where to draw; by default new axes, 3.3 in wide.
    legend
        Whether to name the curves.

    Returns
    -------
    matplotlib.axes.Axes
        One curve for each name, with a dot at every point that was looked at and a marker at the largest rise. NaN and
        infinity are holes.

    Raises
    ------
    ValueError
        There is nothing to draw.
    TypeError
        Something that is not the result of the measure.
    """
    several = require_some(result, DirectionalSharpness)
    with style():
        made, ax = ax is None, one_panel(ax)
        for name, appearance in look(several).items():
            item: DirectionalSharpness = several[name]
            x, rises = as_array(item.coordinates), as_array(item.rises)
            draw_curve(ax, x, rises, np.full_like(rises, item.resolution), appearance, name or None)
            ax.plot(x, rises, marker=".", color=appearance.color, **_NONE)
            ax.plot(item.at, item.largest, marker=appearance.marker, color=appearance.color, **_NONE)
        _zero(ax)
        directions = {item.direction for item in several.values()}
        where = f" along {directions.pop()}" if len(directions) == 1 else ""
        ax.set_xlabel(wrapped(f"distance{where}", size_of(ax)[0]))
        ax.set_ylabel("rise of the loss")
        return _finished(ax, made=made, legend=legend)


def sam_msam_angle(result: Named[SamMsamAngle], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the angle of MSAM's gradient to SAM's over the perturbation strength, and where it is 0.

    Parameters as for :func:`directional_sharpness`. A marker with a bar stands at ``rho_0`` and its bracket; dots are
    open where less than a tenth of the gradient lies in the plane, so that its angle there says little.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure 3.
    """
    several = require_some(result, SamMsamAngle)
    with style():
        made, ax = ax is None, one_panel(ax)
        for name, appearance in look(several).items():
            item: SamMsamAngle = several[name]
            x, angles, shares = (as_array(part) for part in (item.rhos, item.angles, item.shares))
            draw_curve(ax, x, angles, np.full_like(angles, np.nan), appearance, name or None)
            for inside, fill in ((shares >= _LITTLE, appearance.color), (shares < _LITTLE, "white")):
                ax.plot(x[inside], angles[inside], marker="o", color=appearance.color, markerfacecolor=fill, **_NONE)
            if np.isfinite(item.rho_0):
                bar = [[item.rho_0 - item.bracket[0]], [item.bracket[1] - item.rho_0]]
                shape: dict[str, Any] = {"marker": appearance.marker, "markersize": 6, "capsize": 3, "zorder": 4}
                ax.errorbar(item.rho_0, 0.0, xerr=bar, color=appearance.color, markeredgecolor="white", **shape)
        _zero(ax, always=True)
        ax.set_xlabel(r"strength $\rho$ of MSAM's perturbation")
        ax.set_ylabel("angle to SAM's gradient, degrees")
        return _finished(ax, made=made, legend=legend)


def feature_rank(result: Named[FeatureRank], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the share of the variance of the features that the first components explain, with a marker at the rank.

    Parameters as for :func:`directional_sharpness`.
    """
    several = require_some(result, FeatureRank)
    ranks = {name: item.rank for name, item in several.items()}
    ax = _shares(several, "explained", ranks, ax, legend=legend, word="rank")
    for threshold in {item.threshold for item in several.values()}:
        ax.axhline(threshold, color=GREY, linewidth=0.7, linestyle=(0, (4, 2)), zorder=1.5)
    ax.set_ylabel("explained share of the variance")
    return ax


def pca_plane(result: Named[Result], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the share of a trajectory that the first components of its points show, with a marker at the plane's two.

    Parameters as for :func:`directional_sharpness`; results are those of ``pca_plane``.
    """
    several = require_some(result, Result)
    ax = _shares(several, "cumulative", dict.fromkeys(several, 2), ax, legend=legend)
    ax.set_ylabel("share of the squared distances")
    return ax


def robust_accuracy(result: Named[RobustAccuracy], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the accuracy over the size of a disturbance of the inputs, from 0 on, with its standard error.

    Parameters as for :func:`directional_sharpness`.
    """
    several = require_some(result, RobustAccuracy)
    with style():
        made, ax = ax is None, one_panel(ax)
        for name, appearance in look(several).items():
            item: RobustAccuracy = several[name]
            x = np.concatenate([[0.0], as_array(item.sizes)])
            accuracies = np.concatenate([[item.clean], as_array(item.accuracies)])
            errors = np.concatenate([[item.clean_error], as_array(item.errors)])
            order = np.argsort(x, kind="stable")
            draw_curve(ax, x[order], accuracies[order], errors[order], appearance, name or None)
            ax.plot(x, accuracies, marker=appearance.marker, color=appearance.color, **_NONE)
        attacks = " or ".join(dict.fromkeys(item.attack for item in several.values()))
        ax.set_xlabel(f"size of the disturbance ({attacks}), in units of the inputs")
        ax.set_ylabel("accuracy (share of the samples)")
        return _finished(ax, made=made, legend=legend)


def _shares(
    several: Mapping[str, Result],
    column: str,
    marks: Mapping[str, int],
    ax: Axes | None,
    *,
    legend: bool,
    word: str | None = None,
) -> Axes:
    """Draw a column of cumulative shares over the components, with a marker at one component of each."""
    with style():
        made, ax = ax is None, one_panel(ax)
        for name, appearance in look(several).items():
            frame = several[name].to_frame()
            if not {"component", column} <= set(frame.columns):
                raise TypeError(f"expected a result with shares of components, got {type(several[name]).__name__}")
            x, shares = (frame[part].to_numpy(dtype=np.float64) for part in ("component", column))
            label = ": ".join([*([name] if name else []), *([f"{word} {marks[name]}"] if word else [])])
            _stairs(ax, x, shares, appearance, label or None)
            at = x == marks[name]
            ax.plot(x[at], shares[at], marker=appearance.marker, markersize=6, color=appearance.color, **_NONE)
        ax.set_xlabel("component")
        ax.set_ylim(0.0, 1.03)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _finished(ax, made=made, legend=legend)


def _stairs(ax: Axes, x: Array, shares: Array, appearance: Look, label: str | None) -> None:
    draw_curve(ax, x, shares, np.full_like(shares, np.nan), appearance, label)
    if len(x) <= 40:
        ax.plot(x, shares, marker=".", color=appearance.color, **_NONE)


def _zero(ax: Axes, *, always: bool = False) -> None:
    """Draw a line at 0 where values lie on both sides of it."""
    low, high = ax.get_ylim()
    if always or low < 0 < high:
        zero_line(ax)


def _finished(ax: Axes, *, made: bool, legend: bool) -> Axes:
    if legend and ax.get_legend_handles_labels()[1]:
        name_curves(np.array([ax], dtype=np.object_), made=made)
    return ax
