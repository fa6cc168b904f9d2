"""What a monitor records: drawn once, or again and again in a notebook while the training goes on."""

from __future__ import annotations

import importlib
import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from msam_analysis.plots.drawing import draw_curve, several_panels, zero_line
from msam_analysis.plots.look import AxesArray, Places, look, require_columns, style, words

Columns = str | Sequence[str] | Mapping[str, Sequence[str]]
"""A column for each panel, or the columns of each panel by its title."""

_LAYER = "/"  # between a quantity and the layer, offset or strength it belongs to
_MOST = 8  # panels, where nobody says which
_SHARE = 20  # drawing takes at most one part in so many of the time
_FAMILIES: dict[str, tuple[str, ...]] = {  # drawn in one panel
    "cosine": ("cosine", "cosine_after", "held_out_cosine"),
    "loss": ("loss_before", "loss_after"),
    "curvature": ("curvature_momentum", "curvature_gradient", "curvature_random"),
    "norm": ("weights_norm", "gradient_norm", "momentum_norm", "step_norm"),
}
_LOGARITHMIC = {"curvature", "norm"}
_ASIDE = ("epsilon_norm", "lambda_residual", "lambda_converged", "rho_0_low", "rho_0_high")  # not drawn unless named


class Recording(Protocol):
    """What is drawn live: a :class:`~msam_analysis.monitor.Monitor`."""

    def frame(self) -> pd.DataFrame:
        """Return the table so far."""

    def on_record(self, listener: Callable[[Any], None]) -> Any:
        """Call ``listener`` after every row; ``remove()`` of what is returned ends that."""


def recorded(frame: pd.DataFrame, columns: Columns | None = None, axes: Places = None) -> AxesArray:
    """Draw what a monitor has recorded against the step, one panel for each kind of quantity.

    Parameters
    ----------
    frame
        What :meth:`Monitor.frame() <msam_analysis.monitor.Monitor.frame>` or ``Monitor.read(path)`` returns: column
        ``step`` and one for each quantity.
    columns
        Which columns, a panel each; or a mapping from a panel's title to its columns. Default: all but those of single
        layers, offsets and strengths and those that say how well another is known, up to eight panels, with what is of
        one kind (cosines, losses, curvatures, norms) together.
    axes
        See :mod:`msam_analysis.plots`.

    Returns
    -------
    numpy.ndarray
        The axes, shape ``(panels,)``. Where a value is NaN or infinite, or was not recorded, there is no point of the
        curve; norms and curvatures are drawn on a logarithmic axis where all of them are positive.

    Raises
    ------
    ValueError
        There are no rows, no such column, nothing to draw, or too few axes.
    """
    require_columns(frame, ["step"])
    shown = _panels(frame, columns)
    with style():
        drawn = several_panels(axes, len(shown), panel_height=1.9)
        for ax, (title, names) in zip(drawn, shown.items(), strict=True):
            _draw(ax, frame, title, names)
            if len(names) > 1:  # above the panel, where it covers no curve
                ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1)
    return drawn


def live(monitor: Recording, columns: Columns | None = None, *, interval: float = 2.0) -> LivePlot:
    """Draw a monitor's rows in a notebook while they come in: call it in a cell, before the loop.

    The picture below that cell is replaced from time to time. In a terminal, in a script, or without IPython nothing is
    drawn. Drawing takes at most a twentieth of the time.

    Parameters
    ----------
    monitor
        The monitor.
    columns
        As for :func:`recorded`; columns that are not there yet are left out.
    interval
        Least number of seconds between two pictures. Default 2.

    Returns
    -------
    LivePlot
        Its ``close()`` draws the last rows and ends the drawing; so does leaving it as a ``with`` block.

    Raises
    ------
    ValueError
        ``interval`` is negative.

    Examples
    --------
    >>> with plots.live(monitor):  # doctest: +SKIP
    ...     train(model, optimizer)
    """
    if not interval >= 0:
        raise ValueError(f"interval must be seconds, 0 or more, got {interval!r}: 2 is the default")
    return LivePlot(monitor, columns, interval)


class LivePlot(AbstractContextManager["LivePlot"]):
    """A picture in a notebook that follows a monitor; made by :func:`live`.

    Attributes
    ----------
    drawn
        How many pictures were shown.
    """

    def __init__(self, monitor: Recording, columns: Columns | None, interval: float) -> None:
        self.drawn = 0
        self._monitor, self._columns, self._interval = monitor, columns, interval
        self._display = _notebook_display()
        self._place: Any = None
        self._next = -float("inf")
        self._handle = monitor.on_record(lambda _: self._update(now=False)) if self._display is not None else None

    def close(self) -> None:
        """Show the last rows and stop; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._update(now=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _update(self, *, now: bool) -> None:
        start = time.monotonic()
        if self._display is None or not (now or start >= self._next):
            return
        try:
            self._show(self._display)
        except Exception as error:  # noqa: BLE001 - a picture must not end a training run
            warnings.warn(f"the live plot stopped: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
            self._display = None
            return
        end = time.monotonic()
        self._next = end + max(self._interval, (_SHARE - 1) * (end - start))

    def _show(self, display: Callable[[Any, bytes], Any]) -> None:
        frame = self._monitor.frame()
        shown = _present(frame, self._columns)
        if not shown:
            return
        figure: Figure = recorded(frame, shown)[0].figure
        try:
            buffer = io.BytesIO()
            with style():
                figure.savefig(buffer, format="png")
        finally:
            plt.close(figure)
        self._place = display(self._place, buffer.getvalue())
        self.drawn += 1


def _notebook_display() -> Callable[[Any, bytes], Any] | None:
    """Return what shows a PNG in the place of an older one; ``None`` outside of notebooks."""
    try:
        ipython: Any = importlib.import_module("IPython")
    except ModuleNotFoundError:
        return None
    if not hasattr(ipython.get_ipython(), "kernel"):  # a terminal would print the name of an object every time
        return None

    def show(place: Any, png: bytes) -> Any:
        image = ipython.display.Image(png)
        if place is None:
            return ipython.display.display(image, display_id=True)
        place.update(image)
        return place

    return show


def _present(frame: pd.DataFrame, columns: Columns | None) -> dict[str, tuple[str, ...]]:
    """Return the panels that have a column by now."""
    if frame.empty:
        return {}
    if columns is None:
        return _panels(frame, None)
    found = ((title, tuple(name for name in names if name in frame)) for title, names in _by_title(columns).items())
    return {title: names for title, names in found if names}


def _panels(frame: pd.DataFrame, columns: Columns | None) -> dict[str, tuple[str, ...]]:
    """Return the columns of every panel, by its title."""
    if columns is not None:
        chosen = _by_title(columns)
        require_columns(frame, [name for names in chosen.values() for name in names])
    else:
        whole = [name for name in frame.columns if name not in ("step", *_ASIDE) and _LAYER not in name]
        chosen = {}
        for name in whole:
            family = next((title for title, members in _FAMILIES.items() if name in members), name)
            chosen[family] = (*chosen.get(family, ()), name)
        chosen = dict(list(chosen.items())[:_MOST])
    if not chosen:
        raise ValueError("there is nothing to draw: expected at least one column; name those wanted in columns=[...]")
    return chosen


def _by_title(columns: Columns) -> dict[str, tuple[str, ...]]:
    if isinstance(columns, Mapping):
        return {title: tuple(names) for title, names in columns.items()}
    return {name: (name,) for name in ([columns] if isinstance(columns, str) else columns)}


def _draw(ax: Axes, frame: pd.DataFrame, title: str, names: tuple[str, ...]) -> None:
    several = len(names) > 1
    drawn = []
    for name, appearance in zip(names, look(names if several else [""]).values(), strict=True):
        known = frame[["step", name]].dropna()
        values = known[name].to_numpy(dtype=np.float64)
        label = words(name.removeprefix(f"{title}_").removesuffix(f"_{title}")) if several else None
        draw_curve(ax, known["step"].to_numpy(dtype=np.float64), values, np.nan, appearance, label)
        drawn.append(values[np.isfinite(values)])
    values = np.concatenate(drawn)
    if title in _LOGARITHMIC and values.size and values.min() > 0:
        ax.set_yscale("log")
    elif values.size and values.min() < 0 < values.max():
        zero_line(ax)
    ax.set_xlabel("step")
    ax.set_ylabel(words(title))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
