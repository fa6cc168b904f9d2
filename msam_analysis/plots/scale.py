"""One scale of colours and heights for all slices of a picture, and the numbers that it is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from msam_analysis.plots.look import Array, require_some
from msam_analysis.results import Slice1D, Slice2D
from msam_analysis.results.slices import LARGE_RANGE

Slice = TypeVar("Slice", Slice1D, Slice2D)


class MapOptions(TypedDict, total=False):
    """What all pictures of planes let one choose."""

    values: str
    limits: tuple[float, float] | None
    log: bool | None
    label: str | None


COLORMAP = "viridis"
ROUND_STEPS = (1, 2, 2.5, 5, 10)
"""Steps between ticks, times powers of ten."""

_FEWEST_LINES = 3  # labelled levels in a panel, where it has a range at all
_ROUND = MaxNLocator(4, steps=ROUND_STEPS)
_DECADES = 6.0  # where the losses span more, a logarithmic scale may end before the largest tenth of them


def as_array(values: Tensor) -> Array:
    """Return a tensor in float64 for drawing."""
    return values.detach().cpu().double().numpy()


def shown(item: Slice, values: str) -> Slice:
    """Return a slice with one of its metrics in the place of the loss, and at its centre, NaN where 0 is off the grid.

    Raises ``ValueError`` if it has no such metric, or one with several numbers at a point.
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


def drawable(result: Slice2D | Mapping[str, Slice2D], values: str) -> tuple[dict[str, Slice2D], list[Array]]:
    """Return planes by name, "" for a single one, with what is to be drawn in the place of the loss; and their losses.

    A loss that is not finite is NaN. Raises :class:`ValueError` where nothing can be drawn.
    """
    several: dict[str, Slice2D] = require_some(result, Slice2D)
    slices = {name: shown(item, values) for name, item in several.items()}
    for item in slices.values():
        if min(item.loss.shape) < 2:
            raise ValueError(f"a plane needs two points along each direction, got {tuple(item.loss.shape)}")
    losses = [as_array(item.loss) for item in slices.values()]
    return slices, [np.where(np.isfinite(loss), loss, np.nan) for loss in losses]


@dataclasses.dataclass(frozen=True)
class Scale:
    """One colour scale for all slices of a picture."""

    filled: Array  # boundaries of the filled levels
    lines: Array  # labelled levels, the ticks of the colour bar
    norm: Normalize
    extend: str
    log: bool
    low: float
    high: float

    @classmethod
    def of(cls, losses: Sequence[Array], limits: tuple[float, float] | None, log: bool | None) -> Scale:
        """Return the scale that holds all losses, or ends at ``limits``; logarithmic where they span a factor of ten.

        Raises ``ValueError`` if nothing is finite, limits are in the wrong order, or a logarithmic scale would start at
        0 or below.
        """
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
        extend = (("neither", "max"), ("min", "both"))[int(below)][int(above)]
        norm: Normalize = (LogNorm if log else Normalize)(filled[0], filled[-1])
        return cls(filled, lines, norm, extend, log, float(filled[0]), float(filled[-1]))

    def lines_within(self, low: float, high: float) -> Array:
        """Return the labelled levels between two losses; finer ones where these are fewer than three.

        A flat minimum beside a sharp one would otherwise have no line at all.
        """
        between = self.lines[(self.lines > low) & (self.lines < high)]
        if len(between) >= _FEWEST_LINES:
            return between
        wide = self.log and high >= LARGE_RANGE * low
        finer = np.asarray(_log_levels(low, high, False)[0] if wide else _ROUND.tick_values(low, high), np.float64)
        finer = finer[(finer > max(low, self.low)) & (finer < min(high, self.high))]
        return finer if len(finer) > len(between) else between

    def label(self, bar: Any, name: str) -> None:
        """Put the labelled levels on a colour bar, and a name."""
        bar.set_label(name)
        bar.locator = FixedLocator(self.lines.tolist())
        bar.formatter = FuncFormatter(number)
        bar.minorlocator = NullLocator()
        bar.update_ticks()
        bar.outline.set_linewidth(0.6)


def _log_levels(low: float, high: float, exact: bool) -> tuple[Array, Array]:
    """Return labelled levels, 1-2-5, 1-3 or 1 of every decade so that at most seven fit, and filled ones between."""
    decades = np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 2)
    choices = [(10.0 ** decades[:, None] * digits).ravel() for digits in ((1, 2, 5), (1, 3), (1,))]
    choices += [10.0 ** decades[::step] for step in (2, 5, 10, 50)]
    levels = next((item for item in choices if ((low < item) & (item < high)).sum() <= 7), choices[-1])
    grid = np.exp(np.interp(*_subdivision(levels, low, high), np.log(levels)))
    return levels, _enclosing(grid, low, high, exact)


def _linear_levels(low: float, high: float, exact: bool) -> tuple[Array, Array]:
    """Return about seven round labelled levels, and filled ones between."""
    levels = np.asarray(MaxNLocator(7, steps=ROUND_STEPS).tick_values(low, high), dtype=np.float64)
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
