"""Directions: their distribution, their normalisation filter for filter, their lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from . import cases
from .cases import CASES, CONVNET, MLP, PARTIAL, Case, normal
from .oracles import dense_hessian, flatten, reference_loss, symmetric

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make(case: Case, **options: Any) -> ma.Objective:
    return ma.Objective(case.model(), case.loss_fn, case.data(), **options)


def normalized(direction: ma.Direction, objective: ma.Objective, kind: Any) -> Tensor:
    """The one place that knows how a direction is normalised after it was made."""
    return direction.normalized(objective, kind).vector


def filter_normalized(objective: ma.Objective, raw: Tensor) -> Tensor:
    """Li et al. (2018), section 4, as a loop: ``d_ij ← d_ij / ‖d_ij‖ · ‖w_ij‖``; vectors get zero."""
    out = []
    weights = objective.layout.views(objective.point())
    for name, view in objective.layout.views(raw).items():
        d, w = view.clone(), weights[name]
        for index in range(len(d)):
            if d.ndim < 2:
                d[index] = 0
            elif float(torch.sum(d[index] ** 2)) > 0:
                d[index] *= float(torch.sum(w[index] ** 2)) ** 0.5 / float(torch.sum(d[index] ** 2)) ** 0.5
        out.append(d.flatten())
    return torch.cat(out)


@each_case
def test_filter_normalisation_filter_for_filter(case: Case) -> None:
    objective = make(case)
    raw = ma.directions.random(objective, seed=1, normalize="none")
    expected = filter_normalized(objective, raw.vector)
    torch.testing.assert_close(normalized(raw, objective, "filter"), expected, rtol=1e-12, atol=1e-14)
    direction = ma.directions.random(objective, seed=1, normalize="filter")
    torch.testing.assert_close(direction.vector, expected, rtol=1e-12, atol=1e-14)
    assert float(direction.norm) == pytest.approx(float(expected.norm()), rel=1e-12)
    weights = objective.layout.views(objective.point())
    for name, view in objective.layout.views(direction.vector).items():
        if view.ndim < 2:
            assert not view.any()
        else:
            norms, targets = view.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, targets, rtol=1e-12, atol=0)


@each_case
def test_layer_normalisation(case: Case) -> None:
    objective = make(case)
    direction = ma.directions.random(objective, seed=1, normalize="layer")
    weights = objective.layout.views(objective.point())
    for name, view in objective.layout.views(direction.vector).items():
        if view.ndim >= 2:
            assert float(view.norm()) == pytest.approx(float(weights[name].norm()), rel=1e-12)
    raw = ma.directions.random(objective, seed=1, normalize="none")
    for name, view in objective.layout.views(raw.vector).items():
        if view.ndim >= 2:
            got = objective.layout.views(direction.vector)[name]
            torch.testing.assert_close(got / got.norm(), view / view.norm(), rtol=1e-10, atol=1e-12)


def test_l2_normalisation_is_one_scale_for_all() -> None:
    objective = make(CONVNET)
    raw = ma.directions.random(objective, seed=1, normalize="none").vector
    unit = ma.directions.random(objective, seed=1, normalize="l2")
    torch.testing.assert_close(unit.vector / unit.vector.norm(), raw / raw.norm(), rtol=1e-12, atol=1e-14)
    assert float(unit.norm) == pytest.approx(float(unit.vector.norm()), rel=1e-12)
    assert float(unit.norm) == pytest.approx(1.0, rel=1e-12)


def test_zero_biases_and_zero_filters() -> None:
    """A network as it is initialised: nothing is divided by zero, and a zero filter stays where it is."""
    model = CONVNET.model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
        model[3].weight[1].zero_()
        model[8].weight.zero_()
    objective = ma.Objective(model, CONVNET.loss_fn, CONVNET.data())
    for normalize in ("filter", "layer"):
        direction = ma.directions.random(objective, seed=1, normalize=normalize)
        assert torch.isfinite(direction.vector).all()
        views = objective.layout.views(direction.vector)
        assert not views["8.weight"].any()
        assert views["3.weight"][0].any()
    views = objective.layout.views(ma.directions.random(objective, seed=1, normalize="filter").vector)
    assert not views["3.weight"][1].any()


def test_a_zero_filter_of_the_direction() -> None:
    """The gradient of a dead filter is zero and cannot be scaled to anything else."""
    objective = make(PARTIAL)
    vector = normalized(ma.directions.gradient(objective), objective, "filter")
    assert torch.isfinite(vector).all()
    assert not objective.layout.views(vector)["unused.weight"].any()
    expected = filter_normalized(objective, objective.gradient())
    torch.testing.assert_close(vector, expected, rtol=1e-12, atol=1e-14)


def test_normalising_twice_changes_nothing() -> None:
    objective = make(CONVNET)
    for kind in ("filter", "layer", "l2"):
        once = ma.directions.random(objective, seed=2, normalize=kind)
        torch.testing.assert_close(normalized(once, objective, kind), once.vector, rtol=1e-13, atol=1e-15)


@pytest.fixture
def large() -> ma.Objective:
    model = nn.Linear(100, 100, bias=False).double()
    model.weight.data.copy_(normal(100, 100, seed=100))
    return ma.Objective(model, F.mse_loss, (normal(2, 100, seed=101), normal(2, 100, seed=102)))


def test_random_directions_are_gaussian(large: ma.Objective) -> None:
    sample = ma.directions.random(large, seed=0, normalize="none").vector.numpy()
    assert scipy.stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(scipy.stats.kurtosis(sample)) < 0.3  # −1.2 for a uniform distribution, −2 for signs


@pytest.mark.parametrize("normalize", ["none", "filter", "layer", "l2"])
def test_random_directions_are_nearly_orthogonal(large: ma.Objective, normalize: Any) -> None:
    vectors = torch.stack([ma.directions.random(large, seed=s, normalize=normalize).vector for s in range(6)])
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = vectors @ vectors.T - torch.eye(6).double()
    assert float(cosines.abs().max()) < 0.05
    assert float(cosines.abs().max()) > 0


def test_random_directions_by_seed() -> None:
    objective = make(MLP)
    draw = ma.directions.random
    assert torch.equal(draw(objective, seed=4).vector, draw(objective, seed=4).vector)
    assert not torch.equal(draw(objective, seed=4).vector, draw(objective, seed=5).vector)
    assert torch.equal(draw(objective).vector, draw(objective, seed=0, normalize="filter").vector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(draw(objective, seed=4).vector, draw(make(MLP), seed=4).vector)


@each_case
def test_gradient(case: Case) -> None:
    model, data = case.model(), case.data()
    objective = ma.Objective(model, case.loss_fn, data)
    expected = torch.func.grad(reference_loss(case, model, data))(flatten(model))
    direction = ma.directions.gradient(objective)
    torch.testing.assert_close(direction.vector, expected, rtol=1e-9, atol=1e-12)
    assert float(direction.norm) == pytest.approx(float(expected.norm()))
    assert "gradient" in direction.name


def test_eigenvectors() -> None:
    model, data = MLP.model(), MLP.data()
    objective = ma.Objective(model, MLP.loss_fn, data)
    _, vectors = torch.linalg.eigh(dense_hessian(reference_loss(MLP, model, data), flatten(model)))
    for index in (0, 1, 2):
        direction = ma.directions.eigenvector(objective, index=index)
        unit = direction.vector / direction.vector.norm()
        assert abs(float(unit @ vectors[:, -1 - index])) > 1 - 1e-6
        assert float(direction.norm) == pytest.approx(1.0, rel=1e-9)


def test_interpolation_ends_at_the_other_point() -> None:
    objective = make(MLP)
    other = flatten(MLP.model(seed=5))
    direction = ma.directions.interpolation(objective, other)
    torch.testing.assert_close(direction.vector, other - objective.point(), rtol=1e-14, atol=1e-15)
    line = ma.slice_1d(objective, direction, coordinates=[0.0, 0.5, 1.0])
    there = reference_loss(MLP, MLP.model(), MLP.data())(other)
    assert float(line.loss[2]) == pytest.approx(float(there), rel=1e-11)
    assert float(line.loss[0]) == float(objective.loss())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Any], number: int) -> None:
    for index in range(number):
        optimizer.zero_grad()
        x, y = data[index % len(data)]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    }


@pytest.mark.parametrize(("name", "key"), [("SGD", "momentum_buffer"), ("AdamW", "exp_avg")])
@pytest.mark.parametrize("pattern", [None, "3.*"])
def test_momentum(name: str, key: str, pattern: str | None) -> None:
    model, data = MLP.model().eval(), MLP.data()
    optimizer = optimizers()[name](list(model.parameters())[::-1])  # another order than the model's
    steps(model, optimizer, data, 4)
    objective = ma.Objective(model, MLP.loss_fn, data, parameters=pattern)
    chosen = [p for n, p in model.named_parameters() if pattern is None or n.startswith("3.")]
    expected = torch.cat([optimizer.state[parameter][key].flatten() for parameter in chosen])
    direction = ma.directions.momentum(optimizer, objective)
    assert torch.equal(direction.vector, expected)
    assert "momentum" in direction.name
    optimizer.state[chosen[0]][key].zero_()
    assert torch.equal(direction.vector, expected), "a copy"


def test_momentum_where_a_parameter_never_had_a_gradient() -> None:
    model, data = PARTIAL.model(), PARTIAL.data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    F.mse_loss(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    objective = ma.Objective(model, PARTIAL.loss_fn, data)
    views = objective.layout.views(ma.directions.momentum(optimizer, objective).vector)
    assert not views["unused.weight"].any()
    assert torch.equal(views["head.weight"], optimizer.state[model.head.weight]["momentum_buffer"])


def test_subset_restricts_directions() -> None:
    objective = make(CONVNET, parameters="*.weight")
    assert ma.directions.random(objective).vector.shape == (objective.size,)
    assert ma.directions.gradient(objective).vector.shape == (objective.size,)


def test_float32_directions_are_float32() -> None:
    objective = ma.Objective(MLP.model(torch.float32), MLP.loss_fn, MLP.data(torch.float32))
    for normalize in ("filter", "layer", "l2", "none"):
        assert ma.directions.random(objective, normalize=normalize).vector.dtype == torch.float32


def test_eigenvector_of_a_quadratic() -> None:
    H = symmetric([1.0, 5.0, 3.0], seed=13)
    objective = ma.Objective(cases.Quadratic(H, torch.zeros(3).double()), cases.mean_output, cases.ONE_SAMPLE)
    vector = ma.directions.eigenvector(objective).vector
    residual = H @ vector - 5 * vector
    assert float(residual.norm()) < 1e-3
    assert np.isclose(float(vector.norm()), 1.0)
