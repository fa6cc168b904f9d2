"""Ball maxima against the exact trust-region answer; averages against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import msam_analysis as ma
from msam_analysis.results import BallSharpness, ConvergenceWarning

from . import cases
from .cases import CASES, CONVNET, MLP, Case, Quadratic, mean_output, normal
from .oracles import flatten, reference_loss, rotation, symmetric, trust_region_maximum

NORMS = [("l2", False), ("linf", False), ("l2", True), ("linf", True)]
norms = pytest.mark.parametrize(("norm", "adaptive"), NORMS, ids=["l2", "linf", "adaptive l2", "adaptive linf"])


def quadratic(H: Tensor, g: Tensor, w: Tensor | None = None) -> ma.Objective:
    """Return the objective ``½ eᵀHe + gᵀe + const`` in the displacement ``e`` from ``w``."""
    w = torch.zeros_like(g) if w is None else w
    return ma.Objective(Quadratic(H, g - H @ w, 0.5, w), mean_output, cases.ONE_SAMPLE)


def length(e: Tensor, weights: Tensor, norm: Any, adaptive: bool) -> float:
    """Return the norm of the ball; where a weight is zero, an adaptive displacement must be zero."""
    if adaptive:
        assert not e[weights == 0].any()
        e = torch.where(weights == 0, torch.zeros_like(e), e / weights.abs())
    return float(e.norm()) if norm == "l2" else float(e.abs().max())


def check_certificate(result: BallSharpness, objective: ma.Objective, rho: float, norm: Any, adaptive: bool) -> None:
    """The displacement is in the ball and shows the rise that is claimed."""
    point = objective.point()
    base, there = float(objective.loss()), float(objective.loss(point + result.displacement))
    assert result.displacement.shape == (objective.size,)
    assert result.loss == pytest.approx(base, rel=1e-12)
    assert result.sharpness == pytest.approx(there - base, rel=1e-12, abs=1e-12 * max(1, abs(base)))
    eps = float(torch.finfo(point.dtype).eps)
    assert length(result.displacement.double(), point.double(), norm, adaptive) <= rho * (1 + 20 * eps)
    assert result.sharpness >= 0
    assert result.sharpness >= result.one_step
    assert (result.rho, result.norm, result.adaptive) == (rho, norm, adaptive)
    if result.starts:
        assert result.sharpness >= max(result.starts.values()) * (1 - 1e-12)


def test_the_oracle_itself() -> None:
    """In two dimensions the circle can simply be walked along."""
    angles = np.linspace(0, 2 * np.pi, 200001)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for seed, spectrum in enumerate([(3, 1), (3, -1), (-1, -2), (0, 0), (2, 2), (-0.1, -3)]):
        H = symmetric(spectrum, seed=seed).numpy()
        g = np.random.default_rng(seed).standard_normal(2)
        for rho in (0.1, 1.0, 10.0):
            e = np.concatenate([circle * rho * r for r in (0.25, 0.5, 0.75, 1.0)], axis=1)
            walked = (0.5 * np.einsum("ik,ij,jk->k", e, H, e) + g @ e).max()
            exact = trust_region_maximum(H, g, rho)
            assert exact >= walked - 1e-12
            if spectrum[0] >= 0:
                assert exact == pytest.approx(walked, rel=1e-8)
    interior = trust_region_maximum(-np.diag([1.0, 2.0]), np.array([1.0, 1.0]), 5.0)
    assert interior == pytest.approx(0.75)
    assert trust_region_maximum(np.diag([2.0, 1.0]), np.array([0.0, 0.5]), 1.0) == pytest.approx(0.5 * 2 + 0.125)


# --- exact answers


SPECTRA = {
    "positive": [5.0, 3.0, 1.0, 0.5, 0.1],
    "one dimension": [2.0],
    "one dimension, negative": [-2.0],
    "indefinite": [5.0, 3.0, 0.0, -1.0, -8.0],
    "negative definite": [-0.5, -1.0, -2.0, -3.0],
    "zero": [0.0, 0.0, 0.0],
    "multiple": [4.0, 4.0, 4.0, 1.0, -1.0],
    "close": [1.0, 0.9999, 0.999, 0.99, 0.5, 0.0],
    "wide": [1e4, 1e2, 1.0, 1e-2, 0.0],
    "forty": list(np.linspace(3, -2, 40)),
}


@pytest.mark.parametrize("rho", [1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_quadratics(name: str, rho: float) -> None:
    H = symmetric(SPECTRA[name], seed=1)
    g = normal(len(H), seed=70)
    w = normal(len(H), seed=71)
    objective = quadratic(H, g, w)
    result = ma.ball_sharpness(objective, rho)
    exact = trust_region_maximum(H, g, rho)
    assert result.sharpness == pytest.approx(exact, rel=1e-6, abs=1e-13)
    check_certificate(result, objective, rho, "l2", False)
    step = rho * g / g.norm()
    assert result.one_step == pytest.approx(float(0.5 * step @ H @ step + g @ step), rel=1e-8, abs=1e-13)
    if exact > 0 and SPECTRA[name][0] >= 0:
        assert result.stationarity < 1e-2


@pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")
@pytest.mark.parametrize("iterations", [1, 2, 50])
def test_stationarity_is_that_of_the_displacement(iterations: int) -> None:
    """On the sphere: the part of the gradient that is not along the displacement, relative to the gradient."""
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    result = ma.ball_sharpness(objective, 0.5, iterations=iterations)
    e = result.displacement
    assert float(e.norm()) == pytest.approx(0.5)
    slope = objective.gradient(objective.point() + e)
    tangential = slope - (slope @ e) / (e @ e) * e
    assert result.stationarity == pytest.approx(float(tangential.norm() / slope.norm()), rel=1e-6, abs=1e-9)


def test_an_ascent_cut_short_says_so() -> None:
    objective = ma.Objective(CONVNET.model(), CONVNET.loss_fn, CONVNET.data())
    with pytest.warns(ConvergenceWarning, match=r"(?s)rising.*raise iterations"):
        result = ma.ball_sharpness(objective, 1.0, iterations=2)
    assert not result.converged
    check_certificate(result, objective, 1.0, "l2", False)


@pytest.mark.parametrize("rho", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("part", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("name", ["positive", "indefinite", "multiple", "forty"])
def test_hard_case(name: str, part: float, rho: float) -> None:
    """The gradient has no part, or next to none, along the top eigenvector."""
    H = symmetric(SPECTRA[name], seed=2)
    values, vectors = torch.linalg.eigh(H)
    g = vectors @ torch.where(values > values.max() - 1e-9, part, normal(len(H), seed=72))
    result = ma.ball_sharpness(quadratic(H, g), rho)
    assert result.sharpness == pytest.approx(trust_region_maximum(H, g, rho), rel=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
def test_at_a_critical_point(name: str) -> None:
    """With g = 0 the maximum is ½ ρ² max(λ1, 0)."""
    H = symmetric(SPECTRA[name], seed=3)
    objective = quadratic(H, torch.zeros(len(H)).double())
    result = ma.ball_sharpness(objective, 0.3)
    assert result.sharpness == pytest.approx(0.5 * 0.09 * max(SPECTRA[name][0], 0.0), rel=1e-6, abs=1e-14)
    check_certificate(result, objective, 0.3, "l2", False)


def test_interior_maximum() -> None:
    """Where the loss is concave with its top inside, the answer is the top and not the sphere."""
    H = symmetric([-1.0, -2.0, -5.0], seed=4)
    g = normal(3, seed=73)
    top = torch.linalg.solve(-H, g)
    rho = 3 * float(top.norm())
    result = ma.ball_sharpness(quadratic(H, g), rho)
    assert result.sharpness == pytest.approx(float(0.5 * g @ top), rel=1e-6)
    torch.testing.assert_close(result.displacement, top, rtol=1e-3, atol=1e-4)


@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_any_quadratic(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40), label="n")
    number = st.integers(-3000, 3000).map(lambda thousandths: thousandths / 1000)
    signs = data.draw(st.sampled_from(["mixed", "positive", "negative"]), label="signs")
    spectrum = np.array(data.draw(st.lists(number, min_size=n, max_size=n), label="spectrum"))
    if signs != "mixed":
        spectrum = np.abs(spectrum) * (1 if signs == "positive" else -1)
    parts = np.array(data.draw(st.lists(number, min_size=n, max_size=n), label="g in the eigenbasis"))
    rho = data.draw(st.sampled_from([0.05, 0.5, 3.0]), label="rho")
    q = rotation(n, seed=n)
    H = torch.from_numpy((q * spectrum) @ q.T)
    H = (H + H.T) / 2
    g = torch.from_numpy(q @ parts)
    objective = quadratic(H, g)
    result = ma.ball_sharpness(objective, rho)
    exact = trust_region_maximum(H, g, rho)
    assert result.sharpness == pytest.approx(exact, rel=1e-6, abs=1e-13)
    check_certificate(result, objective, rho, "l2", False)


def test_ragged_batches_are_weighted() -> None:
    H, g = symmetric(SPECTRA["indefinite"], seed=5), normal(5, seed=74)
    scale = torch.arange(1.0, 12.0).double()
    data = cases.split([5, 5, 1], scale, torch.zeros(11))
    result = ma.ball_sharpness(ma.Objective(Quadratic(H, g), mean_output, data), 0.7)
    assert result.sharpness == pytest.approx(float(scale.mean()) * trust_region_maximum(H, g, 0.7), rel=1e-6)


@pytest.mark.parametrize("zeros", [0, 2], ids=["", "with zero weights"])
@pytest.mark.parametrize("rho", [0.05, 2.0])
@pytest.mark.parametrize("name", ["positive", "indefinite", "negative definite", "forty"])
def test_adaptive_ball_is_a_ball_in_scaled_weights(name: str, rho: float, zeros: int) -> None:
    """With ``e = |w| u`` the problem is the trust region of ``|w| H |w|`` and ``|w| g``."""
    H = symmetric(SPECTRA[name], seed=6)
    g, w = normal(len(H), seed=75), normal(len(H), seed=76)
    w[:zeros] = 0
    objective = quadratic(H, g, w)
    result = ma.ball_sharpness(objective, rho, adaptive=True)
    T = w.abs()
    exact = trust_region_maximum(T[:, None] * H * T, T * g, rho)
    assert result.sharpness == pytest.approx(exact, rel=1e-6, abs=1e-13)
    check_certificate(result, objective, rho, "l2", True)
    step = rho * T**2 * g / (T * g).norm()
    assert result.one_step == pytest.approx(float(0.5 * step @ H @ step + g @ step), rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_linf_of_a_convex_separable_loss(rho: float, adaptive: bool) -> None:
    """Every coordinate goes to the end that its gradient points to: ``½ h r² + |g| r`` each."""
    h, g, w = normal(9, seed=77).abs(), normal(9, seed=78), normal(9, seed=79)
    w[0] = 0
    objective = quadratic(torch.diag(h), g, w)
    result = ma.ball_sharpness(objective, rho, norm="linf", adaptive=adaptive)
    r = rho * w.abs() if adaptive else torch.full_like(w, rho)
    exact = float((0.5 * h * r**2 + g.abs() * r).sum())
    assert result.sharpness == pytest.approx(exact, rel=1e-6)
    assert result.one_step == pytest.approx(exact, rel=1e-6)
    check_certificate(result, objective, rho, "linf", adaptive)


@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_linf_of_an_indefinite_separable_loss(rho: float) -> None:
    """Coordinates of negative curvature have their maximum inside the box."""
    h, g = normal(9, seed=80), normal(9, seed=81)
    objective = quadratic(torch.diag(h), g)
    result = ma.ball_sharpness(objective, rho, norm="linf")
    best = torch.where(h < 0, torch.minimum(g.abs() / h.abs(), torch.tensor(rho)), torch.tensor(rho).double())
    exact = float((0.5 * h * best**2 + g.abs() * best).sum())
    assert result.sharpness <= exact * (1 + 1e-12)
    assert result.sharpness >= exact * 0.999
    check_certificate(result, objective, rho, "linf", False)


def test_linf_of_a_coupled_quadratic_against_every_corner() -> None:
    """A convex function is largest at a corner of the box: all 256 of them are tried."""
    H, g = symmetric([6.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.0], seed=7), normal(8, seed=82)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8).double()
    for rho in (0.05, 0.5, 5.0):
        e = rho * corners
        exact = float((0.5 * ((e @ H) * e).sum(1) + e @ g).max())
        result = ma.ball_sharpness(quadratic(H, g), rho, norm="linf")
        assert 0.95 * exact <= result.sharpness <= exact * (1 + 1e-12)


# --- networks


@norms
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_certified_on_networks(case: Case, norm: Any, adaptive: bool) -> None:
    model, data = case.model(), case.data()
    objective = ma.Objective(model, case.loss_fn, data)
    rho = 0.02 if norm == "linf" else 0.3
    result = ma.ball_sharpness(objective, rho, norm=norm, adaptive=adaptive)
    check_certificate(result, objective, rho, norm, adaptive)
    reference, point = reference_loss(case, model, data), flatten(model)
    rise = float(reference(point + result.displacement) - reference(point))
    assert result.sharpness == pytest.approx(rise, rel=1e-9)
    g = torch.func.grad(reference)(point)
    T = point.abs() if adaptive else torch.ones_like(point)
    step = rho * T * g.sign() if norm == "linf" else rho * T**2 * g / (T * g).norm()
    one_step = float(reference(point + step) - reference(point))
    assert result.one_step == pytest.approx(one_step, rel=1e-8)
    assert one_step > 0
    assert result.sharpness > one_step * (1 - 1e-12 if norm == "linf" else 1)
    assert result.gradients > 0


@pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")
@pytest.mark.parametrize("policy", CONVNET.policies)
@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_no_long_search_finds_much_more(policy: Any, rho: float) -> None:
    """Five starts of 60 fixed-point steps each, written here."""
    model, data = CONVNET.model(), CONVNET.data()
    reference, point = reference_loss(CONVNET, model, data, policy), flatten(model)
    gradient = torch.func.grad(reference)
    best = 0.0
    for start in range(5):
        d = gradient(point) if start == 0 else normal(len(point), seed=90 + start)
        e = rho * d / d.norm()
        for _ in range(60):
            d = gradient(point + e)
            e = rho * d / d.norm()
        best = max(best, float(reference(point + e) - reference(point)))
    objective = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy)
    result = ma.ball_sharpness(objective, rho)
    assert result.sharpness >= 0.98 * best


def test_one_step_is_not_the_maximum() -> None:
    """Strong curvature across the gradient: one step finds a small part of what is there."""
    H = symmetric([100.0, 0.1, 0.1, 0.1], seed=8)
    vectors = torch.linalg.eigh(H).eigenvectors
    g = 0.1 * vectors[:, 0] + 1e-3 * vectors[:, 3]
    result = ma.ball_sharpness(quadratic(H, g), 1.0)
    assert result.sharpness == pytest.approx(trust_region_maximum(H, g, 1.0), rel=1e-6)
    assert result.one_step < 0.02 * result.sharpness


@norms
def test_rho_zero(norm: Any, adaptive: bool) -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    result = ma.ball_sharpness(objective, 0.0, norm=norm, adaptive=adaptive)
    assert result.sharpness == 0
    assert result.one_step == 0
    assert not result.displacement.any()
    assert result.loss == float(objective.loss())


@pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")
@norms
def test_rho_matters(norm: Any, adaptive: bool) -> None:
    """To first order the rise is rho times the dual norm of the gradient."""
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    g = objective.gradient()
    scaled = g * objective.point().abs() if adaptive else g
    slope = float(scaled.norm() if norm == "l2" else scaled.abs().sum())
    for rho in (1e-4, 2e-4):
        result = ma.ball_sharpness(objective, rho, norm=norm, adaptive=adaptive)
        assert result.sharpness == pytest.approx(rho * slope, rel=1e-2)
    rises = [ma.ball_sharpness(objective, rho, norm=norm, adaptive=adaptive).sharpness for rho in (0.01, 0.1, 1.0)]
    assert rises[0] < rises[1] < rises[2]


def test_sign_matters() -> None:
    """It is the largest rise that is asked for: of a loss and of its negative the answers differ."""
    H, g = symmetric([4.0, 1.0, -0.5], seed=9), normal(3, seed=83)
    up, down = (ma.ball_sharpness(quadratic(sign * H, sign * g), 0.8).sharpness for sign in (1, -1))
    assert up == pytest.approx(trust_region_maximum(H, g, 0.8), rel=1e-6)
    assert down == pytest.approx(trust_region_maximum(-H, -g, 0.8), rel=1e-6)
    assert up > 1.5 * down


def test_float32() -> None:
    H, g = symmetric(SPECTRA["indefinite"], seed=10), normal(5, seed=84)
    data = (torch.ones(1), torch.zeros(1))
    objective = ma.Objective(Quadratic(H.float(), g.float()), mean_output, data)
    result = ma.ball_sharpness(objective, 0.7)
    assert result.sharpness == pytest.approx(trust_region_maximum(H, g, 0.7), rel=1e-5)
    assert result.displacement.dtype == torch.float32
    check_certificate(result, objective, 0.7, "l2", False)


def test_subset_moves_only_itself() -> None:
    model, data = MLP.model(), MLP.data()
    objective = ma.Objective(model, MLP.loss_fn, data, parameters="3.*")
    result = ma.ball_sharpness(objective, 0.5)
    assert result.displacement.shape == (24,)
    check_certificate(result, objective, 0.5, "l2", False)
    whole = ma.ball_sharpness(ma.Objective(model, MLP.loss_fn, data), 0.5)
    assert whole.sharpness > result.sharpness


def test_seed() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    first, again = (ma.ball_sharpness(objective, 0.5, seed=3) for _ in range(2))
    assert torch.equal(first.displacement, again.displacement)
    assert first.sharpness == again.sharpness
    drawn, same, other = (
        ma.ball_sharpness(objective, 0.5, starts=("random",), seed=seed).starts["random"] for seed in (3, 3, 4)
    )
    assert drawn == same != other


def test_steep_loss() -> None:
    """−log(1 − w) up to the edge of its pole."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    model.weight.data.zero_()
    objective = ma.Objective(model, lambda output, target: -torch.log(1 - output).mean(), cases.ONE_SAMPLE)
    for rho in (0.5, 0.999999):
        assert ma.ball_sharpness(objective, rho).sharpness == pytest.approx(-math.log(1 - rho), rel=1e-9)


# --- averages


def test_average_of_a_quadratic() -> None:
    """``E L(w + σz) − L(w) = ½ σ² tr H``, whatever the gradient."""
    H, g = symmetric([5.0, 3.0, 1.0, 0.5, -0.3, -1.0], seed=11), normal(6, seed=85)
    objective = quadratic(H, 0.1 * g)
    for sigma in (0.1, 0.5, 2.0):
        estimate = ma.average_sharpness(objective, sigma, draws=500, seed=1)
        assert abs(estimate.value - 0.5 * sigma**2 * float(H.trace())) < 4 * estimate.standard_error
        assert 0 < estimate.standard_error < 0.8 * sigma**2 + 0.04 * sigma
        assert estimate.draws == 500


def test_adaptive_average_of_a_quadratic() -> None:
    H, w = symmetric([5.0, 3.0, 1.0, 0.5, -0.3, -1.0], seed=11), 2 * normal(6, seed=86)
    w[2] = 0
    objective = quadratic(H, torch.zeros(6).double(), w)
    estimate = ma.average_sharpness(objective, 0.5, adaptive=True, draws=500, seed=2)
    expected = 0.125 * float((w**2 * H.diagonal()).sum())
    assert abs(expected - 0.125 * float(H.trace())) > 6 * estimate.standard_error
    assert abs(estimate.value - expected) < 4 * estimate.standard_error


def test_average_of_a_linear_loss_is_zero() -> None:
    objective = quadratic(torch.zeros(4, 4).double(), normal(4, seed=87))
    with pytest.warns(ma.results.ApproximationWarning, match="average_sharpness: .* below the resolution"):
        estimate = ma.average_sharpness(objective, 1.0, draws=500, seed=3)
    assert abs(estimate.value) <= 4 * estimate.standard_error + 1e-12


def test_average_seeds_and_error() -> None:
    objective = quadratic(symmetric([5.0, 3.0, 1.0], seed=12), normal(3, seed=88))
    first, again, other = (ma.average_sharpness(objective, 0.5, draws=10, seed=seed) for seed in (1, 1, 2))
    assert first.value == again.value
    assert first.value != other.value
    few, many = (ma.average_sharpness(objective, 0.5, draws=draws, seed=4) for draws in (50, 450))
    assert many.standard_error == pytest.approx(few.standard_error / 3, rel=0.4)


def test_average_at_sigma_zero() -> None:
    objective = quadratic(symmetric([5.0, 3.0, 1.0], seed=12), normal(3, seed=88))
    estimate = ma.average_sharpness(objective, 0.0, draws=4)
    assert estimate.value == 0
    assert estimate.standard_error == 0


def test_an_interior_maximum_that_was_not_reached_is_not_called_one() -> None:
    """A flat ridge inside the ball: the loss rises too slowly to see, far below the top."""
    H = symmetric(-np.logspace(-4, 3, 60), seed=31)
    g = H @ torch.linspace(-0.2, 0.2, 60, dtype=torch.float64)
    with pytest.warns(ma.ConvergenceWarning, match="no maximum was reached"):
        short = ma.ball_sharpness(quadratic(H, g), 5.0, starts=("gradient",), iterations=5)
    assert not short.converged
    with pytest.warns(ma.ConvergenceWarning, match="no maximum was reached"):
        stalled = ma.ball_sharpness(quadratic(H, g), 5.0, starts=("gradient",), iterations=100)
    assert stalled.gradients < 100, "the ascent stopped because it no longer rose"
    assert stalled.stationarity > 0.1
    assert not stalled.converged
    full = ma.ball_sharpness(quadratic(H, g), 5.0)
    exact = float(-0.5 * g @ torch.linalg.solve(H, g))
    assert full.sharpness == pytest.approx(exact, rel=1e-6)
    assert full.converged


def test_too_small_a_subspace_is_refused() -> None:
    with pytest.raises(ValueError, match="krylov_hvps must be at least 2, got 1"):
        ma.ball_sharpness(
            quadratic(symmetric([1.0, 2.0], seed=0), torch.ones(2, dtype=torch.float64)), 1.0, krylov_hvps=1
        )
