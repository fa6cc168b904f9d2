"""Slices against closed forms: every point, both axes, the centre, holes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import msam_analysis as ma

from . import cases
from .cases import CASES, CONVNET, MLP, WITH_POLICY, Case, Quadratic, mean_output, normal
from .oracles import flatten, reference_loss, symmetric

policies = pytest.mark.parametrize(("case", "policy"), WITH_POLICY, ids=lambda value: getattr(value, "name", value))

H = symmetric([5.0, 2.0, 1.0, -1.0], seed=20)
G = normal(4, seed=110)
W = normal(4, seed=111)
D1, D2 = normal(4, seed=112), 3 * normal(4, seed=113)


@pytest.fixture
def objective() -> ma.Objective:
    return ma.Objective(
        Quadratic(H, G, 0.5, W), mean_output, cases.split([2, 2, 1], torch.ones(5).double(), torch.zeros(5))
    )


def closed_form(e: Tensor) -> float:
    w = W + e
    return float(0.5 * w @ H @ w + G @ w + 0.5)


def test_surface_on_a_grid_that_is_not_square(objective: ma.Objective) -> None:
    surface = ma.slice_2d(objective, (D1, D2), radius=(0.5, 2.0), points=(7, 13))
    assert surface.loss.shape == (7, 13)
    np.testing.assert_allclose(surface.x.numpy(), np.linspace(-0.5, 0.5, 7), atol=1e-15)
    np.testing.assert_allclose(surface.y.numpy(), np.linspace(-2.0, 2.0, 13), atol=1e-15)
    for i in range(7):
        for j in range(13):
            expected = closed_form(surface.x[i] * D1 + surface.y[j] * D2)
            assert float(surface.loss[i, j]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert float(surface.loss[1, 9]) != pytest.approx(float(surface.loss.T[1, 6]))
    assert surface.direction_norms == pytest.approx((float(D1.norm()), float(D2.norm())), rel=1e-12)
    assert surface.cosine == pytest.approx(float(D1 @ D2 / D1.norm() / D2.norm()), rel=1e-12)


def test_surface_of_two_parameters_by_coordinate() -> None:
    """One parameter along each axis: x moves the first, y the second."""
    matrix = torch.diag(torch.tensor([2.0, 20.0]).double())
    objective = ma.Objective(Quadratic(matrix, torch.zeros(2).double()), mean_output, cases.ONE_SAMPLE)
    surface = ma.slice_2d(objective, tuple(torch.eye(2).double()), radius=1.0, points=5)
    expected = surface.x[:, None] ** 2 + 10 * surface.y[None, :] ** 2
    torch.testing.assert_close(surface.loss.double(), expected.double(), rtol=1e-14, atol=1e-15)
    frame = surface.to_frame()
    np.testing.assert_allclose(frame["loss"], frame["x"] ** 2 + 10 * frame["y"] ** 2, atol=1e-14)


def test_line(objective: ma.Objective) -> None:
    line = ma.slice_1d(objective, D1, radius=2.0, points=9)
    np.testing.assert_allclose(line.coordinates.numpy(), np.linspace(-2, 2, 9), atol=1e-15)
    for x, loss in zip(line.coordinates, line.loss, strict=True):
        assert float(loss) == pytest.approx(closed_form(x * D1), rel=1e-12, abs=1e-12)
    assert line.direction_norm == pytest.approx(float(D1.norm()), rel=1e-12)
    assert line.center_loss == float(objective.loss())


def test_line_on_given_coordinates(objective: ma.Objective) -> None:
    """A logarithmic axis, without the centre; the coordinates reported are those applied."""
    coordinates = torch.logspace(-3, 1, 8, dtype=torch.float64)
    forms: list[Any] = [coordinates, coordinates.tolist(), coordinates.numpy()]
    for given in forms:
        line = ma.slice_1d(objective, D2, coordinates=given)
        np.testing.assert_array_equal(line.coordinates.numpy(), coordinates.numpy())
        for x, loss in zip(coordinates, line.loss, strict=True):
            assert float(loss) == pytest.approx(closed_form(x * D2), rel=1e-12, abs=1e-12)
        assert line.center_loss == pytest.approx(closed_form(0 * D2), rel=1e-12)


def test_a_direction_and_its_vector_give_the_same(objective: ma.Objective) -> None:
    direction = ma.directions.random(objective, seed=1, normalize="none")
    by_direction = ma.slice_1d(objective, direction, points=5)
    by_vector = ma.slice_1d(objective, direction.vector, points=5)
    assert torch.equal(by_direction.loss, by_vector.loss)
    assert by_direction.direction == direction.name
    assert by_direction.direction_norm == pytest.approx(float(direction.norm), rel=1e-12)
    surface = ma.slice_2d(objective, (direction, D1), points=3)
    assert surface.directions[0] == direction.name


@policies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_centre_is_exact(case: Case, policy: Any, dtype: torch.dtype) -> None:
    """Bit for bit the objective's loss, on odd radii too."""
    objective = ma.Objective(case.model(dtype), case.loss_fn, case.data(dtype), batchnorm=policy)
    loss = float(objective.loss())
    d1, d2 = (ma.directions.random(objective, seed=seed) for seed in (1, 2))
    line = ma.slice_1d(objective, d1, radius=0.1, points=3)
    assert float(line.coordinates[1]) == 0.0
    assert float(line.loss[1]) == line.center_loss == loss
    assert float(line.loss[0]) != loss != float(line.loss[2])
    surface = ma.slice_2d(objective, (d1, d2), radius=(0.7, 0.3), points=(3, 5))
    assert float(surface.x[1]) == float(surface.y[2]) == 0.0
    assert float(surface.loss[1, 2]) == surface.center_loss == loss
    assert int((surface.loss == loss).sum()) == 1


@policies
def test_networks_at_every_point(case: Case, policy: Any) -> None:
    model, data = case.model(), case.data()
    objective = ma.Objective(model, case.loss_fn, data, batchnorm=policy)
    reference, point = reference_loss(case, model, data, policy), flatten(model)
    d1, d2 = normal(len(point), seed=114), normal(len(point), seed=115)
    lines = ma.directions.Direction(d1, "one"), ma.directions.Direction(d2, "another")
    surface = ma.slice_2d(objective, lines, radius=0.3, points=(3, 5))
    for i, x in enumerate(surface.x):
        for j, y in enumerate(surface.y):
            expected = float(reference(point + x * d1 + y * d2))
            assert float(surface.loss[i, j]) == pytest.approx(expected, rel=1e-10)


def test_recalibration_happens_at_every_point() -> None:
    objective = ma.Objective(CONVNET.model(), CONVNET.loss_fn, CONVNET.data(), batchnorm="recalibrate")
    direction = ma.directions.random(objective, seed=1)
    line = ma.slice_1d(objective, direction, points=5)
    for x, loss in zip(line.coordinates, line.loss, strict=True):
        assert float(loss) == float(objective.loss(objective.point() + x * direction.vector))


def test_the_centre_line_of_a_surface_is_the_line() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    d1, d2 = (ma.directions.random(objective, seed=seed) for seed in (1, 2))
    surface = ma.slice_2d(objective, (d1, d2), points=(5, 7))
    np.testing.assert_allclose(surface.loss[:, 3], ma.slice_1d(objective, d1, points=5).loss, rtol=1e-13)
    np.testing.assert_allclose(surface.loss[2, :], ma.slice_1d(objective, d2, points=7).loss, rtol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_defaults(case: Case) -> None:
    objective = ma.Objective(case.model(), case.loss_fn, case.data())
    line = ma.slice_1d(objective, ma.directions.random(objective))
    assert line.loss.shape == (51,)
    assert float(line.coordinates[0]) == -1.0
    assert float(line.coordinates[-1]) == 1.0
    assert dict(objective.settings).items() <= dict(line.settings).items()


def test_a_surface_has_51_by_51_points_by_default() -> None:
    objective = ma.Objective(Quadratic(H, G, 0.5, W), mean_output, cases.ONE_SAMPLE)
    surface = ma.slice_2d(objective, (D1, D2))
    assert surface.loss.shape == (51, 51)
    assert (float(surface.x[0]), float(surface.y[-1])) == (-1.0, 1.0)


def test_one_point_is_the_centre(objective: ma.Objective) -> None:
    line = ma.slice_1d(objective, D1, points=1)
    assert line.coordinates.tolist() == [0.0]
    assert float(line.loss[0]) == float(objective.loss())


def logarithm(output: Tensor, target: Tensor) -> Tensor:
    return torch.log(output).mean()


def test_nan_and_infinity_stay_what_they_are() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    objective = ma.Objective(model, logarithm, cases.ONE_SAMPLE)
    line = ma.slice_1d(objective, torch.ones(1).double(), radius=2.0, points=5)
    expected = [np.nan, -np.inf, 0.0, np.log(2.0), np.log(3.0)]
    np.testing.assert_allclose(line.loss.numpy(), expected, rtol=1e-14)
    surface = ma.slice_2d(objective, (torch.ones(1).double(), torch.full((1,), 0.5).double()), radius=2.0, points=5)
    with np.errstate(divide="ignore", invalid="ignore"):
        grid = np.log(1 + surface.x.numpy()[:, None] + 0.5 * surface.y.numpy()[None, :])
    np.testing.assert_allclose(surface.loss.numpy(), grid, rtol=1e-13)
    assert np.isnan(grid).any()
    assert np.isinf(grid).any()


@pytest.mark.parametrize("points", [2, 10, (7, 8), (8, 7), 0, -3])
def test_even_grids_are_refused(objective: ma.Objective, points: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)odd"):
        ma.slice_2d(objective, (D1, D2), points=points)
    if isinstance(points, int):
        with pytest.raises(ValueError, match=r"(?s)odd"):
            ma.slice_1d(objective, D1, points=points)


def test_same_direction_twice_is_degenerate_and_says_so(objective: ma.Objective) -> None:
    """The plane is a line: allowed, and visible in the cosine."""
    surface = ma.slice_2d(objective, (D1, 2 * D1), points=3)
    assert surface.cosine == pytest.approx(1.0, rel=1e-12)
