"""Optimizers compared after training: eigenvalues, sharpness in a ball, accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msam_analysis.plots.drawing import GREY, draw_curve, log_scale, log_ticks, one_panel, points
from msam_analysis.plots.look import Look, look, ordered, require_columns
from msam_analysis.results.statistics import LEVEL, summarise
from msam_analysis.studies.pictures.means import mean_curves

_GREY_DOT = Look(GREY, "-", "o")
_LARGE_RANGE = 20.0  # from this ratio on, eigenvalues go on a logarithmic axis


def eigenvalues(
    frame: pd.DataFrame, ax: Axes | None = None, *, log: bool | None = None, level: float = LEVEL, legend: bool = True
) -> Axes:
    """Draw the leading eigenvalues of every optimizer, side by side for each index, by each method.

    Becker et al., arXiv 2401.12033, table A1.

    Parameters
    ----------
    frame
        Table with the columns ``index`` (1 for the largest), ``value`` and, where two methods were used, ``method``.
        The first method drawn (``lanczos`` where there is one) has filled markers with the interval, any other an open
        ring around them: a ring that is not centred is a disagreement.
    ax, level, legend
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    log
        Logarithmic axis; by default where all means are positive and the largest is at least 20 times the smallest.
    """
    require_columns(frame, ["optimizer", "seed", "index", "value"])
    methods = list(dict.fromkeys(frame["method"])) if "method" in frame.columns else []
    methods.sort(key=lambda name: name != "lanczos")
    table = summarise(frame, ["optimizer", "index", *(["method"] if methods else [])], "value", level)
    looks = look(ordered(table["optimizer"]))
    means = table["value"].to_numpy(dtype=np.float64)
    finite = means[np.isfinite(means)]
    if log is None:
        log = bool(finite.size) and finite.min() > 0 and finite.max() / finite.min() >= _LARGE_RANGE
    handles: dict[str, Any] = {}
    with one_panel(ax, handles, legend=legend) as panel:
        spread = min(0.18, 0.7 / len(looks))
        for position, name in enumerate(looks):
            for rank, method in enumerate(methods or [None]):
                shown = table if method is None else table[table["method"] == method]
                (curve,) = mean_curves(shown, "index", "value", looks={name: looks[name]})
                at = curve.x + (position - (len(looks) - 1) / 2) * spread
                mean = np.where(np.isfinite(curve.mean), curve.mean, np.nan)
                if rank:
                    panel.plot(at, mean, color=curve.look.color, **_ring(rank))
                    continue
                if np.isfinite(curve.half_width).any():
                    bar: dict[str, Any] = {"fmt": "none", "elinewidth": 1.0, "capsize": 2, "capthick": 1.0}
                    panel.errorbar(at, mean, curve.half_width, ecolor=curve.look.color, **bar)
                panel.plot(at, mean, **points(curve.look, 3.2))
        if log:
            log_scale(panel, [means])
        indices = sorted(set(table["index"]))
        panel.set_xlim(indices[0] - 0.5, indices[-1] + 0.5)
        panel.grid(visible=False, axis="x")
        panel.set_xticks(indices, [f"$\\lambda_{{{index}}}$" for index in indices])
        panel.set_ylabel("eigenvalue of the Hessian")
        for name, item in looks.items():
            handles[name] = Line2D([], [], color=item.color, marker=item.marker, linestyle="none")
        for rank, method in enumerate(methods if len(methods) > 1 else ()):
            handles[str(method)] = Line2D([], [], color=GREY, **_ring(rank))
    return panel


def _ring(rank: int) -> dict[str, Any]:
    """Return the shape of the markers of a method: filled for the first, open and larger for each further one."""
    size = {"markersize": 6.5 + 2 * rank, "fillstyle": "none", "markeredgewidth": 0.8} if rank else {"markersize": 3}
    return {"marker": "o", "linestyle": "none", **size}


def ball_sharpness(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    value: str = "sharpness",
    log: bool = True,
    level: float = LEVEL,
    label: str | None = None,
    legend: bool = True,
) -> Axes:
    """Draw the largest loss rise found in a ball against its radius, one curve per optimizer.

    ``max_{‖e‖ ≤ ρ} L(w + e) − L(w)``, Foret et al., arXiv 2010.01412, equation 1.

    Parameters
    ----------
    frame
        Table with the columns ``rho`` and the one named by ``value``.
    ax, level, legend
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    value
        Column drawn, default ``sharpness``; ``one_step`` for what a single ascent step finds.
    log
        Both axes logarithmic (default); means that are not positive are then holes.
    label
        Label of the vertical axis, instead of the definition of the sharpness.
    """
    require_columns(frame, ["optimizer", "seed", "rho", value])
    table = summarise(frame, ["optimizer", "rho"], value, level)
    means = []
    with one_panel(ax, legend=legend) as panel:
        for curve in mean_curves(table, "rho", value, log=log):
            means.append(curve.mean)
            draw_curve(panel, curve.x, curve.mean, curve.half_width, curve.look, None)
            panel.plot(curve.x, curve.mean, **points(curve.look, 3.2))
            panel.plot([], [], **points(curve.look, 3.2, linestyle=curve.look.linestyle), label=curve.optimizer)
        if log:
            panel.set_xscale("log")
            log_ticks(panel.xaxis, *sorted(panel.get_xlim()))
            log_scale(panel, means)
        panel.set_xlabel(r"radius $\rho$ of the ball")
        panel.set_ylabel(label or r"$\max_{\|e\| \leq \rho}\ L(w + e) - L(w)$")
    return panel


def accuracy(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    train: str = "train_accuracy",
    test: str = "test_accuracy",
    level: float = LEVEL,
    legend: bool = True,
) -> Axes:
    """Draw train and test accuracy of every optimizer: the mean with its interval, and each seed as a small dot.

    Becker et al., arXiv 2401.12033, table 1 and figure 2 A and B.

    Parameters
    ----------
    frame
        Table with the two accuracies, fractions between 0 and 1; one row per run.
    ax, level, legend
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    train, test
        Names of the two columns.

    Returns
    -------
    matplotlib.axes.Axes
        One row per optimizer, the first at the top: test above, filled; train below, open.

    Raises
    ------
    ValueError
        A value is not a fraction.
    """
    require_columns(frame, ["optimizer", "seed", train, test])
    values = frame[[train, test]].to_numpy(dtype=np.float64)
    outside = values[np.isfinite(values) & ((values < 0) | (values > 1))]
    if outside.size:
        raise ValueError(f"accuracies must be fractions between 0 and 1, got {outside[0]:g}")
    table = summarise(frame, "optimizer", [train, test], level)
    names = ordered(table["optimizer"])
    handles: dict[str, Any] = {}
    dots: dict[str, Any] = {"marker": "o", "markeredgewidth": 0, "alpha": 0.35, "zorder": 2}
    with one_panel(ax, handles, legend=legend, height=0.75 + 0.36 * len(names)) as panel:
        for row, (optimizer, appearance) in enumerate(look(names).items()):
            part = table[table["optimizer"] == optimizer].iloc[0]
            runs = frame[frame["optimizer"] == optimizer]
            color = appearance.color
            for column, at, face in ((test, row - 0.14, color), (train, row + 0.14, "white")):
                mean, half_width = float(part[column]), float(part[f"{column}_half_width"])
                seeds = runs[column].to_numpy(dtype=np.float64)
                if len(seeds) > 1:
                    panel.plot(seeds, np.full(len(seeds), at), **points(appearance, 2.6, **dots))
                if np.isfinite(half_width):
                    panel.errorbar(mean, at, xerr=half_width, fmt="none", ecolor=color, elinewidth=1.1, capsize=2)
                panel.plot(mean, at, **points(appearance, 4.2, markerfacecolor=face, zorder=3))
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0, labelsize=8)
        panel.margins(x=0.06)
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
        panel.set_xlabel("accuracy (%)")
        for name, face in (("test", GREY), ("train", "white")):
            handles[name] = Line2D([], [], **points(_GREY_DOT, 4.2, markerfacecolor=face))
    return panel
