"""Writes to what is the user's: weights, buffers, attributes, inputs, vectors, random state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, labels, mlp, normal, numbers, points, right_numbers, seeded


def leaves(ask: Ask, net: nn.Module, f: Any, data: Any, want: Tensor | None = None) -> Answer:
    """Ask for everything there is; the user's things stay (see cases.run), and the loss is right where it is known."""

    def question() -> Tensor:
        objective = ma.Objective(net, f, data)
        loss = objective.loss()
        objective.gradient()
        ma.top_eigenvalues(objective, k=1)
        ma.slice_1d(objective, ma.directions.random(objective, seed=0), points=3)
        return loss

    got = ask(question)
    return None if want is None else (got, want, 1e-6)


TOKENS, Y = torch.arange(5), torch.tensor([0, 1, 0, 1, 0])


def renormalised(trained: bool) -> nn.Module:
    net: nn.Module = seeded(lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 2)))
    table: Any = net.get_parameter("0.weight")
    table.data.mul_(3)
    table.requires_grad_(trained)
    return net


@case("writes", "right", "refused", "warned")
def renormalised_embedding_frozen(ask: Ask) -> Answer:
    """A frozen Embedding(max_norm=1), which renormalises its weight in forward."""
    net = renormalised(trained=False)
    table = net.get_parameter("0.weight")
    short = table / table.norm(dim=1, keepdim=True).clamp(min=1.0)
    head: Any = net.get_submodule("1")
    return leaves(ask, net, F.cross_entropy, (TOKENS, Y), F.cross_entropy(head(short), Y))


@case("writes", "right", "refused", "warned")
def renormalised_embedding_trained(ask: Ask) -> Answer:
    """A trained Embedding(max_norm=1), which renormalises its weight in forward."""
    return leaves(ask, renormalised(trained=True), F.cross_entropy, (TOKENS, Y))


class Clamped(nn.Module):
    """Clamps its weights in forward (a Lipschitz critic)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.clamp_(-0.3, 0.3)
        return self.net(x)


@case("writes", "right", "refused", "warned")
def clamped_weights(ask: Ask) -> Answer:
    """A forward that clamps the weights in place (WGAN)."""
    x, y = points()
    other = Clamped()
    want = F.cross_entropy(other(x), y)
    return leaves(ask, Clamped(), F.cross_entropy, (x, y), want)


@case("writes", "right", "refused", "warned")
def clamped_vector(ask: Ask) -> Answer:
    """A forward that clamps the weights in place, and a vector of the caller's."""
    net, (x, y) = Clamped(), points()
    w = normal(26, seed=4)

    def question() -> None:
        objective = ma.Objective(net, F.cross_entropy, (x, y))
        objective.loss(w)
        objective.gradient(w)
        objective.hvp(w, w)

    ask(question)
    return None


class Normalised(nn.Module):
    """Keeps the rows of its last layer on the sphere (ArcFace)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Any:
        self.weight.data = F.normalize(self.weight.data, dim=1)
        return F.linear(torch.tanh(self.a(x)), self.weight)


@case("writes", "right", "refused", "warned")
def normalised_weights(ask: Ask) -> Answer:
    """A forward that puts a normalised tensor into weight.data."""
    net, (x, y) = seeded(Normalised), points()
    want = F.cross_entropy(F.linear(torch.tanh(net.a(x)), F.normalize(net.weight, dim=1)), y)
    return leaves(ask, net, F.cross_entropy, (x, y), want)


class Pruned(nn.Module):
    """Multiplies its weight by a mask in place."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mask", torch.tensor([[1.0, 0.0, 1.0]] * 4))

    def forward(self, x: Tensor) -> Any:
        self.a.weight.data.mul_(self.mask)
        return self.b(torch.tanh(self.a(x)))


@case("writes", "right", "refused", "warned")
def pruned_weights(ask: Ask) -> Answer:
    """A forward that multiplies the weight by a pruning mask in place."""
    net, (x, y) = seeded(Pruned), points()
    want = F.cross_entropy(net.b(torch.tanh(F.linear(x, net.a.weight * net.mask, net.a.bias))), y)
    return leaves(ask, net, F.cross_entropy, (x, y), want)


class Bookkeeping(nn.Module):
    """Counts its calls in an attribute, a buffer and a list, and remembers its last input."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net, self.number, self.history, self.last = mlp(), 0, [0.0], {"x": 0}
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        self.number += 1
        self.calls += 1
        self.history.append(float(x.mean()))
        self.last["x"] = len(x)
        return self.net(x)


@case("writes", "right", "refused")
def bookkeeping(ask: Ask) -> Answer:
    """A forward that counts its calls in an attribute, a buffer, a list and a dictionary."""
    net, (x, y) = Bookkeeping(), points()
    want = right_numbers(Truth(lambda: F.cross_entropy(net.net(x), y), net.net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5


class Meter:
    """A criterion that keeps a running mean of its losses."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.best = 1e9

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        self.values.append(float(loss))
        self.best = min(self.best, float(loss))
        return loss


@case("writes", "right", "refused", "warned")
def criterion_with_a_meter(ask: Ask) -> Answer:
    """A criterion that keeps a list of its values: it grows as the user wrote it, and the loss is right."""
    net, (x, y), meter = mlp(), points(), Meter()
    want = F.cross_entropy(net(x), y)
    got = ask(lambda: ma.Objective(net, meter, (x, y)).loss())
    ask.changed.clear()  # the user's own criterion did this, and it is no model
    return got, want, 1e-9


@case("writes", "right", "refused")
def inputs_masked_in_place(ask: Ask) -> Answer:
    """A forward that masks its input in place."""

    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            x[:, 0] = 0.0
            return self.net(x)

    net, (x, y) = Masking(), points()
    masked = x.clone()
    masked[:, 0] = 0.0
    return leaves(ask, net, F.cross_entropy, (x, y), F.cross_entropy(net.net(masked), y))


@case("writes", "right", "refused")
def inputs_scaled_in_place(ask: Ask) -> Answer:
    """A forward that standardises its input in place: another function at every call."""

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            return self.net(x.mul_(0.5))

    net, (x, y) = Scaling(), points()
    want = right_numbers(Truth(lambda: F.cross_entropy(net.net(0.5 * x), y), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5


@case("writes", "right", "refused")
def targets_changed_in_place(ask: Ask) -> Answer:
    """A criterion that writes to its targets (0 for unknown ones)."""
    net, (x, y) = mlp(), points()
    y[:3] = -1

    def f(output: Tensor, target: Tensor) -> Any:
        target[target < 0] = 0
        return F.cross_entropy(output, target)

    return leaves(ask, net, f, (x, y), F.cross_entropy(net(x), y.clamp(min=0)))


@case("writes", "right", "refused")
def dictionary_emptied(ask: Ask) -> Answer:
    """A loss_fn that pops the labels from the batch."""
    net, (x, y) = mlp(), points()
    batch = {"x": x, "labels": y}

    def f(model: Any, b: Any) -> Any:
        target = b.pop("labels")
        return F.cross_entropy(model(**b) if "input" in b else model(b["x"]), target)

    return leaves(ask, net, f, batch, F.cross_entropy(net(x), y))


@case("writes", "right", "refused")
def inputs_require_gradients(ask: Ask) -> Answer:
    """A loss_fn that calls requires_grad_() on its inputs."""
    net, (x, y) = mlp(), points()

    def f(model: Any, b: Any) -> Any:
        b["x"].requires_grad_(True)
        return F.cross_entropy(model(b["x"]), b["y"])

    return leaves(ask, net, f, {"x": x, "y": y}, F.cross_entropy(net(x), y))


@case("writes", "right", "refused")
def spectral_norm_iterates(ask: Ask) -> Answer:
    """A spectral_norm in training mode, whose power iteration writes buffers."""
    net = seeded(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)))
    x, y = points()
    want = F.cross_entropy(net(x), y)
    return leaves(ask, net.train(), F.cross_entropy, (x, y), want)


@case("writes", "right")
def batchnorm_cumulative(ask: Ask) -> Answer:
    """BatchNorm with momentum=None under batch statistics and recalibration: its counts stay."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)))
    x, y = points()
    want = F.cross_entropy(net[2](F.batch_norm(net[0](x), None, None, net[1].weight, net[1].bias, True)), y)
    ask(lambda: ma.Objective(net, F.cross_entropy, (x, y), batchnorm="recalibrate").loss())
    net.train()
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y), batchnorm="batch").loss()), want, 1e-9


@case("writes", "right", "refused")
def modes_switched_in_forward(ask: Ask) -> Answer:
    """A loss_fn that calls model.train() and model.requires_grad_(True)."""
    net, (x, y) = mlp(), points()
    net[0].requires_grad_(False)
    net.eval()

    def f(model: Any, b: Any) -> Any:
        model.train()
        model.requires_grad_(True)
        return F.cross_entropy(model(b["x"]), b["y"])

    return leaves(ask, net, f, {"x": x, "y": y}, F.cross_entropy(net(x), y))


@case("writes", "right", "refused")
def training_step_as_loss(ask: Ask) -> Answer:
    """A loss_fn that is a whole training step: zero_grad and backward inside."""
    net, (x, y) = mlp(), points()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)

    def f(model: Any, b: Any) -> Any:
        model.zero_grad()
        loss = F.cross_entropy(model(b["x"]), b["y"])
        loss.backward(retain_graph=True)
        return loss

    return leaves(ask, net, f, {"x": x, "y": y}, F.cross_entropy(net(x), y))


@case("writes", "right", "refused")
def seeds_set_in_forward(ask: Ask) -> Answer:
    """A forward that seeds torch, numpy and random."""

    class Seeding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            torch.manual_seed(1)
            np.random.seed(1)
            random.seed(1)
            return self.net(x)

    net, (x, y) = Seeding(), points()
    return leaves(ask, net, F.cross_entropy, (x, y), F.cross_entropy(net.net(x), y))


@case("writes", "right")
def gradients_are_kept(ask: Ask) -> Answer:
    """A network in the middle of an accumulation: its .grad stays."""
    net, (x, y) = mlp(), (normal(6, 3), labels(6))
    F.cross_entropy(net(x), y).backward()
    return leaves(ask, net, F.cross_entropy, (x, y), F.cross_entropy(net(x), y))
