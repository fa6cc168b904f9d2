"""The other definitions of sharpness, against closed forms and dense derivatives; what rescaled layers do to each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.results import BatchSharpness, ConvergenceWarning

from . import cases
from .cases import CONVNET, MLP, Quadratic, labels, mean_output, normal
from .oracles import dense_hessian, flatten, reference_loss, symmetric
from .test_untouched import lived_in, untouched

loose: Any = ma


def quadratic(H: Tensor, g: Tensor, w: Tensor | None = None) -> ma.Objective:
    """Return the objective ``½ eᵀHe + gᵀe + const`` in the displacement ``e`` from ``w``."""
    w = torch.zeros_like(g) if w is None else w
    return ma.Objective(Quadratic(H, g - H @ w, 0.5, w), mean_output, cases.ONE_SAMPLE)


def mlp() -> ma.Objective:
    return ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())


# --- one step


def filter_norms(model: nn.Module) -> Tensor:
    """The norm of each entry's filter; of a vector's entry its own magnitude."""
    pieces = []
    for parameter in model.parameters():
        weight = parameter.detach()
        if weight.ndim == 1:
            pieces.append(weight.abs())
        else:
            pieces += [torch.full((row.numel(),), float((row**2).sum().sqrt())).double() for row in weight]
    return torch.cat([piece.flatten() for piece in pieces])


SCALES: dict[Any, Callable[[nn.Module], Tensor]] = {
    False: lambda model: torch.ones_like(flatten(model)),
    True: lambda model: flatten(model).abs(),
    "filter": filter_norms,
}


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", SCALES)
def test_one_step_is_the_maximum_of_the_linearised_loss(adaptive: Any, norm: Any) -> None:
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data)
    reference, point = reference_loss(CONVNET, model, data), flatten(model)
    g, T, rho = torch.func.grad(reference)(point), SCALES[adaptive](model), 0.02
    step = rho * T**2 * g / (T * g).norm() if norm == "l2" else rho * T * g.sign()
    result = ma.one_step_sharpness(objective, rho, norm=norm, adaptive=adaptive)
    torch.testing.assert_close(result.displacement, step, rtol=1e-7, atol=1e-12)
    assert result.sharpness == pytest.approx(float(reference(point + step) - reference(point)), rel=1e-8)
    assert result.sharpness == result.largest == float(result.rises)
    assert (result.at, result.rho) == (rho, rho)
    ball = ma.ball_sharpness(objective, rho, norm=norm, adaptive=adaptive)
    assert result.sharpness == pytest.approx(ball.one_step, rel=1e-12)
    assert ball.sharpness >= result.sharpness


@pytest.mark.parametrize("adaptive", SCALES)
def test_average_noise_is_scaled(adaptive: Any) -> None:
    """To second order ``½ σ² Σ T² diag H``; the draws are those of the plain noise."""
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data)
    sigma, T = 0.01, SCALES[adaptive](model)
    estimate = ma.average_sharpness(objective, sigma, adaptive=adaptive, draws=100)
    diagonal = dense_hessian(reference_loss(CONVNET, model, data), flatten(model)).diagonal()
    expected = 0.5 * sigma**2 * float((T**2 * diagonal).sum())
    assert abs(estimate.value - expected) < 4 * estimate.standard_error + 0.02 * abs(expected)


def test_one_step_at_a_critical_point_goes_nowhere() -> None:
    result = ma.one_step_sharpness(quadratic(symmetric([2.0, 1.0], seed=0), torch.zeros(2).double()), 0.5)
    assert result.sharpness == 0
    assert not result.displacement.any()


# --- along a direction


def test_directional_rise_of_a_quadratic() -> None:
    H, g, d = symmetric([4.0, 1.0, -2.0], seed=1), normal(3, seed=2), normal(3, seed=3)
    objective, unit = quadratic(H, g), d / d.norm()
    for direction in (d, 7 * d, ma.Direction(d, "mine")):
        result = ma.directional_sharpness(objective, direction, 0.6, points=5)
        t = torch.tensor([-0.6, -0.3, 0.0, 0.3, 0.6], dtype=torch.float64)
        rises = 0.5 * t**2 * float(unit @ H @ unit) + t * float(g @ unit)
        torch.testing.assert_close(result.coordinates, t, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(result.rises, rises, rtol=1e-9, atol=1e-12)
        assert result.rises[2] == 0
        assert result.sharpness == pytest.approx(float(rises[-1]))
        assert result.largest == pytest.approx(float(rises.max()))
        assert result.at == pytest.approx(float(t[rises.argmax()]))
        torch.testing.assert_close(result.displacement, 0.6 * unit)
        assert result.evaluations == 5
    assert result.direction == "mine"
    back = ma.directional_sharpness(objective, -d, 0.6, points=5)
    torch.testing.assert_close(back.rises, result.rises.flip(0))
    assert list(result.to_frame()["rise"]) == result.rises.tolist()


def test_resolution_is_the_rounding_of_the_losses() -> None:
    """Far from where it is resolved, a rise in single precision is off by no more than a few of these."""
    kinds = (torch.double, torch.float)
    wide, narrow = (ma.Objective(MLP.model(dtype), MLP.loss_fn, MLP.data(dtype)) for dtype in kinds)
    exact = ma.directional_sharpness(wide, wide.gradient(), 1e-6)
    rounded = ma.directional_sharpness(narrow, wide.gradient().float(), 1e-6)
    assert exact.resolution < 1e-8 * rounded.resolution
    assert rounded.resolution == pytest.approx(2 * exact.loss * torch.finfo(torch.float).eps, rel=1e-3)
    assert abs(rounded.sharpness - exact.sharpness) < 5 * rounded.resolution


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stays_visible(bad: float) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return torch.where(output > 0.25, bad, output).mean()

    objective = ma.Objective(Quadratic(torch.zeros(1, 1).double(), torch.ones(1).double()), loss, cases.ONE_SAMPLE)
    result = ma.directional_sharpness(objective, torch.ones(1).double(), 0.4, points=5)
    assert torch.isfinite(result.rises).tolist() == [True, True, True, True, False]
    for value in (result.sharpness, result.largest):
        assert value == bad or (math.isnan(bad) and math.isnan(value))


# --- batch by batch


class Linear(nn.Module):
    """The loss of a sample ``x`` is ``⟨w, x⟩``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def rows(count: int = 10, size: int = 3) -> tuple[ma.Objective, Tensor]:
    x = normal(count, size, seed=5)
    data = cases.split([count // 2, count - count // 2], x, torch.zeros(count))
    return ma.Objective(Linear(size), mean_output, data), x


@pytest.mark.parametrize("m", [1, 2, 3, 4, 10])
def test_m_sharpness_of_a_linear_loss(m: int) -> None:
    """Every batch rises by ``ρ`` times the norm of its mean; the last one weighs what it holds."""
    objective, x = rows()
    result = ma.m_sharpness(objective, 0.5, m)
    parts = x.split(m)
    rises = torch.stack([0.5 * part.mean(0).norm() for part in parts])
    sizes = torch.tensor([len(part) for part in parts]).double()
    torch.testing.assert_close(result.rises, rises, rtol=1e-9, atol=0)
    torch.testing.assert_close(result.one_steps, rises, rtol=1e-9, atol=0)
    assert result.sizes.tolist() == sizes.tolist()
    assert result.value == pytest.approx(float((sizes * rises).sum()) / 10)
    assert result.batches == len(parts)
    assert result.converged
    if 10 % m == 0 and m < 10:
        assert result.standard_error == pytest.approx(float(rises.std()) / math.sqrt(len(parts)))
    elif m == 10:
        assert math.isnan(result.standard_error)
    assert list(result.to_frame()["sharpness"]) == result.rises.tolist()


def test_smaller_batches_are_sharper() -> None:
    objective, _ = rows()
    values = [ma.m_sharpness(objective, 0.5, m).value for m in (1, 2, 5, 10)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(ma.ball_sharpness(objective, 0.5).sharpness)


def test_m_sharpness_of_a_network_is_the_mean_of_its_batches_balls() -> None:
    objective = mlp()
    options: dict[str, Any] = {"norm": "linf", "adaptive": True, "iterations": 30, "seed": 3}
    result = ma.m_sharpness(objective, 0.05, 8, **options)
    balls = [
        ma.ball_sharpness(ma.Objective(objective.model, MLP.loss_fn, [batch]), 0.05, **options) for batch in MLP.data()
    ]
    assert result.rises.tolist() == pytest.approx([ball.sharpness for ball in balls], rel=1e-9)
    assert result.value == pytest.approx(sum(n * ball.sharpness for n, ball in zip((8, 8, 3), balls, strict=True)) / 19)
    assert result.gradients == sum(ball.gradients for ball in balls)
    assert result.hvps == sum(ball.hvps for ball in balls)


def test_some_batches_stand_for_all() -> None:
    objective, _ = rows(count=40)
    everything = ma.m_sharpness(objective, 0.5, 2)
    some, again, others = (ma.m_sharpness(objective, 0.5, 2, batches=6, seed=seed) for seed in (1, 1, 2))
    assert len(some.rises) == 6
    assert some.batches == 20
    known = {round(rise, 9) for rise in everything.rises.tolist()}
    assert {round(rise, 9) for rise in some.rises.tolist()} <= known
    assert some.rises.tolist() == again.rises.tolist() != others.rises.tolist()
    assert abs(some.value - everything.value) < 4 * some.standard_error


def test_m_sharpness_warns_once() -> None:
    objective = mlp()
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 batches reached no maximum") as caught:
        result = ma.m_sharpness(objective, 2.0, 8, iterations=5)
    assert len(caught) == 1
    assert not result.converged


# --- measures that do not see a rescaling


class Features(nn.Module):
    """A head on random features: its curvature is that of softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=20 + index))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.body(x)))
        return out


def classified(model: nn.Module) -> ma.Objective:
    data = cases.split([8, 8, 3], normal(19, 4, seed=1), labels(19, classes=3, seed=2))
    return ma.Objective(model, F.cross_entropy, data)


def test_relative_flatness_of_a_softmax_layer() -> None:
    """``mean ‖φ‖² (Σ_c ‖w_c‖² p_c − ‖Σ_c p_c w_c‖²)`` for features ``φ`` and probabilities ``p``."""
    model = Features()
    features = torch.relu(model.body(normal(19, 4, seed=1))).detach()
    p, W = model.head(features).softmax(1).detach(), model.head.weight.detach()
    exact = ((features**2).sum(1) * (p @ (W**2).sum(1) - ((p @ W) ** 2).sum(1))).mean()
    estimate = ma.relative_flatness(classified(model), "head.weight", draws=400)
    assert abs(estimate.value - float(exact)) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.05 * float(exact)
    assert estimate.settings["layer"] == "head.weight"


@pytest.mark.parametrize("layer", ["0.weight", "3.weight", "8.weight"])
def test_relative_flatness_against_the_dense_hessian(layer: str) -> None:
    """Of filters too: a row is a flattened filter."""
    model, data = CONVNET.model(), CONVNET.data()
    H = dense_hessian(
        reference_loss(CONVNET, model, data, names=[layer]), dict(model.named_parameters())[layer].detach().flatten()
    )
    W = dict(model.named_parameters())[layer].detach().flatten(1)
    blocks = H.reshape(*W.shape, *W.shape)  # s, t, s', t'
    exact = float(((W @ W.T) * blocks.diagonal(dim1=1, dim2=3).sum(-1)).sum())
    estimate = ma.relative_flatness(ma.Objective(model, CONVNET.loss_fn, data), layer, draws=300)
    assert abs(estimate.value - exact) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.3 * abs(exact)


def test_fisher_rao_norm_against_gradients_of_single_samples() -> None:
    model, w = MLP.model(), flatten(MLP.model())
    samples = [sample for x, y in MLP.data() for sample in zip(x.split(1), y.split(1), strict=True)]
    slopes = [w.dot(torch.func.grad(reference_loss(MLP, model, [sample]))(w)) for sample in samples]
    squares = torch.stack(slopes) ** 2
    estimate = ma.fisher_rao_norm(mlp())
    assert estimate.value == pytest.approx(float(squares.mean()), rel=1e-9)
    assert estimate.standard_error == pytest.approx(float(squares.std()) / math.sqrt(19), rel=1e-9)
    some, again, others = (ma.fisher_rao_norm(mlp(), samples=7, seed=seed) for seed in (1, 1, 2))
    assert some == again
    assert some.draws == 7
    assert some.value != others.value


class Homogeneous(nn.Module):
    """Three ReLU layers without biases."""

    def __init__(self, scales: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        sizes = ((4, 7), (7, 5), (5, 3))
        self.layers = nn.ModuleList(nn.Linear(inward, outward, bias=False) for inward, outward in sizes).double()
        for index, (weight, scale) in enumerate(zip(self.parameters(), scales, strict=True)):
            weight.data.copy_(scale * normal(*weight.shape, seed=30 + index))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.parameters()
        out: Tensor = torch.relu(torch.relu(x @ first.T) @ second.T) @ third.T
        return out


def test_fisher_rao_norm_of_a_homogeneous_network() -> None:
    """Liang et al. (2019): ``⟨w, ∇ℓ⟩ = (number of layers) ⟨∂ℓ/∂f, f⟩``."""
    model = Homogeneous()
    f = model(normal(19, 4, seed=1)).detach()
    slope = f.softmax(1) - F.one_hot(labels(19, classes=3, seed=2), 3)
    exact = float((3 * (slope * f).sum(1)).square().mean())
    assert ma.fisher_rao_norm(classified(model)).value == pytest.approx(exact, rel=1e-9)


INVARIANT: dict[str, Callable[[ma.Objective], float]] = {
    "adaptive ball": lambda o: ma.ball_sharpness(o, 0.2, adaptive=True).sharpness,
    "adaptive ball, filters": lambda o: ma.ball_sharpness(o, 0.05, adaptive="filter").sharpness,
    "adaptive ball, linf": lambda o: ma.ball_sharpness(o, 0.05, norm="linf", adaptive=True).sharpness,
    "adaptive one step": lambda o: ma.one_step_sharpness(o, 0.2, adaptive=True).sharpness,
    "adaptive one step, filters": lambda o: ma.one_step_sharpness(o, 0.2, adaptive="filter").sharpness,
    "adaptive average": lambda o: ma.average_sharpness(o, 0.2, adaptive=True, draws=4).value,
    "adaptive average, filters": lambda o: ma.average_sharpness(o, 0.2, adaptive="filter", draws=4).value,
    "m-sharpness, adaptive": lambda o: ma.m_sharpness(o, 0.2, 8, adaptive=True).value,
    "relative flatness, first": lambda o: ma.relative_flatness(o, "layers.0.weight", draws=3).value,
    "relative flatness, last": lambda o: ma.relative_flatness(o, "layers.2.weight", draws=3).value,
    "Fisher-Rao": lambda o: ma.fisher_rao_norm(o).value,
}
CHANGING: dict[str, Callable[[ma.Objective], float]] = {
    "ball": lambda o: ma.ball_sharpness(o, 0.2).sharpness,
    "ball, linf": lambda o: ma.ball_sharpness(o, 0.05, norm="linf").sharpness,
    "one step": lambda o: ma.one_step_sharpness(o, 0.2).sharpness,
    "average": lambda o: ma.average_sharpness(o, 0.2, draws=4).value,
    "m-sharpness": lambda o: ma.m_sharpness(o, 0.2, 8).value,
    "λ1": lambda o: float(ma.top_eigenvalues(o, 1).values[0]),
    "trace": lambda o: ma.trace(o, draws=3).value,
}


@pytest.mark.parametrize("name", [*INVARIANT, *CHANGING])
def test_rescaled_layers(name: str) -> None:
    """The same function with one ReLU layer four times as large, and another a quarter."""
    plain, scaled = classified(Homogeneous()), classified(Homogeneous((4.0, 1.0, 0.25)))
    assert float(plain.loss()) == pytest.approx(float(scaled.loss()), rel=1e-12)
    before, after = ((INVARIANT | CHANGING)[name](objective) for objective in (plain, scaled))
    if name in INVARIANT:
        assert after == pytest.approx(before, rel=1e-5)
    else:
        assert not 0.8 < after / before < 1.25


# --- manners


PROBES: dict[str, Callable[[ma.Objective], Any]] = {
    "one step": lambda o: ma.one_step_sharpness(o, 0.1),
    "one step, filters": lambda o: ma.one_step_sharpness(o, 0.1, adaptive="filter"),
    "direction": lambda o: ma.directional_sharpness(o, torch.ones(o.size).double(), 0.1, points=3),
    "m-sharpness": lambda o: ma.m_sharpness(o, 0.1, 8, batches=2),
    "relative flatness": lambda o: ma.relative_flatness(o, "0.weight", draws=2),
    "Fisher-Rao": lambda o: ma.fisher_rao_norm(o, samples=3),
}


@pytest.mark.parametrize("name", PROBES)
def test_nothing_is_left_behind(name: str) -> None:
    model = lived_in(CONVNET)
    objective = ma.Objective(model, CONVNET.loss_fn, CONVNET.data())
    with untouched(model):
        PROBES[name](objective)


def test_tokens_and_mappings() -> None:
    """Batches that are mappings, losses that are sums over tokens."""
    case = cases.TAGGER
    objective = ma.Objective(case.model(), case.loss_fn, case.data())
    result = ma.m_sharpness(objective, 0.1, 4)
    assert isinstance(result, BatchSharpness)
    assert result.value > 0
    assert ma.fisher_rao_norm(objective).value > 0
    assert ma.relative_flatness(objective, "head.weight", draws=2).standard_error > 0


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rho of one step": (lambda o: loose.one_step_sharpness(o, -1.0), r"rho must be a number >= 0, got -1\.0"),
    "norm of one step": (lambda o: loose.one_step_sharpness(o, 1.0, norm="l1"), r"norm must be one of .*got 'l1'"),
    "adaptive": (lambda o: loose.one_step_sharpness(o, 1.0, adaptive="layer"), r"adaptive must be .*got 'layer'"),
    "adaptive ball": (lambda o: loose.ball_sharpness(o, 1.0, adaptive=None), r"adaptive must be .*got None"),
    "adaptive average": (lambda o: loose.average_sharpness(o, 1.0, adaptive=1), r"adaptive must be .*got 1"),
    "rho along": (lambda o: loose.directional_sharpness(o, o.point(), math.nan), r"rho must be a number >= 0, got nan"),
    "points": (lambda o: loose.directional_sharpness(o, o.point(), 1.0, points=4), r"points must be odd.*got 4"),
    "one point": (lambda o: loose.directional_sharpness(o, o.point(), 1.0, points=1), r"points must be odd.*got 1"),
    "zero direction": (lambda o: loose.directional_sharpness(o, 0 * o.point(), 1.0), r"direction is zero"),
    "m = 0": (lambda o: loose.m_sharpness(o, 0.1, 0), r"m must be between 1 and the number of samples \(19\), got 0"),
    "m too large": (lambda o: loose.m_sharpness(o, 0.1, 20), r"m must be between 1 .*\(19\), got 20"),
    "m = 2.5": (lambda o: loose.m_sharpness(o, 0.1, 2.5), r"m must be between 1 .*\(19\), got 2\.5"),
    "no batches": (lambda o: loose.m_sharpness(o, 0.1, 8, batches=0), r"batches must be between 1 and 3.*got 0"),
    "many batches": (lambda o: loose.m_sharpness(o, 0.1, 8, batches=4), r"batches must be between 1 and 3.*got 4"),
    "ball of a batch": (lambda o: loose.m_sharpness(o, -0.1, 8), r"rho must be a number >= 0, got -0\.1"),
    "one draw": (lambda o: loose.relative_flatness(o, "0.weight", draws=1), r"draws must be at least 2.*got 1"),
    "no such layer": (lambda o: loose.relative_flatness(o, "9.weight"), r"no parameter is named '9\.weight'"),
    "a bias": (lambda o: loose.relative_flatness(o, "0.bias"), r"one weight with at least two dim.*'0\.bias' \(7,\)"),
    "two layers": (lambda o: loose.relative_flatness(o, "*.weight"), r"one weight.*'0\.weight' \(7, 4\), '3\.weight'"),
    "one sample": (lambda o: loose.fisher_rao_norm(o, samples=1), r"samples must be between 2 and 19, got 1"),
    "many samples": (lambda o: loose.fisher_rao_norm(o, samples=20), r"samples must be between 2 and 19, got 20"),
    "tolerance": (lambda o: loose.ball_sharpness(o, 0.1, tolerance=-1.0), r"tolerance must be a number >= 0, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(mlp())


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_fisher_rao_norm_wants_single_samples(policy: Any) -> None:
    objective = ma.Objective(CONVNET.model(), CONVNET.loss_fn, CONVNET.data(), batchnorm=policy)
    with pytest.raises(ValueError, match=rf"batchnorm='{policy}'.*use batchnorm='eval'"):
        ma.fisher_rao_norm(objective)
    without = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), batchnorm=policy)
    assert ma.fisher_rao_norm(without).value == ma.fisher_rao_norm(mlp()).value
