"""Resolution of a density: bulks, outliers, clusters, low rank, against exact spectra."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, labels, mlp, need, normal


def symmetric(values: Tensor, seed: int = 0) -> Any:
    """Return a matrix with given eigenvalues and random eigenvectors."""
    q, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    return (q * values) @ q.T


def resolved(ask: Ask, matrix: Tensor, density: Callable[[int], ma.results.SpectralDensity] | None = None) -> Answer:
    """Ask for the density: within three standard errors at 95 % of the places, a total of 1 and the right mean.

    Neighbouring places err together, so that one seed is hardly more than one draw: the places of three are counted.
    """
    values = torch.linalg.eigvalsh(matrix)
    operator = ma.MatrixOperator(matrix)
    question = density or (lambda seed: ma.spectral_density(operator, seed=seed))
    far, silent = [], False
    for seed in range(3):
        before = len(ask.said)
        found = ask(partial(question, seed))
        far.append(_beyond(found, values))
        silent = silent or (found.converged and len(ask.said) == before)
    places = float(torch.cat(far).double().mean())
    need(not silent or places <= 0.05, f"{places:.0%} of the places beyond three standard errors, in silence")
    return None if places <= 0.05 else "warned"


def _beyond(found: ma.results.SpectralDensity, values: Tensor) -> Tensor:
    """Return at which places with a density that counts it lies beyond three standard errors; its total must be 1."""
    at = torch.as_tensor(found.values).double()
    got, error = torch.as_tensor(found.density).double(), torch.as_tensor(found.standard_error).double()
    sigma = float(found.sigma)
    exact = torch.exp(-0.5 * ((at[:, None] - values) / sigma).pow(2)).sum(1) / (
        len(values) * sigma * math.sqrt(2 * math.pi)
    )
    floor = 1e-6 * exact.max()  # rounding, where the density is exact and its error 0
    total = float(torch.trapezoid(got, at))
    need(abs(total - 1) < 0.02, f"the density's integral is {total}")
    return ((got - exact).abs() > 3 * error + floor)[exact > 0.01 * exact.max()]


SAID = ("right", "warned")


@case("resolution", *SAID)
def semicircle(ask: Ask) -> Answer:
    """Wigner's semicircle of 400 values."""
    a = normal(400, 400, seed=0)
    return resolved(ask, (a + a.T) / math.sqrt(800))


@case("resolution", *SAID)
def marchenko_pastur(ask: Ask) -> Answer:
    """A Marchenko-Pastur bulk of 300 values."""
    a = normal(300, 600, seed=0)
    return resolved(ask, a @ a.T / 600)


@case("resolution", *SAID)
def marchenko_pastur_singular(ask: Ask) -> Answer:
    """A Marchenko-Pastur bulk with half of its values at 0."""
    a = normal(240, 120, seed=0)
    return resolved(ask, a @ a.T / 120)


@case("resolution", *SAID)
def bulk_with_outliers(ask: Ask) -> Answer:
    """A bulk of 290 values with ten outliers, as of a classifier of ten classes."""
    bulk = 0.1 * normal(290, seed=1)
    return resolved(ask, symmetric(torch.cat([bulk, torch.linspace(3, 30, 10, dtype=torch.float64)])))


@case("resolution", *SAID)
def clusters(ask: Ask) -> Answer:
    """Three clusters of 80 close values each."""
    centres = torch.tensor([-1.0, 0.0, 2.0]).double().repeat_interleave(80)
    return resolved(ask, symmetric(centres + 0.005 * normal(240, seed=2)))


@case("resolution", *SAID)
def multiple_values(ask: Ask) -> Answer:
    """Four values, each 50 times."""
    return resolved(ask, symmetric(torch.tensor([-1.0, 0.0, 0.5, 2.0]).double().repeat_interleave(50)))


@case("resolution", *SAID)
def low_rank(ask: Ask) -> Answer:
    """Rank 12 of 250: nearly all of the mass at 0."""
    values = torch.zeros(250, dtype=torch.float64)
    values[:12] = torch.linspace(1, 5, 12)
    return resolved(ask, symmetric(values))


@case("resolution", *SAID)
def uniform(ask: Ask) -> Answer:
    """A uniform spectrum of 300 values."""
    return resolved(ask, symmetric(torch.linspace(-1, 1, 300, dtype=torch.float64)))


@case("resolution", *SAID)
def decaying(ask: Ask) -> Answer:
    """Values that decay over eight decades."""
    return resolved(ask, symmetric(torch.logspace(-6, 2, 200, dtype=torch.float64)))


@case("resolution", *SAID)
def two_bulks(ask: Ask) -> Answer:
    """Two bulks far apart."""
    low, high = 0.2 * normal(150, seed=3), 5 + 0.5 * normal(150, seed=4)
    return resolved(ask, symmetric(torch.cat([low, high])))


@case("resolution", "right")
def identity(ask: Ask) -> Answer:
    """One value 60 times: all of the mass at one place, or a refusal to spread it."""
    found = ask(lambda: ma.spectral_density(ma.MatrixOperator(torch.eye(60, dtype=torch.float64)), seed=0))
    nodes, weights = torch.as_tensor(found.nodes).double(), torch.as_tensor(found.weights).double()
    mass = float(weights.sum()) + (len(found.top) + len(found.bottom)) / 60
    need(nodes.numel() == 0 or float((nodes - 1).abs().max()) < 1e-9, "nodes beside the value")
    need(mass > 0.9, f"mass {mass}")
    return None


@case("resolution", *SAID)
def trained_network(ask: Ask) -> Answer:
    """The Hessian of a trained perceptron with 118 parameters."""
    net, x, y = mlp(inputs=22, classes=4), normal(60, 22), labels(60, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    hessian = Truth(lambda: F.cross_entropy(net(x), y), net.parameters()).hessian()
    return resolved(
        ask, hessian, lambda seed: ma.spectral_density(ma.Objective(net, F.cross_entropy, (x, y)), seed=seed)
    )
