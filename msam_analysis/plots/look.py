"""What all pictures share: style, sizes, one look per optimizer, panels, and writing to files."""

from __future__ import annotations

import functools
import itertools
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import matplotlib as mpl
import matplotlib.style
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from msam_analysis.results import atomic_path

COLUMN_WIDTH = 3.3
"""Width of one panel, in inches: one column of a two-column page."""

PAGE_WIDTH = 6.8
"""Width of several panels, in inches: the full page."""

LineStyle = Literal["-"] | tuple[float, tuple[float, ...]]
Array = npt.NDArray[np.float64]
AxesArray = npt.NDArray[np.object_]
Kind = TypeVar("Kind")
Named: TypeAlias = Kind | Mapping[str, Kind]
"""One result, or one for each name."""

_CHARACTERS_PER_INCH = 18  # of a label of 8 points

_FILE_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


class Look(NamedTuple):
    """How one optimizer is drawn.

    Attributes
    ----------
    color
        Hexadecimal, from the palette of Okabe and Ito (2008), which readers with colour-blindness can tell apart.
    linestyle
        A matplotlib line style, so that curves differ without colour.
    marker
        A matplotlib marker, so that points differ without colour.
    """

    color: str
    linestyle: LineStyle
    marker: str


_FIXED = {
    "": Look("#0072B2", "-", "o"),  # one curve without a name
    "SGD": Look("#000000", (0, (4, 1, 1, 1)), "o"),
    "NAG": Look("#56B4E9", (0, (1, 0.8)), "s"),
    "SAM": Look("#009E73", (0, (4, 1.2)), "^"),
    "MSAM": Look("#D55E00", "-", "D"),
}
_FURTHER = (
    Look("#0072B2", (0, (7, 1.5)), "v"),
    Look("#CC79A7", (0, (2, 0.8)), "P"),
    Look("#E69F00", (0, (7, 1, 1, 1, 1, 1)), "X"),
    Look("#7F7F7F", (0, (1, 1.6)), "<"),
)


def look(names: Iterable[str]) -> dict[str, Look]:
    """Return the look of every name: fixed for SGD, NAG, SAM and MSAM, in order of appearance for the others.

    Parameters
    ----------
    names
        Names of optimizers, or of whatever else a picture compares. Repetitions are ignored.

    Returns
    -------
    dict
        Name to :class:`Look`, in the order given. Beyond eight names, the looks of the others repeat.
    """
    spare = itertools.cycle(_FURTHER)
    return {name: _FIXED[name] if name in _FIXED else next(spare) for name in dict.fromkeys(names)}


@functools.cache
def _style_settings() -> dict[str, Any]:
    path = Path(__file__).resolve().parent / "style.mplstyle"
    settings: Any = mpl.rc_params_from_file(path, use_default_template=False)
    return dict(settings)


def style() -> AbstractContextManager[None]:
    """Return the package's style as a context: ``with plots.style(): fig, ax = plt.subplots()``.

    Returns
    -------
    context manager
        Inside, ``style.mplstyle`` lies over the user's ``rcParams``; outside they are as before.
    """
    # pyplot chooses its backend, and turns interactive mode on in a notebook, when it is first used. Were that inside
    # the context, leaving it would turn interactive mode off again.
    plt.draw_if_interactive()  # type: ignore[no-untyped-call]  # matplotlib leaves it untyped
    return matplotlib.style.context(_style_settings())


def panels(
    count: int,
    *,
    columns: int | None = None,
    width: float | None = None,
    panel_height: float = 2.1,
    share_x: bool = False,
    share_y: bool = False,
    layout: Literal["constrained", "compressed"] = "constrained",
) -> tuple[Figure, AxesArray]:
    """Make a figure with panels in the package's style.

    Parameters
    ----------
    count
        How many panels.
    columns
        Panels in a row. By default up to four; five and six go in rows of three.
    width
        Width of the figure in inches, by default 3.3 for one panel and 6.8 for several.
    panel_height
        Height of one row in inches.
    share_x, share_y
        Whether all panels have the same axis limits.
    layout
        ``"compressed"`` keeps panels of fixed aspect close together.

    Returns
    -------
    figure, axes
        ``axes`` of shape ``(count,)``, row by row.

    Raises
    ------
    ValueError
        ``count`` is less than 1.
    """
    if count < 1:
        raise ValueError(f"expected at least one panel, got {count}")
    columns = columns or (count if count <= 4 else 3 if count <= 6 else 4)
    rows = -(-count // columns)
    with style():
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(width or (COLUMN_WIDTH if count == 1 else PAGE_WIDTH), rows * panel_height),
            sharex=share_x,
            sharey=share_y,
            squeeze=False,
            layout=layout,
        )
        axes = grid.ravel()
        make_ticks(axes)
        for ax in axes[count:]:
            ax.remove()
        for ax in bottom_panels(axes[:count]) if share_x else ():
            ax.tick_params(labelbottom=True)
    return figure, axes[:count]


def make_ticks(axes: Iterable[Axes]) -> None:
    """Make the ticks now: left alone they are made when first read, with the rcParams of that moment."""
    for ax in axes:
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_ticks(1)
            axis.get_minor_ticks(1)


def bottom_panels(axes: AxesArray) -> AxesArray:
    """Return those of a grid's axes that have none below them, all where the axes are not on one grid."""
    place = axes[0].get_subplotspec()
    columns = place.get_gridspec().ncols if place is not None and place.get_gridspec() is not None else len(axes)
    return axes[max(len(axes) - columns, 0) :]


def one_panel(ax: Axes | None, *, width: float = COLUMN_WIDTH, height: float = 2.4) -> Axes:
    """Return ``ax``, or the axes of a new figure of one panel."""
    if ax is not None:
        return ax
    _, axes = panels(1, width=width, panel_height=height)
    made: Axes = axes[0]
    return made


def given_axes(axes: Axes | Sequence[Axes] | AxesArray, count: int) -> AxesArray:
    """Return the user's axes as an array, one for each of ``count`` panels."""
    flat = np.atleast_1d(np.asarray(axes, dtype=np.object_)).ravel()
    if len(flat) < count:
        raise ValueError(f"{count} panels need {count} axes, got {len(flat)}")
    return flat[:count]


def name_curves(axes: AxesArray, *, made: bool, handles: Mapping[str, Any] | None = None) -> None:
    """Add the legend: above all panels, where it covers nothing, if the figure was made here, else inside each axes.

    Every label appears once; ``handles`` replaces those of the artists drawn.
    """
    if not made:
        for ax in axes:
            if handles is not None:
                ax.legend(list(handles.values()), list(handles), handler_map=_SIDE_BY_SIDE)
            elif ax.get_legend_handles_labels()[1]:
                ax.legend()
        return
    if handles is None:
        found = [item for ax in axes for item in zip(*ax.get_legend_handles_labels(), strict=True)]
        handles = {label: handle for handle, label in reversed(found)}
        handles = {label: handles[label] for _, label in found}
    if handles:
        figure = axes[0].figure
        columns = _legend_columns(list(handles), 72.0 * figure.get_figwidth(), 4 if figure.get_figwidth() < 5 else 8)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=columns,
            handler_map=_SIDE_BY_SIDE,
        )


def _legend_columns(labels: Sequence[str], width: float, most: int) -> int:
    """Return how many columns of labels fit into ``width`` points, in as few rows as that takes."""
    size = float(_style_settings()["legend.fontsize"])
    # line, gaps and letters in units of the font size; matplotlib fills column by column
    widths = [size * (5.2 + 0.56 * len(label)) for label in labels]
    for rows in range(1, len(labels)):
        columns = -(-len(labels) // rows)
        total = sum(max(widths[start : start + rows]) for start in range(0, len(labels), rows))
        if columns <= most and total <= width:
            return columns
    return 1


_SIDE_BY_SIDE = {tuple: HandlerTuple(ndivide=None, pad=0)}


def draw_curve(
    ax: Axes, x: Array, mean: Array, half_width: Array, appearance: Look, label: str | None, *, zorder: float = 2.5
) -> None:
    """Draw a mean with its band; what is not finite becomes a hole, and a point between two holes a dot."""
    draw_banded(ax, x, mean, (mean - half_width, mean + half_width), appearance, label, zorder=zorder)


def draw_banded(
    ax: Axes,
    x: Array,
    middle: Array,
    band: tuple[Array, Array],
    appearance: Look,
    label: str | None,
    *,
    zorder: float = 2.5,
) -> None:
    """Draw a curve between the two ends of a band; holes and dots as :func:`draw_curve` makes them."""
    middle = np.where(np.isfinite(middle), middle, np.nan)
    known = np.isfinite(middle)
    padded = np.concatenate([[False], known, [False]])
    alone = np.flatnonzero(known & ~padded[:-2] & ~padded[2:])
    width = None if len(x) <= 80 else 0.9
    color = appearance.color
    ax.plot(x, middle, color=color, linestyle=appearance.linestyle, linewidth=width, label=label, zorder=zorder)
    if alone.size:
        ax.plot(x[alone], middle[alone], linestyle="none", marker=".", color=color, zorder=zorder)
    low, high = (np.where(np.isfinite(end) & known, end, np.nan) for end in band)
    if np.isfinite(high - low).any():
        ax.fill_between(x, low, high, color=color, alpha=0.17, linewidth=0, zorder=zorder - 0.5)


def curve_of(
    table: pd.DataFrame, optimizer: str, x: str, y: str, *, positive: bool = False
) -> tuple[Array, Array, Array]:
    """Return an optimizer's x, means and half widths of a summary; ``positive`` makes holes of all other means."""
    rows = table[table["optimizer"] == optimizer].sort_values(x)
    at, mean, half_width = (rows[name].to_numpy(dtype=np.float64) for name in (x, y, f"{y}_half_width"))
    return at, np.where(mean > 0, mean, np.nan) if positive else mean, half_width


def log_scale(ax: Axes, drawn: Sequence[Array]) -> None:
    """Make the y axis logarithmic, with limits set by the means ``drawn`` and not by where a band touches zero."""
    positive = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in drawn])
    ax.set_yscale("log", nonpositive="clip")
    if positive.size:
        low, high = positive.min(), positive.max()
        margin = max((high / low) ** 0.06, 1.25)
        # what was drawn before, here or on axes that share this scale, stays in sight
        family = [*ax.get_shared_y_axes().get_siblings(ax)]
        seen = [getattr(member, _LIMITS) for member in family if hasattr(member, _LIMITS)]
        limits = (min([low / margin, *(pair[0] for pair in seen)]), max([high * margin, *(pair[1] for pair in seen)]))
        setattr(ax, _LIMITS, limits)
        ax.set_ylim(*limits, auto=None)
        log_ticks(ax.yaxis, *limits)


_LIMITS = "_msam_analysis_log_limits"


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers where these are short: 1-2-5 over two decades or less."""
    if high / low <= 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    if low >= 1e-3 and high < 2e4:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def require_columns(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise :class:`ValueError` unless the table has rows and all ``columns``."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ValueError(f"the table has no column {missing}; it has {list(frame.columns)}")
    if frame.empty:
        raise ValueError("the table has no rows, so there is nothing to draw")


def require_some(result: Any, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """Return results by name, that of a single one empty; raise unless there are some, and all of a kind.

    Raises
    ------
    ValueError
        The mapping is empty.
    TypeError
        Something is of another kind.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    several = {"": result} if isinstance(result, kinds) or not isinstance(result, Mapping) else dict(result)
    if not several:
        raise ValueError("there is nothing to draw: pass a result, or a mapping with at least one")
    for name, item in several.items():
        if not isinstance(item, kinds):
            expected = " or ".join(each.__name__ for each in kinds)
            raise TypeError(f"expected {expected} results, got {type(item).__name__} under {name!r}")
    return several


def ordered(names: Iterable[str]) -> list[str]:
    """Return the names without repetition: SGD, NAG, SAM, MSAM first, then the others as they appear."""
    unique = list(dict.fromkeys(names))
    return [name for name in _FIXED if name in unique] + [name for name in unique if name not in _FIXED]


def wrapped(text: str, inches: float) -> str:
    """Return a label of 8 points in lines that are not much longer than its axis."""
    return textwrap.fill(text, max(int(_CHARACTERS_PER_INCH * inches), 12), break_on_hyphens=False)


def size_of(ax: Axes) -> tuple[float, float]:
    """Return about how wide and how high axes will be, in inches."""
    figure: Any = ax.figure
    place = ax.get_position(original=True)
    width, height = place.width * figure.get_figwidth(), place.height * figure.get_figheight()
    if ax.get_aspect() == "auto":
        return width, height
    ratio = ax.get_data_ratio()
    return min(width, height / ratio), min(height, width * ratio)


def words(name: str) -> str:
    """Return a column's name as an axis label."""
    return name.replace("_", " ")


def save(
    drawn: Figure | Axes | Sequence[Axes] | AxesArray,
    path: str | os.PathLike[str],
    formats: Sequence[str] = ("png",),
    *,
    close: bool = False,
) -> list[Path]:
    """Write a figure, 200 dots per inch in raster formats, the same bytes for the same figure.

    No time stamp and no version is written, and identifiers in SVG files are salted with a fixed word. Each file
    replaces an older one only when it is complete.

    Parameters
    ----------
    drawn
        A figure, or what a function of this package returned.
    path
        Where to write, without the suffix (a suffix that names one of the formats is dropped); parents are made.
    formats
        Any of ``"png"``, ``"svg"``, ``"pdf"``.
    close
        Close the figure afterwards, so that a program that draws many does not keep them all.

    Returns
    -------
    list of pathlib.Path
        The files, in the order of ``formats``.

    Raises
    ------
    ValueError
        A format is not one of the three, or none was given.
    TypeError
        ``drawn`` is neither a figure nor axes.
    """
    unknown = [name for name in formats if name not in _FILE_METADATA]
    if unknown or not formats:
        raise ValueError(f"formats must be among {sorted(_FILE_METADATA)}, got {list(formats)}")
    figure = _figure(drawn)
    path = Path(path)
    if path.suffix[1:] in _FILE_METADATA:
        path = path.with_suffix("")
    written = []
    with style():
        for name in formats:
            target = path.with_name(f"{path.name}.{name}")
            with atomic_path(target) as partial:
                figure.savefig(partial, format=name, metadata=_FILE_METADATA[name])
            written.append(target)
    if close:
        plt.close(figure)
    return written


def _figure(drawn: Any) -> Figure:
    if isinstance(drawn, Figure):
        return drawn
    axes = np.atleast_1d(np.asarray(drawn, dtype=np.object_)).ravel()
    figure = axes[0].figure if len(axes) and isinstance(axes[0], Axes) else None
    if not isinstance(figure, Figure):
        raise TypeError(f"expected a figure or axes on one, got {type(drawn).__name__}")
    return figure
