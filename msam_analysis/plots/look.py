"""What all pictures share: style, sizes, one look per optimizer, and writing to files."""

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
from matplotlib.figure import Figure

from msam_analysis.results import atomic_path
from msam_analysis.results.text import printable

COLUMN_WIDTH = 3.3
"""Width of one panel, in inches: one column of a two-column page."""

PAGE_WIDTH = 6.8
"""Width of several panels, in inches: the full page."""

LineStyle = Literal["-"] | tuple[float, tuple[float, ...]]
Array = npt.NDArray[np.float64]
AxesArray = npt.NDArray[np.object_]
Places: TypeAlias = Axes | Sequence[Axes] | AxesArray | None
"""Where to draw: axes for each panel, or ``None`` for a new figure."""
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
def style_settings() -> dict[str, Any]:
    """Return the settings of the package's style file."""
    path = Path(__file__).resolve().parent / "style.mplstyle"
    settings: Any = mpl.rc_params_from_file(path, use_default_template=False)
    return dict(settings)


def style() -> AbstractContextManager[None]:
    """Return the package's style as a context: ``with plots.style(): fig, ax = plt.subplots()``.

    Inside, ``style.mplstyle`` lies over the user's ``rcParams``; outside they are as before.
    """
    # pyplot chooses its backend, and turns interactive mode on in a notebook, when it is first used. Were that inside
    # the context, leaving it would turn interactive mode off again.
    plt.draw_if_interactive()  # type: ignore[no-untyped-call]  # matplotlib leaves it untyped
    return matplotlib.style.context(style_settings())


def require_columns(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise :class:`ValueError` unless the table has rows and all ``columns``."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ValueError(f"the table has no column {missing}; it has {list(frame.columns)}")
    if frame.empty:
        raise ValueError("the table has no rows, so there is nothing to draw")


def require_some(result: Any, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """Return results by name as it is drawn, "" for a single one; ``ValueError``: none; ``TypeError``: others."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    several = {"": result} if isinstance(result, kinds) or not isinstance(result, Mapping) else dict(result)
    if not several:
        raise ValueError("there is nothing to draw: pass a result, or a mapping with at least one")
    for name, item in several.items():
        if not isinstance(item, kinds):
            expected = " or ".join(each.__name__ for each in kinds)
            raise TypeError(f"expected {expected} results, got {type(item).__name__} under {name!r}")
    return {literal(str(name)): item for name, item in several.items()}


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
    return literal(name.replace("_", " "))


def literal(name: str) -> str:
    """Return a user's name as matplotlib shows it: no formula, no control character, and in a legend it counts."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves such labels out


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
