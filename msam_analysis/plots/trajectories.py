"""Trajectories on a slice, never without how far they are from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from msam_analysis.plots.drawing import GREY, log_scale, make_ticks, name_curves, one_panel, points, several_panels
from msam_analysis.plots.look import PAGE_WIDTH, Array, AxesArray, Look, Places, literal, look, require_some, style
from msam_analysis.plots.planes import slice_2d
from msam_analysis.plots.scale import as_array
from msam_analysis.results import Projection, Slice2D
from msam_analysis.results.slices import LARGE_RANGE

Projections = Projection | Iterable[Projection] | Mapping[str, Projection]

_LARGEST_CIRCLE = 95.0  # area in square points of the circle for the largest off-plane distance
_CIRCLES = 10  # on one trajectory
_HALO = [patheffects.withStroke(linewidth=2.6, foreground="white", alpha=0.85)]


def trajectory(projections: Projections, ax: Axes | None = None, *, circles: bool = True, legend: bool = True) -> Axes:
    """Draw projected trajectories, for example over a contour plot of the same plane.

    Li et al., arXiv 1712.09913, figure 9, which leaves the distance from the plane open.

    Parameters
    ----------
    projections
        One, several (named by their labels), or a mapping from a name to each.
    ax
        Where to draw, usually the axes of :func:`slice_2d`, whose limits stay. See :mod:`msam_analysis.plots`, also for
        the errors.
    circles
        Put circles on each path whose area is proportional to the distance from the plane (default).
    legend
        Whether to name trajectories and circles. A name says how many points lie outside the limits.

    Returns
    -------
    matplotlib.axes.Axes
        With a path for each trajectory from a small ring at its first point to the optimizer's marker at its last. A
        point that is NaN is a gap.

    Raises
    ------
    ValueError
        A projection that is not on a plane, or projections on different planes.
    """
    several = named(projections)
    _require_planes(several)
    made = ax is None
    with one_panel(ax, legend=False, height=3.0) as panel:
        if made:
            first = next(iter(several.values()))
            panel.set_aspect("equal", adjustable="datalim")
            panel.set_xlabel(literal(first.directions[0]))
            panel.set_ylabel(literal(first.directions[1]))
        else:
            panel.set_autoscale_on(False)
        draw_paths(panel, several, circles=circles)
        if legend:
            handles = _path_handles(panel, several, circles=circles)
            name_curves([panel], made=made or _has_room_above(panel), handles=handles)
    return panel


def project(projections: Projections, ax: Axes | None = None, *, circles: bool = True, legend: bool = True) -> Axes:
    """Draw projected trajectories: on their plane as :func:`trajectory` does, else their coordinates over the steps.

    Parameters
    ----------
    projections, ax, circles, legend
        As for :func:`trajectory`, also for the errors; there are circles on a plane only.

    Returns
    -------
    matplotlib.axes.Axes
        On a plane as :func:`trajectory`. On a line, or along more than two directions, a curve over the steps for each
        trajectory and direction, a marker of the trajectory at its end.
    """
    several = named(projections)
    if all(item.coordinates.shape[1] == 2 for item in several.values()):
        return trajectory(several, ax, circles=circles, legend=legend)
    with one_panel(ax, legend=legend) as panel:
        for name, appearance in look(several).items():
            steps = as_array(several[name].steps)
            for index, coordinates in enumerate(as_array(several[name].coordinates).T):
                (line,) = panel.plot(steps, coordinates, color=appearance.color, linestyle=_DIRECTIONS[index % 4])
                line.set_label(f"{name}, {literal(several[name].directions[index])}")
                panel.plot(steps[-1:], coordinates[-1:], **_last(appearance), clip_on=False, zorder=4)
        panel.set_xlabel("step")
        panel.set_ylabel("coordinate (multiples of the direction)")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return panel


def trajectory_losses(projections: Projections, axes: Places = None, *, log: bool | None = None) -> AxesArray:
    """Draw what a picture of projected trajectories hides: the true loss beside the projected one, and the distance.

    Parameters
    ----------
    projections
        As for :func:`trajectory`, with measured losses.
    axes
        See :mod:`msam_analysis.plots`, also for the errors. There are two panels.
    log
        Logarithmic loss axis; by default where the largest loss is at least 10 times the smallest positive one.

    Returns
    -------
    numpy.ndarray
        Two axes over the steps: the loss at the weights (full lines) and at their projections onto the plane (thin
        dashes); the L2 distance of the weights from the plane.

    Raises
    ------
    ValueError
        A projection without losses.
    """
    several = named(projections)
    measured_losses(several)
    with style():
        drawn = several_panels(axes, 2, share_x=True)
        draw_losses(drawn, several, log=log)
        handles = {name: _line_handle(item) for name, item in look(several).items()} | _loss_handles()
        name_curves(drawn if axes is None else drawn[:1], made=axes is None, handles=handles)
    return drawn


def trajectory_panels(
    plane: Slice2D,
    projections: Projections,
    axes: Places = None,
    *,
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    filled: bool = True,
    aspect: str = "equal",
) -> AxesArray:
    """Draw trajectories on the loss of their plane, and beside it the losses and distances that the plane hides.

    Parameters
    ----------
    plane
        The loss on the plane that the trajectories were projected onto, with the same centre.
    projections
        As for :func:`trajectory`, with measured losses.
    axes
        See :mod:`msam_analysis.plots`. There are three panels.
    limits, filled, aspect
        As for :func:`slice_2d`.
    log
        Logarithmic colour scale and loss axis; by default as each of the two chooses.

    Returns
    -------
    numpy.ndarray
        Three axes: of :func:`slice_2d` with :func:`trajectory` on it, and the two of :func:`trajectory_losses`.

    Raises
    ------
    ValueError, TypeError
        As those functions, or projections along other directions than the slice's (``ValueError``).
    """
    return draw_panels(plane, named(projections), axes, limits=limits, log=log, filled=filled, aspect=aspect)[0]


# --------------------------------------------------------------------------------------------------- what is drawn


def named(projections: Projections) -> dict[str, Projection]:
    """Return the projections by name."""
    found = dict(projections) if isinstance(projections, Mapping) else {}
    if not isinstance(projections, Mapping):
        for number, item in enumerate([projections] if isinstance(projections, Projection) else projections):
            label = getattr(item, "label", "")
            found[label if label not in found else f"{label} {number + 1}"] = item
    return require_some(found, Projection)


def _require_planes(several: Mapping[str, Projection]) -> None:
    first = next(iter(several.values()))
    for name, item in several.items():
        if (count := item.coordinates.shape[1]) != 2:
            raise ValueError(f"{name!r} is projected onto {count} directions, expected two: a plane")
        if item.directions != first.directions or not np.allclose(item.direction_norms, first.direction_norms):
            raise ValueError(f"{name!r} is projected onto another plane: expected one for all; project them together")


def measured_losses(several: Mapping[str, Projection]) -> dict[str, tuple[Array, Array]]:
    """Return the true and the projected losses by name; raise :class:`ValueError` where they were not measured."""
    found = {}
    for name, item in several.items():
        if item.loss is None or item.projected_loss is None:
            raise ValueError(f"the losses of {name!r} were not measured: project it with objective=...")
        found[name] = as_array(item.loss), as_array(item.projected_loss)
    return found


def require_same_plane(plane: Slice2D, several: Mapping[str, Projection]) -> None:
    """Raise unless a slice and projections have the same directions."""
    if not isinstance(plane, Slice2D):
        raise TypeError(f"expected a Slice2D to draw on, got {type(plane).__name__}")
    for name, item in several.items():
        norms = np.allclose(item.direction_norms, plane.direction_norms, rtol=1e-4)
        if item.directions != plane.directions or not norms:
            raise ValueError(
                f"{name!r} is projected onto {item.directions}, and the slice is along {plane.directions}: "
                "expected the same directions of the same lengths"
            )


class Drawn(NamedTuple):
    """The artists of one trajectory: on the map, and beside it where there are panels for losses and distance."""

    growing: tuple[Line2D, ...]  # lines over the recorded points: path, loss, projected loss, distance
    heads: tuple[Line2D, ...]  # the markers at the ends of path, loss and distance
    first: Line2D | None  # the ring at the first point of the path
    circles: PathCollection | None
    at: npt.NDArray[np.int64]  # indices of the points that have circles
    areas: Array  # areas of the circles

    @property
    def moving(self) -> tuple[Artist, ...]:
        """Everything that an animation changes, or that lies above it."""
        return (*self.growing, *self.heads, *(artist for artist in (self.first, self.circles) if artist is not None))


def draw_panels(
    plane: Slice2D, several: Mapping[str, Projection], axes: Places = None, *, log: bool | None = None, **options: Any
) -> tuple[AxesArray, dict[str, Drawn]]:
    """Draw :func:`trajectory_panels` and return its axes and artists."""
    _require_planes(several)
    require_same_plane(plane, several)
    measured_losses(several)
    with style():
        drawn = _three_panels() if axes is None else several_panels(axes, 3)
        slice_2d(plane, drawn[0], log=log, **options)
        drawn[0].set_autoscale_on(False)
        paths = draw_paths(drawn[0], several)
        beside = draw_losses(drawn[1:], several, log=log)
        on_map, others = _path_handles(drawn[0], several, circles=True), _loss_handles()
        if axes is None:
            drawn[1].set_xlabel("")
            drawn[1].tick_params(labelbottom=False)
            name_curves(drawn, made=True, handles=on_map | others)
        else:
            name_curves(drawn[:1], made=False, handles=on_map)
            name_curves(drawn[1:2], made=False, handles=others)
    artists = {
        name: path._replace(growing=path.growing + beside[name].growing, heads=path.heads + beside[name].heads)
        for name, path in paths.items()
    }
    return drawn, artists


def _three_panels() -> AxesArray:
    figure = plt.figure(figsize=(PAGE_WIDTH, 3.1), layout="constrained")
    mosaic = figure.subplot_mosaic([["map", "loss"], ["map", "off"]], width_ratios=[1.15, 1.0])
    axes = np.array([mosaic[name] for name in ("map", "loss", "off")], dtype=np.object_)
    axes[2].sharex(axes[1])
    make_ticks(axes)
    return axes


def draw_paths(ax: Axes, several: Mapping[str, Projection], *, circles: bool = True) -> dict[str, Drawn]:
    """Draw the paths on a map and return their artists."""
    largest = _largest_off_plane(several)
    paths = {}
    for name, appearance in look(several).items():
        item = several[name]
        x, y = as_array(item.coordinates).T
        color = appearance.color
        (line,) = ax.plot(x, y, color=color, linewidth=1.3, zorder=5, path_effects=_HALO)
        known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        (first,) = ax.plot(x[known[:1]], y[known[:1]], **_FIRST, color=color, zorder=6)
        (last,) = ax.plot(x[known[-1:]], y[known[-1:]], **_last(appearance), zorder=7)
        at = _spread(x, y, known)
        areas = _LARGEST_CIRCLE * np.nan_to_num(as_array(item.off_plane)[at]) / (largest or 1.0)
        rings = None
        if circles and largest > 0:
            edge: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.6, "zorder": 5.5}
            rings = ax.scatter(x[at], y[at], areas, facecolors=f"{color}59", **edge)
        paths[name] = Drawn((line,), (last,), first, rings, at, areas)
    return paths


def _spread(x: Array, y: Array, known: Any) -> Any:
    """Return some indices of a path, equally far apart along it, both ends among them."""
    if known.size < 2:
        return known
    way = np.concatenate([[0.0], np.hypot(np.diff(x[known]), np.diff(y[known])).cumsum()])
    return known[np.unique(np.searchsorted(way, np.linspace(0, way[-1], _CIRCLES)).clip(0, len(known) - 1))]


def _has_room_above(ax: Axes) -> bool:
    """Return whether a legend can go above axes that were given: they are alone, and the layout makes room."""
    figure: Any = ax.figure
    others = [other for other in figure.axes if other is not ax and not hasattr(other, "_colorbar")]
    return not others and not figure.legends and isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine)


def _largest_off_plane(several: Mapping[str, Projection]) -> float:
    """Return the largest distance from the plane, 0 where it is no more than rounding."""
    off, away, rounding = (
        np.concatenate([as_array(getattr(item, name)) for item in several.values()])
        for name in ("off_plane", "distance", "rounding")
    )
    noise = rounding + 1e-6 * away
    real = off[np.isfinite(off) & (off > noise)]
    return float(real.max()) if real.size else 0.0


def draw_losses(axes: AxesArray, several: Mapping[str, Projection], *, log: bool | None) -> dict[str, Drawn]:
    """Draw losses and distances over the steps and return their artists."""
    losses = measured_losses(several)
    drawn = {}
    values = []
    for name, appearance in look(several).items():
        item = several[name]
        steps, color = as_array(item.steps), appearance.color
        true, projected = (np.where(np.isfinite(loss), loss, np.nan) for loss in losses[name])
        values += [true, projected]
        off_plane = as_array(item.off_plane)
        lines = (
            *axes[0].plot(steps, true, color=color, linewidth=1.2, zorder=3),
            *axes[0].plot(steps, projected, color=color, **_PROJECTED, zorder=3.5),
            *axes[1].plot(steps, off_plane, color=color, linewidth=1.2),
        )
        heads = (
            *axes[0].plot(steps[-1:], true[-1:], **_last(appearance), clip_on=False, zorder=4),
            *axes[1].plot(steps[-1:], off_plane[-1:], **_last(appearance), clip_on=False, zorder=4),
        )
        drawn[name] = Drawn(lines, heads, None, None, np.zeros(0, dtype=np.int64), np.zeros(0))
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    if log is None:
        log = bool(known.size) and known.min() > 0 and known.max() / known.min() >= LARGE_RANGE
    if log:
        log_scale(axes[0], values)
    axes[0].set_ylabel("loss")
    axes[1].set_ylabel("distance from plane")
    axes[1].set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return drawn


# --------------------------------------------------------------------------------------------------- the legend

_FIRST: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3.4, "markerfacecolor": "white"}
_PROJECTED: dict[str, Any] = {"linestyle": (0, (2.2, 1.2)), "linewidth": 0.8}
_DIRECTIONS = ("-", "--", "-.", ":")


def _last(appearance: Look) -> dict[str, Any]:
    return points(appearance, 5.5, markeredgecolor="white", markeredgewidth=0.7)


def _line_handle(appearance: Look) -> Line2D:
    return Line2D([], [], **_last(appearance) | {"linestyle": "-", "linewidth": 1.3})


def _path_handles(ax: Axes, several: Mapping[str, Projection], *, circles: bool) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    for name, appearance in look(several).items():
        x, y = as_array(several[name].coordinates).T
        outside = (np.isfinite(x) & np.isfinite(y) & ((x < left) | (x > right) | (y < bottom) | (y > top))).sum()
        label = name + (f" ({outside} of {len(several[name].steps)} points outside)" if outside else "")
        handles[label] = _line_handle(appearance)
    handles["start"] = Line2D([], [], **_FIRST, color=GREY)
    largest = _largest_off_plane(several)
    if circles and largest > 0:
        shown = _round_number(largest)
        diameter = 2 * math.sqrt(_LARGEST_CIRCLE * shown / largest / math.pi)
        handles[f"{shown:g} from plane"] = Line2D(
            [], [], linestyle="none", marker="o", markersize=diameter, markerfacecolor=f"{GREY}59",
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
    return handles


def _loss_handles() -> dict[str, Any]:
    return {
        "loss at the weights": Line2D([], [], color=GREY, linewidth=1.2),
        "at their projection": Line2D([], [], color=GREY, **_PROJECTED),
    }


def _round_number(value: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is not above a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(digit * power for digit in (1, 2, 5) if digit * power <= value * (1 + 1e-9))
