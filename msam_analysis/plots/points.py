"""Results that are a number or a few: points with their errors, in one picture for all kinds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from msam_analysis import results
from msam_analysis.plots.curves import spectral_density
from msam_analysis.plots.drawing import GREY, log_scale, name_curves, one_panel, several_panels, zero_line
from msam_analysis.plots.look import AxesArray, Look, Named, Places, look, require_some, size_of, style, wrapped
from msam_analysis.results.slices import LARGE_RANGE

_FEW = 6  # points that have their values written beside them
_PER_INCH = 19  # characters of a tick label
_CURVATURE = "(loss\u00a0/\u00a0distance²)"  # never in two lines
_PANELS = {  # of the table of all metrics: what is in one unit, by how the names begin
    f"eigenvalue {_CURVATURE}": ("lambda",),
    f"critical sharpness {_CURVATURE}": ("critical",),
    f"trace {_CURVATURE}": ("trace",),
    "rise of the loss": ("ball", "one_step", "average", "adaptive", "m_sharpness"),
    "relative flatness (loss)": ("relative_flatness",),
    "Fisher-Rao norm (loss²)": ("fisher_rao",),
    "loss": ("loss",),
    "norm": ("gradient_norm", "weight_norm"),
}
_UNITS = {  # of a reading, by its name
    "eigenvalue": f"eigenvalue {_CURVATURE}",
    "trace": f"trace {_CURVATURE}",
    "sharpness": "rise of the loss",
    "m-sharpness": "mean largest rise of the loss",
    "average sharpness": "mean rise of the loss",
    "average sharpness (adaptive)": "mean rise of the loss",
    "relative flatness": "relative flatness (loss)",
    "squared Fisher-Rao norm": "squared Fisher-Rao norm (loss²)",
}

T_contra = TypeVar("T_contra", bound=results.Result, contravariant=True)
Along: TypeAlias = results.Scalar | results.Curvatures


class Point(NamedTuple):
    """A number in a picture: over which tick it stands, its value, the ends of its bar, whether it converged."""

    at: str
    value: float
    low: float
    high: float
    converged: bool = True


def top_eigenvalues(
    result: Named[results.Eigenpairs], ax: Axes | None = None, *, log: bool | None = None, legend: bool = True
) -> Axes:
    """Draw eigenvalues over their index, with their residuals.

    Parameters
    ----------
    result, ax, legend
        See :mod:`msam_analysis.plots`, also for the errors.
    log
        Logarithmic axis of the values; by default where all are positive and the largest is at least 10 times the
        smallest.

    Returns
    -------
    matplotlib.axes.Axes
        Bars are standard errors or residuals; an exact eigenvalue lies within its residual. Open markers did not
        converge; a value that is NaN or infinite is written at its place.
    """
    several = require_some(result, results.Eigenpairs)
    points = {name: _points(item, "eigenvalue ") for name, item in several.items()}
    ax = draw_points(points, ax, _UNITS["eigenvalue"], log=log, legend=legend)
    ax.set_xlabel("index")
    return ax


class _Draws(Protocol[T_contra]):
    def __call__(
        self, result: Named[T_contra], ax: Axes | None = None, *, log: bool | None = None, legend: bool = True
    ) -> Axes: ...


def _picture(name: str, kind: type[T_contra], says: str, label: str = "", only: str | None = None) -> _Draws[T_contra]:
    """Return the function that draws the readings of a result, with the parameters of :func:`top_eigenvalues`."""
    label = label or name.replace("_", " ")

    def draw(result: Named[T_contra], ax: Axes | None = None, *, log: bool | None = None, legend: bool = True) -> Axes:
        points = {name: _points(item, only=only) for name, item in require_some(result, kind).items()}
        return draw_points(points, ax, _UNITS.get(label, label), log=log, legend=legend)

    draw.__name__ = draw.__qualname__ = name
    draw.__annotations__["result"] = f"Named[{kind.__name__}]"
    draw.__doc__ = f"Draw {says}.\n{(top_eigenvalues.__doc__ or '').partition(chr(10))[2]}"
    return draw


_ERRORS = "with their standard errors"
_BALL = "the largest rise found in a ball, a lower bound, beside that of a single step"
_STEP = "rises after a single step, with the error of rounding"
trace = _picture("trace", results.Estimate, f"traces {_ERRORS}")
average_sharpness = _picture("average_sharpness", results.Estimate, f"mean rises under noise {_ERRORS}")
relative_flatness = _picture("relative_flatness", results.Estimate, f"relative flatnesses {_ERRORS}")
fisher_rao_norm = _picture(
    "fisher_rao_norm", results.Estimate, f"squared Fisher-Rao norms {_ERRORS}", "squared Fisher-Rao norm"
)
m_sharpness = _picture("m_sharpness", results.BatchSharpness, f"mean largest rises of batches {_ERRORS}", "m-sharpness")
critical_sharpness = _picture(
    "critical_sharpness", results.CriticalSharpness, "critical sharpnesses, with the farther ends of their brackets"
)
ball_sharpness = _picture("ball_sharpness", results.BallSharpness, _BALL, "sharpness")
one_step_sharpness = _picture(
    "one_step_sharpness", results.DirectionalSharpness, _STEP, "rise of the loss after one step", "sharpness"
)


def certify(result: Named[results.Certificate], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw the curvature left within the ball with its residual, under the verdict: at a maximum none is positive.

    Parameters as for :func:`top_eigenvalues`.
    """
    several = require_some(result, results.Certificate)
    points = {name: _points(item, only="curvature") for name, item in several.items()}
    ax = draw_points(points, ax, f"largest curvature left {_CURVATURE}", log=False, legend=legend)
    zero_line(ax)
    _name_ticks(ax, [f"{name}\n{item.verdict}".strip() for name, item in several.items()])
    return ax


def curvature_along(
    result: Named[Along], ax: Axes | None = None, *, log: bool | None = None, legend: bool = True
) -> Axes:
    """Draw curvatures along directions; parameters as for :func:`top_eigenvalues`."""
    several: dict[str, Along] = require_some(result, (results.Scalar, results.Curvatures))
    points = {name: _points(item, "curvature along ") for name, item in several.items()}
    return draw_points(points, ax, f"curvature {_CURVATURE}", log=log, legend=legend)


def momentum_gradient_cosine(result: Named[results.Scalar], ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Draw cosines of momentum and gradient: a negative one overshot; parameters as for :func:`top_eigenvalues`."""
    points = {name: _points(item) for name, item in require_some(result, results.Scalar).items()}
    ax = draw_points(points, ax, "cosine of momentum and gradient", log=False, legend=legend)
    zero_line(ax)
    ax.set_ylim(-1.05, 1.05)
    return ax


def data_interval(
    result: Named[results.DataInterval], ax: Axes | None = None, *, log: bool | None = None, legend: bool = True
) -> Axes:
    """Draw a metric less its bias with its interval, beside a dash at the value on the samples.

    Parameters as for :func:`top_eigenvalues`; the unit is that of the metric.
    """
    several = require_some(result, results.DataInterval)
    points = {}
    for name, item in several.items():
        rows = zip(*(part.reshape(-1).tolist() for part in (item.corrected, item.low, item.high)), strict=True)
        numbered = enumerate(rows, 1)
        points[name] = [Point(str(index), value, low, high, item.converged) for index, (value, low, high) in numbered]
    levels = {f"{100 * item.level:g} %" for item in several.values()}
    dashes = {name: item.value.reshape(-1).tolist() for name, item in several.items()}
    label = f"metric less bias, {' or '.join(sorted(levels))} interval"
    ax = draw_points(points, ax, label, log=log, legend=legend, dashes=("on the samples", dashes))
    if len(ax.get_xticks()) > 1 and any(len(rows) > 1 for rows in points.values()):
        ax.set_xlabel("index")
    return ax


def by_layer(
    result: Named[results.ByLayer[Any]], ax: Axes | None = None, *, log: bool | None = None, legend: bool = True
) -> Axes:
    """Draw a number of every layer with its error, all eigenvalues of each, or the layers' spectral densities.

    Parameters as for :func:`top_eigenvalues`. Of a result with several numbers, such as a ball, the first is drawn.
    """
    several: dict[str, results.ByLayer[Any]] = require_some(result, results.ByLayer)
    first = next(iter(several.values()))
    if any(isinstance(item, results.SpectralDensity) for item in first.values()) and len(several) == 1:
        return spectral_density(dict(first), ax, legend=legend)
    points: dict[str, list[Point]] = {}
    for name, layers in several.items():
        numbers = {layer: _numbers(item.readings()) for layer, item in layers.items()}
        stems = {layer: _stem(rows[0].name) for layer, rows in numbers.items() if rows}
        points[name] = [
            _point(row, layer) for layer, rows in numbers.items() for row in rows if _stem(row.name) == stems[layer]
        ]
    label = " or ".join(dict.fromkeys(_UNITS.get(stem, stem) for stem in stems.values()))
    ax = draw_points(points, ax, label, log=log, legend=legend, grouped=True)
    ax.set_xlabel("layer")
    return ax


def measure(result: Named[results.Measurement], axes: Places = None) -> AxesArray:
    """Draw the table of all metrics, a panel for what is in one unit.

    Parameters and errors as for :func:`top_eigenvalues`; there are several panels.
    """
    several = require_some(result, results.Measurement)
    found: dict[str, dict[str, list[Point]]] = {}
    for name, item in several.items():
        for row in _numbers(item.readings()):
            panel = next((unit for unit, starts in _PANELS.items() if row.name.startswith(starts)), row.name)
            found.setdefault(panel, {}).setdefault(name, []).append(_point(row, row.name))
    found = {unit: found[unit] for unit in (*_PANELS, *found) if unit in found}
    drawn = several_panels(axes, len(found), panel_height=2.3)
    handles: dict[str, Line2D] = {}
    for ax, (unit, points) in zip(drawn, found.items(), strict=True):
        draw_points(points, ax, unit, log=None, legend=False, grouped=True)
        if len(ax.get_xticks()) == 1:  # what it is stands beside the other axis
            ax.set_xticks([])
        handles |= handles_of(points)
    with style():
        name_curves(drawn if axes is None else drawn[:1], made=axes is None, handles=handles)
    return drawn


# ------------------------------------------------------------------------------------------------------ the one picture


def draw_points(
    points: Mapping[str, Sequence[Point]],
    ax: Axes | None,
    label: str,
    *,
    log: bool | None,
    legend: bool,
    dashes: tuple[str, Mapping[str, Sequence[float]]] | None = None,
    grouped: bool = False,
) -> Axes:
    """Draw points with their bars: side by side where each name has one, else over what they are (``grouped``).

    ``dashes`` are further values of the same points, with what they are.
    """
    ticks = list(dict.fromkeys(point.at for rows in points.values() for point in rows))
    grouped = grouped or len(ticks) > 1
    finite = [point for rows in points.values() for point in rows if math.isfinite(point.value)]
    known = np.array([point.value for point in finite])
    if log is None:  # a bar that reaches 0 has no end on a logarithmic axis
        certain = known.size > 0 and not any(point.low <= 0 or point.value <= 0 for point in finite)
        log = bool(certain and known.max() >= LARGE_RANGE * known.min())
    handles: dict[str, Line2D] = {}
    written = known.size <= _FEW and not grouped
    with one_panel(ax, handles, legend=legend) as panel:
        for place, (name, appearance) in enumerate(look(points).items()):
            for index, point in enumerate(points[name]):
                x = ticks.index(point.at) + 0.6 * ((place + 0.5) / len(points) - 0.5) if grouped else float(place)
                _draw(panel, x, point, appearance, written=written)
                if dashes is not None:
                    panel.plot(x, dashes[1][name][index], marker="_", markersize=9, color=appearance.color, zorder=3)
        if log:
            log_scale(panel, [known])
        elif known.size and known.min() < 0 < known.max():
            zero_line(panel)
        _name_ticks(panel, ticks if grouped or set(points) == {""} else list(points))
        panel.set_ylabel(wrapped(label, 0.8 * size_of(panel)[1]))
        handles |= handles_of(points if grouped else {"": [row for rows in points.values() for row in rows]})
        if dashes is not None:
            handles[dashes[0]] = Line2D([], [], marker="_", markersize=9, color=GREY, linestyle="none")
    return panel


def _draw(ax: Axes, x: float, point: Point, appearance: Look, *, written: bool) -> None:
    color = appearance.color
    if not math.isfinite(point.value):
        ax.text(x, 0.03, f"{point.value:g}", color=color, ha="center", fontsize=7, transform=ax.get_xaxis_transform())
        return
    bar = [[point.value - point.low], [point.high - point.value]]
    marker = {"marker": appearance.marker, "markersize": 5, "markerfacecolor": color if point.converged else "white"}
    shape: dict[str, Any] = {**marker, "elinewidth": 1.2, "capsize": 3, "linestyle": "none", "zorder": 3}
    ax.errorbar(x, point.value, bar if np.isfinite(bar).all() else None, color=color, **shape)
    if written:
        known = (point.high - point.low) / 2
        text = f"{point.value:.4g}" + (f" ± {known:.2g}" if known > 1e-4 * abs(point.value) else "")
        text = text.replace("-", "−")  # as on the axes
        ax.annotate(text, (x, point.value), (6, 0), textcoords="offset points", va="center", fontsize=7)


def _name_ticks(ax: Axes, ticks: Sequence[str]) -> None:
    """Name the ticks: in lines where these fit between them, else turned."""
    room = size_of(ax)[0] / max(len(ticks), 1)
    lines = [tick if "\n" in tick else wrapped(tick, room) for tick in ticks]
    longest = max((len(line) for text in lines for line in text.split("\n")), default=0)
    turned: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    if longest <= _PER_INCH * room:
        ax.set_xticks(range(len(ticks)), lines)
    else:
        ax.set_xticks(range(len(ticks)), [wrapped(tick, 1.2) for tick in ticks], **turned)
    ax.set_xlim(-0.6, len(ticks) - 0.4)
    ax.grid(False, axis="x")


def handles_of(points: Mapping[str, Iterable[Point]]) -> dict[str, Line2D]:
    """Return what the markers stand for."""
    shapes: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    looks = look(points)
    handles = {
        name: Line2D([], [], color=looks[name].color, marker=looks[name].marker, **shapes) for name in points if name
    }
    if not all(point.converged for rows in points.values() for point in rows):
        handles["not converged"] = Line2D([], [], color=GREY, marker="o", markerfacecolor="white", **shapes)
    return handles


# ---------------------------------------------------------------------------------------------- from results to points


def _points(result: results.Result, prefix: str = "", only: str | None = None) -> list[Point]:
    """Return the readings that are numbers (of one name) as points, the tick named without a prefix."""
    rows = [row for row in _numbers(result.readings()) if only is None or row.name == only]
    return [_point(row, row.name.removeprefix(prefix)) for row in rows]


def _point(row: results.Reading, at: str) -> Point:
    value = float(row.value)
    return Point(at, value, value - row.error, value + row.error, row.converged)


def _numbers(readings: Iterable[results.Reading]) -> list[results.Reading]:
    return [row for row in readings if not isinstance(row.value, str)]


def _stem(name: str) -> str:
    return name.rstrip("0123456789 ")
