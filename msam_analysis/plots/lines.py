"""The loss on lines: curves with bands over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from msam_analysis.plots.drawing import draw_banded, log_scale, name_curves, one_panel, several_panels
from msam_analysis.plots.look import Array, AxesArray, Places, literal, look, size_of, style, wrapped
from msam_analysis.plots.scale import ROUND_STEPS, as_array, shown
from msam_analysis.results import Slice1D
from msam_analysis.results.statistics import LEVEL, bands, quantile_bands

Curves = Slice1D | Sequence[Slice1D] | Mapping[str, Slice1D | Sequence[Slice1D]]


def slice_1d(
    result: Curves,
    ax: Axes | None = None,
    *,
    values: str = "loss",
    relative: bool = False,
    log: bool = False,
    x: str = "coordinate",
    summary: Literal["mean", "median"] = "mean",
    level: float = LEVEL,
    label: str | None = None,
    legend: bool = True,
) -> Axes:
    """Draw the loss along a line, one curve per optimizer, with a band over seeds.

    Becker et al., arXiv 2401.12033, figure 4, with ``relative=True``.

    Parameters
    ----------
    result
        One slice, the slices of several seeds, or a mapping from a name (an optimizer) to either. The slices under one
        name must share their coordinates.
    ax, legend
        See :mod:`msam_analysis.plots`, also for the errors.
    values
        What is drawn: ``"loss"`` (default), or one of the slices' ``metrics`` by its name.
    relative
        Draw ``loss − center_loss``, each seed less its own centre, which is the sharpness along the line.
    log
        Logarithmic loss axis; values that are not positive are then holes.
    x
        ``"coordinate"`` for multiples of the direction (default) or ``"distance"`` for L2 distances in weight space.
    summary
        What stands for several seeds: ``"mean"`` with its Student-t interval (default, as in the paper), or
        ``"median"`` with the range of the middle seeds, which one diverged seed does not move.
    level
        Confidence of the interval, or part of the seeds in the range; default 0.68. One seed has a band only if its
        slice has a standard error: the interval for the loss on all data.
    label
        Label of the loss axis, instead of the one made from ``relative``.

    Returns
    -------
    matplotlib.axes.Axes
        With one line per name, in the order given. A point that is NaN or infinite for any seed is a hole in the mean.

    Raises
    ------
    ValueError
        An unknown ``values``, ``x`` or ``summary``, or seeds under one name whose coordinates differ.
    """
    if x not in ("coordinate", "distance"):
        raise ValueError(f"x must be 'coordinate' or 'distance', got {x!r}")
    if summary not in ("mean", "median"):
        raise ValueError(f"summary must be 'mean' or 'median', got {summary!r}")
    curves = {name: [shown(item, values) for item in slices] for name, slices in _curves(result).items()}
    means = []
    with one_panel(ax, legend=legend) as panel:
        for name, appearance in look(curves).items():
            line, losses = _seeds(name, curves[name], relative=relative, distance=x == "distance")
            middle, low, high = _band(curves[name], losses, summary, level, relative=relative)
            if log:
                middle = np.where(middle > 0, middle, np.nan)
            means.append(middle)
            draw_banded(panel, line, middle, (low, high), appearance, name or None)
        if log:
            log_scale(panel, means)
        directions = {slice_.direction for slices in curves.values() for slice_ in slices}
        where = f" along {literal(directions.pop())}" if len(directions) == 1 else ""
        panel.set_xlabel(wrapped(f"{'displacement' if x == 'coordinate' else 'distance'}{where}", size_of(panel)[0]))
        what = literal(values)
        panel.set_ylabel(label or (f"{what} − {what} at centre" if relative else what))
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    return panel


def slice_1d_panels(
    results: Mapping[str, Curves],
    axes: Places = None,
    *,
    values: str = "loss",
    relative: bool = True,
    log: bool = False,
    x: str = "coordinate",
    summary: Literal["mean", "median"] = "mean",
    level: float = LEVEL,
    share_y: bool = True,
) -> AxesArray:
    """Draw slices along several directions side by side, with one legend.

    Becker et al., arXiv 2401.12033, figure 4 A to C.

    Parameters
    ----------
    results
        Title of a panel (``"gradient"``, ``"momentum"``, ``"random"``) to what :func:`slice_1d` draws.
    axes
        See :mod:`msam_analysis.plots`.
    share_y
        One loss axis for all panels of a new figure (default), or one each where the rises differ too much.
    values, relative, log, x, summary, level
        As in :func:`slice_1d`, also for the errors, except that ``relative`` is on by default.
    """
    made = axes is None
    drawn = several_panels(axes, len(results), share_y=share_y)
    options: Any = {"values": values, "relative": relative, "log": log, "x": x, "summary": summary, "level": level}
    with style():
        for ax, (title, result) in zip(drawn, results.items(), strict=True):
            slice_1d(result, ax, legend=not made, **options)
            ax.set_title(literal(title))
            ax.set_xlabel("displacement" if x == "coordinate" else "distance")
            if made and ax is not drawn[0]:
                ax.set_ylabel("")
        if made:
            name_curves(drawn, made=True)
    return drawn


def _band(
    slices: Sequence[Slice1D], losses: Array, summary: str, level: float, *, relative: bool
) -> tuple[Array, Array, Array]:
    """Return the curve and the ends of its band."""
    (first, *others) = slices
    if not others and first.standard_error is not None:
        if relative:  # the rise has an error of its own, from the same samples
            first = dataclasses.replace(first, loss=first.loss - first.center_loss, standard_error=first.rise_error)
        low, high = first.interval(level)
        return losses[0], as_array(low), as_array(high)
    if summary == "median":
        return quantile_bands(losses, level)
    mean, half_width = bands(losses, level)
    return mean, mean - half_width, mean + half_width


def _curves(result: Curves) -> dict[str, list[Slice1D]]:
    several = result if isinstance(result, Mapping) else {"": result}
    named = {literal(str(name)): item for name, item in several.items()}
    curves = {name: list(item) if isinstance(item, Iterable) else [item] for name, item in named.items()}
    if not curves or not all(curves.values()):
        raise ValueError("expected at least one slice under every name, got none")
    for name, slices in curves.items():
        for item in slices:
            if not isinstance(item, Slice1D):
                raise TypeError(f"expected Slice1D results, got {type(item).__name__} under {name!r}")
    return curves


def _seeds(name: str, slices: list[Slice1D], *, relative: bool, distance: bool) -> tuple[Array, Array]:
    """Return the common grid, shape ``(points,)``, and the losses, shape ``(seeds, points)``."""
    grids = [as_array(item.coordinates) * (item.direction_norm if distance else 1.0) for item in slices]
    for grid in grids[1:]:
        if grid.shape != grids[0].shape or not np.allclose(grid, grids[0], rtol=1e-6, atol=0):
            raise ValueError(
                f"the slices under {name!r} have different {'distances' if distance else 'coordinates'}; "
                "measure them on one grid, or draw every seed under its own name"
            )
    losses = np.stack([as_array(item.loss) - (item.center_loss if relative else 0.0) for item in slices])
    return grids[0], losses
