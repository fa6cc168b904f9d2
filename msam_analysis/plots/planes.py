"""The loss on planes: contours, and surfaces seen from above, several models on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]

from msam_analysis.plots.drawing import panels, several_panels
from msam_analysis.plots.look import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    Array,
    AxesArray,
    Places,
    literal,
    size_of,
    style,
    wrapped,
)  # fmt: skip
from msam_analysis.plots.scale import COLORMAP, ROUND_STEPS, MapOptions, Scale, as_array, drawable, number
from msam_analysis.results import Slice2D

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _MapOptions(MapOptions, total=False):
    filled: bool
    aspect: str


@overload
def slice_2d(result: Slice2D, axes: Places = None, **options: Unpack[_MapOptions]) -> Axes: ...
@overload
def slice_2d(result: Mapping[str, Slice2D], axes: Places = None, **options: Unpack[_MapOptions]) -> AxesArray: ...
def slice_2d(
    result: Slice2D | Mapping[str, Slice2D],
    axes: Places = None,
    *,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    filled: bool = True,
    aspect: str = "equal",
    label: str | None = None,
) -> Axes | AxesArray:
    """Draw the loss on a plane as contours, several models side by side on one colour scale.

    Becker et al., arXiv 2401.12033, figure A13; Li et al., arXiv 1712.09913.

    Parameters
    ----------
    result, axes
        See :mod:`msam_analysis.plots`, also for the errors. There is a panel for each slice.
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
        positive, or fewer than two points along a direction.
    """
    slices, losses = drawable(result, values)
    scale = Scale.of(losses, limits, log)
    with style():
        if axes is None:
            shapes = [np.ptp(as_array(item.y)) / np.ptp(as_array(item.x)) for item in slices.values()]
            drawn = _map_panels(len(slices), max(shapes) if aspect == "equal" else 0.8)
        else:
            drawn = several_panels(axes, len(slices))
        figure = drawn[0].figure
        mapped: Any = ScalarMappable(scale.norm, COLORMAP)
        for ax, (title, item), loss in zip(drawn, slices.items(), losses, strict=True):
            ax.set_aspect(aspect)
            contours = _contours(ax, item, loss, scale, small=len(slices) > 2, filled=filled)
            mapped = contours if filled and contours is not None else mapped
            if title:
                ax.set_title(title)
        _name_directions(figure, drawn, list(slices.values()), made=axes is None)
        ends: dict[str, Any] = {"extendfrac": 0.04} | ({} if filled else {"extend": scale.extend})
        bar = figure.colorbar(mapped, ax=list(drawn), aspect=22, pad=0.015 if len(slices) > 1 else 0.03, **ends)
        scale.label(bar, label or literal(values))
        reasons = _why_holes(slices.values())
        if reasons:
            place, where = (figure, "outside lower right") if axes is None else (drawn[-1], "lower right")
            place.legend(handles=[Patch(label=reasons, **_HOLE)], loc=where)
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


def _map_panels(count: int, ratio: float) -> AxesArray:
    """Return axes for maps whose height is ``ratio`` times their width, in a figure that fits them."""
    columns = count if count <= 4 else 3 if count <= 6 else 4
    around = 1.1 if count > 1 else 1.2  # tick labels, colour bar
    panel_width = ((PAGE_WIDTH if count > 1 else COLUMN_WIDTH) - around) / columns
    panel_height = min(panel_width * ratio, 3.2)
    width = max(panel_height / ratio * columns + around + 0.1 * (columns - 1), COLUMN_WIDTH)
    width = min(width, PAGE_WIDTH) if count > 1 else COLUMN_WIDTH
    height = panel_height + (0.45 if count == 1 else 0.42 if count == columns else 0.31)
    size: dict[str, Any] = {"columns": columns, "width": width, "panel_height": height}
    return panels(count, **size, share_x=True, share_y=True, layout="compressed")[1]


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
        within = scale.lines_within(float(finite.min()), float(finite.max()))
        lines: dict[str, Any] = {"levels": within, "linewidths": 0.6}
        if filled:
            # the outermost colours stand for all that lies beyond; the colour bar's arrows say where that is so
            contours = ax.contourf(x, y, height, scale.filled, norm=scale.norm, cmap=COLORMAP, extend=scale.extend)
            # light lines on dark colours, dark lines on light ones
            lines["colors"] = ["#ffffffb0" if scale.norm(level) < 0.62 else "#000000a0" for level in within]
        else:
            everything = [finite.min() - 1.0, finite.max() + 1.0]
            ax.contourf(x, y, height, levels=everything, colors=["white"])  # over the hatching of what is not there
            between = [level for level in scale.filled if finite.min() < level < finite.max()]
            if between:
                contours = ax.contour(x, y, height, between, norm=scale.norm, cmap=COLORMAP, linewidths=0.5, alpha=0.8)
            lines |= {"norm": scale.norm, "cmap": COLORMAP, "linewidths": 1.1}
        if within.size:
            drawn = ax.contour(x, y, height, **lines)
            places = _label_places(drawn, x, y, crowded=small)
            for text in ax.clabel(drawn, fmt=number, fontsize=7, inline_spacing=2, manual=places) if places else ():
                text.set_alpha(1.0)
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        outline = [patheffects.withStroke(linewidth=2.2, foreground="black")]
        ax.plot(0, 0, marker="+", markersize=6, markeredgewidth=1.2, color="white", path_effects=outline, zorder=4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3 if small else 5, steps=ROUND_STEPS))
    for spine in ax.spines.values():
        spine.set_visible(True)
    return contours


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
        figure.supxlabel(literal(slices[0].directions[0]), fontsize=8)
        for ax in drawn:
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel(wrapped(literal(slices[0].directions[1]), size_of(ax)[1]))
        return
    for ax, item in zip(drawn, slices, strict=True):
        width, height = size_of(ax)
        ax.set_xlabel(wrapped(literal(item.directions[0]), width))
        ax.set_ylabel(wrapped(literal(item.directions[1]), height))


# ------------------------------------------------------------------------------------------------------------ surfaces


class _SurfaceOptions(MapOptions, total=False):
    view: tuple[float, float]


@overload
def surface_3d(result: Slice2D, axes: Places = None, **options: Unpack[_SurfaceOptions]) -> Axes: ...
@overload
def surface_3d(result: Mapping[str, Slice2D], axes: Places = None, **options: Unpack[_SurfaceOptions]) -> AxesArray: ...
def surface_3d(
    result: Slice2D | Mapping[str, Slice2D],
    axes: Places = None,
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
    result, axes
        As in :func:`slice_2d`, also for the errors; axes must be three-dimensional.
    values, limits, log, label
        As in :func:`slice_2d`; they hold for the height too, and the surface is cut off at the ends.
    view
        Elevation and azimuth of the viewer in degrees.

    Returns
    -------
    matplotlib.axes.Axes or numpy.ndarray
        The axes of the one slice, or those of all, shape ``(slices,)``. Every grid point is drawn; a cell with a
        corner that is NaN or infinite is left out.
    """
    slices, losses = drawable(result, values)
    scale = Scale.of(losses, limits, log)
    with style():
        drawn = _surface_panels(len(slices)) if axes is None else several_panels(axes, len(slices))
        if any(ax.name != "3d" for ax in drawn):
            raise ValueError("surface_3d needs three-dimensional axes: make them with projection='3d'")
        for ax, (title, item), loss in zip(drawn, slices.items(), losses, strict=True):
            _surface(ax, item, loss, scale, view)
            if title:
                ax.set_title(title, y=0.97)
        _name_axes_3d(drawn[0].figure, drawn, list(slices.values()), made=axes is None)
        size: dict[str, Any] = {"shrink": 0.7, "aspect": 18, "pad": 0.06 if len(slices) == 1 else 0.03}
        mapped = ScalarMappable(scale.norm, COLORMAP)
        bar = drawn[0].figure.colorbar(mapped, ax=list(drawn), extend=scale.extend, **size)
        scale.label(bar, label or literal(values))
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
    colors = colormaps[COLORMAP](Normalize(low, high)(cells[:, :, 2].mean(axis=1)))
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
        names = ("$x$", "$y$") if explained else tuple(map(literal, item.directions))
        ax.set_xlabel(names[0], labelpad=-5)
        ax.set_ylabel(names[1], labelpad=-5)
        if explained:
            ax.set_box_aspect((1, 1, 0.75), zoom=0.98)  # short labels leave room
    if explained:
        between = "    " if figure.get_figwidth() > COLUMN_WIDTH else "\n"
        x, y = map(literal, slices[0].directions)
        figure.supxlabel(f"$x$: {x}{between}$y$: {y}", fontsize=8)
