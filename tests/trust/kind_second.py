"""Wrong second derivatives: the gradient is right, and its own derivative is not, or does not exist."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, compiled, mlp, need, normal, points, probe, seeded


def curvature(ask: Ask, net: nn.Module, f: Any, data: Any, true: Callable[[], Tensor] | None = None) -> Answer:
    """Ask for the two largest eigenvalues and a product: those of differences of the user's own gradient."""
    truth = Truth(true or (lambda: f(net(data[0]), data[1])), net.parameters())
    gradient = truth.gradient
    v = probe(len(gradient))
    want = torch.cat([truth.top(2), truth.hvp(v)])

    def question() -> tuple[Tensor, bool]:
        objective = ma.Objective(net, f, data)
        need(torch.allclose(objective.gradient(), gradient, rtol=1e-6, atol=1e-9), "another gradient")
        pairs = ma.top_eigenvalues(objective, k=2)
        return torch.cat([pairs.values, objective.hvp(v)]), pairs.converged

    got, converged = ask(question)
    scale = float(want.abs().max())
    far = float((got - want).abs().max()) / scale
    need(far < 1e-4, f"off by {far:.1e} of the largest, converged: {converged}")
    return got, want, 1e-4


SOFT = ("right", "refused", "warned")


@case("second", *SOFT)
def weight_norm(ask: Ask) -> Answer:
    """The weight_norm of parametrizations, whose double backward is wrong."""
    net = seeded(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)))
    return curvature(ask, net, F.cross_entropy, points())


@case("second", *SOFT)
def weight_norm_old(ask: Ask) -> Answer:
    """The old weight_norm, by a hook before forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = seeded(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)))
    return curvature(ask, net, F.cross_entropy, points())


@case("second", *SOFT)
def weight_norm_of_a_convolution(ask: Ask) -> Answer:
    """A weight-normalised convolution, as in vocoders."""
    net = seeded(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Conv1d(2, 3, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)
        )
    )
    return curvature(ask, net, F.cross_entropy, (normal(8, 2, 5), points(8)[1]))


@case("second", *SOFT)
def spectral_norm(ask: Ask) -> Answer:
    """The spectral_norm of parametrizations, in evaluation mode."""
    net = seeded(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)))
    return curvature(ask, net, F.cross_entropy, points())


@case("second", *SOFT)
def orthogonal(ask: Ask) -> Answer:
    """An orthogonal parametrization by Householder products."""
    net = seeded(
        lambda: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="householder"), nn.Tanh(), nn.Linear(3, 2)
        )
    )
    return curvature(ask, net, F.cross_entropy, points())


class Checkpointed(nn.Module):
    """Activation checkpointing around the first layer."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Any:
        x = x.clone().requires_grad_(True)
        return self.b(checkpoint(lambda z: self.a(z).tanh(), x, use_reentrant=self.reentrant))


@case("second", *SOFT)
def reentrant_checkpoint(ask: Ask) -> Answer:
    """Activation checkpointing of the reentrant kind, which drops gradients under autograd.grad."""
    net, plain, (x, y) = seeded(lambda: Checkpointed(True)), seeded(lambda: Checkpointed(False)), points()
    truth = Truth(lambda: F.cross_entropy(plain(x), y), plain.parameters())
    want = torch.cat([truth.gradient, truth.top(1)])

    def question() -> Tensor:
        objective = ma.Objective(net, F.cross_entropy, (x, y))
        return torch.cat([objective.gradient(), ma.top_eigenvalues(objective, k=1).values])

    got = ask(question)
    need(
        torch.allclose(got, want, rtol=1e-4, atol=1e-6), f"gradient {float(got[:-1].norm())}, {float(want[:-1].norm())}"
    )
    return got, want, 1e-4


@case("second", *SOFT)
def checkpoint_without_reentry(ask: Ask) -> Answer:
    """Activation checkpointing of the newer kind."""
    return curvature(ask, seeded(lambda: Checkpointed(False)), F.cross_entropy, points())


class SavesIntermediate(torch.autograd.Function):
    """A tanh that saves its result for backward as a constant of the computation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = 1 - torch.tanh(x).pow(2)
        ctx.save_for_backward(slope)  # computed inside: its own derivative is lost
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return gradients[0] * slope


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 2 * x * gradients[0]


class ByNumpy(torch.autograd.Function):
    """A sine by numpy, forward and backward: no graph of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return gradients[0] * torch.from_numpy(np.cos(x.detach().numpy()))


class Refusing(torch.autograd.Function):
    """A square whose double backward raises an exception of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return RefusingBackward.apply(ctx.saved_tensors[0], gradients[0])  # type: ignore[no-untyped-call]  # torch's


class RefusingBackward(torch.autograd.Function):
    """The backward pass of that square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        return 2 * x * gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("kernel of second order is on our list")


class Custom(nn.Module):
    """A perceptron with a function of the user's as activation."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Any:
        return self.b(self.function(self.a(x)))


@case("second", *SOFT)
def saved_intermediate(ask: Ask) -> Answer:
    """A custom Function that saves an intermediate: the derivative of its backward is wrong."""
    return curvature(ask, seeded(lambda: Custom(SavesIntermediate.apply)), F.cross_entropy, points())


@case("second", *SOFT)
def once_differentiable_function(ask: Ask) -> Answer:
    """A custom Function marked once_differentiable."""
    return curvature(ask, seeded(lambda: Custom(Once.apply)), F.cross_entropy, points())


@case("second", *SOFT)
def function_by_numpy(ask: Ask) -> Answer:
    """A custom Function whose backward is computed by numpy."""
    return curvature(ask, seeded(lambda: Custom(ByNumpy.apply)), F.cross_entropy, points())


@case("second", *SOFT)
def function_that_refuses(ask: Ask) -> Answer:
    """A custom Function whose double backward raises with a message of its own."""
    return curvature(ask, seeded(lambda: Custom(Refusing.apply)), F.cross_entropy, points())


@case("second", *SOFT)
def criterion_by_custom_function(ask: Ask) -> Answer:
    """The criterion is a custom Function that saves probabilities (fused cross-entropy)."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
            p = logits.softmax(1)
            ctx.save_for_backward((p - F.one_hot(target, 2)) / len(target))
            return F.cross_entropy(logits, target)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return gradients[0] * ctx.saved_tensors[0], None

    return curvature(ask, mlp(), Fused.apply, points())


def _once(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) + 0


def _doubled(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) * 2


@case("second", *SOFT)
def compiled_criterion(ask: Ask) -> Answer:
    """A criterion compiled by torch.compile (aot_eager), which has no double backward."""
    criterion: Any = compiled(_once, "aot_eager")
    net, (x, y) = mlp(), points()
    return curvature(ask, net, criterion, (x, y), lambda: F.cross_entropy(net(x), y))


@case("second", *SOFT)
def compiled_criterion_after_training(ask: Ask) -> Answer:
    """A compiled criterion that has already been used in a training step."""
    criterion: Any = compiled(_doubled, "aot_eager")
    net, (x, y) = mlp(), points()
    criterion(net(x), y).backward()
    return curvature(ask, net, criterion, (x, y), lambda: 2 * F.cross_entropy(net(x), y))


@case("second", *SOFT)
def compiled_block(ask: Ask) -> Answer:
    """One block compiled by torch.compile (aot_eager)."""
    net, (x, y) = mlp(), points()
    plain = mlp()
    net[2] = compiled(net[2], "aot_eager")
    want = Truth(lambda: F.cross_entropy(plain(x), y), plain.parameters()).top(1)
    got = ask(lambda: ma.top_eigenvalues(ma.Objective(net, F.cross_entropy, (x, y)), k=1).values)
    need(torch.allclose(got, want, rtol=1e-4), f"{got}, right is {want}")
    return got, want, 1e-4


@case("second", *SOFT)
def temporal_classification(ask: Ask) -> Answer:
    """CTCLoss, whose kernel has no double backward."""
    net = seeded(lambda: nn.Linear(3, 4))
    x, y, lengths = normal(4, 6, 3), 1 + torch.arange(8).view(4, 2) % 3, torch.tensor([2, 1, 2, 1])

    def f(output: Tensor, target: Tensor) -> Any:
        times = torch.full((len(output),), 6)
        return F.ctc_loss(output.log_softmax(2).transpose(0, 1), target, times, lengths[: len(output)])

    return curvature(ask, net, f, (x, y))


@case("second", *SOFT)
def bag_of_embeddings(ask: Ask) -> Answer:
    """nn.EmbeddingBag, whose kernel has no double backward."""
    net = seeded(lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="mean"), nn.Tanh(), nn.Linear(3, 2)))
    tokens = torch.randint(5, (9, 3), generator=torch.Generator().manual_seed(0))
    return curvature(ask, net, F.cross_entropy, (tokens, points(9)[1]))


@case("second", "right")
def recurrent(ask: Ask) -> Answer:
    """An LSTM: exact where exact is right, and nothing is said."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.lstm(x)[0][:, -1])

    return curvature(ask, seeded(Net), F.cross_entropy, (normal(6, 3, 2), points(6)[1]))


@case("second", "right")
def plain_perceptron(ask: Ask) -> Answer:
    """A perceptron: exact, and nothing is said."""
    return curvature(ask, mlp(), F.cross_entropy, points())


@case("second", "refused", "warned")
def product_that_is_not_symmetric(ask: Ask) -> Answer:
    """A stop-gradient whose Jacobian of the gradient is not symmetric: never `converged` in silence."""
    net, (x, _) = mlp(), points()

    def f(model: Any, b: Any) -> Any:
        a = model(b["x"])
        return (a[:, 0] * a[:, 1].detach().pow(2)).mean()

    pairs = ask(lambda: ma.top_eigenvalues(ma.Objective(net, f, {"x": x}), k=1))
    return "short" if pairs.converged and not ask.said else "warned"


class Doubled(torch.autograd.Function):
    """A square whose backward is off by a factor of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 4 * x * gradients[0]


@case("second", "refused", "warned")
def wrong_first_derivative(ask: Ask) -> Answer:
    """A custom Function whose backward is off by a factor of two."""
    net, (x, y) = seeded(lambda: Custom(Doubled.apply)), points()
    truth = Truth(lambda: F.cross_entropy(net.b(net.a(x).pow(2)), y), net.parameters())
    want = truth.top(1)
    return ask(lambda: ma.top_eigenvalues(ma.Objective(net, F.cross_entropy, (x, y)), k=1).values), want, 1e-4


@case("second", *SOFT)
def norm_at_zero(ask: Ask) -> Answer:
    """A group penalty by norms with one group at 0: its double backward is NaN."""
    net, (x, y) = mlp(), points()
    with torch.no_grad():
        net[2].weight[0] = 0.0

    def f(model: Any, b: Any) -> Any:
        return F.cross_entropy(model(b["x"]), b["y"]) + 0.1 * sum(p.norm(dim=-1).sum() for p in model.parameters())

    got = ask(lambda: ma.trace(ma.Objective(net, f, {"x": x, "y": y}), draws=4).value)
    need(not np.isfinite(got) or ask.said, f"trace {got} at a kink, in silence")
    return None
