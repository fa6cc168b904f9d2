"""Surfaces that can be turned, in one file that needs no network."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from msam_analysis.plots.look import Array, look
from msam_analysis.plots.scale import Scale, as_array, drawable, number
from msam_analysis.plots.trajectories import Projections, measured_losses, named, require_same_plane
from msam_analysis.results import Projection, Slice2D
from msam_analysis.results.files import write_text
from msam_analysis.results.text import printable

if TYPE_CHECKING:
    import plotly.graph_objects as go

_HEAD = "<title>Loss surface</title><style>body { margin: 0; overflow: hidden; }</style>"
_FEW = 25  # dots and threads on one trajectory
_FONT = {"family": "DejaVu Sans, Verdana, sans-serif", "size": 13, "color": "#1a1a1a"}


def interactive_surface(
    result: Slice2D | Mapping[str, Slice2D],
    path: str | os.PathLike[str] | None = None,
    *,
    trajectories: Projections | None = None,
    values: str = "loss",
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
    label: str | None = None,
) -> go.Figure:
    """Draw the loss on a plane as a surface to turn, with trajectories at their true loss; write it as one HTML file.

    Parameters
    ----------
    result
        One slice, or a mapping from a name to each; several have one height and colour scale, and a click in the legend
        takes one away.
    path
        Where to write the page, ``.html``; parents are made. Everything is in the file, plotly too (some 5 MB), so that
        it opens without a network. ``None``: nothing is written.
    trajectories
        As for :func:`trajectory`, with measured losses: a full line at the loss at the weights, dots on the surface at
        the loss of their projections, and a thread from each to the other.
    values, limits, log, label
        As in :func:`slice_2d`; the surface is cut off at the ends.

    Returns
    -------
    plotly.graph_objects.Figure
        To go on from, or to show in a notebook. Pointing at the surface tells the coordinates and the loss as measured,
        pointing at a trajectory also the step and the distance from the plane. NaN and infinity are holes.

    Raises
    ------
    ValueError
        As :func:`slice_2d`; a trajectory without losses or along other directions.
    TypeError
        As :func:`slice_2d`, or something that is not a projection.
    ImportError
        plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(
            "interactive_surface needs plotly, which is not installed: pip install 'msam-analysis[interactive]'"
        ) from error
    slices, losses = drawable(result, values)
    label = _plain(label or values)
    several = {} if trajectories is None else named(trajectories)
    heights = measured_losses(several)
    for item in slices.values():
        require_same_plane(item, several)
    scale = Scale.of(losses, limits, log)
    figure = go.Figure()
    for (name, item), loss in zip(slices.items(), losses, strict=True):
        figure.add_trace(_surface(go, name, item, loss, scale, label, bar=not len(figure.data)))
    if several:
        figure.update_traces(opacity=0.7, selector={"type": "surface"})  # the true loss is often below
    for name, appearance in look(several).items():
        figure.add_traces(_path(go, name, several[name], heights[name], appearance.color, scale, label))
    first = next(iter(slices.values()))
    figure.update_layout(_layout(first, scale, label, legend=len(slices) + len(several) > 1))
    if path is not None:
        buttons = {"displaylogo": False, "responsive": True}
        page: str = figure.to_html(buttons, include_plotlyjs=True, div_id="surface", default_height="100vh")
        write_text(path, page.replace("<head>", f"<head>{_HEAD}", 1))
    return figure


def _height(loss: Array, scale: Scale) -> Array:
    """Return the height of losses on a scale; NaN where there is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        cut = np.clip(np.where(np.isfinite(loss), loss, np.nan), scale.low, scale.high)
        height: Array = np.log10(cut) if scale.log else cut
    return height


def _surface(go: Any, name: str, item: Slice2D, loss: Array, scale: Scale, label: str, *, bar: bool) -> Any:
    # plotly wants rows of constant y
    low, high = _height(np.array([scale.low, scale.high]), scale)
    # around holes plotly draws level lines that are not there
    levels = {"show": bool(np.isfinite(loss).all()), "usecolormap": True, "width": 1}
    name = _plain(name)
    return go.Surface(
        name=name,
        x=as_array(item.x),
        y=as_array(item.y),
        z=_height(loss, scale).T,
        customdata=np.array([[f"{value:.6g}" for value in row] for row in loss.T], dtype=np.object_),  # as measured
        hovertemplate=f"x %{{x:.4g}}<br>y %{{y:.4g}}<br>{label} %{{customdata}}<extra>{name}</extra>",
        cmin=low,
        cmax=high,
        colorscale="Viridis",
        showscale=bar,
        showlegend=bool(name),
        colorbar={"title": {"text": label, "side": "right"}, **_ticks(scale), "len": 0.7, "thickness": 16},
        contours={"z": {**levels, "start": low, "end": high, "size": (high - low) / 24}},
        lighting={"ambient": 0.75, "diffuse": 0.5, "specular": 0.05},
    )


def _path(
    go: Any, name: str, item: Projection, losses: tuple[Array, Array], color: str, scale: Scale, label: str
) -> list[Any]:
    name = _plain(name)
    x, y = as_array(item.coordinates).T
    true, projected = losses
    above, on = _height(true, scale), _height(projected, scale)
    told = np.stack([as_array(item.steps), true, projected, as_array(item.off_plane)], axis=1)
    hover = (
        f"step %{{customdata[0]:.0f}}<br>{label} %{{customdata[1]:.6g}}<br>projected %{{customdata[2]:.6g}}"
        f"<br>from plane %{{customdata[3]:.4g}}<extra>{name}</extra>"
    )
    common: dict[str, Any] = {"legendgroup": name, "hovertemplate": hover}
    gap = np.full_like(x, np.nan)
    few = np.unique(np.linspace(0, len(x) - 1, _FEW).round().astype(int))
    threads = (np.stack(ends, axis=1)[few].ravel() for ends in ((x, x, gap), (y, y, gap), (above, on, gap)))
    return [
        go.Scatter3d(
            x=x, y=y, z=above, mode="lines", name=name, customdata=told, **common, line={"color": color, "width": 6}
        ),
        go.Scatter3d(
            x=x[few], y=y[few], z=on[few], mode="markers", showlegend=False, customdata=told[few], **common,
            marker={"color": color, "size": 3},
        ),
        go.Scatter3d(
            **dict(zip("xyz", threads, strict=True)), mode="lines", showlegend=False, legendgroup=name,
            line={"color": color, "width": 1.5}, hoverinfo="skip",
        ),
    ]  # fmt: skip


def _layout(item: Slice2D, scale: Scale, label: str, *, legend: bool) -> dict[str, Any]:
    lengths = [np.ptp(as_array(axis)) * norm for axis, norm in zip((item.x, item.y), item.direction_norms, strict=True)]
    longest = max(lengths) or 1.0
    flat = {"backgroundcolor": "white", "gridcolor": "#e3e3e3", "zerolinecolor": "#c9c9c9"}
    return {
        "font": _FONT,
        "paper_bgcolor": "white",
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "showlegend": legend,
        "legend": {"x": 0.02, "y": 0.98, "bgcolor": "rgba(255,255,255,0.8)"},
        "scene": {
            "xaxis": {"title": {"text": _plain(item.directions[0])}, **flat},
            "yaxis": {"title": {"text": _plain(item.directions[1])}, **flat},
            "zaxis": {"title": {"text": label}, **_ticks(scale), **flat},
            "aspectmode": "manual",
            "aspectratio": {"x": max(lengths[0] / longest, 0.4), "y": max(lengths[1] / longest, 0.4), "z": 0.65},
            "camera": {"eye": {"x": -1.0, "y": -1.45, "z": 1.0}, "center": {"x": 0, "y": 0, "z": -0.1}},
        },
    }  # fmt: skip


def _plain(name: str) -> str:
    """Return a name as plotly shows it: no HTML, no place for a number, and no formula to escape."""
    return html.escape(printable(name.replace(r"\$", "$"))).replace("%{", "%&#123;")


def _ticks(scale: Scale) -> dict[str, Any]:
    """Return the labelled levels, their numbers without mathematical notation."""
    numbers = [f"{value:.3g}" if "$" in number(value) else number(value) for value in scale.lines]
    return {"tickvals": _height(scale.lines, scale), "ticktext": numbers}
