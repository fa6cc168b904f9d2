"""Slices of the loss: curves with bands over seeds, filled contours on one scale, surfaces."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]
from torch import Tensor

from msam_analysis.plots.look import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    Array,
    AxesArray,
    draw_banded,
    given_axes,
    log_scale,
    look,
    name_curves,
    one_panel,
    panels,
    style,
)
from msam_analysis.results import Slice1D, Slice2D
from msam_analysis.results.slices import LARGE_RANGE
from msam_analysis.results.statistics import LEVEL, bands, quantile_bands

Slice = TypeVar("Slice", Slice1D, Slice2D)
Curves = Slice1D | Sequence[Slice1D] | Mapping[str, Slice1D | Sequence[Slice1D]]

_COLORMAP = "viridis"
_CHARACTERS_PER_INCH = 18  # of a label of 8 points
_FEWEST_LINES = 3  # labelled levels in a panel, where it has a range at all
_ROUND = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
_DECADES = 6.0  # where the losses span more, a logarithmic scale may end before the largest tenth of them


def as_array(values: Tensor) -> Array:
    """Return a tensor in float64 for drawing."""
    return values.detach().cpu().double().numpy()


def shown(item: Slice, values: str) -> Slice:
    """Return a slice with one of its metrics in the place of the loss, and at its centre, NaN where 0 is off the grid.

    Raises
    ------
    ValueError
        It has no such metric, or one with several numbers at a point.
    """
    if values == "loss":
        return item
    if values not in item.metrics:
        known = ", ".join(map(repr, ("loss", *item.metrics)))
        raise ValueError(f"values must be one of {known}, got {values!r}: measure it with metrics= first")
    metric = item.metrics[values]
    if metric.shape != item.loss.shape:
        raise ValueError(
            f"{values!r} has {tuple(metric.shape[item.loss.ndim :])} numbers at every point and one can be drawn: "
            "reduce it first, e.g. to its mean"
        )
    grids = (item.coordinates,) if isinstance(item, Slice1D) else (item.x, item.y)
    centre = [(grid == 0).nonzero().flatten().tolist() for grid in grids]
    at_centre = float(metric[tuple(place[0] for place in centre)]) if all(centre) else float("nan")
    return dataclasses.replace(item, loss=metric, center_loss=at_centre, standard_error=None, rise_error=None)


# ---------------------------------------------------------------------------------------------------- one dimension


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

    Parameters
    ----------
    result
        One slice, the slices of several seeds, or a mapping from a name (an optimizer) to either. The slices under one
        name must share their coordinates.
    ax
        Where to draw; by default new axes, 3.3 in wide.
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
    legend
        Whether to name the curves.

    Returns
    -------
    matplotlib.axes.Axes
        With one line per name, in the order given. A point that is NaN or infinite for any seed is a hole in the mean.

    Raises
    ------
    ValueError
        Nothing to draw, an unknown ``values``, ``x`` or ``summary``, or seeds under one name whose coordinates differ.
    TypeError
        Something that is not a :class:`~msam_analysis.results.Slice1D`.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure 4, with ``relative=True``.
    """
    if x not in ("coordinate", "distance"):
        raise ValueError(f"x must be 'coordinate' or 'distance', got {x!r}")
    if summary not in ("mean", "median"):
        raise ValueError(f"summary must be 'mean' or 'median', got {summary!r}")
    curves = {name: [shown(item, values) for item in slices] for name, slices in _curves(result).items()}
    with style():
        made = ax is None
        ax = one_panel(ax)
        means = []
        for name, appearance in look(curves).items():
            line, losses = _seeds(name, curves[name], relative=relative, distance=x == "distance")
            middle, low, high = _band(curves[name], losses, summary, level, relative=relative)
            if log:
                middle = np.where(middle > 0, middle, np.nan)
            means.append(middle)
            draw_banded(ax, line, middle, (low, high), appearance, name or None)
        if log:
            log_scale(ax, means)
        directions = {slice_.direction for slices in curves.values() for slice_ in slices}
        where = f" along {directions.pop()}" if len(directions) == 1 else ""
        ax.set_xlabel(f"{'displacement' if x == 'coordinate' else 'distance'}{where}")
        ax.set_ylabel(label or (f"{values} − {values} at centre" if relative else values))
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if legend:
            name_curves(np.array([ax], dtype=np.object_), made=made)
    return ax


def slice_1d_panels(
    results: Mapping[str, Curves],
    axes: Sequence[Axes] | AxesArray | None = None,
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

    Parameters
    ----------
    results
        Title of a panel (``"gradient"``, ``"momentum"``, ``"random"``) to what :func:`slice_1d` draws.
    axes
        One axes per panel; by default a new figure, 6.8 in wide.
    share_y
        One loss axis for all panels of a new figure (default), or one each where the rises differ too much.
    values, relative, log, x, summary, level
        As in :func:`slice_1d`, except that ``relative`` is on by default.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(panels,)``.

    Raises
    ------
    ValueError
        As :func:`slice_1d`, or fewer axes than panels.
    TypeError
        As :func:`slice_1d`.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure 4 A to C.
    """
    made = axes is None
    drawn = panels(len(results), share_y=share_y)[1] if axes is None else given_axes(axes, len(results))
    with style():
        for ax, (title, result) in zip(drawn, results.items(), strict=True):
            slice_1d(
                result,
                ax,
                values=values,
                relative=relative,
                log=log,
                x=x,
                summary=summary,
                level=level,
                legend=not made,
            )
            ax.set_title(title)
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
    named = result if isinstance(result, Mapping) else {"": result}
    curves = {name: [item] if isinstance(item, Slice1D) else list(item) for name, item in named.items()}
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


# --------------------------------------------------------------------------------------------------- two dimensions


@dataclasses.dataclass(frozen=True)
class Scale:
    """One colour scale for all slices of a picture."""

    filled: Array  # boundaries of the filled levels
    lines: Array  # labelled levels, the ticks of the colour bar
    norm: Normalize
    extend: str
    log: bool

    @property
    def low(self) -> float:
        return float(self.filled[0])

    @property
    def high(self) -> float:
        return float(self.filled[-1])


def scale_of(losses: Sequence[Array], limits: tuple[float, float] | None, log: bool | None) -> Scale:
    values = np.concatenate([loss[np.isfinite(loss)] for loss in losses])
    if values.size == 0:
        raise ValueError("every loss is NaN or infinite, so there is nothing to draw")
    smallest, largest = float(values.min()), float(values.max())
    low, high = (smallest, largest) if limits is None else (float(limits[0]), float(limits[1]))
    if limits is not None and not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"limits must be two finite numbers, the lower first, got {limits!r}")
    if log is None:
        log = low > 0 and high / low >= LARGE_RANGE
    elif log and low <= 0:
        raise ValueError(f"a logarithmic scale needs positive losses, but it would start at {low:g}; pass limits")
    if log and limits is None and high / low > 10**_DECADES:
        high = max(low * 10**_DECADES, float(np.quantile(values, 0.9)))
    if high <= low:  # one value everywhere
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    exact = limits is not None
    lines, filled = _log_levels(low, high, exact) if log else _linear_levels(low, high, exact)
    lines = lines[(lines >= filled[0]) & (lines <= filled[-1])]
    below, above = smallest < filled[0] * (1 - 1e-12), largest > filled[-1] * (1 + 1e-12)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    norm: Normalize = (LogNorm if log else Normalize)(filled[0], filled[-1])
    return Scale(filled, lines, norm, extend, log)


def _log_levels(low: float, high: float, exact: bool) -> tuple[Array, Array]:
    """Return labelled levels, 1-2-5, 1-3 or 1 of every decade so that at most seven fit, and filled ones between."""
    decades = np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 2)
    choices = [(10.0 ** decades[:, None] * digits).ravel() for digits in ((1, 2, 5), (1, 3), (1,))]
    choices += [10.0 ** decades[::step] for step in (2, 5, 10, 50)]
    levels = next((item for item in choices if ((low < item) & (item < high)).sum() <= 7), choices[-1])
    grid = np.exp(np.interp(*_subdivision(levels, low, high), np.log(levels)))
    return levels, _enclosing(grid, low, high, exact)


def _lines_within(scale: Scale, low: float, high: float) -> Array:
    """Return the scale's labelled levels between two losses; finer ones where these are fewer than three.

    A flat minimum beside a sharp one would otherwise have no line at all.
    """
    between = scale.lines[(scale.lines > low) & (scale.lines < high)]
    if len(between) >= _FEWEST_LINES:
        return between
    wide = scale.log and high >= LARGE_RANGE * low
    finer = _log_levels(low, high, False)[0] if wide else np.asarray(_ROUND.tick_values(low, high), dtype=np.float64)
    finer = finer[(finer > max(low, scale.low)) & (finer < min(high, scale.high))]
    return finer if len(finer) > len(between) else between


def _linear_levels(low: float, high: float, exact: bool) -> tuple[Array, Array]:
    """Return about seven round labelled levels, and filled ones between."""
    levels = np.asarray(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high), dtype=np.float64)
    grid = np.interp(*_subdivision(levels, low, high), levels)
    return levels, _enclosing(grid, low, high, exact)


def _subdivision(levels: Array, low: float, high: float) -> tuple[Array, Array]:
    """Return positions that cut the steps between levels finely enough for some 24 steps from low to high."""
    inside = int(((low < levels) & (levels < high)).sum())
    cuts = int(np.clip(round(24 / (inside + 1)), 2, 8))
    steps = len(levels) - 1
    return np.linspace(0, steps, steps * cuts + 1), np.arange(steps + 1.0)


def _enclosing(grid: Array, low: float, high: float, exact: bool) -> Array:
    """Return the part of the grid from just below ``low`` to just above ``high``, or with those very ends."""
    if exact:
        return np.concatenate([[low], grid[(grid > low) & (grid < high)], [high]])
    first = int(np.searchsorted(grid, low, side="right")) - 1
    last = int(np.searchsorted(grid, high, side="left"))
    return grid[max(first, 0) : last + 1]


def number(value: float, _position: int | None = None) -> str:
    """Return a short number for a level: 0.02, 5, 300, or powers of ten beyond."""
    if value == 0 or 1e-3 <= abs(value) < 2e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    digits = mantissa.rstrip("0").rstrip(".")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if digits == "1" else f"${digits}\\cdot {power}$"


@overload
def slice_2d(
    result: Slice2D,
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    filled: bool = True,
    aspect: str = "equal",
    label: str | None = None,
) -> Axes: ...
@overload
def slice_2d(
    result: Mapping[str, Slice2D],
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    filled: bool = True,
    aspect: str = "equal",
    label: str | None = None,
) -> AxesArray: ...
def slice_2d(
    result: Slice2D | Mapping[str, Slice2D],
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    filled: bool = True,
    aspect: str = "equal",
    label: str | None = None,
) -> Axes | AxesArray:
    """Draw the loss on a plane as contours, several models side by side on one colour scale.

    Parameters
    ----------
    result
        One slice, or a mapping from a panel's title to its slice.
    axes
        One axes per slice; by default a new figure, 3.3 in wide for one slice and 6.8 in for several.
    values
        What is drawn: ``"loss"`` (default), or one of the slices' ``metrics`` by its name.
    limits
        Ends of the colour scale, in the unit of what is drawn. By default they enclose every finite value, but a
        logarithmic scale over more than six decades may leave out the largest tenth. Losses beyond an end keep its
        colour, and the colour bar has an arrow there.
    log
        Logarithmic colour scale; by default where the largest loss is at least 10 times the smallest positive one.
    filled
        Fill between the levels (default), or draw coloured lines only.
    aspect
        ``"equal"`` (one multiple of either direction has the same length, default) or ``"auto"``.
    label
        Label of the colour bar, by default the name of what is drawn.

    Returns
    -------
    matplotlib.axes.Axes or numpy.ndarray
        The axes of the one slice, or those of all, shape ``(slices,)``. A cross marks the centre; NaN and infinity,
        and what was not measured yet, are hatched.

    Raises
    ------
    ValueError
        Nothing finite to draw, unknown values, limits in the wrong order, a logarithmic scale of losses that are not
        positive, fewer than two points along a direction, or fewer axes than slices.
    TypeError
        Something that is not a :class:`~msam_analysis.results.Slice2D`.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure A13; Li et al., arXiv 1712.09913.
    """
    slices = named_slices(result, values)
    losses = checked_losses(slices)
    scale = scale_of(losses, limits, log)
    with style():
        if axes is None:
            shapes = [np.ptp(as_array(item.y)) / np.ptp(as_array(item.x)) for item in slices.values()]
            drawn = _map_panels(len(slices), max(shapes) if aspect == "equal" else 0.8)
        else:
            drawn = given_axes(axes, len(slices))
        figure = drawn[0].figure
        mapped: Any = ScalarMappable(scale.norm, _COLORMAP)
        for ax, (title, item), loss in zip(drawn, slices.items(), losses, strict=True):
            ax.set_aspect(aspect)
            contours = _contours(ax, item, loss, scale, small=len(slices) > 2, filled=filled)
            mapped = contours if filled and contours is not None else mapped
            if title:
                ax.set_title(title)
        _name_directions(figure, drawn, list(slices.values()), made=axes is None)
        bar = figure.colorbar(
            mapped,
            ax=list(drawn),
            **({} if filled else {"extend": scale.extend}),
            extendfrac=0.04,
            aspect=22,
            pad=0.015 if len(slices) > 1 else 0.03,
        )
        _finish_bar(bar, scale, label or values)
        reasons = _why_holes(slices.values())
        if reasons:
            figure_or_axes: Any = figure if axes is None else drawn[-1]
            figure_or_axes.legend(
                handles=[Patch(label=reasons, **_HOLE)],
                loc="outside lower right" if axes is None else "lower right",
            )
    first: Axes = drawn[0]
    return first if isinstance(result, Slice2D) else drawn


def _why_holes(slices: Iterable[Slice2D]) -> str:
    """Return what the holes of some slices are, in words; empty if there are none."""
    broken = unfinished = False
    for item in slices:
        measured = np.ones(item.loss.shape, bool) if item.evaluated is None else item.evaluated.cpu().numpy()
        missing = ~np.isfinite(as_array(item.loss))
        broken |= bool((missing & measured).any())
        unfinished |= bool((missing & ~measured).any())
    return " or ".join([*(["not finite"] if broken else []), *(["not measured yet"] if unfinished else [])])


_HOLE: dict[str, Any] = {"facecolor": "#ececec", "edgecolor": "#a8a8a8", "hatch": "////////", "linewidth": 0}


def named_slices(result: Slice2D | Mapping[str, Slice2D], values: str) -> dict[str, Slice2D]:
    slices = {"": result} if isinstance(result, Slice2D) else dict(result)
    for name, item in slices.items():
        if not isinstance(item, Slice2D):
            raise TypeError(f"expected Slice2D results, got {type(item).__name__} under {name!r}")
    return {name: shown(item, values) for name, item in slices.items()}


def checked_losses(slices: Mapping[str, Slice2D]) -> list[Array]:
    if not slices:
        raise ValueError("expected at least one slice, got none")
    for item in slices.values():
        if min(item.loss.shape) < 2:
            raise ValueError(f"a plane needs two points along each direction, got {tuple(item.loss.shape)}")
    losses = [as_array(item.loss) for item in slices.values()]
    return [np.where(np.isfinite(loss), loss, np.nan) for loss in losses]


def _map_panels(count: int, ratio: float) -> AxesArray:
    """Return axes for maps whose height is ``ratio`` times their width, in a figure that fits them."""
    columns = count if count <= 4 else 3 if count <= 6 else 4
    around = 1.1 if count > 1 else 1.2  # tick labels, colour bar
    panel_width = ((PAGE_WIDTH if count > 1 else COLUMN_WIDTH) - around) / columns
    panel_height = min(panel_width * ratio, 3.2)
    width = max(panel_height / ratio * columns + around + 0.1 * (columns - 1), COLUMN_WIDTH)
    return panels(
        count,
        columns=columns,
        width=min(width, PAGE_WIDTH) if count > 1 else COLUMN_WIDTH,
        panel_height=panel_height + (0.45 if count == 1 else 0.42 if count == columns else 0.31),
        share_x=True,
        share_y=True,
        layout="compressed",
    )[1]


def _contours(
    ax: Axes, item: Slice2D, loss: Array, scale: Scale, *, small: bool, filled: bool
) -> QuadContourSet | None:
    """Draw one slice and return its contours, None where nothing is finite."""
    # loss[i, j] belongs to x[i], y[j]; contour wants rows of constant y.
    x, y, height = as_array(item.x), as_array(item.y), np.ma.masked_invalid(loss.T)
    ax.grid(False)
    ax.patch.set(**_HOLE)
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    finite = loss[np.isfinite(loss)]
    contours = None
    if finite.size:
        within = _lines_within(scale, float(finite.min()), float(finite.max()))
        lines: dict[str, Any] = {"levels": within, "linewidths": 0.6}
        if filled:
            # the outermost colours stand for all that lies beyond; the colour bar's arrows say where that is so
            contours = ax.contourf(
                x, y, height, levels=scale.filled, norm=scale.norm, cmap=_COLORMAP, extend=scale.extend
            )
            # light lines on dark colours, dark lines on light ones
            lines["colors"] = ["#ffffffb0" if scale.norm(level) < 0.62 else "#000000a0" for level in within]
        else:
            everything = [finite.min() - 1.0, finite.max() + 1.0]
            ax.contourf(x, y, height, levels=everything, colors=["white"])  # over the hatching of what is not there
            between = [level for level in scale.filled if finite.min() < level < finite.max()]
            if between:
                contours = ax.contour(x, y, height, between, norm=scale.norm, cmap=_COLORMAP, linewidths=0.5, alpha=0.8)
            lines |= {"norm": scale.norm, "cmap": _COLORMAP, "linewidths": 1.1}
        if within.size:
            _labelled_lines(ax, x, y, height, lines, small=small)
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        outline = [patheffects.withStroke(linewidth=2.2, foreground="black")]
        ax.plot(0, 0, marker="+", markersize=6, markeredgewidth=1.2, color="white", path_effects=outline, zorder=4)
    ax.xaxis.set_major_locator(MaxNLocator(3 if small else 5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(3 if small else 5, steps=[1, 2, 2.5, 5, 10]))
    for spine in ax.spines.values():
        spine.set_visible(True)
    return contours


def _labelled_lines(ax: Axes, x: Array, y: Array, height: Any, options: Mapping[str, Any], *, small: bool) -> None:
    lines = ax.contour(x, y, height, **options)
    places = _label_places(lines, x, y, crowded=small)
    if places:
        for text in ax.clabel(lines, fmt=number, fontsize=7, inline_spacing=2, manual=places):
            text.set_alpha(1.0)


def _label_places(lines: QuadContourSet, x: Array, y: Array, *, crowded: bool) -> list[tuple[float, float]]:
    """Return one point per line for its label, away from the edges, the centre and the other labels."""
    corner, unit = np.array([x[0], y[0]]), max(np.ptp(x), np.ptp(y))
    box = np.array([np.ptp(x), np.ptp(y)]) / unit
    taken, places = [box / 2], []
    smallest = 0.22 if crowded else 0.2
    for path in reversed(lines.get_paths()):
        starts = np.flatnonzero(np.asarray(path.codes) == Path.MOVETO)
        pieces = np.split((np.asarray(path.vertices) - corner) / unit, starts[1:])
        pieces = [piece for piece in pieces if len(piece) and np.ptp(piece, axis=0).max() >= smallest]
        if not pieces:
            continue
        points = np.concatenate(pieces)
        edge = np.minimum(points, box - points).min(axis=1)
        apart = np.min([np.hypot(*(points - other).T) for other in taken], axis=0)
        worth = np.where(edge > (0.12 if crowded else 0.08), apart, -np.inf)
        best = int(worth.argmax())
        if worth[best] > 0.1:
            taken.append(points[best])
            places.append(tuple(points[best] * unit + corner))
    return places


def _name_directions(figure: Figure, drawn: AxesArray, slices: Sequence[Slice2D], *, made: bool) -> None:
    """Label each axis with its direction; once for all panels where they agree and the figure is ours."""
    shared = len({item.directions for item in slices}) == 1
    if made and shared and len(slices) > 1:
        figure.supxlabel(slices[0].directions[0], fontsize=8)
        for ax in drawn:
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel(_broken(slices[0].directions[1], _size(ax)[1]))
        return
    for ax, item in zip(drawn, slices, strict=True):
        width, height = _size(ax)
        ax.set_xlabel(_broken(item.directions[0], width))
        ax.set_ylabel(_broken(item.directions[1], height))


def _size(ax: Axes) -> tuple[float, float]:
    """Return about how wide and how high axes will be, in inches."""
    figure: Any = ax.figure
    place = ax.get_position(original=True)
    width, height = place.width * figure.get_figwidth(), place.height * figure.get_figheight()
    if ax.get_aspect() == "auto":
        return width, height
    ratio = ax.get_data_ratio()
    return min(width, height / ratio), min(height, width * ratio)


def _broken(name: str, inches: float) -> str:
    """Return the name of a direction in lines that are not much longer than its axis."""
    return textwrap.fill(name, max(int(_CHARACTERS_PER_INCH * inches), 12), break_on_hyphens=False)


def _finish_bar(bar: Any, scale: Scale, label: str) -> None:
    bar.set_label(label)
    bar.locator = FixedLocator(scale.lines.tolist())
    bar.formatter = FuncFormatter(number)
    bar.minorlocator = NullLocator()
    bar.update_ticks()
    bar.outline.set_linewidth(0.6)


# ------------------------------------------------------------------------------------------------------------ surface


@overload
def surface_3d(
    result: Slice2D,
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    view: tuple[float, float] = (36.0, -60.0),
    label: str | None = None,
) -> Axes: ...
@overload
def surface_3d(
    result: Mapping[str, Slice2D],
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    view: tuple[float, float] = (36.0, -60.0),
    label: str | None = None,
) -> AxesArray: ...
def surface_3d(
    result: Slice2D | Mapping[str, Slice2D],
    axes: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    view: tuple[float, float] = (36.0, -60.0),
    label: str | None = None,
) -> Axes | AxesArray:
    """Draw the loss on a plane as a surface, several models side by side on one height and colour scale.

    Parameters
    ----------
    result
        One slice, or a mapping from a panel's title to its slice.
    axes
        One three-dimensional axes per slice; by default a new figure.
    values, limits, log, label
        As in :func:`slice_2d`; they hold for the height too, and the surface is cut off at the ends.
    view
        Elevation and azimuth of the viewer in degrees.

    Returns
    -------
    matplotlib.axes.Axes or numpy.ndarray
        The axes of the one slice, or those of all, shape ``(slices,)``. Every grid point is drawn; a cell with a
        corner that is NaN or infinite is left out.

    Raises
    ------
    ValueError
        As :func:`slice_2d`, or axes that are not three-dimensional.
    TypeError
        As :func:`slice_2d`.
    """
    slices = named_slices(result, values)
    losses = checked_losses(slices)
    scale = scale_of(losses, limits, log)
    with style():
        drawn = _surface_panels(len(slices)) if axes is None else given_axes(axes, len(slices))
        if any(ax.name != "3d" for ax in drawn):
            raise ValueError("surface_3d needs three-dimensional axes: make them with projection='3d'")
        for ax, (title, item), loss in zip(drawn, slices.items(), losses, strict=True):
            _surface(ax, item, loss, scale, view)
            if title:
                ax.set_title(title, y=0.97)
        _name_axes_3d(drawn[0].figure, drawn, list(slices.values()), made=axes is None)
        bar = drawn[0].figure.colorbar(
            ScalarMappable(scale.norm, _COLORMAP),
            ax=list(drawn),
            extend=scale.extend,
            shrink=0.7,
            aspect=18,
            pad=0.06 if len(slices) == 1 else 0.03,
        )
        _finish_bar(bar, scale, label or values)
    first: Axes = drawn[0]
    return first if isinstance(result, Slice2D) else drawn


def _surface_panels(count: int) -> AxesArray:
    columns = min(count, 2 if count in (2, 4) else 3)
    figure, flat = panels(count, columns=columns, panel_height=2.6 if columns < 3 else 2.1)
    axes = np.empty(count, dtype=np.object_)
    for index, ax in enumerate(flat):
        place = ax.get_subplotspec()
        ax.remove()
        axes[index] = figure.add_subplot(place, projection="3d")
    return axes


def _daylight(cells: Array) -> Array:
    """Return how bright each cell is, between 0.72 and 1: a mild light from above the viewer's left shoulder."""
    normal = np.cross(cells[:, 2] - cells[:, 0], cells[:, 3] - cells[:, 1])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-300
    toward = np.array([-0.35, -0.45, 0.82])
    brightness: Array = 0.72 + 0.28 * np.clip(normal @ (toward / np.linalg.norm(toward)), 0, 1)
    return brightness


def _surface(ax: Any, item: Slice2D, loss: Array, scale: Scale, view: tuple[float, float]) -> None:
    x, y = np.meshgrid(as_array(item.x), as_array(item.y), indexing="ij")
    height = np.clip(loss, scale.low, scale.high)
    low, high = scale.low, scale.high
    if scale.log:
        height, low, high = np.log10(height), np.log10(low), np.log10(high)
    points = np.stack([x, y, height], axis=-1)
    corners = np.stack([points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]], axis=2)
    cells = corners.reshape(-1, 4, 3)
    cells = cells[np.isfinite(cells).all(axis=(1, 2))]
    colors = colormaps[_COLORMAP](Normalize(low, high)(cells[:, :, 2].mean(axis=1)))
    colors[:, :3] *= _daylight(cells / np.array([np.ptp(x), np.ptp(y), high - low]))[:, None]
    # opaque edges: through others what lies behind would shine
    edges = np.concatenate([colors[:, :3] * 0.93, colors[:, 3:]], axis=1)
    surface = Poly3DCollection(cells, facecolors=colors, edgecolors=edges, linewidths=0.35)
    ax.add_collection3d(surface)
    ax.set_xlim(x.min(), x.max())
    ax.set_ylim(y.min(), y.max())
    ax.set_zlim(low, high)
    ax.set_box_aspect((1, 1, 0.75), zoom=0.84)
    ax.view_init(*view)
    ax.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
    ax.yaxis.set_major_locator(MaxNLocator(4, prune="both"))
    ticks = scale.lines[(scale.lines >= scale.low) & (scale.lines <= scale.high)]
    ax.set_zticks(np.log10(ticks) if scale.log else ticks, [number(tick) for tick in ticks])
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_tick_params(labelsize=7, pad=-2)
        axis.set_pane_color((1.0, 1.0, 1.0, 0.0))
        axis.line.set_linewidth(0.6)


def _name_axes_3d(figure: Any, drawn: AxesArray, slices: Sequence[Slice2D], *, made: bool) -> None:
    """Label the axes with the directions; with short letters, explained once, where the names are too long."""
    longest = max(len(name) for item in slices for name in item.directions)
    explained = made and longest > (22 if len(slices) == 1 else 10) and len({item.directions for item in slices}) == 1
    for ax, item in zip(drawn, slices, strict=True):
        names = ("$x$", "$y$") if explained else item.directions
        ax.set_xlabel(names[0], labelpad=-5)
        ax.set_ylabel(names[1], labelpad=-5)
        if explained:
            ax.set_box_aspect((1, 1, 0.75), zoom=0.98)  # short labels leave room
    if explained:
        between = "    " if figure.get_figwidth() > COLUMN_WIDTH else "\n"
        figure.supxlabel(f"$x$: {slices[0].directions[0]}{between}$y$: {slices[0].directions[1]}", fontsize=8)


__all__ = ["slice_1d", "slice_1d_panels", "slice_2d", "surface_3d"]
