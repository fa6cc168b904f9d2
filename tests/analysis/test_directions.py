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


@pytest.mark.parametrize("normalize", ["none", "filter", "layer", "weight", "l2"])
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


# --- weight normalisation, and what the name says


@each_case
def test_weight_normalisation(case: Case) -> None:
    """Entry by entry, ``d |w|``; vectors stay, or move with ``one_d``."""
    objective = make(case)
    raw = ma.directions.random(objective, seed=1, normalize="none").vector
    scaled = objective.layout.views(raw * objective.point().abs())
    for one_d in (False, True):
        direction = ma.directions.random(objective, seed=1, normalize="weight", one_d=one_d)
        for name, view in objective.layout.views(direction.vector).items():
            expected = scaled[name] if view.ndim >= 2 or one_d else torch.zeros_like(view)
            torch.testing.assert_close(view, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("normalize", ["filter", "layer", "weight"])
def test_the_name_says_what_biases_and_norms_do(normalize: Any) -> None:
    objective = make(CONVNET)
    fixed, moved = (ma.directions.random(objective, normalize=normalize, one_d=one_d) for one_d in (False, True))
    assert fixed.name == f"random 0, {normalize}-normalised, biases and norms fixed"
    assert moved.name == f"random 0, {normalize}-normalised, biases and norms moved"
    views = objective.layout.views(moved.vector)
    assert views["1.weight"].any()
    assert not objective.layout.views(fixed.vector)["1.weight"].any()
    weights = objective.layout.views(objective.point())
    if normalize != "weight":
        assert float(views["1.weight"].norm()) == pytest.approx(float(weights["1.weight"].norm()), rel=1e-12)
    matrices = make(MLP, parameters="*.weight")
    assert ma.directions.random(matrices, normalize=normalize).name == f"random 0, {normalize}-normalised", "no choice"
    assert ma.directions.gradient(objective, "l2").name == "gradient, unit length"


# --- orthogonal directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4])
def test_orthogonalised_directions_are_orthogonal(angle: float, dtype: torch.dtype) -> None:
    """Also where they were nearly parallel: the cosine is below 1e-6, and the part left is the right one."""
    a, b = normal(500, seed=1), normal(500, seed=2)
    near = (a + angle * b).to(dtype)
    rest = ma.directions.orthogonalized(ma.Direction(near, "near"), ma.Direction(a.to(dtype), "first"))
    first, left = a.to(dtype).double(), rest.vector.double()
    assert abs(float(first @ left) / float(first.norm() * left.norm())) < 1e-6
    expected = near.double() - first * (first @ near.double()) / (first @ first)
    torch.testing.assert_close(left, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-7 * angle)
    assert rest.vector.dtype == dtype
    assert rest.name == "near, orthogonal to first"


def test_orthogonal_to_several_that_are_not_orthogonal_themselves() -> None:
    others = [ma.Direction(normal(40, seed=seed) + 2 * normal(40, seed=9), f"d{seed}") for seed in range(3)]
    rest = ma.directions.orthogonalized(ma.Direction(normal(40, seed=7), "new"), others)
    for other in others:
        assert abs(float(other.vector @ rest.vector)) < 1e-12 * other.norm * rest.norm
    again = ma.directions.orthogonalized(rest, others)
    torch.testing.assert_close(again.vector, rest.vector, rtol=1e-12, atol=1e-14)


def test_the_cosine_of_an_orthogonalised_plane() -> None:
    objective = ma.Objective(MLP.model(torch.float32), MLP.loss_fn, MLP.data(torch.float32))
    d1 = ma.directions.gradient(objective)
    d2 = ma.directions.orthogonalized(ma.directions.random(objective), d1)
    assert abs(ma.slice_2d(objective, (d1, d2), points=1).cosine) < 1e-6


@pytest.mark.parametrize("other", [3.0, -1.0])
def test_nothing_is_left_of_a_parallel_direction(other: float) -> None:
    direction = ma.Direction(normal(40, seed=1).float(), "first")
    with pytest.raises(ValueError, match=r"'second' lies in the span of 'first': expected one that leads out"):
        ma.directions.orthogonalized(ma.Direction(other * direction.vector, "second"), direction)


# --- between points


def test_last_update() -> None:
    """What the step did, by whatever optimizer, and for a part of the parameters."""
    model, data = MLP.model().eval(), MLP.data()
    optimizer = optimizers()["AdamW"](list(model.parameters()))
    steps(model, optimizer, data, 3)
    objective = ma.Objective(model, MLP.loss_fn, data)
    part = objective.with_parameters("3.*")
    before, some = objective.point(), part.point()
    steps(model, optimizer, data, 1)
    direction = ma.directions.last_update(objective, before)
    torch.testing.assert_close(before + direction.vector, flatten(model), rtol=1e-15, atol=1e-16)
    assert direction.name == "last update"
    restricted = ma.directions.restricted(direction, objective, part)
    assert torch.equal(ma.directions.last_update(part, some).vector, restricted.vector)
    assert ma.directions.last_update(objective, before, "l2").norm == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ValueError, match=r"the weights are where they were: expected the point before the step"):
        ma.directions.last_update(objective, objective.point())
    with pytest.raises(ValueError, match=r"expected a flat point before the step of shape \(59,\)"):
        ma.directions.last_update(objective, some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orthonormal", [True, False])
def test_plane_through_three_points(orthonormal: bool, dtype: torch.dtype) -> None:
    """The three points lie where the plane says, and the loss there is theirs."""
    objective = ma.Objective(MLP.model(dtype), MLP.loss_fn, MLP.data(dtype))
    a, b = (flatten(MLP.model(seed=seed)).to(dtype) for seed in (5, 6))
    plane = ma.directions.plane_through(objective, a, b, orthonormal=orthonormal)
    d1, d2 = (direction.vector for direction in plane.directions)
    for (x, y), point in zip(plane.points, (objective.point(), a, b), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(objective.point() + float(x) * d1 + float(y) * d2, point, rtol=0, atol=tolerance)
    if orthonormal:
        assert abs(float(d1.double() @ d2.double())) < 1e-6
        assert [direction.norm for direction in plane.directions] == pytest.approx([1.0, 1.0], rel=1e-6)
        distances = torch.cdist(plane.points, plane.points)
        corners = torch.stack([objective.point(), a, b]).double()
        torch.testing.assert_close(distances, torch.cdist(corners, corners), rtol=1e-6, atol=1e-6)
    else:
        assert plane.points.tolist() == [[0, 0], [1, 0], [0, 1]]
    x, y = plane.coordinates(21, margin=0.5)
    for axis, places in ((x, plane.points[:, 0]), (y, plane.points[:, 1])):
        assert len(axis) == 21
        assert 0.0 in axis.tolist()
        assert float(axis[0]) < float(places.min()) < float(places.max()) < float(axis[-1])
    corner = ma.slice_2d(objective, plane.directions, coordinates=([0.0, float(plane.points[1, 0])], [0.0]))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert float(corner.loss[1, 0]) == pytest.approx(float(objective.loss(a)), rel=tolerance)
    assert float(corner.loss[0, 0]) == float(objective.loss())


@pytest.mark.parametrize("orthonormal", [True, False])
def test_three_points_on_one_line(orthonormal: bool) -> None:
    objective = make(MLP)
    w, step = objective.point(), normal(59, seed=1)
    for a, b in ((w + step, w - 2 * step), (w, w + step), (w + step, w)):
        with pytest.raises(ValueError, match=r"the three points lie on one line: expected three that span a plane"):
            ma.directions.plane_through(objective, a, b, orthonormal=orthonormal)


@pytest.mark.parametrize(("points", "margin"), [(1, 0.1), (5, -0.1)])
def test_bad_axes_of_a_plane(points: int, margin: float) -> None:
    objective = make(MLP)
    plane = ma.directions.plane_through(objective, *(flatten(MLP.model(seed=seed)) for seed in (5, 6)))
    with pytest.raises(ValueError, match=r"expected at least 2 points and a margin of at least 0"):
        plane.coordinates(points, margin)


# --- a part of the parameters


MADE: dict[str, Callable[[ma.Objective, torch.optim.Optimizer, dict[str, Tensor]], ma.Direction]] = {
    "random": lambda o, optimizer, others: ma.directions.random(o, one_d=True),
    "gradient": lambda o, optimizer, others: ma.directions.gradient(o),
    "momentum": lambda o, optimizer, others: ma.directions.momentum(optimizer, o),
    "last update": lambda o, optimizer, others: ma.directions.last_update(o, o.vector(others)),
    "interpolation": lambda o, optimizer, others: ma.directions.interpolation(o, o.vector(others)),
    "eigenvector": lambda o, optimizer, others: ma.directions.eigenvector(o),
    "plane": lambda o, optimizer, others: ma.directions.plane_through(
        o, o.vector(others), o.gradient(), orthonormal=False
    ).directions[0],
}


@pytest.mark.parametrize("pattern", ["3.*", "*.weight"])
@pytest.mark.parametrize("name", MADE)
def test_a_part_of_the_parameters_restricts_every_direction_alike(name: str, pattern: str) -> None:
    """An entry for each of them and none for others; what does not depend on the choice is a piece of the whole."""
    model, data = MLP.model().eval(), MLP.data()
    optimizer = optimizers()["SGD"](list(model.parameters()))
    steps(model, optimizer, data, 3)
    others = dict(MLP.model(seed=5).state_dict())
    whole = ma.Objective(model, MLP.loss_fn, data)
    part = whole.with_parameters(pattern)
    direction = MADE[name](part, optimizer, others)
    assert direction.vector.shape == (part.size,)
    if name not in ("random", "eigenvector"):
        full = ma.directions.restricted(MADE[name](whole, optimizer, others), whole, part)
        torch.testing.assert_close(direction.vector, full.vector, rtol=1e-12, atol=1e-14)
    line = ma.slice_1d(part, direction, points=3)
    for x, loss in zip(line.coordinates, line.loss, strict=True):
        moved = dict(model.named_parameters()) | part.layout.views(part.point() + x * direction.vector)
        flat = torch.cat([moved[n].detach().flatten() for n, _ in model.named_parameters()])
        assert float(loss) == pytest.approx(float(whole.loss(flat)), rel=1e-12)


def test_restricting_to_what_is_not_there() -> None:
    whole, part = make(MLP), make(MLP, parameters="0.*")
    with pytest.raises(ValueError, match=r"has no entries for '3.weight': expected a part"):
        ma.directions.restricted(ma.directions.random(part), part, whole)
