"""The files of a landscape: pictures, pages and arrays of measured slices."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msam_analysis import plots
from msam_analysis.results import Projection, Result, Slice1D, export

PICTURES = ("png", "pdf", "svg")
FILMS = ("gif", "mp4")
ARRAYS: dict[str, Any] = {"nc": export.to_netcdf, "h5": export.to_hdf5, "vtk": export.to_vtk, "npz": export.to_npz}
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
    results: Mapping[str, Result],
    slices: Mapping[str, Any],
    projections: Mapping[str, Projection],
    marks: Mapping[str, tuple[float, ...]],
    formats: Sequence[str],
    folder: Path,
) -> list[Path]:
    """Draw slices, by title, in one picture on one scale; write results, by the names of their files; return all files.

    ``marks``: Points to mark on a plane, by title.
    """
    first = next(iter(slices.values()))
    written: list[Path] = []
    pictures = [name for name in formats if name in PICTURES]
    for name, drawn in _drawn(slices, projections, marks).items() if pictures else ():
        written += plots.save(drawn, folder / name, pictures, close=True)
    if "html" in formats:
        shown = first if len(slices) == 1 else slices
        plots.interactive_surface(shown, folder / "landscape.html", trajectories=projections or None)
        written.append(folder / "landscape.html")
    for film in (name for name in formats if name in FILMS):
        written.append(plots.animate_trajectory(first, projections, folder / f"trajectory.{film}"))
    for stem, result in results.items():
        written += [ARRAYS[name](result, folder / stem) for name in formats if name in ARRAYS]
        if "csv" in formats:
            written.append(folder / f"{stem}.csv")
            result.to_frame().to_csv(written[-1], index=False, lineterminator="\n")
    return written


def _drawn(
    slices: Mapping[str, Any], projections: Mapping[str, Projection], marks: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Return pictures by name: the loss, also as a surface, and every other number measured at the points."""
    first = next(iter(slices.values()))
    line = isinstance(first, Slice1D)
    draw: Any = plots.slice_1d if line else plots.slice_2d
    drawn = {"landscape": plots.trajectory_panels(first, projections) if projections else draw(slices)}
    if not line:
        drawn["surface"] = plots.surface_3d(slices)
    for name in (name for name, values in first.metrics.items() if values.shape == first.loss.shape):
        # A fraction is drawn from 0 to 1.
        drawn[name] = draw(slices, values=name, **({"log": False} if name == "accuracy" else {}))
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for axes in (axes for name, axes in drawn.items() if name != "surface" and marks):
        for title, (x, y) in marks.items():
            axes[0].plot([x], [y], "o", color="white", markeredgecolor="black", markersize=4, zorder=8)
            near = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "bbox": box, "zorder": 9}
            axes[0].annotate(title, (x, y), (0, 6), **near)
    return drawn
