"""Surfaces from few points: close to the dense ones, with an error estimate that holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.landscape import metrics
from msam_analysis.landscape.refine import Kernel, Surface, refine_grid
from msam_analysis.landscape.refine import _left_out as left_out

from . import cases
from .cases import MLP, Quadratic, mean_output, normal
from .oracles import symmetric

Array = npt.NDArray[np.float64]


def refined(dense: Array, tolerance: float) -> tuple[int, Surface]:
    """Refine a known surface: number of points, and what came of them."""
    flat, asked = dense.ravel(), np.zeros(dense.size, dtype=bool)
    last: list[Surface] = []

    def measure(places: Any) -> dict[str, Array]:
        assert not asked[places].any(), "no point is asked for twice"
        asked[places] = True
        return {"loss": np.where(asked, flat, np.nan)}

    refine_grid(measure, dense.shape, tolerance, lambda surfaces: last.append(surfaces["loss"]))
    assert last[-1].relative <= tolerance
    np.testing.assert_array_equal(last[-1].values[asked], flat[asked], "measured points stay as they are")
    return int(asked.sum()), last[-1]


def surfaces(points: int) -> Iterator[tuple[str, Array]]:
    """Bowls, valleys, saddles, kinks, cliffs, waves and dips, over ranges from 2 to 10^6."""
    x, y = np.linspace(-1, 1, points)[:, None], np.linspace(-1, 1, points)[None, :]
    for seed in range(4):
        draw = np.random.default_rng(seed)
        a, b, w = 2 * draw.normal(size=(12, 2)), draw.normal(size=12), draw.normal(size=12)
        matrix = draw.normal(size=(2, 2))
        u, v = matrix[0, 0] * x + matrix[0, 1] * y - 0.3 * b[0], matrix[1, 0] * x + matrix[1, 1] * y - 0.3 * b[1]
        bowl = u**2 + v**2
        units = [np.maximum(0, a[i, 0] * x + a[i, 1] * y + b[i]) for i in range(12)]
        scores = 10 * np.stack([w[i] * units[i] for i in range(6)])
        yield f"bowl {seed}", bowl + 0.02
        yield f"quartic {seed}", 0.02 + bowl + 3 * bowl**2
        yield f"exponential {seed}", 0.02 + np.expm1(2 * bowl)
        yield f"saddle {seed}", u**2 - v**2
        yield f"ReLU {seed}", sum(w[i] * units[i] for i in range(12)) ** 2 + 0.01
        yield f"kinks {seed}", np.abs(u) + 0.5 * np.abs(v)
        yield f"cross entropy {seed}", np.logaddexp.reduce(scores, 0) - scores[0] + 0.001
        yield f"waves {seed}", np.sin(3 * u + b[2]) * np.cos(2 * v)
        yield f"dip {seed}", x**2 + y**2 + 1 - np.exp(-((x - 0.1 * b[3]) ** 2 + (y - 0.1 * b[4]) ** 2) / 0.02)
        yield f"cliff {seed}", 0.02 + 50 / (1 + np.exp(-8 * (u + v - 1)))
        yield f"huge {seed}", np.exp(3 * u + 2 * v) + 0.001 * (1 + x**2)
        yield f"curved valley {seed}", (1 - 2 * x) ** 2 + 20 * (2 * y - 4 * x**2 + 0.5 * b[2]) ** 2


def off(values: Array, dense: Array) -> float:
    """The largest error as a fraction of the range, or of the logarithm's where there is a factor of ten in it."""
    found = np.abs(values - dense).max() / (np.ptp(dense) or 1.0)
    if dense.min() <= 0 or dense.max() < 10 * dense.min():
        return float(found)
    if values.min() <= 0:
        return math.inf
    return float(max(found, np.abs(np.log(values / dense)).max() / np.ptp(np.log(dense))))


def covered(cases: list[tuple[str, Array, float]]) -> tuple[float, list[str]]:
    """Return which share of the errors is within its estimate, and the surfaces and tolerances where it is not."""
    missed = []
    for name, dense, tolerance in cases:
        count, surface = refined(dense, tolerance)
        flat, rounding = dense.ravel(), 1e-12 * np.abs(dense).max()
        absolute = np.abs(surface.values - flat).max() > surface.error + rounding
        if absolute or off(surface.values, flat) > surface.relative + rounding / np.ptp(dense):
            missed.append(f"{name} at {tolerance}, {count} points")
    return 1 - len(missed) / len(cases), missed


def test_the_estimate_covers_the_error_on_planes() -> None:
    """Every kind of surface at both tolerances, each with two seeds of the four."""
    rate, missed = covered([(name, dense, (0.05, 0.01)[int(name[-1]) % 2]) for name, dense in surfaces(31)])
    assert rate >= 0.95, missed


def test_the_estimate_covers_the_error_on_unequal_planes() -> None:
    rate, missed = covered([(name, dense[:, ::2], 0.02) for name, dense in surfaces(41) if name.endswith("0")])
    assert rate >= 0.9, missed


def test_the_estimate_covers_the_error_on_lines() -> None:
    lines = [(f"{name} {row}", dense[row]) for name, dense in surfaces(51) for row in (3, 25)]
    rate, missed = covered([(name, dense, tolerance) for name, dense in lines for tolerance in (0.05, 0.01)])
    assert rate >= 0.95, missed


def test_a_smooth_surface_takes_few_points() -> None:
    counts = {
        name: refined(dense, 0.01)[0] for name, dense in surfaces(51) if name.startswith(("bowl", "saddle", "quar"))
    }
    # Of 2,601; what is far larger at its rims than at its floor is to be right on a logarithmic scale, too.
    assert max(count for name, count in counts.items() if name.startswith("saddle")) <= 100, counts
    assert max(counts.values()) <= 300, counts


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5,), (1, 1), (1, 31), (31, 1), (2, 31), (3, 3), (7, 7), (4, 40)])
def test_grids_of_any_shape(shape: tuple[int, ...]) -> None:
    axes = np.meshgrid(*(np.linspace(-1, 1, count) for count in shape), indexing="ij")
    dense = np.asarray(sum((k + 1) * (axis + 0.3) ** 2 for k, axis in enumerate(axes)))
    _, surface = refined(dense, 0.01)
    assert np.abs(surface.values - dense.ravel()).max() <= 0.011 * np.ptp(dense) + 1e-12


def test_the_floor_of_a_steep_valley_is_right_on_a_logarithmic_scale() -> None:
    """An error of 1 % of the range would be ten times the loss at the minimum."""
    x, y = np.meshgrid(np.linspace(-1, 1, 51), np.linspace(-1, 1, 51), indexing="ij")
    dense = 0.02 + 20 * ((x - 0.13) ** 2 + 0.4 * (y + 0.07) ** 2 + 0.3 * x**4)
    count, surface = refined(dense, 0.01)
    assert count < 300  # of 2,601
    assert np.abs(np.log(surface.values / dense.ravel())).max() <= 0.01 * np.log(dense.max() / dense.min())


def test_a_constant_needs_no_more_than_the_beginning() -> None:
    count, surface = refined(np.full((51, 51), 0.1), 0.01)
    assert count < 100
    np.testing.assert_allclose(surface.values, 0.1, rtol=1e-9)


def test_what_is_not_finite_is_measured_and_never_interpolated() -> None:
    x, y = np.meshgrid(np.linspace(-1, 1, 31), np.linspace(-1, 1, 31), indexing="ij")
    dense = x**2 + y**2
    dense[x + y > 1] = np.inf
    dense[x - y > 1.2] = np.nan
    count, surface = refined(dense, 0.02)
    np.testing.assert_array_equal(np.isnan(surface.values), np.isnan(dense).ravel())
    np.testing.assert_array_equal(np.isinf(surface.values), np.isinf(dense).ravel())
    finite = np.isfinite(dense).ravel()
    assert np.abs(surface.values[finite] - dense.ravel()[finite]).max() <= surface.error
    assert count < dense.size
    everywhere = refined(np.full((9, 9), np.nan), 0.02)
    assert everywhere[0] == 81


def test_noise_is_measured_everywhere() -> None:
    """Nothing can be interpolated: every point is computed, and the error is 0, not a guess."""
    count, surface = refined(np.random.default_rng(0).normal(size=(21, 21)), 0.01)
    assert (count, surface.error) == (441, 0.0)


@pytest.mark.parametrize("kernel", ["linear", "thin_plate_spline", "cubic", "quintic"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_left_out_points_are_predicted_from_all_others(kernel: Kernel, dimensions: int) -> None:
    """As if each were left out in turn and the rest interpolated anew, by scipy; quintic ones are ill-conditioned."""
    draw = np.random.default_rng(0)
    places, values = draw.uniform(size=(20, dimensions)), draw.normal(size=20)
    expected = []
    for point in range(20):
        others = np.arange(20) != point
        rest = RBFInterpolator(places[others], values[others], kernel=kernel)
        expected.append(values[point] - rest(places[[point]])[0])
    np.testing.assert_allclose(left_out(places, values, kernel), expected, rtol=1e-4, atol=1e-4)


def test_a_singular_matrix_predicts_nothing() -> None:
    assert np.isinf(left_out(np.zeros((4, 2)), np.arange(4.0), "linear")).all()


# --- through the front door


@pytest.fixture(scope="module")
def trained() -> ma.Objective:
    """A trained network: loss near 0 at the centre, large away from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)).double()
    x = normal(60, 4, seed=1)
    y = (x @ normal(4, 3, seed=2)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return ma.Objective(model, nn.CrossEntropyLoss(), (x, y))


@pytest.mark.parametrize("seed", [0, 2])
def test_a_network(seed: int, trained: ma.Objective) -> None:
    plane = (ma.directions.random(trained, seed), ma.directions.random(trained, seed + 1))
    dense = ma.slice_2d(trained, plane, radius=1.0, points=41)
    surface = ma.slice_2d(trained, plane, radius=1.0, points=41, refine=0.01, metrics={"accuracy": metrics.accuracy})
    extent = float(dense.loss.max() - dense.loss.min())
    worst = float((surface.loss - dense.loss).abs().max())
    assert worst <= surface.error
    assert surface.error <= 0.01 * extent
    logarithms = (surface.loss.log() - dense.loss.log()).abs().max() / (dense.loss.max() / dense.loss.min()).log()
    assert float(logarithms) <= 0.01, "the loss spans a factor of ten and more"
    assert surface.converged
    assert surface.tolerance == 0.01
    assert surface.evaluations < 0.7 * 41 * 41  # the loss spans a factor of 20,000
    assert surface.evaluated is not None
    assert torch.equal(surface.loss[surface.evaluated], dense.loss[surface.evaluated]), "as every point alone"
    assert bool(surface.evaluated[20, 20]), "the centre is measured"
    assert surface.center_loss == dense.center_loss == float(surface.loss[20, 20])
    assert dict(surface.settings)["refine"] == 0.01
    frame = surface.to_frame()
    assert frame["evaluated"].sum() == surface.evaluations
    accuracies = ma.slice_2d(trained, plane, radius=1.0, points=41, metrics={"accuracy": metrics.accuracy})
    off = (surface.metrics["accuracy"] - accuracies.metrics["accuracy"]).abs().max()
    assert float(off) <= surface.metric_errors["accuracy"]


def test_wide_metrics_are_not_interpolated(trained: ma.Objective) -> None:
    direction = ma.directions.random(trained)
    line = ma.slice_1d(trained, direction, points=51, refine=0.05, metrics={"each": metrics.sample_losses})
    assert line.evaluated is not None
    assert line.metrics["each"].shape == (51, 60)
    assert torch.isnan(line.metrics["each"][~line.evaluated]).all()
    np.testing.assert_allclose(line.metrics["each"].mean(1)[line.evaluated], line.loss[line.evaluated], rtol=1e-12)
    assert list(line.metric_errors) == []


def test_a_logarithmic_axis() -> None:
    """Sharpness against rho: as smooth in the logarithm as it is on the line."""
    H = symmetric([5.0, 2.0, 1.0], seed=20)
    objective = ma.Objective(Quadratic(H, torch.zeros(3).double(), 0.1), mean_output, cases.ONE_SAMPLE)
    rhos = ma.landscape.logarithmic(1e-3, 10.0, 61)
    d = normal(3, seed=1)
    line = ma.slice_1d(objective, d, coordinates=rhos, refine=0.001)
    expected = 0.1 + 0.5 * rhos**2 * float(d @ H @ d)
    assert float((line.loss - expected).abs().max()) <= line.error <= 0.001 * float(expected.max() - expected.min())
    assert line.evaluations < 61


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, 2, float("nan")])
def test_bad_tolerances(tolerance: float) -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    with pytest.raises(ValueError, match=r"refine must be a fraction of the range between 0 and 1, got"):
        ma.slice_1d(objective, ma.directions.random(objective), refine=tolerance)


def test_the_same_again(trained: ma.Objective) -> None:
    plane = (ma.directions.random(trained, 0), ma.directions.random(trained, 1))
    first, second = (ma.slice_2d(trained, plane, points=31, refine=0.02) for _ in range(2))
    assert isinstance(first.evaluated, Tensor)
    assert isinstance(second.evaluated, Tensor)
    assert torch.equal(first.evaluated, second.evaluated)
    assert torch.equal(first.loss, second.loss)
