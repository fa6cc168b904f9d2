"""The files of a landscape: pictures, pages and arrays of measured slices."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msam_analysis import plots
from msam_analysis.results import Projection, Result, Slice1D, export

if TYPE_CHECKING:
    from msam_analysis.cli.landscape import View

PICTURES = ("png", "pdf", "svg")
FILMS = ("gif", "mp4")
ARRAYS: dict[str, Callable[[Any, Path], Path]] = {
    "nc": export.to_netcdf,
    "h5": export.to_hdf5,
    "vtk": export.to_vtk,
    "npz": export.to_npz,
}
FORMATS = (*PICTURES, "html", *FILMS, *ARRAYS, "csv")
_NEEDS = {"html": ("plotly", "interactive"), "nc": ("h5netcdf", "export"), "h5": ("h5netcdf", "export")}


def check_formats(formats: Sequence[str], dimensions: int, trajectories: int) -> None:
    """Refuse formats that could not be written, before anything is measured."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"--formats must be among {', '.join(FORMATS)}, got {(unknown or ['none'])[0]!r}")
    if "html" in formats and dimensions == 1:
        raise ValueError("--formats html is a surface to turn: expected --dim 2, or another format")
    if set(formats) & set(FILMS) and not trajectories:
        raise ValueError("--formats gif and mp4 show a trajectory that grows: expected --trajectory FOLDER")
    for package, extra in (_NEEDS[name] for name in formats if name in _NEEDS):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"a format needs {package}, which is not installed: pip install 'msam-analysis[{extra}]'")


def write_all(
    measured: Sequence[tuple[View, Any]], projections: Mapping[str, Projection], formats: Sequence[str], folder: Path
) -> list[Path]:
    """Draw and write slices, all of them in one picture on one scale, and return the files."""
    slices = {view.title: result for view, result in measured}
    one = len(slices) == 1
    written: list[Path] = []
    pictures = [name for name in formats if name in PICTURES]
    if pictures:
        for name, drawn in _drawn(measured, projections).items():
            written += plots.save(drawn, folder / name, pictures, close=True)
    if "html" in formats:
        shown = next(iter(slices.values())) if one else slices
        plots.interactive_surface(shown, folder / "landscape.html", trajectories=projections or None)
        written.append(folder / "landscape.html")
    for name in formats:
        if name in FILMS:
            plane = next(iter(slices.values()))
            written.append(plots.animate_trajectory(plane, projections, folder / f"trajectory.{name}"))
    results: dict[str, Result] = {view.name: result for view, result in measured}
    results |= {f"trajectory-{name}": item for name, item in projections.items()}
    for stem, result in results.items():
        written += [ARRAYS[name](result, folder / stem) for name in formats if name in ARRAYS]
        if "csv" in formats:
            written.append(folder / f"{stem}.csv")
            result.to_frame().to_csv(written[-1], index=False, lineterminator="\n")
    return written


def _drawn(measured: Sequence[tuple[View, Any]], projections: Mapping[str, Projection]) -> dict[str, Any]:
    """Return pictures by name: the loss, also as a surface, and every other number measured at the points."""
    slices = {view.title: result for view, result in measured}
    first = next(iter(slices.values()))
    scalars = [name for name, values in first.metrics.items() if values.shape == first.loss.shape]
    if isinstance(first, Slice1D):
        drawn: dict[str, Any] = {"landscape": plots.slice_1d(slices)}
        for name in scalars:
            drawn[name] = plots.slice_1d(_of_metric(slices, name), label=name)
        return drawn
    if projections:
        drawn = {"landscape": plots.trajectory_panels(first, projections)}
    else:
        drawn = {"landscape": plots.slice_2d(slices)}
    drawn["surface"] = plots.surface_3d(slices)
    for name in scalars:
        scale = False if name == "accuracy" else None  # a fraction: from 0 to 1
        drawn[name] = plots.slice_2d(_of_metric(slices, name), label=name, log=scale)
    for name, axes in drawn.items():
        if name != "surface":
            _mark(axes[0], measured[0][0].marks)
    return drawn


def _of_metric(slices: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return slices with a metric in place of the loss, for the functions that draw a loss."""
    return {
        title: replace(item, loss=item.metrics[name], standard_error=None, rise_error=None)
        for title, item in slices.items()
    }


def _mark(ax: Any, marks: Mapping[str, tuple[float, ...]]) -> None:
    for title, (x, y) in marks.items():
        ax.plot([x], [y], "o", color="white", markeredgecolor="black", markersize=4, zorder=8)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        ax.annotate(title, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7, bbox=box, zorder=9)
