"""Another network's buffers: statistics that do not belong to the weights that are measured."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, case, labels, need, normal, seeded

X, Y = 2 * normal(40, 3) + 1, labels(40, 3)


def trained(seed: int, norm: Callable[[], nn.Module] | None = None, steps: int = 20) -> nn.Module:
    """Return a network with normalisation, trained from a seed, in evaluation mode."""

    def build() -> nn.Module:
        middle = nn.BatchNorm1d(5) if norm is None else norm()
        return nn.Sequential(nn.Linear(3, 5), middle, nn.ReLU(), nn.Linear(5, 3))

    net: nn.Module = seeded(build, seed).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    return net.eval()


def weights(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def loss_of(net: nn.Module) -> Tensor:
    return F.cross_entropy(net(X), Y).detach()


ENDS = torch.linspace(0, 1, 3)
SAID = ("right", "refused", "warned")


def line(ask: Ask, a: nn.Module, b: nn.Module, **options: Any) -> Answer:
    """Ask for a slice from one network to another: its end is the other's loss."""
    want, v = torch.stack([loss_of(a), loss_of(b)]), weights(b)

    def question() -> Tensor:
        objective = ma.Objective(a, F.cross_entropy, (X, Y), **options)
        return ma.slice_1d(objective, ma.directions.interpolation(objective, v), coordinates=ENDS).loss[[0, 2]]

    return ask(question), want, 1e-6


@case("buffers", *SAID)
def interpolation_to_another(ask: Ask) -> Answer:
    """slice_1d along directions.interpolation to another BatchNorm network."""
    return line(ask, trained(0), trained(1))


@case("buffers", *SAID)
def interpolation_to_another_instance_norm(ask: Ask) -> Answer:
    """InstanceNorm1d(track_running_stats=True) between two networks."""

    class Instance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

        def forward(self, x: Tensor) -> Any:
            return self.norm(x[:, None])[:, 0]

    return line(ask, trained(0, Instance), trained(1, Instance))


class MovingCentre(nn.Module):
    """A normalisation of the user's own, with a running mean."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(5))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
        return x - self.centre


@case("buffers", *SAID)
def interpolation_to_another_own_norm(ask: Ask) -> Answer:
    """A normalisation of the user's own with a running mean, between two networks."""
    return line(ask, trained(0, MovingCentre), trained(1, MovingCentre))


@case("buffers", *SAID)
def difference_as_a_direction(ask: Ask) -> Answer:
    """slice_1d along a plain tensor, the difference to another BatchNorm network."""
    a, b = trained(0), trained(1)
    want, d = loss_of(b), weights(b) - weights(a)
    return ask(lambda: ma.slice_1d(ma.Objective(a, F.cross_entropy, (X, Y)), d, coordinates=ENDS).loss[2]), want, 1e-6


@case("buffers", *SAID)
def plane_through_three(ask: Ask) -> Answer:
    """slice_2d of directions.plane_through: the corners are the other networks."""
    a, b, c = trained(0), trained(1), trained(2)
    want, v, u = torch.stack([loss_of(b), loss_of(c)]), weights(b), weights(c)

    def question() -> Tensor:
        objective = ma.Objective(a, F.cross_entropy, (X, Y))
        plane = ma.directions.plane_through(objective, v, u, orthonormal=False)
        found = ma.slice_2d(objective, plane.directions, coordinates=([0.0, 1.0], [0.0, 1.0])).loss
        return torch.stack([found[1, 0], found[0, 1]])

    return ask(question), want, 1e-6


@case("buffers", *SAID)
def weights_of_another(ask: Ask) -> Answer:
    """objective.with_weights of another BatchNorm network."""
    a, b = trained(0), trained(1)
    want, v = loss_of(b), weights(b)
    return ask(lambda: ma.Objective(a, F.cross_entropy, (X, Y)).with_weights(v).loss()), want, 1e-6


@case("buffers", *SAID)
def projected_trajectory(ask: Ask) -> Answer:
    """A projection (project) of other networks' weights with an objective in evaluation mode."""
    a, b = trained(0), trained(1)
    want, v = loss_of(b), weights(b)

    def question() -> Tensor:
        objective = ma.Objective(a, F.cross_entropy, (X, Y))
        way = ma.trajectory.from_weights(objective, [v, 0.5 * (v + objective.point()), objective.point()])
        d = ma.directions.interpolation(objective, v)
        found = ma.project(way, [d, ma.directions.random(objective)], objective=objective).loss
        assert found is not None
        return found[0]

    return ask(question), want, 1e-6


@case("buffers", *SAID)
def slice_around_the_mean(ask: Ask) -> Answer:
    """A slice around the mean of two BatchNorm networks (stochastic weight averaging without new statistics)."""
    a, b = trained(0), trained(1)
    mean = copy.deepcopy(a)
    nn.utils.vector_to_parameters(0.5 * (weights(a) + weights(b)), mean.parameters())
    mean.train()
    norm: Any = mean.get_submodule("1")
    norm.momentum = 1.0
    mean(X)
    mean.eval()
    want, v = F.cross_entropy(mean(X), Y), 0.5 * (weights(a) + weights(b))
    need(abs(float(want) - float(loss_of(a))) > 1e-3, "the mean is no other network")

    def question() -> Tensor:
        objective = ma.Objective(a, F.cross_entropy, (X, Y)).with_weights(v)
        return ma.slice_1d(objective, ma.directions.random(objective), points=3, radius=0.1).loss[1]

    return ask(question), want, 1e-3


@case("buffers", "right")
def recalibrated(ask: Ask) -> Answer:
    """The policy recalibrate: both ends have their own statistics."""
    nets = [trained(0), trained(1)]
    for net in nets:
        norm: Any = net.get_submodule("1")
        norm.momentum = 1.0
        net.train()
        net(X)
        variance = net.get_submodule("0")(X).detach().var(0, unbiased=False)
        norm.running_var.copy_(variance * len(X) / (len(X) - 1))
        norm.momentum = 0.1
        net.eval()
    a, b = nets
    want, v = torch.stack([loss_of(a), loss_of(b)]), weights(b)

    def question() -> Tensor:
        objective = ma.Objective(a, F.cross_entropy, (X, Y), batchnorm="recalibrate")
        return ma.slice_1d(objective, ma.directions.interpolation(objective, v), coordinates=ENDS).loss[[0, 2]]

    return ask(question), want, 1e-6


@case("buffers", "right")
def batch_statistics_between(ask: Ask) -> Answer:
    """The policy batch: both ends have the statistics of the data."""
    a, b = trained(0), trained(1)
    want, v = torch.stack([F.cross_entropy(copy.deepcopy(net).train()(X), Y) for net in (a, b)]), weights(b)

    def question() -> Tensor:
        objective = ma.Objective(a, F.cross_entropy, (X, Y), batchnorm="batch")
        return ma.slice_1d(objective, ma.directions.interpolation(objective, v), coordinates=ENDS).loss[[0, 2]]

    return ask(question), want, 1e-6


@case("buffers", "right")
def without_statistics(ask: Ask) -> Answer:
    """LayerNorm has no statistics: the other end is right, and nothing is said."""
    return line(ask, trained(0, lambda: nn.LayerNorm(5)), trained(1, lambda: nn.LayerNorm(5)))


@case("buffers", *SAID)
def checkpoint_of_another(ask: Ask) -> Answer:
    """The other network's weights come from a checkpoint file."""
    a, b = trained(0), trained(1)
    want = loss_of(b)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b.pt"
        torch.save(b.state_dict(), path)

        def question() -> Tensor:
            objective = ma.Objective(a, F.cross_entropy, (X, Y))
            state = torch.load(path, weights_only=True)
            v = objective.vector({name: value for name, value in state.items() if "running" not in name})
            d = ma.directions.interpolation(objective, v)
            return ma.slice_1d(objective, d, coordinates=ENDS).loss[2]

        return ask(question), want, 1e-6
