"""What every measure returns is drawn by the function of its name: the numbers, their errors, and what failed."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import msam_analysis as ma
from msam_analysis import plots, results
from tests.builders import MEASURES, SIGMA, built, by_layer, density, measurement, objective
from tests.plots.cases import projection


@pytest.fixture(scope="module")
def measured() -> dict[str, results.Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", results.ConvergenceWarning)
        tiny = objective()
        return {name: measure(tiny) for name, measure in MEASURES.items()}


def drawn(axes: Any) -> list[Axes]:
    return list(np.atleast_1d(np.asarray(axes, dtype=np.object_)).ravel())


def bars(ax: Axes) -> list[tuple[float, float, float]]:
    """Every point with the ends of its bar, NaN where there is none."""
    found = []
    for item in ax.containers:
        assert isinstance(item, ErrorbarContainer)
        line, _, ends = item.lines
        assert line is not None
        value = float(np.asarray(line.get_ydata())[0])
        vertical = [np.asarray(part.get_segments()[0])[:, 1] for part in ends]
        found.append((value, *(map(float, vertical[0]) if vertical else (math.nan, math.nan))))
    return found


def faces(ax: Axes) -> list[str]:
    return [str(item.lines[0].get_markerfacecolor()) for item in ax.containers if isinstance(item, ErrorbarContainer)]


def ticks(ax: Axes) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in ax.get_xticklabels()]


def legend(ax: Axes) -> list[str]:
    figure: Any = ax.figure
    return [text.get_text() for item in figure.legends for text in item.get_texts()]


# --- all of them


def test_every_measure_has_a_picture() -> None:
    """A public function that measures, and nothing else, returns a result that a plot of its name draws."""
    functions = {name for name in ma.__all__ if inspect.isfunction(getattr(ma, name))}
    assert functions - {"layer_frame", "normalization_layers"} == set(MEASURES)
    assert set(MEASURES) <= set(plots.__all__)
    assert plots.eigenvalues is plots.top_eigenvalues


@pytest.mark.parametrize("name", MEASURES)
def test_what_a_measure_returns_is_drawn(name: str, measured: dict[str, results.Result]) -> None:
    draw: Callable[..., Any] = getattr(plots, name)
    alone = drawn(draw(measured[name]))
    together = drawn(draw({"SGD": measured[name], "MSAM": measured[name]}))
    for axes in (alone, together):
        figure: Any = axes[0].figure
        assert axes[0].get_ylabel()
        assert axes[0].get_xlabel() or figure.get_supxlabel() or any(ticks(axes[0]))
    for ax in (*alone, *together):
        assert ax.containers or ax.lines or ax.collections
    for ax in (alone[0], together[0]):
        ax.figure.canvas.draw()
    given = Figure().subplots(1, len(alone), squeeze=False)[0]
    assert drawn(draw(measured[name], given if len(alone) > 1 else given[0])) == list(given[: len(alone)])
    assert len(plt.get_fignums()) == 2


@pytest.mark.parametrize("name", MEASURES)
def test_something_else_is_refused(name: str) -> None:
    draw: Callable[..., Any] = getattr(plots, name)
    with pytest.raises((TypeError, ValueError), match=r"expected|nothing to draw"):
        draw({})
    with pytest.raises(TypeError, match=r"expected .*, got (int|Trajectory)"):
        draw({"a": built(results.Trajectory) if name == "pca_plane" else 3})


# --- numbers


def test_bars_are_residuals_and_open_markers_did_not_converge() -> None:
    values, residuals = torch.tensor([4.0, 3.0]), torch.tensor([0.5, 0.25])
    good = built(results.Eigenpairs, values=values, residuals=residuals, converged=True)
    ax = plots.top_eigenvalues({"SGD": good, "MSAM": dataclasses.replace(good, converged=False)})
    assert bars(ax) == 2 * [(4.0, 3.5, 4.5), (3.0, 2.75, 3.25)]
    looks = plots.look(["SGD", "MSAM"])
    assert faces(ax) == [looks["SGD"].color, looks["SGD"].color, "white", "white"]
    assert legend(ax) == ["SGD", "MSAM", "not converged"]
    assert ticks(ax) == ["1", "2"]


def test_one_number_each_stands_beside_the_others_with_its_value() -> None:
    one = built(results.Estimate, value=2.0, standard_error=0.5)
    ax = plots.trace({"SGD": one, "MSAM": dataclasses.replace(one, value=-3.0, standard_error=math.nan)})
    assert bars(ax)[0] == (2.0, 1.5, 2.5)
    assert bars(ax)[1][0] == -3.0
    assert ticks(ax) == ["SGD", "MSAM"]
    assert [text.get_text() for text in ax.texts] == ["2 ± 0.5", "−3"]
    assert not legend(ax)


def test_a_single_zero_of_unknown_error_has_a_linear_axis() -> None:
    """Such as the critical sharpness of a loss that falls and falls."""
    ax = plots.critical_sharpness(built(results.CriticalSharpness, value=0.0, status="no crossing"))
    assert ax.get_yscale() == "linear"
    assert [row[0] for row in bars(ax)] == [0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_written_and_not_drawn(value: float) -> None:
    ax = plots.trace({"a": built(results.Estimate, value=value), "b": built(results.Estimate, value=1.0)})
    assert [row[0] for row in bars(ax)] == [1.0]
    assert f"{value:g}" in [text.get_text() for text in ax.texts]
    plots.trace(built(results.Estimate, value=value)).figure.canvas.draw()


@pytest.mark.parametrize(
    ("small", "error", "given", "log"),
    [(0.1, 0.01, None, True), (0.1, 0.2, None, False), (0.9, 0.01, None, False), (0.1, 0.01, False, False)],
)
def test_a_logarithmic_axis_needs_a_range_and_bars_above_zero(
    small: float, error: float, given: bool | None, log: bool
) -> None:
    pairs = {
        name: built(results.Estimate, value=value, standard_error=error) for name, value in (("a", small), ("b", 2))
    }
    assert (plots.trace(pairs, log=given).get_yscale() == "log") == log


def test_an_interval_is_around_the_value_less_its_bias() -> None:
    parts = {"value": 3.0, "bias": 1.0, "low": 1.5, "high": 2.75, "standard_error": 0.5}
    tensors = {name: torch.tensor(value) for name, value in parts.items()}
    ax = plots.data_interval(built(results.DataInterval, **tensors))
    assert bars(ax) == [(2.0, 1.5, 2.75)]
    assert 3.0 in [float(np.asarray(line.get_ydata())[0]) for line in ax.lines if line.get_marker() == "_"]
    assert legend(ax) == ["not converged", "on the samples"]
    assert "68 %" in ax.get_ylabel()


def test_a_certificate_says_its_verdict() -> None:
    good = built(results.Certificate, curvature=-0.5, curvature_residual=0.25)
    bad = built(results.Certificate, verdict="not a local maximum", curvature=0.5, curvature_residual=0.1)
    ax = plots.certify({"SGD": good, "MSAM": bad})
    assert bars(ax)[0] == (-0.5, -0.75, -0.25)
    assert ticks(ax) == ["SGD local maximum", "MSAM not a local maximum"]


def test_layers_stand_side_by_side() -> None:
    ax = plots.by_layer(by_layer())
    assert ticks(ax) == ["0/<a>", "head"]
    assert [row[0] for row in bars(ax)] == [3.0, -1.0, 3.0, -1.0]
    assert faces(ax)[0] == "white"
    assert ax.get_xlabel() == "layer"
    balls = results.ByLayer(results={"a": built(results.BallSharpness), "b": built(results.BallSharpness)})
    assert len(bars(plots.by_layer(balls))) == 2
    densities = results.ByLayer(results={"a": density(), "b": density(1.0)})
    assert plots.by_layer(densities).get_xlabel() == "eigenvalue"
    assert next(iter(densities.values())).sigma == SIGMA


def test_a_table_has_a_panel_for_each_unit() -> None:
    axes = plots.measure({"SGD": measurement(), "MSAM": measurement()})
    labels = [ax.get_ylabel().replace("\n", " ").replace("\u00a0", " ") for ax in axes]
    assert labels == ["eigenvalue (loss / distance²)", "rise of the loss", "loss"]
    assert [len(bars(ax)) for ax in axes] == [2, 2, 2]
    assert legend(axes[0]) == ["SGD", "MSAM", "not converged"]
    with pytest.raises(ValueError, match="3 panels need 3 axes, got 1"):
        plots.measure(measurement(), Figure().subplots())


# --- curves


def curve(ax: Axes) -> list[list[float]]:
    points: list[list[float]] = np.asarray(ax.lines[0].get_xydata()).tolist()
    return points


def test_curves_are_what_was_measured() -> None:
    rises = built(
        results.DirectionalSharpness, rises=torch.tensor([0.5, 0.0, 1.0]), largest=1.0, at=0.5, resolution=0.1
    )
    ax = plots.directional_sharpness(rises)
    assert curve(ax) == [[-0.5, 0.5], [0.0, 0.0], [0.5, 1.0]]
    angles = built(results.SamMsamAngle, angles=torch.tensor([20.0, 10.0, -5.0]), rho_0=0.75, bracket=(0.5, 1.0))
    ax = plots.sam_msam_angle(angles)
    assert np.asarray(curve(ax))[:, 1].tolist() == [20.0, 10.0, -5.0]
    (root,) = ax.containers
    assert np.asarray(root.lines[0].get_xydata()).tolist() == [[0.75, 0.0]]  # type: ignore[attr-defined]
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white" and line.get_linestyle() == "None"]
    assert np.asarray(hollow[0].get_xydata()).tolist() == [[1.0, -5.0]]
    ax = plots.robust_accuracy(built(results.RobustAccuracy, accuracies=torch.tensor([0.5, 0.25]).double()))
    assert curve(ax) == [[0.0, 0.9], [0.1, 0.5], [0.2, 0.25]]
    assert "pgd" in ax.get_xlabel()


def test_the_rank_is_marked_on_its_curve() -> None:
    ax = plots.feature_rank({"SGD": built(results.FeatureRank)})
    assert legend(ax) == ["SGD: rank 2"]
    (mark,) = [line for line in ax.lines if line.get_marker() == plots.look(["SGD"])["SGD"].marker]
    shares = built(results.FeatureRank).to_frame()["explained"]
    assert np.asarray(mark.get_xydata()).tolist() == [[2.0, shares[1]]]


def test_a_projection_on_a_line_is_drawn_over_the_steps() -> None:
    plane = projection()
    line = dataclasses.replace(plane, coordinates=plane.coordinates[:, :1], directions=("u",), direction_norms=(1.0,))
    ax = plots.project(line)
    assert np.asarray(curve(ax))[:, 1].tolist() == plane.coordinates[:, 0].tolist()
    assert ax.get_xlabel() == "step"
    assert legend(ax) == ["MSAM, u"]
    assert plots.project(plane).get_xlabel() == "u"


# --- what is public


@pytest.mark.parametrize(
    "module", [ma, ma.plots, ma.results, ma.directions, ma.probes, ma.trajectory, ma.checkpoints, ma.export]
)
def test_dir_shows_what_is_public(module: Any) -> None:
    assert set(dir(module)) == set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
