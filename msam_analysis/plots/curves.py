"""Results that are curves: rises, angles, shares of components, accuracies, spectral densities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from msam_analysis import results
from msam_analysis.plots.drawing import GREY, draw_curve, one_panel, zero_line
from msam_analysis.plots.look import Named, literal, look, ordered, require_some, size_of, wrapped
from msam_analysis.plots.scale import as_array
from msam_analysis.results.statistics import LEVEL, bands

_LITTLE = 0.1  # share of a gradient within a plane from which on its angle there says little
_FEW = 40  # components that have a dot each
_NONE: dict[str, Any] = {"linestyle": "none"}
_TICK: dict[str, Any] = {"marker": "|", "markersize": 7.0, "linestyle": "none"}  # at an eigenvalue that is known


def directional_sharpness(
    result: Named[results.DirectionalSharpness], ax: Axes | None = None, *, legend: bool = True
) -> Axes:
    """Draw the rise of the loss along a direction, with what rounding can make of it.

    Parameters
    ----------
    result, ax, legend
        See :mod:`msam_analysis.plots`, also for the errors.

    Returns
    -------
    matplotlib.axes.Axes
        One curve for each name, with a dot at every point that was looked at and a marker at the largest rise. NaN and
        infinity are holes.
    """
    several = require_some(result, results.DirectionalSharpness)
    with one_panel(ax, legend=legend) as panel:
        for name, appearance in look(several).items():
            item: results.DirectionalSharpness = several[name]
            x, rises = as_array(item.coordinates), as_array(item.rises)
            draw_curve(panel, x, rises, item.resolution, appearance, name or None)
            panel.plot(x, rises, marker=".", color=appearance.color, **_NONE)
            panel.plot(item.at, item.largest, marker=appearance.marker, color=appearance.color, **_NONE)
        low, high = panel.get_ylim()
        if low < 0 < high:
            zero_line(panel)
        directions = {item.direction for item in several.values()}
        where = f" along {literal(directions.pop())}" if len(directions) == 1 else ""
        panel.set_xlabel(wrapped(f"distance{where}", size_of(panel)[0]))
        panel.set_ylabel("rise of the loss")
    return panel


def sam_msam_angle(result: Named[results.SamMsamAngle], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the angle of MSAM's gradient to SAM's over the perturbation strength, and where it is 0.

    Parameters as for :func:`directional_sharpness`. A marker with a bar stands at ``rho_0`` and its bracket; dots are
    open where less than a tenth of the gradient lies in the plane, so that its angle there says little.

    Becker et al., arXiv 2401.12033, figure 3.
    """
    several = require_some(result, results.SamMsamAngle)
    with one_panel(ax, legend=legend) as panel:
        for name, appearance in look(several).items():
            item: results.SamMsamAngle = several[name]
            x, angles, shares = (as_array(part) for part in (item.rhos, item.angles, item.shares))
            draw_curve(panel, x, angles, np.nan, appearance, name or None)
            for inside, fill in ((shares >= _LITTLE, appearance.color), (shares < _LITTLE, "white")):
                panel.plot(x[inside], angles[inside], marker="o", color=appearance.color, markerfacecolor=fill, **_NONE)
            if np.isfinite(item.rho_0):
                bar = [[item.rho_0 - item.bracket[0]], [item.bracket[1] - item.rho_0]]
                shape: dict[str, Any] = {"marker": appearance.marker, "markersize": 6, "capsize": 3, "zorder": 4}
                panel.errorbar(item.rho_0, 0.0, xerr=bar, color=appearance.color, markeredgecolor="white", **shape)
        zero_line(panel)
        panel.set_xlabel(r"strength $\rho$ of MSAM's perturbation")
        panel.set_ylabel("angle to SAM's gradient, degrees")
    return panel


def feature_rank(result: Named[results.FeatureRank], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the share of the variance of the features that the first components explain, with a marker at the rank.

    Parameters as for :func:`directional_sharpness`.
    """
    several = require_some(result, results.FeatureRank)
    ranks = {name: item.rank for name, item in several.items()}
    ax = _shares(several, "explained", ranks, ax, legend=legend, word="rank")
    for threshold in {item.threshold for item in several.values()}:
        ax.axhline(threshold, color=GREY, linewidth=0.7, linestyle=(0, (4, 2)), zorder=1.5)
    ax.set_ylabel("explained share of the variance")
    return ax


def pca_plane(result: Named[results.Result], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the share of a trajectory that the first components of its points show, with a marker at the plane's two.

    Parameters as for :func:`directional_sharpness`; results are those of ``pca_plane``.
    """
    several = require_some(result, results.Result)
    ax = _shares(several, "cumulative", dict.fromkeys(several, 2), ax, legend=legend, word="")
    ax.set_ylabel("share of the squared distances")
    return ax


def robust_accuracy(result: Named[results.RobustAccuracy], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the accuracy over the size of a disturbance of the inputs, from 0 on, with its standard error.

    Parameters as for :func:`directional_sharpness`.
    """
    several = require_some(result, results.RobustAccuracy)
    with one_panel(ax, legend=legend) as panel:
        for name, appearance in look(several).items():
            item: results.RobustAccuracy = several[name]
            x = np.concatenate([[0.0], as_array(item.sizes)])
            accuracies = np.concatenate([[item.clean], as_array(item.accuracies)])
            errors = np.concatenate([[item.clean_error], as_array(item.errors)])
            order = np.argsort(x, kind="stable")
            draw_curve(panel, x[order], accuracies[order], errors[order], appearance, name or None)
            panel.plot(x, accuracies, marker=appearance.marker, color=appearance.color, **_NONE)
        attacks = " or ".join(dict.fromkeys(item.attack for item in several.values()))
        panel.set_xlabel(f"size of the disturbance ({attacks}), in units of the inputs")
        panel.set_ylabel("accuracy (share of the samples)")
    return panel


def _shares(
    several: Mapping[str, Any], column: str, marks: Mapping[str, int], ax: Axes | None, *, legend: bool, word: str
) -> Axes:
    """Draw a column of cumulative shares over the components, with a marker at one component of each."""
    with one_panel(ax, legend=legend) as panel:
        for name, appearance in look(several).items():
            frame = several[name].to_frame()
            if not {"component", column} <= set(frame.columns):
                raise TypeError(f"expected a result with shares of components, got {type(several[name]).__name__}")
            x, shares = (frame[part].to_numpy(dtype=np.float64) for part in ("component", column))
            label = ": ".join(filter(None, [name, word and f"{word} {marks[name]}"]))
            draw_curve(panel, x, shares, np.nan, appearance, label or None)
            if len(x) <= _FEW:
                panel.plot(x, shares, marker=".", color=appearance.color, **_NONE)
            at = x == marks[name]
            panel.plot(x[at], shares[at], marker=appearance.marker, markersize=6, color=appearance.color, **_NONE)
        panel.set_xlabel("component")
        panel.set_ylim(0.0, 1.03)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return panel


def spectral_density(
    result: Named[results.SpectralDensity],
    ax: Axes | None = None,
    *,
    log: bool = True,
    level: float = LEVEL,
    legend: bool = True,
) -> Axes:
    """Draw the spectral density with its band over the random vectors, and ticks at the eigenvalues at both ends.

    Ghorbani, Krishnan & Xiao 2019, figure 1. Ticks stand at ``top`` and ``bottom``; the legend says where these did not
    converge.

    Parameters
    ----------
    result, ax, legend
        See :mod:`msam_analysis.plots`, also for the errors.
    log
        Logarithmic density axis (default), which ends below the peak of a single eigenvalue, so that every one of the
        outliers is seen.
    level
        Confidence of the bands, Student's t over the random vectors at every point; default 0.68.

    Returns
    -------
    matplotlib.axes.Axes
        With the eigenvalues on the horizontal axis.

    Raises
    ------
    ValueError
        ``level`` does not lie between 0 and 1.
    """
    several: dict[str, results.SpectralDensity] = require_some(result, results.SpectralDensity)
    names = ordered(several)
    handles: dict[str, Line2D] = {}
    with one_panel(ax, handles, legend=legend) as panel:
        for row, (name, appearance) in enumerate(look(names).items()):
            density = several[name]
            x = density.values.numpy()
            mean, half_width = bands(density.curves(density.values).numpy(), level)
            draw_curve(panel, x, mean, half_width, appearance, name or None)
            if name:
                handles[name] = panel.lines[-1]
            # those of another curve above them
            ends = np.concatenate([density.top.numpy(), density.bottom.numpy()])
            place: dict[str, Any] = {"transform": panel.get_xaxis_transform(), "label": f"_ends {row}", "zorder": 3}
            panel.plot(ends, np.full(len(ends), 0.03 + 0.06 * row), color=appearance.color, **_TICK, **place)
        if log:
            peaks = [1.0 / (item.size * item.sigma * math.sqrt(2 * math.pi)) for item in several.values()]
            highest = max(float(item.density.max()) for item in several.values())
            panel.set_yscale("log", nonpositive="clip")
            panel.set_ylim(0.1 * min(peaks), 2.0 * max(highest, *peaks))
        else:
            panel.set_ylim(bottom=0.0)
        panel.set_xlabel("eigenvalue")
        panel.set_ylabel("density")
        known = [item for item in several.values() if len(item.top)]
        if known:
            words = "top and bottom eigenvalues" + ("" if all(item.converged for item in known) else " (not converged)")
            color = GREY if len(several) > 1 else look(names)[names[0]].color
            handles[words] = Line2D([], [], color=color, **_TICK)
    return panel
