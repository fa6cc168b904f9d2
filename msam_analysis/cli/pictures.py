"""The files of a landscape: pictures, pages and arrays of measured slices."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import animation

from msam_analysis import plots
from msam_analysis.cli.names import file_names
from msam_analysis.objective.explaining import decorated
from msam_analysis.plots.look import literal
from msam_analysis.results import Projection, Result, Slice1D, export
from msam_analysis.results.files import write_text

PICTURES = ("png", "pdf", "svg")
FILMS = ("gif", "mp4")
ARRAYS: dict[str, Any] = {"nc": export.to_netcdf, "h5": export.to_hdf5, "vtk": export.to_vtk, "npz": export.to_npz}
FORMATS = (*PICTURES, "html", *FILMS, *ARRAYS, "csv")
_OURS = ("landscape", "surface")  # pictures of the loss
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
    if "mp4" in formats and not animation.FFMpegWriter.isAvailable():
        raise ValueError("--formats mp4 needs the program ffmpeg, which was not found: install it, or choose gif")
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
) -> tuple[list[Path], list[str]]:
    """Write results, by the names of their files; draw slices, by title, in one picture on one scale.

    Return all files, and what could not be made: one picture that fails takes no other with it.

    ``marks``: Points to mark on a plane, by title.
    """
    first = next(iter(slices.values()))
    written: list[Path] = []
    failed: list[str] = []
    for stem, result in results.items():
        for name in (name for name in formats if name in ARRAYS):
            with decorated(f"{stem} as {name}", failed):
                written.append(ARRAYS[name](result, folder / stem))
        if "csv" in formats:
            path = folder / f"{stem}.csv"
            write_text(path, result.to_frame().to_csv(index=False, lineterminator="\n"))
            written.append(path)
    pictures = [name for name in formats if name in PICTURES]
    for name, draw in _drawn(slices, projections, marks).items() if pictures else ():
        with decorated(f"the picture {name}", failed):
            written += plots.save(draw(), folder / file_names([name])[0], pictures, close=True)
    if "html" in formats:
        with decorated("the page landscape.html", failed):
            shown = first if len(slices) == 1 else slices
            plots.interactive_surface(shown, folder / "landscape.html", trajectories=projections or None)
            written.append(folder / "landscape.html")
    for film in (name for name in formats if name in FILMS):
        with decorated(f"the film trajectory.{film}", failed):
            written.append(plots.animate_trajectory(first, projections, folder / f"trajectory.{film}"))
    return written, failed


def _drawn(
    slices: Mapping[str, Any], projections: Mapping[str, Projection], marks: Mapping[str, tuple[float, ...]]
) -> dict[str, Callable[[], Any]]:
    """Return what draws each picture, by name: the loss, also as a surface, and every other number at the points."""
    first = next(iter(slices.values()))
    line = isinstance(first, Slice1D)
    one: Any = plots.slice_1d if line else plots.slice_2d
    drawn: dict[str, Callable[[], Any]] = {
        "landscape": partial(plots.trajectory_panels, first, projections) if projections else partial(one, slices)
    }
    for name in (name for name, values in first.metrics.items() if values.shape == first.loss.shape):
        # A fraction is drawn from 0 to 1.
        drawn[f"metric-{name}" if name in _OURS else name] = partial(
            one, slices, values=name, **({"log": False} if name == "accuracy" else {})
        )
    loss, *others = [(name, partial(_marked, draw, marks)) for name, draw in drawn.items()]
    return dict([loss, *([] if line else [("surface", partial(plots.surface_3d, slices))]), *others])


def _marked(draw: Callable[[], Any], marks: Mapping[str, tuple[float, ...]]) -> Any:
    """Draw, and mark points on the first axes."""
    axes = draw()
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for title, (x, y) in marks.items():
        axes[0].plot([x], [y], "o", color="white", markeredgecolor="black", markersize=4, zorder=8)
        near = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "bbox": box, "zorder": 9}
        axes[0].annotate(literal(title), (x, y), (0, 6), **near)
    return axes
