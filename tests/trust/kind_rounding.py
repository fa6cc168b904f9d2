"""Rounding: numbers below what the precision resolves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, mlp, points

SAID = ("right", "refused", "warned")


def single(offset: float = 0.0) -> tuple[nn.Module, Any, tuple[Tensor, Tensor], Truth]:
    """Return a network in float32, its criterion and data, and the exact function of the same weights."""
    net, (x, y) = mlp().float(), points()
    exact = mlp().float().double()

    def f(output: Tensor, target: Tensor) -> Any:
        return F.cross_entropy(output, target) + offset

    return net, f, (x.float(), y), Truth(lambda: f(exact(x.float().double()), y), exact.parameters())


def resolved(ask: Ask, question: Callable[[], Any], value: Callable[[Any], Any], want: float) -> Answer:
    """Ask for a result: within 10 % of the exact value, or it says that it is not resolved."""
    result = ask(question)
    got = float(value(result))
    far = abs(got - want) > 0.1 * abs(want)
    limit = getattr(result, "resolution", None)
    if far and limit is not None and abs(got - want) <= float(limit):
        return "warned"
    return got, want, 0.1


def noise(truth: Truth, sigma: float) -> float:
    """Return E[L(w + σ ε)] − L(w) to second order."""
    return 0.5 * sigma**2 * float(truth.hessian().trace())


@case("rounding", *SAID)
def average_at_1e_7(ask: Ask) -> Answer:
    """average_sharpness with σ = 1e-7 in float32."""
    net, f, data, truth = single()
    want = noise(truth, 1e-7)
    return resolved(ask, lambda: ma.average_sharpness(ma.Objective(net, f, data), 1e-7), lambda r: r.value, want)


@case("rounding", *SAID)
def average_at_1e_5(ask: Ask) -> Answer:
    """average_sharpness with σ = 1e-5 in float32."""
    net, f, data, truth = single()
    want = noise(truth, 1e-5)
    return resolved(ask, lambda: ma.average_sharpness(ma.Objective(net, f, data), 1e-5), lambda r: r.value, want)


@case("rounding", *SAID)
def average_of_a_large_loss(ask: Ask) -> Answer:
    """average_sharpness with σ = 1e-3 of a loss near 1000 in float32."""
    net, f, data, truth = single(offset=1000.0)
    want = noise(truth, 1e-3)
    return resolved(ask, lambda: ma.average_sharpness(ma.Objective(net, f, data), 1e-3), lambda r: r.value, want)


@case("rounding", "right")
def average_in_double(ask: Ask) -> Answer:
    """average_sharpness with σ = 1e-4 in float64, where it is resolved."""
    net, f, data, truth = single()
    want = noise(truth, 1e-4)

    def question() -> Any:
        return ma.average_sharpness(ma.Objective(net, f, data, dtype=torch.float64), 1e-4, draws=600)

    return resolved(ask, question, lambda r: r.value, want)


def _step(truth: Truth, rho: float) -> float:
    gradient = truth.gradient
    return float(truth.loss_at(rho * gradient / gradient.norm()) - truth.loss)


@case("rounding", *SAID)
def one_step_at_1e_7(ask: Ask) -> Answer:
    """one_step_sharpness with ρ = 1e-7 in float32."""
    net, f, data, truth = single()
    want = _step(truth, 1e-7)
    return resolved(ask, lambda: ma.one_step_sharpness(ma.Objective(net, f, data), 1e-7), lambda r: r.sharpness, want)


@case("rounding", *SAID)
def one_step_of_a_large_loss(ask: Ask) -> Answer:
    """one_step_sharpness with ρ = 1e-3 of a loss near 1000 in float32."""
    net, f, data, truth = single(offset=1000.0)
    want = _step(truth, 1e-3)
    return resolved(ask, lambda: ma.one_step_sharpness(ma.Objective(net, f, data), 1e-3), lambda r: r.sharpness, want)


@case("rounding", *SAID)
def ball_at_1e_5(ask: Ask) -> Answer:
    """ball_sharpness with ρ = 1e-5 in float32."""
    net, f, data, truth = single()
    want = _step(truth, 1e-5)  # the ball's maximum, but for ρ²
    return resolved(ask, lambda: ma.ball_sharpness(ma.Objective(net, f, data), 1e-5), lambda r: r.sharpness, want)


@case("rounding", *SAID)
def ball_at_1e_7(ask: Ask) -> Answer:
    """ball_sharpness with ρ = 1e-7 in float32."""
    net, f, data, truth = single()
    want = _step(truth, 1e-7)
    return resolved(ask, lambda: ma.ball_sharpness(ma.Objective(net, f, data), 1e-7), lambda r: r.sharpness, want)


@case("rounding", "right")
def ball_in_double(ask: Ask) -> Answer:
    """ball_sharpness with ρ = 1e-5 in float64, where it is resolved."""
    net, f, data, truth = single()
    want = _step(truth, 1e-5)

    def question() -> Any:
        return ma.ball_sharpness(ma.Objective(net, f, data, dtype=torch.float64), 1e-5)

    return resolved(ask, question, lambda r: r.sharpness, want)


@case("rounding", *SAID)
def batches_at_1e_7(ask: Ask) -> Answer:
    """m_sharpness with ρ = 1e-7 in float32, one batch."""
    net, f, data, truth = single()
    want = _step(truth, 1e-7)
    return resolved(ask, lambda: ma.m_sharpness(ma.Objective(net, f, data), 1e-7, 10), lambda r: r.value, want)


@case("rounding", *SAID)
def directional_at_1e_7(ask: Ask) -> Answer:
    """directional_sharpness along the gradient at ρ = 1e-7 in float32."""
    net, f, data, truth = single()
    want, gradient = _step(truth, 1e-7), truth.gradient
    d = (gradient / gradient.norm()).float()
    return resolved(
        ask, lambda: ma.directional_sharpness(ma.Objective(net, f, data), d, 1e-7), lambda r: r.sharpness, want
    )


@case("rounding", *SAID)
def slice_at_1e_7(ask: Ask) -> Answer:
    """slice_1d of radius 1e-7 along the gradient in float32: the rise at its end."""
    net, f, data, truth = single()
    want, gradient = _step(truth, 1e-7), truth.gradient
    d = (gradient / gradient.norm()).float()

    def question() -> Any:
        return ma.slice_1d(ma.Objective(net, f, data), d, radius=1e-7, points=3)

    return resolved(ask, question, lambda r: r.loss[2] - r.loss[1], want)


@case("rounding", *SAID)
def average_of_a_bfloat16_network(ask: Ask) -> Answer:
    """average_sharpness with σ = 1e-3 of a bfloat16 network, whose weights are coarser than that."""
    net, (x, y) = mlp().bfloat16(), points()
    exact = mlp().bfloat16().double()
    want = noise(Truth(lambda: F.cross_entropy(exact(x.bfloat16().double()), y), exact.parameters()), 1e-3)

    def question() -> Any:
        return ma.average_sharpness(ma.Objective(net, F.cross_entropy, (x.bfloat16(), y)), 1e-3)

    return resolved(ask, question, lambda r: r.value, want)


@case("rounding", *SAID)
def ball_of_a_float16_network(ask: Ask) -> Answer:
    """one_step_sharpness with ρ = 1e-4 of a float16 network."""
    net, (x, y) = mlp().half(), points()
    exact = mlp().half().double()
    want = _step(Truth(lambda: F.cross_entropy(exact(x.half().double()), y), exact.parameters()), 1e-4)

    def question() -> Any:
        return ma.one_step_sharpness(ma.Objective(net, F.cross_entropy, (x.half(), y)), 1e-4)

    return resolved(ask, question, lambda r: r.sharpness, want)


@case("rounding", *SAID)
def table_below_resolution(ask: Ask) -> Answer:
    """A table (measure) with a ball of ρ = 1e-7 in float32: the table marks what lies below its resolution."""
    net, f, data, truth = single()
    want = _step(truth, 1e-7)

    def question() -> Any:
        return ma.measure(ma.Objective(net, f, data), metrics=["ball"], radii=[1e-7])

    metrics = ask(question)
    row = metrics.table.iloc[0]
    marked = any("resol" in str(cell).lower() or "round" in str(cell).lower() for cell in row)
    return "warned" if marked or ask.said else (float(row["value"]), want, 0.1)
