"""Optimizers compared after training: eigenvalues, sharpness in a ball, accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msam_analysis.plots.look import (
    Look,
    curve_of,
    draw_curve,
    log_scale,
    log_ticks,
    look,
    name_curves,
    one_panel,
    ordered,
    require_columns,
    style,
)
from msam_analysis.results.statistics import LEVEL, summarise

_LARGE_RANGE = 20.0  # from this ratio on, eigenvalues go on a logarithmic axis


def eigenvalues(
    frame: pd.DataFrame, ax: Axes | None = None, *, log: bool | None = None, level: float = LEVEL, legend: bool = True
) -> Axes:
    """Draw the leading eigenvalues of every optimizer, side by side for each index, by each method.

    Parameters
    ----------
    frame
        Tidy table with the columns ``optimizer``, ``seed``, ``index`` (1 for the largest), ``value`` and, where two
        methods were used, ``method``. The first method drawn (``lanczos`` where there is one) has filled markers
        with the interval, any other an open ring around them: a ring that is not centred is a disagreement.
    ax
        Axes to draw on; by default new ones, 3.3 in wide.
    log
        Logarithmic axis; by default where all means are positive and the largest is at least 20 times the smallest.
    level
        Confidence of the intervals, default 0.68; one seed has none.
    legend
        Whether optimizers and methods are named.

    Returns
    -------
    matplotlib.axes.Axes
        With the indices 1, 2, ... on the horizontal axis.

    Raises
    ------
    ValueError
        A column is missing, the table is empty, or a seed has two values for one index and method.

    Notes
    -----
    Becker et al., arXiv 2401.12033, table A1.
    """
    require_columns(frame, ["optimizer", "seed", "index", "value"])
    methods = list(dict.fromkeys(frame["method"])) if "method" in frame.columns else []
    methods.sort(key=lambda name: name != "lanczos")
    by = ["optimizer", "index", *(["method"] if methods else [])]
    table = summarise(frame, by, "value", level)
    looks = look(ordered(table["optimizer"]))
    with style():
        made = ax is None
        ax = one_panel(ax)
        spread = min(0.18, 0.7 / len(looks))
        for position, (optimizer, appearance) in enumerate(looks.items()):
            shift = (position - (len(looks) - 1) / 2) * spread
            part = table[table["optimizer"] == optimizer]
            for rank, method in enumerate(methods or [None]):
                points = part if method is None else part[part["method"] == method]
                _points(ax, points, "index", "value", shift, appearance, ring=rank)
        means = table["value"].to_numpy(dtype=np.float64)
        finite = means[np.isfinite(means)]
        if log is None:
            log = bool(finite.size) and finite.min() > 0 and finite.max() / finite.min() >= _LARGE_RANGE
        if log:
            log_scale(ax, [means])
        indices = sorted(set(table["index"]))
        ax.set_xlim(indices[0] - 0.5, indices[-1] + 0.5)
        ax.grid(visible=False, axis="x")
        ax.set_xticks(indices, [f"$\\lambda_{{{index}}}$" for index in indices])
        ax.set_ylabel("eigenvalue of the Hessian")
        if legend:
            handles = {
                name: Line2D([], [], color=item.color, marker=item.marker, linestyle="none")
                for name, item in looks.items()
            }
            if len(methods) > 1:
                handles |= {str(method): _ring_handle(rank) for rank, method in enumerate(methods)}
            name_curves(np.array([ax], dtype=np.object_), made=made, handles=handles)
    return ax


def _ring_handle(rank: int) -> Line2D:
    if rank == 0:
        return Line2D([], [], color="#4d4d4d", marker="o", markersize=3, linestyle="none")
    return Line2D(
        [], [], color="#4d4d4d", marker="o", markersize=6.5 + 2 * rank, fillstyle="none", linestyle="none",
        markeredgewidth=0.8,
    )  # fmt: skip


def _points(ax: Axes, points: pd.DataFrame, x: str, y: str, shift: float, appearance: Look, *, ring: int = 0) -> None:
    """Draw means as markers with bars (``ring`` 0) or as open rings around them."""
    at = points[x].to_numpy(dtype=np.float64) + shift
    mean = points[y].to_numpy(dtype=np.float64)
    half_width = points[f"{y}_half_width"].to_numpy(dtype=np.float64)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    if ring:
        ax.plot(
            at, mean, linestyle="none", marker="o", markersize=6.5 + 2 * ring, fillstyle="none",
            markeredgewidth=0.8, color=appearance.color,
        )  # fmt: skip
        return
    if np.isfinite(half_width).any():
        ax.errorbar(at, mean, half_width, fmt="none", ecolor=appearance.color, elinewidth=1.0, capsize=2, capthick=1.0)
    ax.plot(at, mean, linestyle="none", marker=appearance.marker, markersize=3.2, color=appearance.color)


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

    Parameters
    ----------
    frame
        Tidy table with the columns ``optimizer``, ``seed``, ``rho`` and the one named by ``value``.
    ax
        Axes to draw on; by default new ones, 3.3 in wide.
    value
        Column drawn, default ``sharpness``; ``one_step`` for what a single ascent step finds.
    log
        Both axes logarithmic (default); means that are not positive are then holes.
    level
        Confidence of the bands, default 0.68; there is no band for one seed.
    label
        Label of the vertical axis, instead of the definition of the sharpness.
    legend
        Whether the curves are named.

    Returns
    -------
    matplotlib.axes.Axes
        With the radius on the horizontal axis.

    Raises
    ------
    ValueError
        A column is missing, the table is empty, or a seed has two values for one radius.

    Notes
    -----
    ``max_{‖e‖ ≤ ρ} L(w + e) − L(w)``, Foret et al., arXiv 2010.01412, equation 1.
    """
    require_columns(frame, ["optimizer", "seed", "rho", value])
    table = summarise(frame, ["optimizer", "rho"], value, level)
    with style():
        made = ax is None
        ax = one_panel(ax)
        means = []
        for optimizer, appearance in look(ordered(table["optimizer"])).items():
            radius, mean, half_width = curve_of(table, optimizer, "rho", value, positive=log)
            means.append(mean)
            draw_curve(ax, radius, mean, half_width, appearance, None)
            ax.plot(radius, mean, linestyle="none", marker=appearance.marker, markersize=3.2, color=appearance.color)
            ax.plot([], [], **_line(appearance), label=optimizer)
        if log:
            ax.set_xscale("log")
            log_ticks(ax.xaxis, *sorted(ax.get_xlim()))
            log_scale(ax, means)
        ax.set_xlabel(r"radius $\rho$ of the ball")
        ax.set_ylabel(label or r"$\max_{\|e\| \leq \rho}\ L(w + e) - L(w)$")
        if legend:
            name_curves(np.array([ax], dtype=np.object_), made=made)
    return ax


def _line(appearance: Look) -> dict[str, Any]:
    return {
        "color": appearance.color,
        "linestyle": appearance.linestyle,
        "marker": appearance.marker,
        "markersize": 3.2,
    }


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

    Parameters
    ----------
    frame
        Tidy table with the columns ``optimizer``, ``seed`` and the two accuracies, fractions between 0 and 1; one
        row per run.
    ax
        Axes to draw on; by default new ones, 3.3 in wide.
    train, test
        Names of the two columns.
    level
        Confidence of the intervals, default 0.68; one seed has none.
    legend
        Whether the markers are named.

    Returns
    -------
    matplotlib.axes.Axes
        One row per optimizer, the first at the top: test above, filled; train below, open.

    Raises
    ------
    ValueError
        A column is missing, the table is empty, a seed has two rows, or a value is not a fraction.

    Notes
    -----
    Becker et al., arXiv 2401.12033, table 1 and figure 2 A and B.
    """
    require_columns(frame, ["optimizer", "seed", train, test])
    values = frame[[train, test]].to_numpy(dtype=np.float64)
    outside = values[np.isfinite(values) & ((values < 0) | (values > 1))]
    if outside.size:
        raise ValueError(f"accuracies must be fractions between 0 and 1, got {outside[0]:g}")
    table = summarise(frame, "optimizer", [train, test], level)
    names = ordered(table["optimizer"])
    with style():
        made = ax is None
        ax = one_panel(ax, height=0.75 + 0.36 * len(names))
        for row, (optimizer, appearance) in enumerate(look(names).items()):
            part = table[table["optimizer"] == optimizer].iloc[0]
            runs = frame[frame["optimizer"] == optimizer]
            for column, shift, filled in ((test, -0.14, True), (train, 0.14, False)):
                at, mean, half_width = row + shift, float(part[column]), float(part[f"{column}_half_width"])
                seeds = runs[column].to_numpy(dtype=np.float64)
                if len(seeds) > 1:
                    ax.plot(
                        seeds, np.full(len(seeds), at), linestyle="none", marker="o", markersize=2.6,
                        markeredgewidth=0, color=appearance.color, alpha=0.35, zorder=2,
                    )  # fmt: skip
                if np.isfinite(half_width):
                    ax.errorbar(
                        mean, at, xerr=half_width, fmt="none", ecolor=appearance.color, elinewidth=1.1, capsize=2
                    )
                ax.plot(
                    mean, at, linestyle="none", marker=appearance.marker, markersize=4.2, color=appearance.color,
                    markerfacecolor=appearance.color if filled else "white", zorder=3,
                )  # fmt: skip
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0, labelsize=8)
        ax.margins(x=0.06)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
        ax.set_xlabel("accuracy (%)")
        if legend:
            grey: dict[str, Any] = {"color": "#4d4d4d", "marker": "o", "linestyle": "none", "markersize": 4.2}
            handles = {"test": Line2D([], [], **grey), "train": Line2D([], [], **grey, markerfacecolor="white")}
            name_curves(np.array([ax], dtype=np.object_), made=made, handles=handles)
    return ax
