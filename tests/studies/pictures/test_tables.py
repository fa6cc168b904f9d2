"""Pictures of the main tables: what is drawn is what the tables hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from msam_analysis import plots
from msam_analysis.results.statistics import mean_interval, summarise
from msam_analysis.studies import pictures
from tests.plots.cases import OPTIMIZERS, check_axes, check_picture, curves, table

EPOCHS = [1.0, 2.0, 3.0]
EIGENVALUES = table(["value"], index=[1, 2, 3], method=["power", "lanczos"])
BALLS = table(["sharpness", "one_step"], rho=[0.05, 0.1, 0.5])
RUNS = table(["x"]).assign(train_accuracy=lambda f: 1 / (1 + f.x / 9), test_accuracy=lambda f: 1 / (1 + f.x / 30))
STEPS = table(["curvature", "loss_before", "loss_after"], epoch=EPOCHS)
COSINES = STEPS.assign(cosine=lambda f: f.curvature - 5)


EVERY_KIND: dict[str, Callable[[], Any]] = {
    "eigenvalues": lambda: pictures.eigenvalues(EIGENVALUES),
    "ball_sharpness": lambda: pictures.ball_sharpness(BALLS),
    "accuracy": lambda: pictures.accuracy(RUNS),
    "over_training": lambda: pictures.over_training(COSINES, "cosine"),
    "over_training several": lambda: pictures.over_training(STEPS, ["curvature", "loss_before"], log=True),
    "perturbation_rise": lambda: pictures.perturbation_rise(STEPS),
    "perturbation_rise six": lambda: pictures.perturbation_rise(
        table(["loss_before", "loss_after"], optimizers=[*OPTIMIZERS, "AdamW", "ASAM"], seeds=1, epoch=EPOCHS), log=True
    ),
}
DRAWN_ON_ONE: dict[str, Callable[[Axes], Any]] = {
    "eigenvalues": lambda ax: pictures.eigenvalues(EIGENVALUES, ax),
    "ball_sharpness": lambda ax: pictures.ball_sharpness(BALLS, ax),
    "accuracy": lambda ax: pictures.accuracy(RUNS, ax),
    "over_training": lambda ax: pictures.over_training(STEPS, "curvature", ax),
}


@pytest.mark.parametrize("name", EVERY_KIND)
def test_files_repeat_and_figures_fit_a_column_or_a_page(name: str, tmp_path: Path) -> None:
    check_picture(EVERY_KIND, name, tmp_path)


@pytest.mark.parametrize("draw", DRAWN_ON_ONE.values(), ids=DRAWN_ON_ONE)
def test_draws_on_the_axes_given(draw: Callable[[Axes], Any]) -> None:
    check_axes(draw)


def test_panels_are_drawn_on_the_axes_given() -> None:
    axes = Figure().subplots(1, 4)
    assert pictures.perturbation_rise(STEPS, axes).tolist() == axes.tolist()
    assert pictures.over_training(STEPS, ["curvature"], axes).tolist() == axes[:1].tolist()
    assert not plt.get_fignums()


def test_over_training_draws_the_mean_of_each_optimizer() -> None:
    shuffled = COSINES.sample(frac=1.0, random_state=0)
    ax = pictures.over_training(shuffled, "cosine")
    drawn = curves(ax)
    assert list(drawn) == list(OPTIMIZERS)
    for name, vertices in drawn.items():
        expected = COSINES[COSINES["optimizer"] == name].groupby("epoch")["cosine"].mean()
        np.testing.assert_allclose(vertices, np.stack([expected.index, expected], axis=1))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "cosine")


@pytest.mark.parametrize(
    ("shift", "given", "drawn"), [(0, None, True), (99, None, False), (99, True, True), (0, False, False)]
)
def test_zero_line(shift: float, given: bool | None, drawn: bool) -> None:
    ax = pictures.over_training(COSINES.assign(cosine=COSINES.cosine + shift), "cosine", zero_line=given)
    zeros = [item for item in ax.lines if np.size(item.get_ydata()) == 2 and not np.any(item.get_ydata())]
    assert bool(zeros) == drawn


def test_over_training_takes_steps_and_several_quantities() -> None:
    frame = STEPS.rename(columns={"epoch": "step"})
    axes = pictures.over_training(frame, {"curvature": "along momentum", "loss_after": "after"}, label="value")
    assert [ax.get_title() for ax in axes] == ["along momentum", "after"]
    assert [ax.get_ylabel() for ax in axes] == ["value", ""]
    assert {ax.get_xlabel() for ax in axes} == {"step"}
    assert axes[0].get_ylim() == axes[1].get_ylim()


def test_over_training_leaves_holes() -> None:
    frame = STEPS.copy()
    frame.loc[(frame.optimizer == "SGD") & (frame.seed == 0) & (frame.epoch == 2.0), "curvature"] = np.nan
    vertices = curves(pictures.over_training(frame, "curvature", log=True))["SGD"]
    assert np.isnan(vertices[:, 1]).tolist() == [False, True, False]


def test_eigenvalues_of_two_methods_agree_where_rings_are_centred() -> None:
    frame = EIGENVALUES[EIGENVALUES["method"] == "lanczos"]
    frame = pd.concat([frame.assign(method="power"), frame])
    ax = pictures.eigenvalues(frame)
    markers = [
        item for item in ax.lines if item.get_marker() not in ("_", "|", "None") and np.size(item.get_xdata()) == 3
    ]
    assert len(markers) == 8
    for filled_in, ring in zip(markers[::2], markers[1::2], strict=True):
        np.testing.assert_array_equal(filled_in.get_xydata(), ring.get_xydata())
        assert (filled_in.get_fillstyle(), ring.get_fillstyle()) == ("full", "none")
    means = summarise(frame[frame["method"] == "power"], ["optimizer", "index"], "value")
    np.testing.assert_allclose(np.concatenate([item.get_ydata() for item in markers[::2]]), means["value"])
    assert [text.get_text() for text in ax.get_xticklabels()] == [rf"$\lambda_{{{index}}}$" for index in (1, 2, 3)]


def test_eigenvalues_take_a_log_axis_only_where_they_can() -> None:
    frame = EIGENVALUES.assign(value=10.0 ** EIGENVALUES["index"])
    assert pictures.eigenvalues(frame).get_yscale() == "log"
    assert pictures.eigenvalues(frame.assign(value=-frame["value"])).get_yscale() == "linear"
    assert pictures.eigenvalues(frame, log=False).get_yscale() == "linear"
    assert pictures.eigenvalues(frame.drop(columns="method").drop_duplicates(["optimizer", "seed", "index"])).lines


def test_ball_sharpness_draws_the_means_on_two_log_axes() -> None:
    ax = pictures.ball_sharpness(BALLS, value="one_step", label="one step")
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("log", "log", "one step")
    for name, vertices in drawn_means(ax).items():
        expected = BALLS[BALLS["optimizer"] == name].groupby("rho")["one_step"].mean()
        np.testing.assert_allclose(vertices, np.stack([expected.index, expected], axis=1))


def drawn_means(ax: Axes) -> dict[str, npt.NDArray[np.float64]]:
    """Name to vertices of the curves, by their colour."""
    colors = {look.color.lower(): name for name, look in plots.look(OPTIMIZERS).items()}
    lines: list[Any] = [item for item in ax.lines if np.size(item.get_xdata())]
    return {colors[to_hex(item.get_color())]: np.asarray(item.get_xydata()) for item in lines}


def test_accuracy_draws_means_intervals_and_seeds() -> None:
    ax = pictures.accuracy(RUNS)
    points = np.concatenate([np.asarray(item.get_xdata(), dtype=np.float64) for item in ax.lines])
    for column in ("train_accuracy", "test_accuracy"):
        for name in OPTIMIZERS:
            values = RUNS.loc[RUNS["optimizer"] == name, column].to_numpy()
            interval = mean_interval(values)
            for value in (*values, *interval[:1], interval.low, interval.high):
                assert np.isclose(points, value, rtol=1e-12).any()
    assert [text.get_text() for text in ax.get_yticklabels()] == list(OPTIMIZERS)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_accuracy_of_one_seed_has_no_interval() -> None:
    ax = pictures.accuracy(RUNS[RUNS["seed"] == 0])
    assert len(ax.lines) == 2 * len(OPTIMIZERS)


def test_perturbation_rise_draws_before_and_after() -> None:
    axes = pictures.perturbation_rise(STEPS)
    assert [ax.get_title() for ax in axes] == list(OPTIMIZERS)
    assert len({ax.get_ylim() for ax in axes}) == 1
    for ax, name in zip(axes, OPTIMIZERS, strict=True):
        drawn = curves(ax)
        for column in ("loss_before", "loss_after"):
            expected = STEPS[STEPS["optimizer"] == name].groupby("epoch")[column].mean()
            np.testing.assert_allclose(drawn[column.replace("_", " ")][:, 1], expected)


def test_the_paper_comes_first_and_others_in_order_of_appearance() -> None:
    frame = table(["curvature"], optimizers=["Z", "MSAM", "A", "SGD"], epoch=EPOCHS)
    assert list(curves(pictures.over_training(frame, "curvature"))) == ["SGD", "MSAM", "Z", "A"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictures.eigenvalues(RUNS), r"no column \['index', 'value'\]"),
        (lambda: pictures.ball_sharpness(BALLS.iloc[:0]), "no rows"),
        (lambda: pictures.ball_sharpness(pd.concat([BALLS, BALLS])), "one seed several times"),
        (lambda: pictures.over_training(STEPS, "cosine"), r"no column \['cosine'\]"),
        (lambda: pictures.perturbation_rise(STEPS, before="loss"), r"no column \['loss'\]"),
        (lambda: pictures.accuracy(RUNS.assign(test_accuracy=95.0)), "between 0 and 1, got 95"),
    ],
)
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
