"""Cases of other projects, written anew: perceptrons and convolutions with every reduction, analytic quadratics.

Opt-in, as they repeat in other words what the suite holds: ``MSAM_PEERS=1 python -m pytest tests/trust/test_peers.py``.
The reference is ``torch.func.hessian`` of the whole loss in float64, or a spectrum that is known beforehand.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam_analysis as ma

from .cases import labels, normal, probe, seeded

pytestmark = pytest.mark.skipif(
    "MSAM_PEERS" not in os.environ, reason="opt-in: set MSAM_PEERS=1 to run the cases of other projects"
)


# --- networks with mean and sum reductions (after curvlinops' test cases)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, a criterion without its reduction, and batches of different sizes."""

    name: str
    build: Callable[[], nn.Module]
    criterion: Callable[..., nn.Module]
    batches: Callable[[], list[tuple[Tensor, Tensor]]]
    frozen: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        """Return the network in float64, some parameters frozen."""
        net: nn.Module = seeded(self.build)
        for name in self.frozen:
            net.get_parameter(name).requires_grad_(False)
        return net


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))


def shared() -> nn.Module:
    """Return a network that uses its weights at every position of a sequence, with classes in dimension 1."""
    return nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 3, 1))


def regression() -> list[tuple[Tensor, Tensor]]:
    return [(normal(n, 5, seed=n), normal(n, 3, seed=n + 20)) for n in (4, 7)]


def classes() -> list[tuple[Tensor, Tensor]]:
    return [(normal(n, 5, seed=n), labels(n, 3, seed=n)) for n in (4, 7)]


def several_labels() -> list[tuple[Tensor, Tensor]]:
    return [(normal(n, 5, seed=n), labels(3 * n, seed=n).view(n, 3).double()) for n in (4, 7)]


def images() -> list[tuple[Tensor, Tensor]]:
    return [(normal(n, 2, 3, 3, seed=n), labels(n, 3, seed=n)) for n in (4, 7)]


def sequences() -> list[tuple[Tensor, Tensor]]:
    return [(normal(n, 3, 4, seed=n), labels(4 * n, 3, seed=n).view(n, 4)) for n in (4, 7)]


PROBLEMS = [
    Problem("perceptron-mse", perceptron, nn.MSELoss, regression),
    Problem("perceptron-ce", perceptron, nn.CrossEntropyLoss, classes),
    Problem("perceptron-bce", perceptron, nn.BCEWithLogitsLoss, several_labels),
    Problem("perceptron-smooth-l1", perceptron, nn.SmoothL1Loss, regression),
    Problem("perceptron-frozen", perceptron, nn.CrossEntropyLoss, classes, ("0.weight", "2.bias")),
    Problem("linear-mse", lambda: nn.Sequential(nn.Linear(5, 3, bias=False)), nn.MSELoss, regression),
    Problem("convolution-ce", convolution, nn.CrossEntropyLoss, images),
    Problem("convolution-frozen", convolution, nn.CrossEntropyLoss, images, ("0.weight", "0.bias")),
    Problem("shared-ce", shared, nn.CrossEntropyLoss, sequences),
]


def reference(net: nn.Module, criterion: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Return loss, gradient and Hessian of the criterion on all data at once, by torch.func."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    chosen = {name: parameter.detach() for name, parameter in net.named_parameters() if parameter.requires_grad}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([value.numel() for value in chosen.values()])
        values = {name: piece.view_as(chosen[name]) for name, piece in zip(chosen, pieces, strict=True)}
        result: Tensor = criterion(torch.func.functional_call(net, values, (x,)), y)
        return result

    w = torch.cat([value.flatten() for value in chosen.values()])
    return loss(w), torch.func.grad(loss)(w), torch.func.hessian(loss)(w)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_network(problem: Problem, reduction: str) -> None:
    net, batches = problem.network(), problem.batches()
    criterion = problem.criterion(reduction=reduction)
    loss, gradient, hessian = reference(net, criterion, batches)
    objective = ma.Objective(net, criterion, batches)
    if reduction == "sum":  # the sum itself, or the mean over samples that an objective is
        share = float(objective.loss()) / float(loss)
        assert min(abs(share - 1), abs(share * objective.samples - 1)) < 1e-9
        loss, gradient, hessian = share * loss, share * gradient, share * hessian
    v = probe(objective.size)
    torch.testing.assert_close(objective.loss(), loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(objective.hvp(v), hessian @ v, rtol=1e-8, atol=1e-11)
    values = torch.linalg.eigvalsh(hessian).flip(0)
    pairs = ma.top_eigenvalues(objective, k=3)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, values[:3], rtol=1e-6, atol=1e-9)


# --- spectra that are known (after hessian-eigenthings' analytic tests)


class Quadratic(nn.Module):
    """A point in weight space."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(size, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


def quadratic(values: Tensor, seed: int) -> ma.Objective:
    """Return ½ wᵀ A w with given eigenvalues of A as an objective."""
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    matrix = (q * values) @ q.T

    def half_form(output: Tensor, target: Tensor) -> Any:
        return 0.5 * ((output @ matrix) * output).sum(1).mean() + 0 * target.sum()

    return ma.Objective(Quadratic(len(values)), half_form, (torch.zeros(4, 1), torch.zeros(4)))


SPECTRA = {
    "decaying": torch.logspace(1, -3, 20, dtype=torch.float64),
    "negative": torch.linspace(-4, 3, 20, dtype=torch.float64),
    "twice": torch.tensor([5.0, 5.0, 2.0, 2.0, 1.0, 0.5, 0.1, 0.0, 0.0, -1.0]).double(),
    "outlier": torch.cat([torch.tensor([100.0]).double(), torch.linspace(0, 1, 19, dtype=torch.float64)]),
    "low-rank": torch.cat([torch.tensor([3.0, 1.0]).double(), torch.zeros(18, dtype=torch.float64)]),
    "zero": torch.zeros(6, dtype=torch.float64),
}


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("name", SPECTRA)
def test_largest_eigenvalues_of_a_quadratic(name: str, method: Any) -> None:
    values = SPECTRA[name].sort(descending=True).values
    pairs = ma.top_eigenvalues(quadratic(values, seed=5), k=2, method=method)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, values[:2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SPECTRA)
def test_smallest_and_largest_in_magnitude(name: str) -> None:
    values = SPECTRA[name].sort().values
    smallest = ma.top_eigenvalues(quadratic(values, seed=6), k=1, which="smallest").values[0]
    largest = ma.top_eigenvalues(quadratic(values, seed=6), k=1, which="magnitude").values[0]
    torch.testing.assert_close(smallest, values[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(largest.abs(), values.abs().max(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("name", SPECTRA)
def test_trace_of_a_quadratic(name: str, method: Any) -> None:
    estimate = ma.trace(quadratic(SPECTRA[name], seed=7), method=method, draws=60)
    assert abs(estimate.value - float(SPECTRA[name].sum())) <= 4 * estimate.standard_error + 1e-9


@pytest.mark.parametrize("name", ["decaying", "negative", "outlier"])
def test_moments_of_a_density(name: str) -> None:
    values = SPECTRA[name]
    density = ma.spectral_density(quadratic(values, seed=8), steps=18, probes=40)
    x, f = torch.as_tensor(density.values).double(), torch.as_tensor(density.density).double()
    mean = float(torch.trapezoid(x * f, x))
    assert abs(float(torch.trapezoid(f, x)) - 1) < 0.01
    assert abs(mean - float(values.mean())) < 0.02 * float(values.max() - values.min())


def test_linear_regression_has_a_closed_form() -> None:
    x, y = normal(30, 6, seed=9), normal(30, 1, seed=10)
    net = seeded(lambda: nn.Linear(6, 1, bias=False))
    pairs = ma.top_eigenvalues(ma.Objective(net, nn.MSELoss(), [(x[:20], y[:20]), (x[20:], y[20:])]), k=6)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(2 * x.T @ x / 30).flip(0), rtol=1e-8, atol=1e-10)


def test_logistic_regression_has_a_closed_form() -> None:
    x, y = normal(30, 6, seed=11), labels(30).double()[:, None]
    net = seeded(lambda: nn.Linear(6, 1, bias=False))
    p = torch.sigmoid(net(x)).detach()
    hessian = x.T @ (p * (1 - p) * x) / 30
    objective = ma.Objective(net, nn.BCEWithLogitsLoss(), (x, y))
    torch.testing.assert_close(
        ma.top_eigenvalues(objective, k=6).values, torch.linalg.eigvalsh(hessian).flip(0), rtol=1e-8, atol=1e-10
    )
    torch.testing.assert_close(objective.gradient(), (x.T @ (p - y) / 30).flatten(), rtol=1e-9, atol=1e-12)
