"""The loss on planes: surfaces seen from above, several models on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]

from msam_analysis.plots.drawing import given_axes, panels
from msam_analysis.plots.look import COLUMN_WIDTH, Array, AxesArray, Places, style
from msam_analysis.plots.scale import COLORMAP, MapOptions, Scale, as_array, checked_losses, named_slices, number
from msam_analysis.results import Slice2D

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(MapOptions, total=False):
    view: tuple[float, float]


@overload
def surface_3d(result: Slice2D, axes: Places = None, **options: Unpack[_Options]) -> Axes: ...
@overload
def surface_3d(result: Mapping[str, Slice2D], axes: Places = None, **options: Unpack[_Options]) -> AxesArray: ...
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
    ValueError, TypeError
        As :func:`slice_2d`, or axes that are not three-dimensional (``ValueError``).
    """
    slices = named_slices(result, values)
    losses = checked_losses(slices)
    scale = Scale.of(losses, limits, log)
    with style():
        drawn = _surface_panels(len(slices)) if axes is None else given_axes(axes, len(slices))
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
        scale.label(bar, label or values)
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
        names = ("$x$", "$y$") if explained else item.directions
        ax.set_xlabel(names[0], labelpad=-5)
        ax.set_ylabel(names[1], labelpad=-5)
        if explained:
            ax.set_box_aspect((1, 1, 0.75), zoom=0.98)  # short labels leave room
    if explained:
        between = "    " if figure.get_figwidth() > COLUMN_WIDTH else "\n"
        figure.supxlabel(f"$x$: {slices[0].directions[0]}{between}$y$: {slices[0].directions[1]}", fontsize=8)
