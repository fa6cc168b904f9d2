"""Value and derivative of different functions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, labels, mlp, normal, numbers, points, probe, right_numbers, seeded


class Padded(nn.Module):
    """A padded encoder, whose fast path without gradients leaves the padding out."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


def padded() -> tuple[nn.Module, dict[str, Tensor], Any]:
    net = seeded(Padded)
    padding = torch.arange(5)[None] >= torch.tensor([2, 5, 3, 4])[:, None]
    batch = {"x": normal(4, 5, 4), "padding": padding, "y": labels(4)}
    return net, batch, lambda model, b: F.cross_entropy(model(b["x"], b["padding"]), b["y"])


@case("function", "right", "refused")
def padded_encoder(ask: Ask) -> Answer:
    """A padded TransformerEncoder: loss, gradient and product."""
    net, batch, f = padded()
    truth = Truth(lambda: f(net, batch), net.parameters())
    want = right_numbers(truth)
    return ask(lambda: numbers(ma.Objective(net, f, batch))), want, 1e-5


@case("function", "right", "refused")
def padded_encoder_noise(ask: Ask) -> Answer:
    """A padded TransformerEncoder: SAM's one-step rise is that along its gradient."""
    net, batch, f = padded()
    truth = Truth(lambda: f(net, batch), net.parameters())
    gradient = truth.gradient
    want = truth.loss_at(0.1 * gradient / gradient.norm()) - truth.loss
    return ask(lambda: ma.one_step_sharpness(ma.Objective(net, f, batch), rho=0.1).sharpness), want, 1e-5


class Attention(nn.Module):
    """Self-attention over padded sequences, without weights: the fast path of nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, -1] = True
        return self.head(self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0].mean(1))


@case("function", "right")
def attention_fast_path(ask: Ask) -> Answer:
    """nn.MultiheadAttention with padding, in evaluation mode."""
    net, x, y = seeded(Attention), normal(6, 4, 4), labels(6)
    want = right_numbers(Truth(lambda: F.cross_entropy(net(x), y), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5


def physics(model: Any, batch: Any) -> Any:
    """Residual of u' + u = 0."""
    x = batch["x"].detach().requires_grad_(True)
    u = model(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return (slope + u).pow(2).mean()


@case("function", "right")
def physics_informed(ask: Ask) -> Answer:
    """A physics-informed loss that differentiates in its inputs."""
    net, batch = mlp(inputs=1, classes=1), {"x": normal(8, 1)}
    want = right_numbers(Truth(lambda: physics(net, batch), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, physics, batch))), want, 1e-5


@case("function", "right")
def physics_informed_measures(ask: Ask) -> Answer:
    """A physics-informed loss: slice, one-step rise and ball at its centre."""
    net, batch = mlp(inputs=1, classes=1), {"x": normal(8, 1)}
    truth = Truth(lambda: physics(net, batch), net.parameters())
    v, gradient = probe(len(truth.gradient)), truth.gradient
    loss, ahead = truth.loss, truth.loss_at(v)
    step = truth.loss_at(0.05 * gradient / gradient.norm()) - loss

    def question() -> Tensor:
        objective = ma.Objective(net, physics, batch)
        line = ma.slice_1d(objective, v, points=3)
        assert ma.ball_sharpness(objective, rho=0.05).sharpness >= float(step) * (1 - 1e-9)
        assert ma.average_sharpness(objective, sigma=0.01, draws=4).standard_error >= 0
        return torch.stack([line.loss[1], line.loss[2], torch.tensor(ma.one_step_sharpness(objective, 0.05).sharpness)])

    return ask(question), torch.stack([loss, ahead, step]), 1e-8


class Energy(nn.Module):
    """Energy and forces of a molecule: forward differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_(True)
            energy = self.net(positions).sum(1)
            forces = -torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]
        return energy, forces


def forces_loss(model: Any, batch: Any) -> Any:
    energy, forces = model(batch["positions"])
    return F.mse_loss(energy, batch["energy"]) + (forces - batch["forces"]).pow(2).sum(1).mean()


@case("function", "right")
def energy_and_forces(ask: Ask) -> Answer:
    """An energy model whose forward differentiates in positions to give forces."""
    net = seeded(Energy)
    batch = {"positions": normal(6, 3), "energy": normal(6, seed=3), "forces": normal(6, 3, seed=4)}
    want = right_numbers(Truth(lambda: forces_loss(net, batch), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, forces_loss, batch))), want, 1e-5


@case("function", "right")
def gradient_penalty(ask: Ask) -> Answer:
    """A critic with a gradient penalty (WGAN-GP)."""
    net, batch = mlp(classes=1), {"real": normal(6, 3), "fake": normal(6, 3, seed=5)}

    def f(model: Any, b: Any) -> Any:
        between = (0.5 * (b["real"] + b["fake"])).requires_grad_(True)
        slope = torch.autograd.grad(model(between).sum(), between, create_graph=True)[0]
        return model(b["fake"]).mean() - model(b["real"]).mean() + 10 * (slope.norm(dim=1) - 1).pow(2).mean()

    want = right_numbers(Truth(lambda: f(net, batch), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, f, batch))), want, 1e-5


@case("function", "right", "refused")
def jacobian_in_the_loss(ask: Ask) -> Answer:
    """A contractive penalty by torch.func.jacrev inside the loss."""
    net, batch = mlp(), {"x": normal(5, 3), "y": labels(5)}

    def f(model: Any, b: Any) -> Any:
        jacobians = torch.func.vmap(torch.func.jacrev(model))(b["x"])
        return F.cross_entropy(model(b["x"]), b["y"]) + jacobians.pow(2).sum((1, 2)).mean()

    want = right_numbers(Truth(lambda: f(net, batch), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, f, batch))), want, 1e-5


class Branch(nn.Module):
    """Rounds its hidden units where no gradient is asked for, as inference code does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.a(x))
        return self.b(hidden if torch.is_grad_enabled() else hidden.round(decimals=1))


@case("function", "right", "refused")
def branch_on_gradients(ask: Ask) -> Answer:
    """A forward that branches on torch.is_grad_enabled()."""
    net, (x, y) = seeded(Branch), points()
    want = right_numbers(Truth(lambda: F.cross_entropy(net(x), y), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5


@case("function", "right", "refused")
def branch_on_gradients_slice(ask: Ask) -> Answer:
    """A slice of a network that branches on torch.is_grad_enabled()."""
    net, (x, y) = seeded(Branch), points()
    truth = Truth(lambda: F.cross_entropy(net(x), y), net.parameters())
    v = probe(len(truth.gradient))
    want = torch.stack([truth.loss_at(a * v) for a in (-1.0, 0.0, 1.0)])
    return ask(lambda: ma.slice_1d(ma.Objective(net, F.cross_entropy, (x, y)), v, points=3).loss), want, 1e-9


class Backbone(nn.Module):
    """Features without gradients in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.training):
            hidden = torch.tanh(self.a(x))
        return self.b(hidden)


@case("function", "refused", "warned")
def gradients_off_in_evaluation(ask: Ask) -> Answer:
    """The backbone runs under set_grad_enabled(self.training): its weights move the loss, its gradient says 0."""
    net, (x, y) = seeded(Backbone), points()
    trained = copy.deepcopy(net).train()
    want = Truth(lambda: F.cross_entropy(trained(x), y), trained.parameters()).gradient
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y)).gradient()), want, 1e-6


@case("function", "refused")
def criterion_without_gradients(ask: Ask) -> Answer:
    """A criterion decorated with torch.no_grad()."""
    net, (x, y) = mlp(), points()

    @torch.no_grad()
    def criterion(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    return ask(lambda: ma.Objective(net, criterion, (x, y)).gradient()), 0.0, 0.0


@case("function", "refused", "warned")
def stop_gradient(ask: Ask) -> Answer:
    """A loss with a stop-gradient (SimSiam): its gradient is not that of its value."""
    net, batch = mlp(), {"a": normal(6, 3), "b": normal(6, 3, seed=5)}

    def f(model: Any, b: Any) -> Any:
        return -F.cosine_similarity(model(b["a"]), model(b["b"]).detach()).mean()

    truth = Truth(lambda: f(net, batch), net.parameters())
    want = torch.stack([truth.loss_at(1e-5 * e) - truth.loss_at(-1e-5 * e) for e in torch.eye(26).double()]) / 2e-5
    return ask(lambda: ma.Objective(net, f, batch).gradient()), want, 1e-6


class StraightThrough(nn.Module):
    """Binarised hidden units with the gradient of the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.a(x))
        return self.b(hidden + (hidden.sign() - hidden).detach())


@case("function", "refused", "warned")
def straight_through(ask: Ask) -> Answer:
    """A straight-through estimator: its gradient is not that of its value."""
    net, (x, y) = seeded(StraightThrough), points()
    truth = Truth(lambda: F.cross_entropy(net(x), y), net.parameters())
    want = torch.stack([truth.loss_at(1e-5 * e) - truth.loss_at(-1e-5 * e) for e in torch.eye(26).double()]) / 2e-5
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y)).gradient()), want, 1e-6


class Reverse(torch.autograd.Function):
    """The identity, with the sign of its gradient reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Adversarial(nn.Module):
    """Domain-adversarial features behind a gradient reversal layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        reversed_features = Reverse.apply(torch.tanh(self.features(x)))  # type: ignore[no-untyped-call]  # torch's
        return self.head(reversed_features)


@case("function", "refused", "warned")
def gradient_reversal(ask: Ask) -> Answer:
    """A gradient reversal layer: its gradient is not that of its value."""
    net, (x, y) = seeded(Adversarial), points()
    truth = Truth(lambda: F.cross_entropy(net(x), y), net.parameters())
    want = torch.stack([truth.loss_at(1e-5 * e) - truth.loss_at(-1e-5 * e) for e in torch.eye(26).double()]) / 2e-5
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y)).gradient()), want, 1e-6


@case("function", "right")
def callers_gradients_are_off(ask: Ask) -> Answer:
    """The caller stands under torch.no_grad()."""
    net, (x, y) = mlp(), points()
    want = right_numbers(Truth(lambda: F.cross_entropy(net(x), y), net.parameters()))
    with torch.no_grad():
        return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5


@case("function", "right", "refused")
def callers_inference_mode(ask: Ask) -> Answer:
    """The caller stands under torch.inference_mode()."""
    net, (x, y) = mlp(), points()
    want = right_numbers(Truth(lambda: F.cross_entropy(net(x), y), net.parameters()))
    with torch.inference_mode():
        return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5
