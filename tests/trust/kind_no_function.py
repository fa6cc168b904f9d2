"""No function of the weights: state from call to call, chance that is not ours, NaN at the centre."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, mlp, need, normal, points, seeded


class Wrapped(nn.Module):
    """A perceptron, and something done to its output at every call."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net = mlp()
        self.change = change
        self.calls = 0
        self.kept: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.change(self, self.net(x))


def twice(ask: Ask, net: nn.Module, f: Any = F.cross_entropy, data: Any = None) -> Answer:
    """Ask for loss and gradient two times on one objective: the same both times, and the gradient that of the loss."""
    batch = points() if data is None else data

    def question() -> tuple[Tensor, Tensor]:
        objective = ma.Objective(net, f, batch)
        v = normal(objective.size, seed=9)
        one = torch.cat([objective.loss().reshape(1), objective.gradient()])
        ahead, behind = (objective.loss(objective.point() + sign * 1e-5 * v) for sign in (1, -1))
        need(torch.isfinite(one).all(), "not finite")
        slope = float((ahead - behind) / 2e-5)
        need(
            abs(slope - float(one[1:] @ v)) <= 1e-4 * (1 + abs(slope)), f"slope {slope}, gradient {float(one[1:] @ v)}"
        )
        return one, torch.cat([objective.loss().reshape(1), objective.gradient()])

    first, second = ask(question)
    return first, second, 1e-9


def _state(module: Any, output: Tensor) -> Tensor:
    output = output if module.kept is None else output + 0.5 * module.kept
    module.kept = output.detach()
    return output


@case("no function", "right", "refused")
def hidden_state_kept(ask: Ask) -> Answer:
    """A recurrent state kept on the module from call to call."""
    return twice(ask, Wrapped(_state))


def _count(module: Any, output: Tensor) -> Any:
    module.calls += 1
    return output * (1 + 0.1 * module.calls)


@case("no function", "right", "refused")
def counter_in_forward(ask: Ask) -> Answer:
    """A forward that counts its calls and scales by the count."""
    return twice(ask, Wrapped(_count))


class Annealed:
    """A criterion whose penalty is annealed by its own calls."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.step += 1
        return F.cross_entropy(output, target) + 0.01 * self.step * output.pow(2).mean()


@case("no function", "right", "refused")
def annealed_criterion(ask: Ask) -> Answer:
    """A criterion that raises its penalty at every call (KL annealing)."""
    return twice(ask, mlp(), Annealed())


@case("no function", "right", "refused")
def noise_from_torch(ask: Ask) -> Answer:
    """A forward that adds noise of torch's global generator."""
    return twice(ask, Wrapped(lambda module, output: output + 0.3 * torch.randn_like(output)))


@case("no function", "right", "refused")
def noise_from_numpy(ask: Ask) -> Answer:
    """A criterion that mixes samples by np.random."""

    def mixed(output: Tensor, target: Tensor) -> Tensor:
        share = float(np.random.beta(0.4, 0.4))
        return share * F.cross_entropy(output, target) + (1 - share) * F.cross_entropy(output, target.flip(0))

    return twice(ask, mlp(), mixed)


@case("no function", "right", "refused")
def noise_from_python(ask: Ask) -> Answer:
    """A forward that skips a branch by random.random()."""
    return twice(ask, Wrapped(lambda module, output: output if random.random() < 0.5 else 2 * output))


@case("no function", "right", "refused")
def noise_from_an_own_generator(ask: Ask) -> Answer:
    """A forward that draws from a torch.Generator of its own."""
    own = torch.Generator().manual_seed(0)
    return twice(ask, Wrapped(lambda module, output: output + 0.3 * torch.randn(2, generator=own).double()))


@case("no function", "right", "refused")
def noise_from_numpys_new_generator(ask: Ask) -> Answer:
    """A criterion that draws from np.random.default_rng."""
    rng = np.random.default_rng(0)
    return twice(ask, mlp(), lambda output, target: F.cross_entropy(output, target) * (1 + 0.2 * rng.random()))


def _momentum_teacher(module: Any, output: Tensor) -> Any:
    module.kept = output.detach() if module.kept is None else 0.9 * module.kept + 0.1 * output.detach()
    return output - module.kept.mean()


@case("no function", "right", "refused")
def moving_average_centre(ask: Ask) -> Answer:
    """Outputs are centred by a moving average that forward updates (DINO)."""
    return twice(ask, Wrapped(_momentum_teacher), lambda o, t: o.pow(2).mean() + F.cross_entropy(o, t))


class Queue(nn.Module):
    """A memory of earlier features, in a buffer that forward fills (MoCo)."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("queue", torch.ones(4, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        output: Tensor = self.net(x)
        result = torch.cat([output, output @ self.queue.T], 1)
        self.queue = torch.cat([self.queue[2:], output[:2].detach()])
        return result


@case("no function", "right", "refused")
def memory_queue(ask: Ask) -> Answer:
    """A forward that pushes its features into a buffer that it reads (MoCo's queue)."""
    return twice(ask, Queue())


def _cached(module: Any, output: Tensor) -> Any:
    if module.kept is None:
        module.kept = output.detach()
    return output - output.detach() + module.kept


@case("no function", "right", "refused")
def cached_output(ask: Ask) -> Answer:
    """A forward that keeps the output of its first call."""
    return twice(ask, Wrapped(_cached))


class Augmented(Dataset[Any]):
    """A data set that adds noise from a generator of its own."""

    def __init__(self) -> None:
        self.x, self.y = points()
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.from_numpy(self.rng.standard_normal(3)), self.y[index]


@case("no function", "refused")
def augmented_data(ask: Ask) -> Answer:
    """A data set that augments with a generator of its own: other data at every pass."""
    return twice(ask, mlp(), data=DataLoader(Augmented(), batch_size=4))


@case("no function", "refused")
def shuffled_loader(ask: Ask) -> Answer:
    """A loader that shuffles, under BatchNorm's batch mode another function at every pass."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    loader = DataLoader(TensorDataset(*points()), batch_size=5, shuffle=True)
    return ask(lambda: ma.Objective(net, F.cross_entropy, loader, batchnorm="batch").loss()), 0.0, 0.0


# NaN and infinity at the centre


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """Kullback and Leibler's divergence as people write it: NaN where a target is 0, with a finite gradient."""
    return (target * (target.log() - output.log_softmax(1))).sum(1).mean()


def _asks_at_nan(ask: Ask, question: Callable[[ma.Objective], Any]) -> Answer:
    net, (x, y) = mlp(), points()
    targets = F.one_hot(y, 2).double()
    return ask(lambda: question(ma.Objective(net, divergence, (x, targets)))), float("nan"), 0.0


@case("no function", "right", "refused")
def nan_loss(ask: Ask) -> Answer:
    """NaN at the centre (a target of 0 in its own logarithm): the loss."""
    return _asks_at_nan(ask, lambda o: o.loss())


@case("no function", "right", "refused")
def nan_trace(ask: Ask) -> Answer:
    """NaN at the centre: the trace."""
    return _asks_at_nan(ask, lambda o: ma.trace(o, draws=4).value)


@case("no function", "refused")
def nan_eigenvalues(ask: Ask) -> Answer:
    """NaN at the centre: eigenvalues."""
    return _asks_at_nan(ask, lambda o: ma.top_eigenvalues(o, k=1).values[0])


@case("no function", "refused")
def nan_density(ask: Ask) -> Answer:
    """NaN at the centre: the spectral density."""
    return _asks_at_nan(ask, lambda o: ma.spectral_density(o, probes=2, steps=5).density[0])


@case("no function", "right", "refused")
def nan_relative_flatness(ask: Ask) -> Answer:
    """NaN at the centre: the relative flatness."""
    return _asks_at_nan(ask, lambda o: ma.relative_flatness(o, "2.weight", draws=3).value)


@case("no function", "right", "refused")
def nan_average(ask: Ask) -> Answer:
    """NaN at the centre: the average-case sharpness."""
    return _asks_at_nan(ask, lambda o: ma.average_sharpness(o, sigma=0.1, draws=3).value)


@case("no function", "right", "refused")
def nan_one_step(ask: Ask) -> Answer:
    """NaN at the centre: SAM's one-step rise."""
    return _asks_at_nan(ask, lambda o: ma.one_step_sharpness(o, rho=0.1).sharpness)


@case("no function", "right", "refused")
def nan_fisher_rao(ask: Ask) -> Answer:
    """NaN at the centre: the Fisher-Rao norm."""
    return _asks_at_nan(ask, lambda o: ma.fisher_rao_norm(o).value)


class Logarithm(nn.Module):
    """The logarithm of a weight that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.net = mlp()

    def forward(self, x: Tensor) -> Any:
        output = self.net(x)
        return output - self.scale.log()


@case("no function", "refused")
def nan_input(ask: Ask) -> Answer:
    """A NaN among the inputs: the sharpness in a ball."""
    net, (x, y) = mlp(), points()
    x[3, 1] = float("nan")
    return ask(lambda: ma.ball_sharpness(ma.Objective(net, F.cross_entropy, (x, y)), rho=0.1).sharpness), 0.0, 0.0


@case("no function", "right", "refused")
def infinite_loss(ask: Ask) -> Answer:
    """An infinite loss at the centre: its trace is no finite number."""
    net, (x, _) = Logarithm(), points()
    value = ask(lambda: ma.trace(ma.Objective(net, F.mse_loss, (x, normal(10, 2))), draws=4).value)
    need(not np.isfinite(value), f"{value} of a loss that is infinite")
    return None


@case("no function", "right", "refused")
def infinite_curvature(ask: Ask) -> Answer:
    """A square root at 0: the loss is finite, its gradient is not."""
    net, (x, y) = mlp(), points()
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.zero_()
    value = ask(lambda: ma.trace(ma.Objective(net, lambda o, t: o.abs().sqrt().mean(), (x, y)), draws=4).value)
    need(not np.isfinite(value), f"trace {value} where the gradient is infinite")
    return None


@case("no function", "right")
def a_plain_network(ask: Ask) -> Answer:
    """A function of the weights, asked twice: nothing is said."""
    net, (x, y) = mlp(), points()
    truth = Truth(lambda: F.cross_entropy(net(x), y), net.parameters())
    want = truth.loss
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y)).loss()), want, 1e-12
