"""Certificates of ball maxima against dense curvature on the tangent space, at maxima, local maxima and saddles."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import msam_analysis as ma
from msam_analysis.results import BallSharpness, Certificate

from . import cases
from .cases import CASES, MLP, Case, Quadratic, mean_output, normal
from .oracles import dense_hessian, flatten, reference_loss, symmetric, trust_region_maximum
from .test_untouched import lived_in, untouched


def quadratic(H: Tensor, g: Tensor, w: Tensor | None = None) -> ma.Objective:
    """Return the objective ``½ eᵀHe + gᵀe + const`` in the displacement ``e`` from ``w``."""
    w = torch.zeros_like(g) if w is None else w
    return ma.Objective(Quadratic(H, g - H @ w, 0.5, w), mean_output, cases.ONE_SAMPLE)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def placed(objective: ma.Objective, displacement: Tensor, rho: float, **changes: Any) -> BallSharpness:
    """Return a ball sharpness that claims the given displacement."""
    ball = ma.ball_sharpness(objective, rho, **changes)
    rise = float(objective.loss(objective.point() + displacement) - objective.loss())
    return dataclasses.replace(ball, displacement=displacement, sharpness=rise)


def top_on_tangent_space(A: Tensor, z: Tensor, multiplier: float) -> float:
    """Return the largest eigenvalue of ``A − λ I`` on ``z⊥``, from a dense basis."""
    basis = torch.linalg.svd(z[None]).Vh[1:].T
    reduced = basis.T @ (A - multiplier * torch.eye(len(z), dtype=A.dtype)) @ basis
    return float(torch.linalg.eigvalsh(reduced)[-1])


def check_curvature(certificate: Certificate, exact: float) -> None:
    """Lanczos stops at 5 % of the value, and the residual it reports bounds its error."""
    assert abs(certificate.curvature - exact) <= certificate.curvature_residual + 1e-9 * abs(exact)
    assert certificate.curvature_residual <= 0.05 * abs(certificate.curvature) + 1e-12
    assert certificate.converged


# --- what is known on paper


SPECTRA = {
    "positive": [5.0, 3.0, 1.0, 0.5, 0.1],
    "indefinite": [5.0, 3.0, 0.0, -1.0, -8.0],
    "zero": [0.0, 0.0, 0.0],
    "multiple": [4.0, 4.0, 4.0, 1.0, -1.0],
    "negative": [-0.5, -1.0, -2.0, -3.0],
}


@pytest.mark.parametrize("rho", [0.05, 2.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_maximum_of_a_quadratic_is_certified(name: str, rho: float) -> None:
    H = symmetric(SPECTRA[name], seed=1)
    g = 4 * normal(len(H), seed=71)
    objective = quadratic(H, g)
    ball = ma.ball_sharpness(objective, rho)
    certificate = ma.certify(ball, objective)
    e = ball.displacement
    multiplier = float((H @ e + g) @ e) / rho**2
    assert certificate.verdict == "local maximum"
    assert certificate.on_surface
    assert certificate.multiplier == pytest.approx(multiplier, rel=1e-9)
    assert multiplier > max(SPECTRA[name][0], 0.0), "the multiplier of a global maximum is beyond the spectrum"
    assert certificate.relative_residual < 1e-6
    assert certificate.dimensions == len(H) - 1
    check_curvature(certificate, top_on_tangent_space(H, e, multiplier))
    assert certificate.gain < 1e-9 * ball.sharpness


def test_an_interior_maximum_is_certified_in_the_whole_space() -> None:
    H, g = symmetric([-1.0, -2.0, -5.0], seed=4), normal(3, seed=73)
    rho = 3 * float(torch.linalg.solve(-H, g).norm())
    objective = quadratic(H, g)
    certificate = ma.certify(ma.ball_sharpness(objective, rho), objective)
    assert certificate.verdict == "local maximum"
    assert not certificate.on_surface
    assert certificate.multiplier == 0
    assert certificate.dimensions == 3
    check_curvature(certificate, -1.0)


@pytest.mark.parametrize("part", [0.0, 1e-9])
def test_the_hard_case(part: float) -> None:
    """The gradient has next to no part along the top eigenvector, and the multiplier is the top eigenvalue."""
    H = symmetric([5.0, 3.0, 1.0, -2.0], seed=2)
    values, vectors = torch.linalg.eigh(H)
    g = vectors @ torch.where(values == values.max(), part, 0.3 * normal(4, seed=72))
    objective = quadratic(H, g)
    ball = ma.ball_sharpness(objective, 1.0)
    assert ball.sharpness == pytest.approx(trust_region_maximum(H, g, 1.0), rel=1e-6)
    certificate = ma.certify(ball, objective)
    assert certificate.verdict == "local maximum"
    assert certificate.multiplier == pytest.approx(5.0, rel=1e-4)
    check_curvature(certificate, top_on_tangent_space(H, ball.displacement, certificate.multiplier))


def test_a_local_maximum_that_is_not_the_largest_is_one_all_the_same() -> None:
    """On the side of the sphere that the gradient points away from (Martínez 1994: there is at most one)."""
    objective = quadratic(diagonal(3.0, 1.0), vector(0.3, 0.0))
    ball = placed(objective, vector(-1.0, 0.0), 1.0)
    assert ball.sharpness < trust_region_maximum(diagonal(3.0, 1.0), vector(0.3, 0.0), 1.0) - 0.5
    certificate = ma.certify(ball, objective)
    assert certificate.verdict == "local maximum"
    assert certificate.multiplier == pytest.approx(3.0 - 0.3)
    assert certificate.curvature == pytest.approx(1.0 - 2.7)


def test_a_saddle_on_the_sphere_is_not_a_maximum() -> None:
    """Stationary along the surface, and the curvature across it exceeds the multiplier."""
    objective = quadratic(diagonal(3.0, 1.0), vector(0.0, 0.3))
    certificate = ma.certify(placed(objective, vector(0.0, 1.0), 1.0), objective)
    assert certificate.residual == 0
    assert certificate.multiplier == pytest.approx(1.3)
    assert certificate.curvature == pytest.approx(3.0 - 1.3)
    assert certificate.verdict == "not a local maximum"


def test_a_minimum_on_the_sphere_is_not_a_maximum() -> None:
    """The slope points inward: no multiplier ≥ 0 explains it."""
    objective = quadratic(diagonal(1.0, 0.5), vector(3.0, 0.0))
    certificate = ma.certify(placed(objective, vector(-1.0, 0.0), 1.0), objective)
    assert certificate.multiplier == 0
    assert certificate.relative_residual == pytest.approx(1.0)
    assert certificate.verdict == "not a local maximum"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_wrong_end_of_an_interval_is_not_a_maximum(norm: Any) -> None:
    objective = quadratic(diagonal(-0.1), vector(1.0))
    certificate = ma.certify(placed(objective, vector(-0.5), 0.5, norm=norm), objective)
    assert certificate.verdict == "not a local maximum"
    assert certificate.gain >= 1.0, "the other end is higher by as much"


def test_a_point_that_is_not_stationary_is_not_a_maximum() -> None:
    objective = quadratic(diagonal(-1.0, -1.0), vector(1.0, 0.0))
    on_surface = ma.certify(placed(objective, 0.5 * vector(0.8, 0.6), 0.5), objective)
    inside = ma.certify(placed(objective, vector(0.2, 0.0), 0.5), objective)
    assert on_surface.verdict == inside.verdict == "not a local maximum"
    assert on_surface.on_surface
    assert not inside.on_surface
    assert inside.residual == pytest.approx(0.8)
    assert inside.relative_residual == pytest.approx(0.8 / (1.0 * 0.5))


def test_flat_directions_leave_it_undecided() -> None:
    """Every point of the top eigenspace is as high: the curvature is zero, and higher orders would have to decide."""
    H = symmetric([4.0, 4.0, 4.0, 1.0, -1.0], seed=3)
    objective = quadratic(H, torch.zeros(5).double())
    certificate = ma.certify(ma.ball_sharpness(objective, 0.3), objective)
    assert certificate.relative_residual < 1e-6
    assert certificate.curvature == pytest.approx(0.0, abs=1e-5)
    assert certificate.verdict == "undecided"


def test_one_parameter_leaves_no_direction() -> None:
    objective = quadratic(diagonal(2.0), vector(1.0))
    certificate = ma.certify(ma.ball_sharpness(objective, 0.5), objective)
    assert (certificate.dimensions, certificate.curvature, certificate.hvps) == (0, -math.inf, 0)
    assert certificate.verdict == "local maximum"
    assert certificate.gain == 0


# --- other balls


@pytest.mark.parametrize("zeros", [0, 2], ids=["", "with zero weights"])
@pytest.mark.parametrize("name", ["positive", "indefinite"])
def test_adaptive_curvature_is_that_of_scaled_weights(name: str, zeros: int) -> None:
    H = symmetric(SPECTRA[name], seed=6)
    g, w = normal(5, seed=75), normal(5, seed=76)
    w[:zeros] = 0
    objective = quadratic(H, g, w)
    ball = ma.ball_sharpness(objective, 2.0, adaptive=True)
    certificate = ma.certify(ball, objective)
    T = w.abs()[zeros:]
    z = ball.displacement[zeros:] / T
    A = T[:, None] * H[zeros:, zeros:] * T
    q = T * (H @ ball.displacement + g)[zeros:]
    assert certificate.multiplier == pytest.approx(float(q @ z) / 4.0, rel=1e-6)
    assert certificate.dimensions == 4 - zeros
    check_curvature(certificate, top_on_tangent_space(A, z, certificate.multiplier))
    assert certificate.verdict == "local maximum"


def test_linf_holds_every_entry_of_a_convex_separable_loss() -> None:
    objective = quadratic(torch.diag(normal(9, seed=77).abs()), normal(9, seed=78))
    certificate = ma.certify(ma.ball_sharpness(objective, 0.5, norm="linf"), objective)
    assert (certificate.dimensions, certificate.residual, certificate.gain) == (0, 0.0, 0.0)
    assert certificate.verdict == "local maximum"


def test_linf_curvature_is_that_of_the_free_entries() -> None:
    """Two entries have their maximum inside the box."""
    h, g = vector(2.0, -4.0, -3.0, 1.0), vector(1.0, 0.4, -0.3, -1.0)
    objective = quadratic(torch.diag(h), g)
    ball = ma.ball_sharpness(objective, 0.5, norm="linf", tolerance=1e-12, iterations=400)
    torch.testing.assert_close(ball.displacement, vector(0.5, 0.1, -0.1, -0.5), rtol=1e-4, atol=0)
    certificate = ma.certify(ball, objective)
    assert certificate.dimensions == 2
    assert certificate.curvature == pytest.approx(-3.0, rel=1e-6)
    assert certificate.verdict == "local maximum"


def test_linf_with_an_entry_on_the_wrong_side() -> None:
    """Its slope points inward and its curvature is positive: at most the other side can be gained."""
    h, g = vector(2.0, 1.0, 0.5), vector(1.0, 1.0, 0.1)
    objective = quadratic(torch.diag(h), g)
    certificate = ma.certify(placed(objective, vector(0.5, 0.5, -0.1), 0.5, norm="linf"), objective)
    assert certificate.dimensions == 1
    assert certificate.residual == pytest.approx(0.1 - 0.05)
    assert certificate.verdict == "not a local maximum"
    left = float((0.5 * 0.5 * 0.25 + 0.1 * 0.5) - (0.5 * 0.5 * 0.01 - 0.1 * 0.1))
    assert left * (1 - 1e-12) <= certificate.gain <= 2 * left


@pytest.mark.parametrize("tilt", [1e-3, 1e-2])
def test_gain_bounds_what_is_left(tilt: float) -> None:
    """Off the maximum by a small angle: the rest of the way up is no longer than the model says, nor much shorter."""
    H, g = symmetric([5.0, 3.0, 1.0, -2.0], seed=11), 3 * normal(4, seed=90)
    objective = quadratic(H, g)
    ball = ma.ball_sharpness(objective, 1.0)
    tangent = normal(4, seed=91)
    tangent -= (tangent @ ball.displacement) * ball.displacement
    off = math.cos(tilt) * ball.displacement + math.sin(tilt) * tangent / tangent.norm()
    near = placed(objective, off, 1.0)
    left = ball.sharpness - near.sharpness
    gain = ma.certify(near, objective).gain
    assert left > 1e-7
    assert left * (1 - 20 * tilt) <= gain <= 30 * left


# --- networks


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_networks_against_the_dense_hessian(case: Case, adaptive: bool) -> None:
    model, data = case.model(), case.data()
    objective = ma.Objective(model, case.loss_fn, data)
    ball = ma.ball_sharpness(objective, 0.3, adaptive=adaptive, tolerance=1e-9, iterations=300)
    certificate = ma.certify(ball, objective)
    reference, point = reference_loss(case, model, data), flatten(model)
    T = point.abs() if adaptive else torch.ones_like(point)
    there = point + ball.displacement
    z, q = ball.displacement / T, T * torch.func.grad(reference)(there)
    multiplier = float(q @ z) / 0.09
    assert certificate.on_surface
    assert certificate.multiplier == pytest.approx(multiplier, rel=1e-7)
    assert certificate.residual == pytest.approx(float((q - multiplier * z).norm()), rel=1e-3, abs=1e-9)
    assert certificate.relative_residual < 1e-3
    assert certificate.verdict == "local maximum"
    A = T[:, None] * dense_hessian(reference, there) * T
    check_curvature(certificate, top_on_tangent_space(A, z, multiplier))


def test_float32_knows_the_surface() -> None:
    objective = ma.Objective(MLP.model(torch.float32), MLP.loss_fn, MLP.data(torch.float32))
    ball = ma.ball_sharpness(objective, 0.3, adaptive=True)
    certificate = ma.certify(ball, objective)
    assert certificate.on_surface
    assert certificate.verdict == "local maximum"


# --- honesty and manners


def test_a_curvature_that_did_not_converge_warns() -> None:
    H = symmetric(-torch.logspace(-4, 3, 60).double().numpy(), seed=31)
    objective = quadratic(H, torch.zeros(60).double())
    ball = ma.ball_sharpness(objective, 1.0)
    assert ball.sharpness == 0
    with pytest.warns(ma.ConvergenceWarning, match=r"certify: after 3 .*raise max_hvps"):
        certificate = ma.certify(ball, objective, max_hvps=3)
    assert not certificate.converged
    assert certificate.verdict == "undecided"


def test_a_positive_curvature_is_proof_before_it_converged() -> None:
    H = symmetric(torch.linspace(-1, 5, 60).double().numpy(), seed=32)
    objective = quadratic(H, torch.zeros(60).double())
    with pytest.warns(ma.ConvergenceWarning):
        ball = dataclasses.replace(ma.ball_sharpness(objective, 1.0, starts=("gradient",)), rho=1.0)
    with pytest.warns(ma.ConvergenceWarning, match="certify"):
        certificate = ma.certify(ball, objective, max_hvps=3)
    assert certificate.verdict == "not a local maximum"


def test_the_tolerance_decides_what_may_be_left() -> None:
    objective = quadratic(diagonal(-1.0, -1.0), vector(1.0, 0.0))
    ball = placed(objective, 0.5 * vector(math.cos(0.1), math.sin(0.1)), 0.5)
    strict, lenient = ma.certify(ball, objective), ma.certify(ball, objective, tolerance=0.1)
    assert 1e-3 < strict.gain / ball.sharpness < 0.1
    assert (strict.verdict, lenient.verdict) == ("not a local maximum", "local maximum")


def test_the_same_seed_gives_the_same_bits() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    ball = ma.ball_sharpness(objective, 0.3)
    first, again, other = (ma.certify(ball, objective, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.curvature == pytest.approx(other.curvature, rel=0.05)


def test_nothing_is_left_behind() -> None:
    model = lived_in(MLP)
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    ball = ma.ball_sharpness(objective, 0.3)
    with untouched(model):
        ma.certify(ball, objective)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"rho": 0.0}, {}, r"radius 0.*expected a positive radius"),
        ({"displacement": torch.zeros(3)}, {}, r"expected a flat displacement of the ball of shape \(2,\)"),
        ({}, {"tolerance": 0.0}, r"tolerance must be a positive number, got 0\.0"),
        ({}, {"tolerance": math.nan}, r"tolerance must be a positive number, got nan"),
        ({}, {"max_hvps": 0}, r"max_hvps must be at least k = 1, got 0"),
        ({"displacement": vector(math.nan, 0.0)}, {}, r"gradient at the displacement has norm nan.*expected a finite"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    objective = quadratic(diagonal(3.0, 1.0), vector(0.3, 0.2))
    ball = dataclasses.replace(ma.ball_sharpness(objective, 1.0), **changes)
    with pytest.raises(ValueError, match=message):
        ma.certify(ball, objective, **options)


def test_frame() -> None:
    objective = quadratic(diagonal(3.0, 1.0), vector(0.3, 0.2))
    frame = ma.certify(ma.ball_sharpness(objective, 1.0), objective).to_frame()
    assert len(frame) == 1
    assert frame["verdict"].tolist() == ["local maximum"]
