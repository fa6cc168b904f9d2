"""The loss on planes: filled contours, several models on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from msam_analysis.plots.drawing import given_axes, panels
from msam_analysis.plots.look import COLUMN_WIDTH, PAGE_WIDTH, Array, AxesArray, Places, size_of, style, wrapped
from msam_analysis.plots.scale import (
    COLORMAP,
    ROUND_STEPS,
    MapOptions,
    Scale,
    as_array,
    checked_losses,
    named_slices,
    number,
)
from msam_analysis.results import Slice2D

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(MapOptions, total=False):
    filled: bool
    aspect: str


@overload
def slice_2d(result: Slice2D, axes: Places = None, **options: Unpack[_Options]) -> Axes: ...
@overload
def slice_2d(result: Mapping[str, Slice2D], axes: Places = None, **options: Unpack[_Options]) -> AxesArray: ...
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
    scale = Scale.of(losses, limits, log)
    with style():
        if axes is None:
            shapes = [np.ptp(as_array(item.y)) / np.ptp(as_array(item.x)) for item in slices.values()]
            drawn = _map_panels(len(slices), max(shapes) if aspect == "equal" else 0.8)
        else:
            drawn = given_axes(axes, len(slices))
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
        scale.label(bar, label or values)
        reasons = _why_holes(slices.values())
        if reasons:
            figure_or_axes: Any = figure if axes is None else drawn[-1]
            figure_or_axes.legend(
                handles=[Patch(label=reasons, **_HOLE)], loc="outside lower right" if axes is None else "lower right"
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
            _labelled_lines(ax, x, y, height, lines, small=small)
    if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
        outline = [patheffects.withStroke(linewidth=2.2, foreground="black")]
        ax.plot(0, 0, marker="+", markersize=6, markeredgewidth=1.2, color="white", path_effects=outline, zorder=4)
    ax.xaxis.set_major_locator(MaxNLocator(3 if small else 5, steps=ROUND_STEPS))
    ax.yaxis.set_major_locator(MaxNLocator(3 if small else 5, steps=ROUND_STEPS))
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
                ax.set_ylabel(wrapped(slices[0].directions[1], size_of(ax)[1]))
        return
    for ax, item in zip(drawn, slices, strict=True):
        width, height = size_of(ax)
        ax.set_xlabel(wrapped(item.directions[0], width))
        ax.set_ylabel(wrapped(item.directions[1], height))
