"""Pictures of trajectories show where every point is, and what the plane hides of it."""

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib import animation
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from PIL import Image

from msam_analysis import plots
from msam_analysis.plots.animation import make_film
from msam_analysis.results import Projection, Slice2D
from tests.plots.cases import OPTIMIZERS, plane, projection, with_surface

SEEN = {name: projection(name, turn=turn) for name, turn in zip(OPTIMIZERS, (-0.5, 0.0, 1.0, 2.0), strict=True)}


def with_a_gap() -> Projection:
    item = projection()
    coordinates = item.coordinates.clone()
    coordinates[3] = math.nan
    return dataclasses.replace(
        item, coordinates=coordinates, off_plane=torch.where(torch.arange(9) == 3, math.nan, item.off_plane)
    )


def colored(ax: Any, name: str, points: int | None = None) -> list[Any]:
    """The lines of one optimizer, by its colour and number of points."""
    color = plots.look([name])[name].color.lower()
    lines = [item for item in ax.lines if to_hex(item.get_color()) == color]
    return [item for item in lines if points is None or np.size(item.get_xdata()) == points]


def circles(ax: Any) -> list[Any]:
    return [item for item in ax.collections if isinstance(item, PathCollection)]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for item in figure.legends for text in item.get_texts()]


# ----------------------------------------------------------------------------------------------------------- matplotlib


def test_every_point_is_at_its_coordinates() -> None:
    ax = plots.trajectory(SEEN, plots.slice_2d(plane()))
    for name, item in SEEN.items():
        path, first, last = colored(ax, name)
        np.testing.assert_array_equal(path.get_xydata(), item.coordinates)
        np.testing.assert_array_equal(first.get_xydata(), item.coordinates[:1])
        np.testing.assert_array_equal(last.get_xydata(), item.coordinates[-1:])
        assert last.get_marker() == plots.look([name])[name].marker


def test_the_map_keeps_its_limits_and_says_what_lies_outside() -> None:
    ax = plots.slice_2d(plane())
    before = ax.get_xlim(), ax.get_ylim()
    far = dataclasses.replace(projection("SGD"), coordinates=SEEN["SGD"].coordinates * torch.tensor([1.0, 1.3]))
    plots.trajectory([far, SEEN["MSAM"]], ax)
    assert (ax.get_xlim(), ax.get_ylim()) == before
    outside = int((far.coordinates[:, 1].abs() > 0.5).sum())
    assert 0 < outside < 9
    assert legend(ax.figure)[:2] == [f"SGD ({outside} of 9 points outside)", "MSAM"]


@pytest.mark.parametrize("shift", [(-2.0, 0.0), (2.0, 0.0), (0.0, -2.0), (0.0, 2.0)])
def test_points_outside_are_counted_on_every_side(shift: tuple[float, float]) -> None:
    item = projection()
    away = item.coordinates.clone()
    away[4] += torch.tensor(shift).double()
    ax = plots.trajectory(dataclasses.replace(item, coordinates=away), plots.slice_2d(plane()))
    assert legend(ax.figure)[0] == "MSAM (1 of 9 points outside)"


def test_circles_grow_with_the_distance_from_the_plane() -> None:
    item = projection()
    (drawn,) = circles(plots.trajectory(item))
    at = [np.flatnonzero((item.coordinates.numpy() == offset).all(axis=1)).item() for offset in drawn.get_offsets()]
    assert {at[0], at[-1]} == {0, 8}
    areas = drawn.get_sizes()
    np.testing.assert_allclose(areas / areas.max(), item.off_plane[at] / float(item.off_plane.max()))


def test_the_legend_has_a_circle_of_a_stated_distance() -> None:
    ax = plots.trajectory(dataclasses.replace(projection(), off_plane=3.7 * projection().off_plane))
    figure: Any = ax.figure
    assert legend(figure) == ["MSAM", "start", "2 from plane"]
    handle = figure.legends[0].legend_handles[-1]
    area = math.pi * (handle.get_markersize() / 2) ** 2
    assert area == pytest.approx(circles(ax)[0].get_sizes().max() * 2 / 3.7)


@pytest.mark.parametrize(
    "flat",
    [
        dataclasses.replace(projection(), off_plane=torch.zeros(9).double()),
        dataclasses.replace(
            projection(), off_plane=torch.full((9,), 1e-4).double(), rounding=torch.full((9,), 2e-4).double()
        ),
    ],
    ids=["in the plane", "within rounding"],
)
def test_points_in_the_plane_have_no_circles(flat: Projection) -> None:
    ax = plots.trajectory(flat)
    assert not circles(ax)
    assert legend(ax.figure) == ["MSAM", "start"]


def test_circles_can_be_left_out() -> None:
    ax = plots.trajectory(projection(), circles=False, legend=False)
    assert not circles(ax)
    assert not legend(ax.figure)


def test_a_point_that_is_nan_is_a_gap() -> None:
    item = with_a_gap()
    axes = plots.trajectory_panels(plane(), item)
    path = colored(axes[0], "MSAM", 9)[0]
    np.testing.assert_array_equal(path.get_xydata(), item.coordinates)
    assert np.isfinite(circles(axes[0])[0].get_offsets()).all()


def test_nothing_but_nan_is_an_empty_path() -> None:
    nothing = dataclasses.replace(projection("SGD"), coordinates=torch.full((9, 2), math.nan))
    ax = plots.trajectory([nothing, SEEN["MSAM"]])
    ax.figure.canvas.draw()
    assert [np.size(item.get_xdata()) for item in colored(ax, "SGD")] == [9, 0, 0]


def test_the_true_loss_stands_beside_the_projected_one() -> None:
    axes = plots.trajectory_losses(SEEN)
    assert [ax.get_ylabel() for ax in axes] == ["loss", "distance from plane"]
    for name, item in SEEN.items():
        true, projected = colored(axes[0], name, 9)
        (off_plane,) = colored(axes[1], name, 9)
        np.testing.assert_array_equal(true.get_xydata(), torch.stack([item.steps, item.loss], 1))  # type: ignore[list-item]
        np.testing.assert_array_equal(projected.get_ydata(), item.projected_loss)
        np.testing.assert_array_equal(off_plane.get_ydata(), item.off_plane)
        assert true.get_linestyle() == "-"
        assert projected.get_linestyle() == "--"
    assert legend(axes[0].figure) == [*OPTIMIZERS, "loss at the weights", "at their projection"]


@pytest.mark.parametrize(("factor", "given", "log"), [(1.0, None, True), (0.0, None, False), (1.0, False, False)])
def test_losses_take_a_log_axis_where_the_range_is_large(factor: float, given: bool | None, log: bool) -> None:
    item = projection()
    assert item.projected_loss is not None
    item = dataclasses.replace(
        item, loss=factor * item.projected_loss + 1, projected_loss=factor * item.projected_loss + 1e-3
    )
    item = item if factor else dataclasses.replace(item, projected_loss=item.loss)
    assert (plots.trajectory_losses(item, log=given)[0].get_yscale() == "log") == log


def test_panels_are_the_map_the_losses_and_the_distances() -> None:
    axes = plots.trajectory_panels(plane(), SEEN)
    assert axes[0].get_xlim() == (-1.0, 1.0)
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("u", "v")
    assert [ax.get_ylabel() for ax in axes[1:]] == ["loss", "distance from plane"]
    assert axes[1].get_xlim() == axes[2].get_xlim()
    assert legend(axes[0].figure) == [
        *OPTIMIZERS, "start", "1 from plane", "loss at the weights", "at their projection",
    ]  # fmt: skip


def test_names_come_from_labels_or_keys() -> None:
    ax = plots.trajectory([projection("SGD"), projection("SGD")])
    assert legend(ax.figure)[:2] == ["SGD", "SGD 2"]
    assert legend(plots.trajectory({"mine": projection()}).figure)[0] == "mine"


# ------------------------------------------------------------------------------------------------------------ animation


def frames(path: Path) -> list[npt.NDArray[np.uint8]]:
    with Image.open(path) as picture:
        found = []
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            found.append(np.asarray(picture.convert("RGB")))
        return found


def test_an_animation_grows_step_by_step() -> None:
    film = make_film(plane(), SEEN, 100)
    assert film.frames == 9
    for frame in (0, 4, 8, 2):
        film.show(frame)
        map_, losses, distances = film.figure.axes[:3]
        assert map_.get_title() == f"step {10 * frame}"
        for name, item in SEEN.items():
            path, _, head = colored(map_, name)
            np.testing.assert_array_equal(path.get_xydata(), item.coordinates[: frame + 1])
            np.testing.assert_array_equal(head.get_xydata(), item.coordinates[frame : frame + 1])
            true, projected, end = colored(losses, name)
            np.testing.assert_array_equal(true.get_ydata(), item.loss[: frame + 1])  # type: ignore[index]
            np.testing.assert_array_equal(projected.get_ydata(), item.projected_loss[: frame + 1])  # type: ignore[index]
            np.testing.assert_array_equal(end.get_ydata(), item.loss[frame : frame + 1])  # type: ignore[index]
            off_plane, end = colored(distances, name)
            np.testing.assert_array_equal(off_plane.get_ydata(), item.off_plane[: frame + 1])
            np.testing.assert_array_equal(end.get_ydata(), item.off_plane[frame : frame + 1])
        shown = [int((drawn.get_sizes() > 0).sum()) for drawn in circles(map_)]
        assert max(shown) <= frame
        assert (max(shown) > 0) == (frame > 0)


def test_an_animation_is_drawn_in_every_frame_and_leaves_nothing_open(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    path = plots.animate_trajectory(plane(), SEEN, tmp_path / "new" / "a.gif", seconds=1.0)
    assert path == tmp_path / "new" / "a.gif"
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()
    drawn = frames(path)
    assert len(drawn) == 9
    assert all((a != b).any() for a, b in itertools.pairwise(drawn))
    # Of 255: the palette has 256 colours, and matplotlib 3.10 fills it with others.
    tolerance = 2.0 if mpl.__version_info__ >= (3, 11) else 8.0
    assert (drawn[0][0, 0] >= 255 - (tolerance > 2) * tolerance).all(), "white"
    film = make_film(plane(), SEEN, 100)  # the last picture, all of it drawn at once
    film.show(8)
    film.figure.set_dpi(150)
    canvas: Any = FigureCanvasAgg(film.figure)
    canvas.draw()
    expected = np.asarray(canvas.buffer_rgba())[:, :, :3].astype(float)
    assert np.abs(drawn[-1] - expected).mean() < tolerance


def test_an_animation_has_the_same_bytes_again(tmp_path: Path) -> None:
    a, b = (plots.animate_trajectory(plane(), projection(), tmp_path / f"{name}.gif", frames=3) for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert len(frames(a)) == 3


def test_trajectories_of_different_steps_keep_time() -> None:
    slow = dataclasses.replace(projection("SGD"), steps=20 * torch.arange(9))
    film = make_film(plane(), {"SGD": slow, "MSAM": projection("MSAM")}, 100)
    film.show(3)  # steps 0, 10, 20, 30
    assert [len(colored(film.figure.axes[0], name)[0].get_xdata()) for name in ("SGD", "MSAM")] == [2, 4]


def test_a_video_is_left_to_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []

    class Writer:
        def __init__(self, fps: int) -> None:
            self.fps = fps

        @staticmethod
        def isAvailable() -> bool:  # noqa: N802 - matplotlib's name
            return True

        @contextmanager
        def saving(self, figure: Any, path: str, dpi: int) -> Iterator[None]:
            self.figure = figure
            yield
            Path(path).write_bytes(f"{self.fps} a second".encode())

        def grab_frame(self) -> None:
            titles.append(self.figure.axes[0].get_title())

    monkeypatch.setattr(animation, "FFMpegWriter", Writer)
    path = plots.animate_trajectory(plane(), projection(), tmp_path / "a.mp4", seconds=3.0)
    assert path.read_bytes() == b"3 a second"
    assert titles == [*(f"step {10 * step}" for step in range(9)), *(3 * ["step 80"])]


# ---------------------------------------------------------------------------------------------------------- interactive


def holes() -> Slice2D:
    whole = plane()
    loss = whole.loss.clone()
    loss[0, 0], loss[6, 12] = math.nan, math.inf
    return with_surface(whole.x.numpy(), whole.y.numpy(), loss.numpy(), ("u", "v"))


def test_a_surface_to_turn_has_every_loss_at_its_place() -> None:
    pytest.importorskip("plotly")
    (surface,) = plots.interactive_surface(holes(), log=True).data
    np.testing.assert_array_equal(surface.x, holes().x)
    np.testing.assert_array_equal(surface.y, holes().y)
    loss = holes().loss.numpy().T  # rows of constant y
    finite = np.isfinite(loss)
    np.testing.assert_allclose(np.asarray(surface.z)[finite], np.log10(loss[finite]))
    assert np.isnan(np.asarray(surface.z)[~finite]).all()
    assert surface.customdata[4][2] == f"{float(holes().loss[2, 4]):.6g}"
    assert not surface.contours.z.show


def test_limits_cut_the_surface_but_not_what_it_tells() -> None:
    pytest.importorskip("plotly")
    (surface,) = plots.interactive_surface(plane(), limits=(0.1, 5.0), log=False).data
    assert (np.min(surface.z), np.max(surface.z)) == (0.1, 5.0)
    assert (surface.cmin, surface.cmax) == (0.1, 5.0)
    assert float(surface.customdata[0][0]) == pytest.approx(float(plane().loss[0, 0]), rel=1e-5)


def test_several_surfaces_share_one_scale() -> None:
    pytest.importorskip("plotly")
    drawn = plots.interactive_surface({"SGD": plane(12.0), "MSAM": plane(1.0)}).data
    assert [item.name for item in drawn] == ["SGD", "MSAM"]
    assert len({(item.cmin, item.cmax) for item in drawn}) == 1
    assert [item.showscale for item in drawn] == [True, False]


def test_trajectories_stand_at_their_true_loss() -> None:
    pytest.importorskip("plotly")
    item = projection()
    assert item.loss is not None
    assert item.projected_loss is not None
    surface, line, dots, threads = plots.interactive_surface(plane(), trajectories=item, log=False).data
    assert surface.opacity < 1
    x, y = item.coordinates.T
    np.testing.assert_array_equal(line.x, x)
    np.testing.assert_array_equal(line.y, y)
    np.testing.assert_array_equal(line.z, item.loss)
    np.testing.assert_array_equal(dots.z, item.projected_loss)
    np.testing.assert_array_equal(
        np.reshape(threads.z, (9, 3))[:, :2], torch.stack([item.loss, item.projected_loss], 1)
    )
    np.testing.assert_array_equal(line.customdata[:, 3], item.off_plane)
    assert line.line.color == plots.look(["MSAM"])["MSAM"].color
    assert (line.name, line.legendgroup, dots.legendgroup) == ("MSAM", "MSAM", "MSAM")


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    figure = plots.interactive_surface(holes(), tmp_path / "new" / "a.html", trajectories=SEEN)
    page = (tmp_path / "new" / "a.html").read_text(encoding="utf-8")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "a.html"]
    assert not re.search(r"<script[^>]*\ssrc=|<link[^>]*\shref=", page)
    assert len(page) > 10**6
    start = page.rindex("Plotly.newPlot(")
    data, _ = json.JSONDecoder().raw_decode(page[page.index("[", start) :])
    assert [item["type"] for item in data] == [item.type for item in figure.data]
    plots.interactive_surface(holes(), tmp_path / "b.html", trajectories=SEEN)
    assert (tmp_path / "b.html").read_text(encoding="utf-8") == page


def test_without_plotly_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"needs plotly.*msam-analysis\[interactive\]"):
        plots.interactive_surface(plane())


# ------------------------------------------------------------------------------------------------------------- mistakes

BARE = projection(losses=False)
ELSEWHERE = dataclasses.replace(projection(), directions=("u", "w"))
LONGER = dataclasses.replace(projection("SGD"), direction_norms=(1.0, 2.0))
ON_A_LINE = dataclasses.replace(projection(), coordinates=torch.ones(9, 1), directions=("u",), direction_norms=(1.0,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.trajectory([]), "at least one"),
        (lambda: plots.trajectory(ON_A_LINE), "onto 1 directions, expected two"),
        (lambda: plots.trajectory([projection(), LONGER]), "'SGD' is projected onto another plane"),
        (lambda: plots.trajectory_losses(BARE), "'MSAM' were not measured"),
        (lambda: plots.trajectory_losses(projection(), [plt.figure().subplots()]), "2 panels need 2 axes"),
        (lambda: plots.trajectory_panels(plane(), BARE), "'MSAM' were not measured"),
        (lambda: plots.trajectory_panels(plane(), ELSEWHERE), "expected the same directions"),
        (lambda: plots.trajectory_panels(plane(), LONGER), "expected the same directions"),
        (lambda: plots.interactive_surface(plane(), trajectories=BARE), "'MSAM' were not measured"),
        (lambda: plots.interactive_surface(plane(), trajectories=ELSEWHERE), "expected the same directions"),
        (lambda: plots.interactive_surface({}), "at least one"),
        (lambda: plots.animate_trajectory(plane(), BARE, "a.gif"), "'MSAM' were not measured"),
        (lambda: plots.animate_trajectory(plane(), projection(), "a.avi"), "to .gif or .mp4, got 'a.avi'"),
        (lambda: plots.animate_trajectory(plane(), projection(), "a.gif", seconds=0.0), "must be positive"),
        (lambda: plots.animate_trajectory(plane(), projection(), "a.gif", frames=0), "must be positive"),
    ],
)
def test_refuses(call: Callable[[], object], message: str) -> None:
    if "interactive_surface" in call.__code__.co_names:
        pytest.importorskip("plotly")
    open_before = len(plt.get_fignums())
    with pytest.raises(ValueError, match=message):
        call()
    assert len(plt.get_fignums()) - open_before <= 1


def test_refuses_a_video_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation.FFMpegWriter, "isAvailable", lambda: False)
    with pytest.raises(ValueError, match="needs the program ffmpeg"):
        plots.animate_trajectory(plane(), projection(), tmp_path / "a.mp4")
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.trajectory([plane()]), "expected Projection results, got Slice2D"),  # type: ignore[list-item]
        (lambda: plots.trajectory_panels(projection(), projection()), "expected a Slice2D to draw on, got Projection"),  # type: ignore[arg-type]
    ],
)
def test_refuses_another_type(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
