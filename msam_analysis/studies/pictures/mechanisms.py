"""Why it works: one step of every optimizer, the loss along momentum, the angle to SAM, and quantities by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msam_analysis.plots.drawing import GREY, draw_curve, name_curves, one_panel, points, several_panels, zero_line
from msam_analysis.plots.look import AxesArray, Places, look, ordered, require_columns, style
from msam_analysis.results.statistics import LEVEL, summarise
from msam_analysis.studies.pictures.means import mean_curves

_ZERO: dict[str, Any] = {"color": GREY, "linewidth": 0.7, "zorder": 1.5}
_LIGHT = "#8c8c8c"
_BEST: dict[str, Any] = {"color": _LIGHT, "linestyle": (0, (3, 2)), "zorder": 1.5}
_DOTTED = (0, (1.5, 1.2))
_POINTS = ("from", "at", "gradient_at", "to")  # of a step


def one_step(steps: pd.DataFrame, surface: pd.DataFrame, axes: Places = None) -> AxesArray:
    """Draw one step of every optimizer from one state on a loss of two weights: where the gradient is taken (F1).

    Becker et al., arXiv 2401.12033, figure 1.

    Parameters
    ----------
    steps
        One row per optimizer, without seeds: ``optimizer``; ``from_x`` and ``from_y``, where the step before began;
        ``at_x`` and so on, where this one does; ``gradient_at_x`` and so on, where the gradient is taken; ``to_x`` and
        so on, where the step ends.
    surface
        ``x``, ``y`` and ``loss`` on a grid.
    axes
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    """
    require_columns(steps, ["optimizer", *(f"{point}_{xy}" for point in _POINTS for xy in "xy")])
    require_columns(surface, ["x", "y", "loss"])
    looks = look(ordered(steps["optimizer"]))
    drawn = several_panels(axes, len(looks), panel_height=2.0, share_x=True, share_y=True)
    grid = surface.pivot_table(index="y", columns="x", values="loss")
    levels = np.unique(np.quantile(grid.to_numpy(), np.linspace(0.02, 0.9, 11)))
    lines: dict[str, Any] = {"levels": levels, "colors": "#c8c8c8", "linewidths": 0.6, "zorder": 1}
    with style():
        for ax, (optimizer, appearance) in zip(drawn, looks.items(), strict=True):
            row = steps[steps["optimizer"] == optimizer].iloc[0]
            at = {point: (float(row[f"{point}_x"]), float(row[f"{point}_y"])) for point in _POINTS}
            ax.contour(grid.columns, grid.index, grid.to_numpy(), **lines)
            _arrow(ax, at["from"], at["at"], _LIGHT)
            if at["gradient_at"] != at["at"]:
                ends = np.transpose([at["at"], at["gradient_at"]])
                ax.plot(*ends, color=appearance.color, linestyle=_DOTTED, zorder=3)
            _arrow(ax, at["at"], at["to"], appearance.color)
            ax.plot(*at["at"], marker="o", color="black", markersize=4, zorder=4)
            star: dict[str, Any] = {"marker": "*", "markersize": 8, "markeredgecolor": "white", "zorder": 5}
            ax.plot(*at["gradient_at"], color=appearance.color, **star)
            ax.set_title(optimizer)
            ax.set_xlabel("$w_1$")
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.set_xlim(grid.columns.min(), grid.columns.max())
            ax.set_ylim(grid.index.min(), grid.index.max())
        drawn[0].set_ylabel("$w_2$")
        handles = {
            "last step": Line2D([], [], color=_LIGHT),
            "weights": Line2D([], [], color="black", marker="o", linestyle="none", markersize=4),
            "perturbation": Line2D([], [], color="black", linestyle=_DOTTED),
            "gradient taken here": Line2D([], [], color="black", marker="*", linestyle="none", markersize=8),
            "step": Line2D([], [], color="black"),
        }
        name_curves(drawn if axes is None else drawn[:1], made=axes is None, handles=handles)
    return drawn


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    shape = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2, "mutation_scale": 7}
    ax.annotate("", end, start, arrowprops={"color": color, **shape}, zorder=3)


def along_momentum(frame: pd.DataFrame, ax: Axes | None = None, *, level: float = LEVEL) -> Axes:
    """Draw the change of the next batch's loss along the momentum, for every optimizer (A2).

    Becker et al., arXiv 2401.12033, figure A2.

    Parameters
    ----------
    frame
        Table with the columns ``offset`` (distance along the unit momentum) and ``change`` of the loss.
    ax, level
        See :mod:`msam_analysis.studies.pictures`, also for the errors.

    Returns
    -------
    matplotlib.axes.Axes
        Symmetric logarithmic in the offset, so that small and large ones are both seen.
    """
    require_columns(frame, ["optimizer", "seed", "offset", "change"])
    table = summarise(frame, ["optimizer", "offset"], "change", level)
    with one_panel(ax) as panel:
        for curve in mean_curves(table, "offset", "change"):
            draw_curve(panel, curve.x, curve.mean, curve.half_width, curve.look, curve.optimizer)
        panel.set_xscale("symlog", linthresh=0.1)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        smallest = float(table["change"].abs()[table["change"] != 0].min()) if (table["change"] != 0).any() else 1.0
        panel.set_yscale("symlog", linthresh=max(smallest, 1e-3))
        zero_line(panel)
        panel.axvline(0.0, **_ZERO)
        panel.set_xlabel(r"$a$ (the last step went towards negative $a$)")
        panel.set_ylabel(r"$L(w + a\,v/\Vert v\Vert) - L(w)$ (nats)")
    return panel


def zero_angle(
    angles: pd.DataFrame, roots: pd.DataFrame, best: float, axes: Places = None, *, level: float = LEVEL
) -> AxesArray:
    """Draw the angle of MSAM's gradient to SAM's against ρ, and where it is 0 over training (F3).

    Becker et al., arXiv 2401.12033, figure 3.

    Parameters
    ----------
    angles
        Table with the columns ``rho`` and ``angle`` (degrees).
    roots
        Table with the columns ``epoch`` and ``rho_0``, NaN where there is no root. Every row is a point.
    best
        MSAM's best ρ, drawn as a line.
    axes, level
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    """
    require_columns(angles, ["optimizer", "seed", "rho", "angle"])
    require_columns(roots, ["optimizer", "seed", "epoch", "rho_0"])
    looks = look(ordered([*angles["optimizer"], *roots["optimizer"]]))
    table = summarise(angles, ["optimizer", "rho"], "angle", level)
    drawn = several_panels(axes, 2, panel_height=2.2)
    with style():
        for curve in mean_curves(table, "rho", "angle", looks=looks):
            draw_curve(drawn[0], curve.x, curve.mean, curve.half_width, curve.look, curve.optimizer)
            # With the markers of the other panel, which have no name of their own.
            drawn[0].lines[-1].set(marker=curve.look.marker, markersize=3.2)
            found = roots[(roots["optimizer"] == curve.optimizer) & np.isfinite(roots["rho_0"])]
            drawn[1].plot(found["epoch"], found["rho_0"], **points(curve.look, 3.2, alpha=0.7))
        zero_line(drawn[0])
        drawn[0].axvline(best, **_BEST)
        drawn[1].axhline(best, **_BEST, label=f"MSAM's ρ = {best:g}")
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
    axes: Places = None,
    *,
    log: Sequence[str] = (),
    zero_line: bool | None = None,
    level: float = LEVEL,
) -> AxesArray:
    """Draw quantities of every optimizer in groups, one below the other: points of the mean with their intervals.

    Parameters
    ----------
    frame
        Table with the column named by ``group``, and the quantities. Holes are left out.
    quantities
        Column to the label of its panel.
    group
        Column whose values, in order of appearance, are the rows.
    axes, level
        See :mod:`msam_analysis.studies.pictures`, also for the errors.
    log
        Quantities on a logarithmic axis.
    zero_line
        Draw a line at zero; by default where means have both signs.
    """
    require_columns(frame, ["optimizer", "seed", group, *quantities])
    rows = list(dict.fromkeys(frame[group]))
    looks = look(ordered(frame["optimizer"]))
    height = max(1.5, 0.55 + len(rows) * (0.12 + 0.09 * len(looks)))
    drawn = several_panels(axes, len(quantities), panel_height=height, share_y=True)
    with style():
        for ax, (quantity, label) in zip(drawn, quantities.items(), strict=True):
            table = summarise(frame.dropna(subset=[quantity]), ["optimizer", group], quantity, level)
            for rank, (optimizer, appearance) in enumerate(looks.items()):
                part = table[table["optimizer"] == optimizer]
                shift = 0.56 * ((rank + 0.5) / len(looks) - 0.5)
                mean, half = part[[quantity, f"{quantity}_half_width"]].to_numpy(dtype=np.float64).T
                at = np.array([rows.index(value) for value in part[group]], dtype=np.float64) + shift
                bar = np.where(np.isfinite(half), half, 0.0)
                ax.errorbar(mean, at, xerr=bar, **points(appearance, 3.8), elinewidth=1.1, label=optimizer)
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
