"""The density of eigenvalues."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from msam_analysis.plots.drawing import GREY, draw_curve, name_curves, one_panel
from msam_analysis.plots.look import Array, Look, Named, look, ordered, require_some, style
from msam_analysis.results import SpectralDensity
from msam_analysis.results.statistics import LEVEL, bands

_TICK: dict[str, Any] = {"marker": "|", "markersize": 7.0, "linestyle": "none"}  # at an eigenvalue that is known


def spectral_density(
    result: Named[SpectralDensity],
    ax: Axes | None = None,
    *,
    log: bool = True,
    level: float = LEVEL,
    legend: bool = True,
) -> Axes:
    """Draw the spectral density with its band over probes, and ticks at the eigenvalues at both ends.

    Parameters
    ----------
    result
        A density, or one for each name.
    ax
        Where to draw; by default new axes, 3.3 in wide.
    log
        Logarithmic density axis (default), which ends below the peak of a single eigenvalue, so that every one of the
        outliers is seen.
    level
        Confidence of the bands, Student's t over the probes at every point; default 0.68.
    legend
        Whether to name the curves and the ticks.

    Returns
    -------
    matplotlib.axes.Axes
        With the eigenvalues on the horizontal axis.

    Raises
    ------
    ValueError
        There is nothing to draw, or ``level`` does not lie between 0 and 1.
    TypeError
        Something that is not a :class:`~msam_analysis.results.SpectralDensity`.

    Notes
    -----
    Ghorbani, Krishnan & Xiao 2019, figure 1. Ticks stand at ``top`` and ``bottom``; the legend says where these did not
    converge.
    """
    results: dict[str, SpectralDensity] = require_some(result, SpectralDensity)
    names = ordered(results)
    with style():
        made = ax is None
        ax = one_panel(ax)
        handles: dict[str, Line2D] = {}
        for row, (name, appearance) in enumerate(look(names).items()):
            density = results[name]
            x = density.values.numpy()
            mean, half_width = bands(density.curves(density.values).numpy(), level)
            draw_curve(ax, x, mean, half_width, appearance, name or None)
            if name:
                handles[name] = ax.lines[-1]
            _ticks(ax, density, appearance, row)
        if log:
            _log_density(ax, list(results.values()))
        else:
            ax.set_ylim(bottom=0.0)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        ends = [item for item in results.values() if len(item.top)]
        if ends:
            words = "top and bottom eigenvalues" + ("" if all(item.converged for item in ends) else " (not converged)")
            color = GREY if len(results) > 1 else look(names)[names[0]].color
            handles[words] = Line2D([], [], color=color, **_TICK)
        if legend and handles:
            name_curves(np.array([ax], dtype=np.object_), made=made, handles=handles)
    return ax


def _ticks(ax: Axes, density: SpectralDensity, appearance: Look, row: int) -> None:
    """Put a tick on the axis for every eigenvalue that is known at the two ends; those of another curve above them."""
    ends: Array = np.concatenate([density.top.numpy(), density.bottom.numpy()])
    place: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "label": f"_ends {row}", "zorder": 3}
    ax.plot(ends, np.full(len(ends), 0.03 + 0.06 * row), color=appearance.color, **_TICK, **place)


def _log_density(ax: Axes, densities: list[SpectralDensity]) -> None:
    peaks = [1.0 / (item.size * item.sigma * math.sqrt(2 * math.pi)) for item in densities]
    highest = max(float(item.density.max()) for item in densities)
    ax.set_yscale("log", nonpositive="clip")
    ax.set_ylim(0.1 * min(peaks), 2.0 * max(highest, *peaks))
