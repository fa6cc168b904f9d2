"""Why it works: one step of every optimizer, the loss along momentum, the angle to SAM, and quantities by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msam_analysis.plots.look import (
    AxesArray,
    curve_of,
    draw_curve,
    given_axes,
    look,
    name_curves,
    one_panel,
    ordered,
    panels,
    require_columns,
    style,
)
from msam_analysis.results.statistics import LEVEL, summarise

_ZERO: dict[str, Any] = {"color": "#4d4d4d", "linewidth": 0.7, "zorder": 1.5}
_GREY = "#8c8c8c"


def one_step(steps: pd.DataFrame, surface: pd.DataFrame, axes: Sequence[Axes] | AxesArray | None = None) -> AxesArray:
    """Draw one step of every optimizer from one state on a loss of two weights: where the gradient is taken (F1).

    Parameters
    ----------
    steps
        One row per optimizer: ``optimizer``; and ``from_x``, ``from_y``, where the step before began, ``at_x``,
        ``at_y``, where this one does, ``gradient_at_x`` and so on, where the gradient is taken, and ``to_x`` and so on,
        where the step ends.
    surface
        ``x``, ``y`` and ``loss`` on a grid.
    axes
        One axes per optimizer; by default a new figure, 6.8 in wide.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(optimizers,)``.

    Raises
    ------
    ValueError
        A column is missing, a table is empty, or there are too few axes.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure 1.
    """
    points = ("from", "at", "gradient_at", "to")
    require_columns(steps, ["optimizer", *(f"{point}_{xy}" for point in points for xy in "xy")])
    require_columns(surface, ["x", "y", "loss"])
    looks = look(ordered(steps["optimizer"]))
    drawn = (
        panels(len(looks), panel_height=2.0, share_x=True, share_y=True)[1]
        if axes is None
        else given_axes(axes, len(looks))
    )
    grid = surface.pivot_table(index="y", columns="x", values="loss")
    with style():
        for ax, (optimizer, appearance) in zip(drawn, looks.items(), strict=True):
            row = steps[steps["optimizer"] == optimizer].iloc[0]
            at = {point: (float(row[f"{point}_x"]), float(row[f"{point}_y"])) for point in points}
            levels = np.quantile(grid.to_numpy(), np.linspace(0.02, 0.9, 11))
            ax.contour(
                grid.columns, grid.index, grid.to_numpy(), np.unique(levels), colors="#c8c8c8", linewidths=0.6, zorder=1
            )
            _arrow(ax, at["from"], at["at"], _GREY)
            if at["gradient_at"] != at["at"]:
                ends = np.transpose([at["at"], at["gradient_at"]])
                ax.plot(*ends, color=appearance.color, linestyle=(0, (1.5, 1.2)), zorder=3)
            _arrow(ax, at["at"], at["to"], appearance.color)
            ax.plot(*at["at"], marker="o", color="black", markersize=4, zorder=4)
            face = appearance.color
            ax.plot(*at["gradient_at"], marker="*", color=face, markersize=8, markeredgecolor="white", zorder=5)
            ax.set_title(optimizer)
            ax.set_xlabel("$w_1$")
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.set_xlim(grid.columns.min(), grid.columns.max())
            ax.set_ylim(grid.index.min(), grid.index.max())
        drawn[0].set_ylabel("$w_2$")
        black: dict[str, Any] = {"color": "black"}
        handles = {
            "last step": Line2D([], [], color=_GREY),
            "weights": Line2D([], [], **black, marker="o", linestyle="none", markersize=4),
            "perturbation": Line2D([], [], **black, linestyle=(0, (1.5, 1.2))),
            "gradient taken here": Line2D([], [], **black, marker="*", linestyle="none", markersize=8),
            "step": Line2D([], [], **black),
        }
        name_curves(drawn if axes is None else drawn[:1], made=axes is None, handles=handles)
    return drawn


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    shape = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2, "mutation_scale": 7}
    ax.annotate("", end, start, arrowprops={"color": color, **shape}, zorder=3)


def along_momentum(frame: pd.DataFrame, ax: Axes | None = None, *, level: float = LEVEL) -> Axes:
    """Draw the change of the next batch's loss along the momentum, for every optimizer (A2).

    Parameters
    ----------
    frame
        ``optimizer``, ``seed``, ``offset`` (distance along the unit momentum) and ``change`` of the loss; one row per
        optimizer, seed and offset.
    ax
        Axes to draw on; by default a new figure.
    level
        Confidence of the bands, default 0.68.

    Returns
    -------
    matplotlib.axes.Axes
        Symmetric logarithmic in the offset, so that small and large ones are both seen.

    Raises
    ------
    ValueError
        A column is missing, or the table is empty.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure A2.
    """
    require_columns(frame, ["optimizer", "seed", "offset", "change"])
    table = summarise(frame, ["optimizer", "offset"], "change", level)
    made = ax is None
    with style():
        ax = one_panel(ax)
        for optimizer, appearance in look(ordered(table["optimizer"])).items():
            draw_curve(ax, *curve_of(table, optimizer, "offset", "change"), appearance, optimizer)
        ax.set_xscale("symlog", linthresh=0.1)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        smallest = float(table["change"].abs()[table["change"] != 0].min()) if (table["change"] != 0).any() else 1.0
        ax.set_yscale("symlog", linthresh=max(smallest, 1e-3))
        ax.axhline(0.0, **_ZERO)
        ax.axvline(0.0, **_ZERO)
        ax.set_xlabel(r"$a$ (the last step went towards negative $a$)")
        ax.set_ylabel(r"$L(w + a\,v/\Vert v\Vert) - L(w)$ (nats)")
        name_curves(np.array([ax], dtype=np.object_), made=made)
    return ax


def zero_angle(
    angles: pd.DataFrame,
    roots: pd.DataFrame,
    best: float,
    axes: Sequence[Axes] | AxesArray | None = None,
    *,
    level: float = LEVEL,
) -> AxesArray:
    """Draw the angle of MSAM's gradient to SAM's against ρ, and where it is 0 over training (F3).

    Parameters
    ----------
    angles
        ``optimizer``, ``seed``, ``rho`` and ``angle`` (degrees); one row per optimizer, seed and ρ.
    roots
        ``optimizer``, ``seed``, ``epoch`` and ``rho_0``; one row per optimizer, seed and epoch, each of which is a
        point; NaN where there is no root.
    best
        MSAM's best ρ, drawn as a line.
    axes
        Two axes; by default a new figure, 6.8 in wide.
    level
        Confidence of the bands of the angles, default 0.68.

    Returns
    -------
    numpy.ndarray
        The two axes.

    Raises
    ------
    ValueError
        A column is missing, a table is empty, or there are too few axes.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure 3.
    """
    require_columns(angles, ["optimizer", "seed", "rho", "angle"])
    require_columns(roots, ["optimizer", "seed", "epoch", "rho_0"])
    drawn = panels(2, panel_height=2.2)[1] if axes is None else given_axes(axes, 2)
    with style():
        looks = look(ordered([*angles["optimizer"], *roots["optimizer"]]))
        table = summarise(angles, ["optimizer", "rho"], "angle", level)
        for optimizer, appearance in looks.items():
            draw_curve(drawn[0], *curve_of(table, optimizer, "rho", "angle"), appearance, optimizer)
            # With the markers of the other panel, which have no name of their own.
            drawn[0].lines[-1].set(marker=appearance.marker, markersize=3.2)
            found = roots[(roots["optimizer"] == optimizer) & np.isfinite(roots["rho_0"])]
            points: dict[str, Any] = {"marker": appearance.marker, "color": appearance.color, "alpha": 0.7}
            drawn[1].plot(found["epoch"], found["rho_0"], linestyle="none", markersize=3.2, **points)
        drawn[0].axhline(0.0, **_ZERO)
        drawn[0].axvline(best, color=_GREY, linestyle=(0, (3, 2)), zorder=1.5)
        drawn[1].axhline(best, color=_GREY, linestyle=(0, (3, 2)), zorder=1.5, label=f"MSAM's ρ = {best:g}")
        drawn[0].set_xlabel("ρ of MSAM's perturbation")
        drawn[0].set_ylabel("angle to SAM's gradient (°)")
        drawn[1].set_xlabel("epoch")
        drawn[1].set_ylabel(r"$\rho_0$, where the angle is 0")
        drawn[1].set_ylim(bottom=0.0)
        drawn[1].set_xlim(roots["epoch"].min() - 0.5, roots["epoch"].max() + 0.5)
        drawn[1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        name_curves(drawn, made=axes is None)
    return drawn


def by_group(
    frame: pd.DataFrame,
    quantities: Mapping[str, str],
    group: str,
    axes: Sequence[Axes] | AxesArray | None = None,
    *,
    log: Sequence[str] = (),
    zero_line: bool | None = None,
    level: float = LEVEL,
) -> AxesArray:
    """Draw quantities of every optimizer in groups, one below the other: points of the mean with their intervals.

    Parameters
    ----------
    frame
        ``optimizer``, ``seed``, the column named by ``group``, and the quantities; one row per optimizer, seed and
        group. Holes are left out.
    quantities
        Column to the label of its panel.
    group
        Column whose values, in order of appearance, are the rows.
    axes
        One axes per quantity; by default a new figure.
    log
        Quantities on a logarithmic axis.
    zero_line
        Draw a line at zero; by default where means have both signs.
    level
        Confidence of the bars, default 0.68.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(quantities,)``.

    Raises
    ------
    ValueError
        A column is missing, the table is empty, or there are too few axes.
    """
    require_columns(frame, ["optimizer", "seed", group, *quantities])
    rows = list(dict.fromkeys(frame[group]))
    looks = look(ordered(frame["optimizer"]))
    if axes is None:
        height = max(1.5, 0.55 + len(rows) * (0.12 + 0.09 * len(looks)))
        drawn = panels(len(quantities), panel_height=height, share_y=True)[1]
    else:
        drawn = given_axes(axes, len(quantities))
    with style():
        for ax, (quantity, label) in zip(drawn, quantities.items(), strict=True):
            table = summarise(frame.dropna(subset=[quantity]), ["optimizer", group], quantity, level)
            for rank, (optimizer, appearance) in enumerate(looks.items()):
                part = table[table["optimizer"] == optimizer]
                shift = 0.56 * ((rank + 0.5) / len(looks) - 0.5)
                mean = part[quantity].to_numpy(dtype=np.float64)
                half = part[f"{quantity}_half_width"].to_numpy(dtype=np.float64)
                at = np.array([rows.index(value) for value in part[group]], dtype=np.float64) + shift
                xerr = np.where(np.isfinite(half), half, 0.0)
                points: dict[str, Any] = {"marker": appearance.marker, "markersize": 3.8, "color": appearance.color}
                ax.errorbar(mean, at, xerr=xerr, linestyle="none", elinewidth=1.1, label=optimizer, **points)
            means = table[quantity].to_numpy(dtype=np.float64)
            if quantity in log:
                ax.set_xscale("log")
            elif zero_line or (zero_line is None and means.size and means.min() < 0 < means.max()):
                ax.axvline(0.0, **_ZERO)
            ax.margins(x=0.08)
            for line in np.arange(len(rows) - 1) + 0.5:
                ax.axhline(line, color="#e6e6e6", linewidth=0.6, zorder=0.5)
            ax.set_yticks(range(len(rows)), labels=[str(row) for row in rows])
            ax.set_ylim(len(rows) - 0.5, -0.5)
            ax.set_xlabel(label)
        name_curves(drawn, made=axes is None)
    return drawn
