import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure

from msam_analysis import plots
from msam_analysis.results import Slice1D, Slice2D
from msam_analysis.results.statistics import mean_interval
from tests.plots.cases import (
    OPTIMIZERS,
    SHARPNESS,
    check_axes,
    check_picture,
    curves,
    line,
    plane,
    projection,
    with_loss,
    with_surface,
)

CURVES = {name: [line(SHARPNESS[name] * seed) for seed in (0.8, 1.0, 1.3)] for name in OPTIMIZERS}
PLANES = {name: plane(SHARPNESS[name]) for name in OPTIMIZERS}
SEEN = {name: projection(name, turn=turn) for name, turn in zip(OPTIMIZERS, (-0.5, 0.0, 1.0, 2.0), strict=True)}
LONG = ("random 0, filter-normalised", "random 1, filter-normalised")

EVERY_KIND: dict[str, Callable[[], Any]] = {
    "slice_1d": lambda: plots.slice_1d(CURVES),
    "slice_1d log": lambda: plots.slice_1d(CURVES, log=True),
    "slice_1d median": lambda: plots.slice_1d(CURVES, summary="median"),
    "slice_1d one": lambda: plots.slice_1d(line()),
    "slice_1d_panels": lambda: plots.slice_1d_panels({"gradient": CURVES, "momentum": CURVES, "random": CURVES}),
    "slice_2d": lambda: plots.slice_2d(PLANES),
    "slice_2d one": lambda: plots.slice_2d(plane()),
    "slice_2d linear": lambda: plots.slice_2d(PLANES, log=False),
    "slice_2d holes": lambda: plots.slice_2d({"a": holes(), "b": plane()}),
    "slice_2d lines": lambda: plots.slice_2d(PLANES, filled=False),
    "slice_2d lines holes": lambda: plots.slice_2d({"a": holes(), "b": plane()}, filled=False),
    "slice_2d constant": lambda: plots.slice_2d(flat()),
    "surface_3d": lambda: plots.surface_3d(PLANES),
    "surface_3d one": lambda: plots.surface_3d(plane()),
    "surface_3d holes": lambda: plots.surface_3d({"a": holes(), "b": plane()}),
    "surface_3d long names": lambda: plots.surface_3d({name: plane(directions=LONG) for name in OPTIMIZERS}),
    "surface_3d long name": lambda: plots.surface_3d(plane(directions=LONG)),
    "trajectory": lambda: plots.trajectory(SEEN),
    "trajectory on a slice": lambda: plots.trajectory(SEEN, plots.slice_2d(plane())),
    "trajectory_losses": lambda: plots.trajectory_losses(SEEN),
    "trajectory_panels": lambda: plots.trajectory_panels(plane(), SEEN),
    "trajectory_panels one": lambda: plots.trajectory_panels(holes(), projection(), filled=False, log=True),
}


def flat() -> Slice2D:
    return with_surface(np.arange(3.0), np.arange(3.0), np.ones((3, 3)), ("u", "v"))


def holes() -> Slice2D:
    whole = plane()
    loss = whole.loss.clone()
    loss[0, :4] = torch.nan
    loss[-1, -1] = torch.inf
    return with_surface(whole.x.numpy(), whole.y.numpy(), loss.numpy(), ("u", "v"))


def filled(ax: Axes) -> Any:
    (found,) = [item for item in ax.collections if isinstance(item, QuadContourSet) and item.filled]
    return found


def corners(ax: Any) -> npt.NDArray[np.float64]:
    """The corners of a surface's cells, shape ``(4 · cells, 3)``; matplotlib has no public way to ask for them."""
    (surface,) = ax.collections
    points = surface._faces.reshape(-1, 3) if hasattr(surface, "_faces") else surface._vec[:3].T
    return np.array(points, dtype=np.float64)


# ------------------------------------------------------------------------------------------------------- every picture


@pytest.mark.parametrize("name", EVERY_KIND)
def test_files_repeat_and_figures_fit_a_column_or_a_page(name: str, tmp_path: Path) -> None:
    check_picture(EVERY_KIND, name, tmp_path)


def test_the_style_holds_when_the_figure_is_drawn_later() -> None:
    for ax in (plots.slice_1d(CURVES), plots.slice_2d(PLANES)[3], plots.panels(1)[1][0]):
        ax.figure.canvas.draw()
        labels = [*ax.get_xticklabels(), *ax.get_yticklabels()]
        assert {text.get_fontsize() for text in labels} == {7.0}
        assert {tick.tick1line.get_markersize() for tick in ax.xaxis.get_major_ticks()} == {2.5}


DRAWN_ON_ONE: dict[str, Callable[[Axes], Any]] = {
    "slice_1d": lambda ax: plots.slice_1d(CURVES, ax),
    "slice_1d log": lambda ax: plots.slice_1d(CURVES, ax=ax, log=True),
    "slice_2d": lambda ax: plots.slice_2d(plane(), ax),
    "slice_2d holes": lambda ax: plots.slice_2d(holes(), ax),
    "slice_2d lines": lambda ax: plots.slice_2d(plane(), ax, filled=False),
    "trajectory": lambda ax: plots.trajectory(SEEN, ax),
}


@pytest.mark.parametrize("draw", DRAWN_ON_ONE.values(), ids=DRAWN_ON_ONE)
def test_draws_on_the_axes_given(draw: Callable[[Axes], Any]) -> None:
    check_axes(draw)


def test_panels_are_drawn_on_the_axes_given() -> None:
    figure = Figure()
    axes = figure.subplots(1, 4)
    assert plots.slice_2d(PLANES, axes).tolist() == axes.tolist()
    assert plots.slice_1d_panels({"a": CURVES, "b": CURVES}, axes).tolist() == axes[:2].tolist()
    axes = figure.subplots(1, 5)
    assert plots.trajectory_losses(SEEN, axes[3:]).tolist() == axes[3:].tolist()
    assert plots.trajectory_panels(plane(), SEEN, axes).tolist() == axes[:3].tolist()
    assert not plt.get_fignums()


def test_optimizers_differ_by_colour_line_and_marker() -> None:
    names = [*OPTIMIZERS, "AdamW", "ASAM", "ESAM", "MESA"]
    looks = plots.look(names)
    assert list(looks) == names
    for attribute in ("color", "linestyle", "marker"):
        assert len({getattr(look, attribute) for look in looks.values()}) == len(names)


def test_an_optimizer_looks_the_same_in_any_company() -> None:
    for name in OPTIMIZERS:
        assert plots.look([name])[name] == plots.look(["Other", *OPTIMIZERS])[name]
    alone = plots.slice_1d({"MSAM": line()})
    together = plots.slice_1d(CURVES)
    drawn: list[Any] = [item for ax in (alone, together) for item in ax.lines if item.get_label() == "MSAM"]
    assert [to_hex(item.get_color()) for item in drawn] == [plots.look(["MSAM"])["MSAM"].color.lower()] * 2


def test_drawing_opens_one_figure_and_close_closes_it(tmp_path: Path) -> None:
    axes = plots.slice_2d(PLANES)
    assert len(plt.get_fignums()) == 1
    plots.save(axes, tmp_path / "a", close=True)
    assert not plt.get_fignums()


# ------------------------------------------------------------------------------------------------------- one dimension


@pytest.mark.parametrize("relative", [False, True])
def test_slice_1d_draws_the_mean_and_its_interval(relative: bool) -> None:
    ax = plots.slice_1d(CURVES, relative=relative, level=0.9)
    drawn = curves(ax)
    assert list(drawn) == list(OPTIMIZERS)
    bands: list[Any] = [item for item in ax.collections if item.get_paths()]
    for (name, vertices), band in zip(drawn.items(), bands, strict=True):
        losses = np.stack([item.loss.numpy() - relative * item.center_loss for item in CURVES[name]])
        np.testing.assert_array_equal(vertices[:, 0], CURVES[name][0].coordinates.numpy())
        np.testing.assert_allclose(vertices[:, 1], losses.mean(axis=0), atol=1e-15)
        outline = np.asarray(band.get_paths()[0].vertices)
        for point in (0, 3):
            interval = mean_interval(losses[:, point], 0.9)
            ends = np.sort(np.unique(outline[np.isclose(outline[:, 0], vertices[point, 0]), 1]))[[0, -1]]
            np.testing.assert_allclose(ends, (interval.low, interval.high))
        assert to_hex(band.get_facecolor()[0]) == plots.look([name])[name].color.lower()


@pytest.mark.parametrize("level", [0.5, 0.68])
def test_the_median_lies_in_the_range_of_the_middle_seeds(level: float) -> None:
    seeds = [line(scale) for scale in (1.0, 2.0, 4.0, 8.0, 100.0)]
    ax = plots.slice_1d({"SGD": seeds}, summary="median", level=level)
    losses = np.stack([item.loss.numpy() for item in seeds])
    np.testing.assert_allclose(curves(ax)["SGD"][:, 1], np.median(losses, axis=0))
    outline: Any = ax.collections[0].get_paths()[0].vertices
    ends = np.quantile(losses[:, -1], [0.5 - level / 2, 0.5 + level / 2])
    at_the_end = np.unique(outline[np.isclose(outline[:, 0], 1.0), 1])
    np.testing.assert_allclose(at_the_end[[0, -1]], ends)


def test_a_diverged_seed_does_not_move_the_median() -> None:
    seeds = [with_loss([1.0, 2.0]), with_loss([1.0, 3.0]), with_loss([1.0, np.inf])]
    np.testing.assert_array_equal(curves(plots.slice_1d({"SGD": seeds}, summary="median"))["SGD"][:, 1], [1.0, 3.0])
    np.testing.assert_array_equal(curves(plots.slice_1d({"SGD": seeds}))["SGD"][:, 1], [1.0, np.nan])


@pytest.mark.parametrize("relative", [False, True])
def test_a_slice_with_a_standard_error_has_the_interval_for_all_data(relative: bool) -> None:
    error = torch.full((11,), 0.1).double()
    measured = dataclasses.replace(line(), standard_error=error, rise_error=error / 10, units=20)
    ax = plots.slice_1d(measured, relative=relative, level=0.95)
    outline: Any = ax.collections[0].get_paths()[0].vertices
    at_the_end = np.unique(outline[np.isclose(outline[:, 0], 1.0), 1])
    half = scipy.stats.t.ppf(0.975, 19) * (0.01 if relative else 0.1)
    np.testing.assert_allclose(at_the_end[[0, -1]], 1.1 + (0.0 if relative else 0.5) + np.array([-half, half]))


def test_one_seed_has_no_band() -> None:
    assert not plots.slice_1d({"SGD": line(), "SAM": [line(2.0)]}).collections


def test_slice_1d_along_distance() -> None:
    ax = plots.slice_1d({"SGD": line()}, x="distance")
    np.testing.assert_allclose(curves(ax)["SGD"][[0, -1], 0], (-3.0, 3.0))
    assert ax.get_xlabel() == "distance along random (filter)"


def test_not_finite_is_a_hole_and_a_lone_point_a_dot() -> None:
    result = with_loss([1.0, np.nan, 2.0, np.inf, 3.0, 4.0, -np.inf])
    ax = plots.slice_1d(result)
    curve, dots = ax.lines
    np.testing.assert_array_equal(curve.get_ydata(), [1.0, np.nan, 2.0, np.nan, 3.0, 4.0, np.nan])
    np.testing.assert_array_equal(dots.get_xydata(), [[0.0, 1.0], [2.0, 2.0]])


def test_a_hole_of_one_seed_is_a_hole() -> None:
    ax = plots.slice_1d({"SGD": [with_loss([1.0, 2.0, 3.0, 4.0]), with_loss([3.0, np.nan, 3.0, 4.0])]})
    np.testing.assert_array_equal(curves(ax)["SGD"][:, 1], [2.0, np.nan, 3.0, 4.0])


def test_log_axis_shows_every_positive_mean() -> None:
    wide = [with_loss([1e-3, 1.0, 5.0, 0.0]), with_loss([1e-3, 3.0, 0.1, -1.0])]
    ax = plots.slice_1d({"SGD": wide, "SAM": with_loss([100.0, 1.0, 1.0, 1.0])}, log=True)
    np.testing.assert_allclose(curves(ax)["SGD"][:, 1], [1e-3, 2.0, 2.55, np.nan])
    low, high = ax.get_ylim()
    assert 1e-4 < low < 1e-3
    assert 100 < high < 1000


def test_panels_share_one_log_scale() -> None:
    axes = plots.slice_1d_panels(
        {"a": {"SGD": with_loss([1.0, 1e4])}, "b": {"SGD": with_loss([1e-3, 1.0])}}, relative=False, log=True
    )
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].get_ylim()[0] < 1e-3
    assert axes[0].get_ylim()[1] > 1e4


def test_slice_1d_panels() -> None:
    axes = plots.slice_1d_panels({"gradient": CURVES, "momentum": {"SGD": line(7.0)}, "random": CURVES})
    assert [ax.get_title() for ax in axes] == ["gradient", "momentum", "random"]
    assert len({ax.get_ylim() for ax in axes}) == 1
    np.testing.assert_allclose(curves(axes[1])["SGD"][:, 1], line(7.0).loss.numpy() - 0.5)
    assert len(axes[0].figure.legends) == 1
    assert [text.get_text() for text in axes[0].figure.legends[0].get_texts()] == list(OPTIMIZERS)


# ------------------------------------------------------------------------------------------------------ two dimensions


def test_first_direction_is_horizontal() -> None:
    result = plane(shape=(7, 13))
    ax = plots.slice_2d(result, log=False)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1.0, 1.0), (-0.5, 0.5))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("u", "v")
    assert ax.get_aspect() == 1.0
    # the loss at a point, read back from the picture: the filled level that holds it
    contours = filled(ax)
    loss = result.loss.numpy()
    for i, j in ((0, 6), (3, 0), (3, 12), (6, 6), (6, 11), (1, 2)):
        inside = [
            level
            for level, path in enumerate(contours.get_paths())
            if len(path) and path.contains_point((0.999 * float(result.x[i]), 0.999 * float(result.y[j])))
        ]
        low, high = contours.levels[inside[0]], contours.levels[inside[-1] + 1]
        assert low * 0.98 <= loss[i, j] <= high * 1.02


def test_lines_lie_where_the_loss_has_their_level() -> None:
    result = plane(shape=(101, 81))
    ax = plots.slice_2d(result)
    (lines,) = [item for item in ax.collections if isinstance(item, QuadContourSet) and not item.filled]
    assert len(list(lines.levels)) >= 3
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        x, y = np.asarray(path.vertices).T
        np.testing.assert_allclose(0.01 + 10 * x**2 + y**2 + 0.5 * x * y, level, rtol=0.05)
    labels = {text.get_text() for text in lines.labelTexts}
    assert labels
    assert labels <= {f"{level:.4g}" for level in lines.levels}


def test_a_flat_minimum_beside_a_sharp_one_has_lines_too() -> None:
    """Of the labelled levels of the common scale (0.01 to 1,000) one or two lie within the flat one's range."""
    axes = plots.slice_2d({"sharp": plane(100.0, floor=0.01), "flat": plane(0.5, floor=2.0)})
    for ax in axes:
        (lines,) = [item for item in ax.collections if isinstance(item, QuadContourSet) and not item.filled]
        assert len(list(lines.levels)) >= 2
    assert min(lines.levels) > 2.0
    assert {text.get_text() for text in lines.labelTexts} <= {f"{level:.4g}" for level in lines.levels}


LINE = dataclasses.replace(line(), metrics={"accuracy": 100 - 3 * line().coordinates ** 2})
PLANE = dataclasses.replace(plane(), metrics={"accuracy": 90 + plane().loss})


def test_another_metric_is_drawn_in_the_place_of_the_loss() -> None:
    (drawn,) = curves(plots.slice_1d({"a": LINE}, values="accuracy")).values()
    np.testing.assert_allclose(drawn[:, 1], 100 - 3 * line().coordinates.numpy() ** 2)
    (drawn,) = curves(plots.slice_1d({"a": LINE}, values="accuracy", relative=True)).values()
    np.testing.assert_allclose(drawn[:, 1], -3 * line().coordinates.numpy() ** 2, atol=1e-12)
    ax = plots.slice_2d(PLANE, values="accuracy")
    assert filled(ax).levels.min() > 89
    (bar,) = set(ax.figure.axes) - {ax}
    assert bar.get_ylabel() == "accuracy"
    assert corners(plots.surface_3d(PLANE, values="accuracy"))[:, 2].min() > 89


def test_a_metric_without_its_centre_has_no_rise() -> None:
    """Without a point at 0 the metric's value there is not known, and nothing is made up."""
    item = line(points=10)
    item = dataclasses.replace(item, metrics={"accuracy": item.loss})
    (drawn,) = curves(plots.slice_1d({"a": item}, values="accuracy", relative=True)).values()
    assert np.isnan(drawn[:, 1]).all()


def test_one_colour_scale_for_all() -> None:
    axes = plots.slice_2d(PLANES)
    contours = [filled(ax) for ax in axes]
    for item in contours[1:]:
        np.testing.assert_array_equal(item.levels, contours[0].levels)
        assert item.norm is contours[0].norm
        assert item.get_cmap().name == contours[0].get_cmap().name
    figure = axes[0].figure
    (bar,) = set(figure.axes) - set(axes)
    assert bar.get_ylabel() == "loss"
    smallest = min(float(item.loss.min()) for item in PLANES.values())
    largest = max(float(item.loss.max()) for item in PLANES.values())
    assert contours[0].levels[0] <= smallest
    assert contours[0].levels[-1] >= largest
    assert contours[0].extend == "neither"
    low, high = bar.get_ylim()
    assert (low, high) == pytest.approx((contours[0].levels[0], contours[0].levels[-1]))


@pytest.mark.parametrize(
    ("limits", "extend"),
    [((0.001, 1000.0), "neither"), ((0.1, 1000.0), "min"), ((0.001, 5.0), "max"), ((0.1, 5.0), "both")],
)
@pytest.mark.parametrize("log", [True, False])
def test_limits_and_arrows(limits: tuple[float, float], extend: str, log: bool) -> None:
    contours = filled(plots.slice_2d(plane(), limits=limits, log=log))
    assert contours.extend == extend
    assert (contours.levels[0], contours.levels[-1]) == limits
    np.testing.assert_array_less(contours.levels[:-1], contours.levels[1:])


@pytest.mark.parametrize(("ratio", "log"), [(5.0, False), (50.0, True), (1e5, True)])
def test_scale_is_logarithmic_where_the_range_is_large(ratio: float, log: bool) -> None:
    x = np.linspace(0.0, 1.0, 5)
    loss = np.geomspace(1.0, ratio, 25).reshape(5, 5)
    levels = filled(plots.slice_2d(with_surface(x, x, loss, ("u", "v")))).levels
    steps = np.diff(np.log(levels)) if log else np.diff(levels)
    assert steps.max() < 2.5 * steps.min()
    assert 10 <= len(levels) <= 64


def test_an_absurd_loss_does_not_take_the_whole_scale() -> None:
    surface = plane(shape=(11, 11)).loss.numpy().copy()
    surface[0, 0] = 1e30
    x = np.linspace(-1.0, 1.0, 11)
    contours = filled(plots.slice_2d(with_surface(x, x, surface, ("u", "v"))))
    assert contours.extend == "max"
    assert contours.levels[-1] < 1e6


def test_holes_are_hatched_and_named() -> None:
    axes = plots.slice_2d({"a": holes(), "b": plane()})
    figure = axes[0].figure
    assert axes[0].patch.get_hatch()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not finite"]
    covered = [path for path in filled(axes[0]).get_paths() if len(path)]
    assert not any(path.contains_point((-0.99, -0.45)) for path in covered)
    assert not any(path.contains_point((0.99, 0.49)) for path in covered)
    assert any(path.contains_point((0.5, 0.1)) for path in covered)
    assert not plots.slice_2d({"b": plane()})[0].figure.legends


def test_what_is_still_to_come_is_not_called_infinite() -> None:
    half = dataclasses.replace(holes(), evaluated=torch.arange(7)[:, None].expand(7, 13) > 0)
    legend = [text.get_text() for text in plots.slice_2d({"a": half}).item().figure.legends[0].get_texts()]
    assert legend == ["not finite or not measured yet"]
    loss = plane().loss.clone()
    loss[0] = torch.nan
    half = dataclasses.replace(half, loss=loss)
    legend = [text.get_text() for text in plots.slice_2d({"a": half}).item().figure.legends[0].get_texts()]
    assert legend == ["not measured yet"]


def test_lines_without_filling_have_the_colours_of_their_levels() -> None:
    ax = plots.slice_2d(holes(), filled=False)
    found: list[Any] = [item for item in ax.collections if isinstance(item, QuadContourSet)]
    white, *lines = found
    assert [item.filled for item in lines] == [False, False]
    assert to_hex(white.get_facecolor()[0]) == "#ffffff"
    for item in lines:
        np.testing.assert_allclose(item.get_edgecolor()[:, :3], item.cmap(item.norm(item.levels))[:, :3])
    # the hatching shows where nothing is known, and only there
    covered = [path for path in white.get_paths() if len(path)]
    assert not any(path.contains_point((-0.99, -0.45)) for path in covered)
    assert any(path.contains_point((0.5, 0.1)) for path in covered)


def test_a_slice_without_any_finite_loss_beside_another() -> None:
    empty = with_surface(np.arange(3.0), np.arange(3.0), np.full((3, 3), np.nan), ("u", "v"))
    axes = plots.slice_2d({"a": empty, "b": plane()})
    assert not [item for item in axes[0].collections if isinstance(item, QuadContourSet)]
    assert len(filled(axes[1]).levels) > 2


def test_the_centre_is_marked_where_it_is_in_sight() -> None:
    (mark,) = plots.slice_2d(plane()).lines
    np.testing.assert_array_equal(mark.get_xydata(), [[0.0, 0.0]])
    x = np.linspace(1.0, 2.0, 3)
    assert not plots.slice_2d(with_surface(x, x, np.ones((3, 3)), ("u", "v"))).lines


def test_directions_are_named_on_every_panel_where_they_differ() -> None:
    axes = plots.slice_2d({"a": plane(directions=("p", "q")), "b": plane(directions=("r", "s"))})
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [("p", "q"), ("r", "s")]
    axes = plots.slice_2d(PLANES)
    assert axes[0].figure.get_supxlabel() == "u"
    assert [ax.get_ylabel() for ax in axes] == ["v", "", "", ""]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_long_names_of_directions_are_broken_to_fit_their_axes(count: int) -> None:
    names = (
        "random 0, filter-normalised, biases and norms fixed",
        "random 1, filter-normalised, biases and norms fixed",
    )
    square = with_surface(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5), np.arange(1.0, 26.0).reshape(5, 5), names)
    axes = plots.slice_2d(square if count == 1 else {str(index): square for index in range(count)})
    ax = axes if isinstance(axes, Axes) else axes[0]
    figure: Any = ax.figure
    figure.canvas.draw()
    assert ax.get_ylabel().replace("\n", " ") == names[1]
    label = ax.yaxis.label.get_window_extent()
    assert figure.bbox.y0 <= label.y0 < label.y1 <= figure.bbox.y1


def test_surface_has_every_point_at_its_place() -> None:
    result = plane(shape=(3, 5))
    ax: Any = plots.surface_3d(result, log=True)
    vertices = np.unique(corners(ax).round(12), axis=0)
    x, y = np.meshgrid(result.x.numpy(), result.y.numpy(), indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), np.log10(result.loss.numpy()).ravel()], axis=1)
    np.testing.assert_allclose(vertices, np.unique(points.round(12), axis=0))


def test_surface_leaves_out_cells_with_a_hole_and_is_cut_at_the_limits() -> None:
    ax: Any = plots.surface_3d(holes(), limits=(0.1, 5.0), log=False)
    vertices = corners(ax)
    assert np.isfinite(vertices).all()
    assert len(vertices) == 4 * (6 * 12 - 4 - 1)
    assert (vertices[:, 2].min(), vertices[:, 2].max()) == (0.1, 5.0)
    assert ax.get_zlim() == pytest.approx((0.1, 5.0))


def test_long_names_of_directions_are_explained_once_below_surfaces() -> None:
    axes = plots.surface_3d({name: plane(directions=LONG) for name in ("SGD", "MSAM")})
    assert {(ax.get_xlabel(), ax.get_ylabel()) for ax in axes} == {("$x$", "$y$")}
    assert axes[0].figure.get_supxlabel() == f"$x$: {LONG[0]}    $y$: {LONG[1]}"
    assert plots.surface_3d(plane()).get_xlabel() == "u"


# --------------------------------------------------------------------------------------------------- files and refusals


def test_save_names_the_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    ax = plots.slice_1d(line())
    assert isinstance(ax.figure, Figure)
    files = plots.save(ax.figure, tmp_path / "new" / "ball_rho0.5", ["svg", "png"])
    assert [path.name for path in files] == ["ball_rho0.5.svg", "ball_rho0.5.png"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(files)
    (named,) = plots.save([ax], tmp_path / "other.png")
    assert named == tmp_path / "other.png"
    content = named.read_bytes()
    assert plots.save(ax, str(tmp_path / "other"))[0] == named
    assert named.read_bytes() == content


def test_files_have_no_date_and_no_version(tmp_path: Path) -> None:
    for path in plots.save(plots.slice_1d(line()), tmp_path / "a", ["png", "svg", "pdf"]):
        content = path.read_bytes()
        for word in (b"Matplotlib", mpl.__version__.encode(), b"CreationDate", b"dc:date", b"tEXt"):
            assert word not in content
    assert plt.imread(tmp_path / "a.png").shape[1] == round(200 * plots.COLUMN_WIDTH)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = plots.save(plots.slice_1d(line()), tmp_path / "a")
    content = old.read_bytes()

    def fail(self: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save(plots.slice_1d(line(2.0)), tmp_path / "a")
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == content


DIFFERENT_GRIDS: list[Slice1D] = [line(), line(points=13)]
PER_SAMPLE = dataclasses.replace(line(), metrics={"losses": torch.zeros(11, 4)})
NOT_FINITE = with_surface(np.arange(3.0), np.arange(3.0), np.full((3, 3), np.nan), ("u", "v"))
THIN = with_surface(np.arange(1.0), np.arange(3.0), np.ones((1, 3)), ("u", "v"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.slice_1d({}), "at least one"),
        (lambda: plots.slice_1d({"SGD": []}), "at least one"),
        (lambda: plots.slice_1d(line(), x="norm"), "must be 'coordinate' or 'distance'"),
        (lambda: plots.slice_1d(line(), summary="mode"), "must be 'mean' or 'median'"),  # type: ignore[arg-type]
        (lambda: plots.slice_1d({"SGD": DIFFERENT_GRIDS}), "'SGD' have different coordinates"),
        (lambda: plots.slice_1d_panels({}), "at least one panel"),
        (
            lambda: plots.slice_1d_panels({"a": line(), "b": line()}, [plt.figure().subplots()]),
            "2 panels need 2 axes, got 1",
        ),
        (lambda: plots.slice_2d({}), "at least one"),
        (lambda: plots.slice_2d(plane(), values="accuracy"), "values must be one of 'loss', got 'accuracy'"),
        (lambda: plots.slice_1d(PER_SAMPLE, values="losses"), "'losses' has \\(4,\\) numbers at every point"),
        (lambda: plots.slice_2d(NOT_FINITE), "NaN or infinite"),
        (lambda: plots.slice_2d(THIN), "two points along each"),
        (lambda: plots.slice_2d(plane(), limits=(2.0, 1.0)), "lower first"),
        (lambda: plots.slice_2d(plane(), limits=(0.0, np.inf)), "finite"),
        (lambda: plots.slice_2d(plane(), limits=(0.0, 1.0), log=True), "positive"),
        (lambda: plots.surface_3d(plane(), plt.figure().subplots()), "projection='3d'"),
        (lambda: plots.panels(0), "at least one panel"),
        (lambda: plots.save(plt.figure(), "a", ["gif"]), "formats must be among"),
        (lambda: plots.save(plt.figure(), "a", []), "formats must be among"),
    ],
)
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.slice_1d({"SGD": [plane()]}), "expected Slice1D results, got Slice2D under 'SGD'"),  # type: ignore[list-item]
        (lambda: plots.slice_2d({"SGD": line()}), "expected Slice2D results, got Slice1D under 'SGD'"),  # type: ignore[dict-item]
        (lambda: plots.save("figure", "a"), "expected a figure or axes on one, got str"),  # type: ignore[arg-type]
        (lambda: plots.save([], "a"), "expected a figure or axes on one, got list"),
    ],
)
def test_refuses_another_type(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
