"""Losses that break off, vanish, or hardly are one: the right answer, or one clear sentence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis.results import ConvergenceWarning

from . import cases
from .cases import MLP, mean_output, normal
from .oracles import symmetric
from .test_sharpness_certificate import quadratic


class Function(nn.Module):
    """A loss that is a function of the weights alone."""

    def __init__(self, w: Tensor, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.f = f

    def forward(self, scale: Tensor) -> Tensor:
        return scale * self.f(self.w)


def of(f: Callable[[Tensor], Tensor], w: Tensor | int) -> ma.Objective:
    """Return the objective with the loss ``f(w)`` at ``w``, or at that many zeros."""
    start = torch.zeros(w, dtype=torch.float64) if isinstance(w, int) else w.double()
    return ma.Objective(Function(start, f), mean_output, cases.ONE_SAMPLE)


def quietly(objective: ma.Objective, rho: float, **options: Any) -> ma.results.BallSharpness:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ma.ball_sharpness(objective, rho, **options)


# --- NaN and infinity inside the ball


@pytest.mark.parametrize("starts", [("gradient", "krylov", "eigenvector"), ("gradient",), ("random",)])
def test_a_loss_that_is_nan_beyond_a_radius(starts: Any) -> None:
    """``g·w + √(1 − ‖w‖²)`` is largest at ``g/√(1 + ‖g‖²)``, inside the ball in which it is defined."""
    g = normal(5, seed=1)
    objective = of(lambda w: g @ w + (1 - w @ w).sqrt(), 5)
    exact = math.sqrt(1 + float(g @ g)) - 1
    with pytest.warns(ConvergenceWarning, match=r"at \d+ of \d+ points the loss or its gradient is NaN.*smaller ball"):
        result = ma.ball_sharpness(objective, 3.0, starts=starts)
    assert not result.converged
    assert 0 < result.undefined < result.gradients
    assert 0.99 * exact <= result.sharpness <= exact * (1 + 1e-12)
    inside = quietly(objective, 0.5)
    assert inside.converged
    assert inside.undefined == 0
    assert inside.sharpness > 0


def test_a_gradient_that_is_nan_where_the_loss_is_not() -> None:
    """``√(w − 1)`` where that is real, else 0: below 1 autograd multiplies NaN by zero."""
    objective = of(lambda w: torch.where(w > 1, (w - 1).sqrt(), 0).sum() + w[0] ** 2 / 2 + w[0], torch.tensor([2.0]))
    with pytest.warns(ConvergenceWarning, match="points the loss or its gradient is NaN"):
        result = ma.ball_sharpness(objective, 1.5, starts=(torch.tensor([-1.5]).double(), "gradient"))
    assert result.undefined > 0
    assert result.sharpness == pytest.approx((1.5 + 1) ** 0.5 - 1 + (3.5**2 - 4) / 2 + 1.5, rel=1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_an_infinite_loss_is_the_largest(norm: Any) -> None:
    objective = of(lambda w: (400 * w.sum()).exp(), 4)
    result = quietly(objective, 2.0, norm=norm)
    assert result.sharpness == math.inf
    assert result.converged
    assert float(objective.loss(objective.point() + result.displacement)) == math.inf
    assert result.spread == 0
    with pytest.raises(ValueError, match="where the loss is infinite there is nothing to certify"):
        ma.certify(result, objective)


def test_a_pole_is_climbed_to_its_edge() -> None:
    """``−log(1 − w)`` is NaN beyond 1, and infinite there: what is returned is finite, and says what it is."""
    objective = of(lambda w: -torch.log(1 - w[0]), 1)
    with pytest.warns(ConvergenceWarning, match="is NaN"):
        result = ma.ball_sharpness(objective, 2.0)
    assert math.isfinite(result.sharpness)
    assert result.sharpness > 0.5
    assert float(result.displacement) < 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_centre_without_a_loss_is_refused(value: float) -> None:
    objective = of(lambda w: w.sum() + value, 3)
    with pytest.raises(ValueError, match=rf"loss at the weights is {value}.*expected finite values at the centre"):
        ma.ball_sharpness(objective, 0.1)


def test_a_curvature_that_is_not_finite_leaves_the_other_starts() -> None:
    """``|w|^1.5`` at 0: a gradient of zero and no second derivative."""
    objective = of(lambda w: (w.abs() ** 1.5).sum() + 0.1 * w[0], 4)
    result = ma.ball_sharpness(objective, 0.5, starts=("gradient", "krylov", "eigenvector", "random"))
    assert result.sharpness >= 0.5**1.5 + 0.05 - 1e-9
    assert math.isfinite(result.sharpness)


# --- nothing to climb along


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_saddle_is_left_along_its_top_eigenvector(adaptive: bool) -> None:
    H = symmetric([3.0, -1.0, -2.0], seed=2)
    w = 2 * torch.ones(3).double() if adaptive else torch.zeros(3).double()
    result = quietly(quadratic(H, torch.zeros(3).double(), w), 0.2, adaptive=adaptive)
    assert result.sharpness == pytest.approx(0.5 * 3 * (0.4 if adaptive else 0.2) ** 2, rel=1e-6)


def test_a_maximum_has_no_sharpness() -> None:
    objective = quadratic(symmetric([-1.0, -2.0, -3.0], seed=2), torch.zeros(3).double())
    for options in ({}, {"norm": "linf"}):
        result = quietly(objective, 0.2, **options)
        assert result.sharpness == 0
        assert not result.displacement.any()
        assert result.converged
    assert ma.certify(quietly(objective, 0.2), objective).verdict == "local maximum"


def test_a_zero_gradient_alone_says_nothing() -> None:
    """At a saddle the gradient leads nowhere, and 0 is not the answer."""
    objective = quadratic(symmetric([3.0, -1.0], seed=2), torch.zeros(2).double())
    with pytest.warns(ConvergenceWarning, match=r"gradient is zero at the weights.*add 'eigenvector' to starts"):
        result = ma.ball_sharpness(objective, 0.2, starts=("gradient",))
    assert result.sharpness == 0
    assert not result.converged


def test_a_constant_loss_has_no_sharpness() -> None:
    result = quietly(of(lambda w: 0 * w.sum() + 1, 3), 0.5)
    assert (result.sharpness, result.one_step, result.loss) == (0, 0, 1)


# --- linear losses


@pytest.mark.parametrize("rho", [1e-6, 0.3, 1e4])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_linear_loss_rises_by_the_dual_norm(norm: Any, adaptive: bool, rho: float) -> None:
    g, w = normal(6, seed=3), normal(6, seed=4)
    w[0] = 0
    objective = of(lambda w: g @ w, w)
    slope = g * w.abs() if adaptive else g
    exact = rho * float(slope.norm() if norm == "l2" else slope.abs().sum())
    result = quietly(objective, rho, norm=norm, adaptive=adaptive)
    assert result.sharpness == pytest.approx(exact, rel=1e-8)
    assert result.sharpness == pytest.approx(result.one_step, rel=1e-12)
    assert result.stationarity < 1e-7
    certificate = ma.certify(result, objective)
    assert certificate.verdict == "local maximum"
    if norm == "l2":
        assert certificate.multiplier == pytest.approx(float(slope.norm()) / rho, rel=1e-6)
        assert certificate.curvature == pytest.approx(-certificate.multiplier, rel=1e-6)


def test_a_linear_model_in_single_precision() -> None:
    g = normal(50, seed=3).float()
    model = Function(torch.zeros(50), lambda w: g @ w)
    objective = ma.Objective(model, mean_output, (torch.ones(1), torch.zeros(1)))
    assert quietly(objective, 0.5).sharpness == pytest.approx(0.5 * float(g.norm()), rel=1e-6)


# --- one parameter, one sample


@settings(max_examples=40, derandomize=True)
@given(
    coefficients=st.lists(st.integers(-40, 40), min_size=3, max_size=3),
    rho=st.sampled_from([0.1, 0.7, 2.0]),
    norm=st.sampled_from(["l2", "linf"]),
)
def test_one_parameter(coefficients: list[int], rho: float, norm: Any) -> None:
    """A cubic on an interval: the answer is one of its local maxima, the largest if there is one only."""
    a, b, c = (value / 10 for value in coefficients)
    grid = torch.linspace(-rho, rho, 20001, dtype=torch.float64)
    values = a * grid + b * grid**2 + c * grid**3
    objective = of(lambda w: (a * w + b * w**2 + c * w**3).sum(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = ma.ball_sharpness(objective, rho, norm=norm, starts=("gradient", "krylov", "eigenvector"))
    e = float(result.displacement)
    assert abs(e) <= rho * (1 + 1e-12)
    assert result.sharpness == pytest.approx(a * e + b * e**2 + c * e**3, rel=1e-9, abs=1e-12)
    assert result.sharpness >= max(float(values[0]), float(values[-1]), 0.0) - 1e-9
    assert result.sharpness <= float(values.max()) + 1e-6


def test_one_sample() -> None:
    x, y = MLP.data()[0]
    objective = ma.Objective(MLP.model(), MLP.loss_fn, [(x[:1], y[:1])])
    ball = quietly(objective, 0.3)
    assert ball.sharpness > ball.one_step > 0
    assert ma.certify(ball, objective).verdict == "local maximum"
    alone = ma.m_sharpness(objective, 0.3, 1)
    assert alone.value == ball.sharpness
    assert math.isnan(alone.standard_error)
    assert ma.relative_flatness(objective, "0.weight").value != 0
    assert math.isnan(ma.fisher_rao_norm(objective).standard_error)


# --- budgets


@pytest.mark.parametrize("budget", [1, 2, 7, 25, 40])
def test_the_budget_is_kept(budget: int) -> None:
    """One gradient at the centre and one at every start are always spent; no more than the budget beyond."""
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = ma.ball_sharpness(objective, 1.0, iterations=budget, tolerance=0.0)
    assert result.gradients <= max(budget, 2 + len(result.starts))
    assert result.gradients >= min(budget, 20)
    assert result.sharpness >= result.one_step


@pytest.mark.parametrize("rho", [0.5, 3.0])
@pytest.mark.parametrize("case", [MLP, cases.CONVNET, cases.TRANSFORMER], ids=lambda case: case.name)
def test_what_the_default_budget_finds_on_networks(case: cases.Case, rho: float) -> None:
    """Nearly all that a longer search from more starts finds, or it says that it was still rising."""
    objective = ma.Objective(case.model(), case.loss_fn, case.data())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = ma.ball_sharpness(objective, rho)
        starts: Any = ("gradient", "krylov", "eigenvector", "random")
        longer = [ma.ball_sharpness(objective, rho, starts=starts, iterations=300, seed=seed) for seed in range(2)]
    assert result.gradients <= 40
    assert result.sharpness >= (0.98 if result.converged else 0.9) * max(ball.sharpness for ball in longer)


@pytest.mark.parametrize("name", ["close eigenvalues", "logistic"])
def test_extrapolation_reaches_the_end(name: str) -> None:
    """Steps that gain little each: plain ones would not be through within this budget."""
    if name == "logistic":
        x = normal(40, 30, seed=6) * torch.linspace(1, 2, 30).double()
        objective = of(lambda w: torch.nn.functional.softplus(x @ w).mean(), 30)
    else:
        objective = quadratic(symmetric(torch.linspace(0, 1, 30).double().numpy(), seed=6), normal(30, seed=7) / 100)
    best = ma.ball_sharpness(objective, 5.0, iterations=400, tolerance=1e-10)
    result = quietly(objective, 5.0, starts=("random",), iterations=35)
    assert result.sharpness >= 0.997 * best.sharpness


def test_a_given_start_is_used() -> None:
    """It ends at once in the maximum that it is, and that a few steps from the gradient do not reach."""
    objective = quadratic(symmetric([3.0, 1.0], seed=5), torch.zeros(2).double() + 1e-9)
    with pytest.warns(ConvergenceWarning, match="no maximum was reached"):
        worse = ma.ball_sharpness(objective, 1.0, starts=("gradient",), iterations=3)
    better = ma.ball_sharpness(objective, 1.0)
    continued = ma.ball_sharpness(objective, 1.0, starts=("gradient", 0.1 * better.displacement))
    assert worse.sharpness < better.sharpness
    assert continued.sharpness == pytest.approx(better.sharpness, rel=1e-9)
    assert set(continued.starts) == {"gradient", "given 0"}
