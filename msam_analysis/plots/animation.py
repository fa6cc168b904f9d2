"""Trajectories that move."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import animation
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from msam_analysis.plots.look import Array, style
from msam_analysis.plots.scale import as_array
from msam_analysis.plots.trajectories import Drawn, Projections, draw_panels, named
from msam_analysis.results import Projection, Slice2D, atomic_path

_MOST_FRAMES = 120
_HOLD = 1.0  # seconds that the last picture stays
_DPI = 150


def animate_trajectory(
    plane: Slice2D,
    projections: Projections,
    path: str | os.PathLike[str],
    *,
    seconds: float = 6.0,
    frames: int | None = None,
    limits: tuple[float, float] | None = None,
    log: bool | None = None,
) -> Path:
    """Animate :func:`trajectory_panels`: the trajectories grow, step by step, and their losses and distances with them.

    Parameters
    ----------
    plane, projections
        As for :func:`trajectory_panels`. Trajectories recorded at different steps keep time with one another.
    path
        Where to write: ``.gif``, or ``.mp4`` where ffmpeg is installed; parents are made. A GIF has the same bytes
        for the same input.
    seconds
        How long it lasts, one more second for the last picture not counted. Default 6.
    frames
        How many pictures; default: one for each recorded step, at most 120.
    limits, log
        As for :func:`trajectory_panels`.

    Returns
    -------
    pathlib.Path
        The file written. In a notebook, ``IPython.display.Image(filename=path)`` shows a GIF.

    Raises
    ------
    ValueError, TypeError
        As :func:`trajectory_panels`; ``ValueError`` too if ``seconds`` or ``frames`` is not positive, the suffix is
        another, or ffmpeg is missing.
    """
    path = Path(path)
    if not seconds > 0 or (frames is not None and frames < 1):
        raise ValueError(f"seconds and frames must be positive, got {seconds!r} and {frames!r}: leave them out")
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"an animation is written to .gif or .mp4, got {path.name!r}: choose one of the two")
    if path.suffix == ".mp4" and not animation.FFMpegWriter.isAvailable():
        raise ValueError("writing .mp4 needs the program ffmpeg, which was not found: install it, or write a .gif")
    film = make_film(plane, named(projections), frames or _MOST_FRAMES, limits=limits, log=log)
    rate = film.frames / seconds
    try:
        with style(), atomic_path(path) as partial:
            (_write_gif if path.suffix == ".gif" else _write_mp4)(partial, film, rate)
    finally:
        plt.close(film.figure)
    return path


class Film(NamedTuple):
    """A picture, and how it moves."""

    figure: Any
    show: Callable[[int], None]  # sets the picture to a frame
    frames: int
    moving: tuple[Artist, ...]  # what differs between frames, or lies above it, from back to front


def make_film(plane: Slice2D, several: Mapping[str, Projection], frames: int, **scale: Any) -> Film:
    """Draw the whole picture, with options of :func:`draw_panels`, and return how to show it frame by frame."""
    axes, drawn = draw_panels(plane, several, **scale)
    figure = axes[0].figure
    with style():
        title = axes[0].set_title("step")
        figure.canvas.draw()
    figure.set_layout_engine("none")  # a layout made anew for each picture would tremble
    times = np.unique(np.concatenate([as_array(item.steps) for item in several.values()]))
    times = times[np.unique(np.linspace(0, len(times) - 1, min(frames, len(times))).round().astype(int))]
    whole = {  # the complete data of the lines: path, loss, projected loss, distance
        name: [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in artists.growing]
        for name, artists in drawn.items()
    }

    def show(frame: int) -> None:
        title.set_text(f"step {times[frame]:.0f}")
        for name, artists in drawn.items():
            _show(artists, whole[name], several[name], times[frame])

    moving = [title, *(artist for artists in drawn.values() for artist in artists.moving)]
    return Film(figure, show, len(times), tuple(sorted(moving, key=Artist.get_zorder)))


def _show(artists: Drawn, whole: list[tuple[Array, Array]], item: Projection, time: float) -> None:
    """Show a trajectory as far as it came until some time."""
    steps = as_array(item.steps)
    past = int((steps <= time).sum())
    for line, (x, y) in zip(artists.growing, whole, strict=True):
        line.set_data(x[:past], y[:past])
    for marker, (x, y) in zip(artists.heads, (whole[0], whole[1], whole[3]), strict=True):
        marker.set_data(x[max(past - 1, 0) : past], y[max(past - 1, 0) : past])
    if artists.circles is not None:
        artists.circles.set_sizes(np.where(steps[artists.at] <= time, artists.areas, 0.0))


def _write_mp4(path: Path, film: Film, rate: float) -> None:
    writer = animation.FFMpegWriter(fps=max(round(rate), 1))
    with writer.saving(film.figure, os.fspath(path), _DPI):
        for frame in range(film.frames):
            film.show(frame)
            writer.grab_frame()
        for _ in range(round(_HOLD * rate)):
            writer.grab_frame()


def _write_gif(path: Path, film: Film, rate: float) -> None:
    pictures = list(_pictures(film))
    palette = pictures[-1].quantize(256, dither=Image.Dither.NONE)  # one for all: colours do not flicker
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    colors[colors.min(axis=1) >= 250] = 255  # the paper stays white
    palette.putpalette(colors.ravel().tolist())
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [1000 / rate] * (film.frames - 1) + [1000 / rate + 1000 * _HOLD]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _pictures(film: Film) -> Iterator[Image.Image]:
    """Draw what stands still once, and on copies of that what moves: ten times faster than drawing all each time."""
    film.figure.set_dpi(_DPI)
    canvas: Any = FigureCanvasAgg(film.figure)  # matplotlib leaves most of it untyped
    for artist in film.moving:
        artist.set_animated(True)
    canvas.draw()
    still = canvas.copy_from_bbox(film.figure.bbox)
    for frame in range(film.frames):
        film.show(frame)
        canvas.restore_region(still)
        for artist in film.moving:
            artist.draw(canvas.get_renderer())
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
