"""Dropout by name: ``dropout=True`` turns on what is random in training, found by what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, case, mlp, need, normal, points, probe, seeded


class Around(nn.Module):
    """A perceptron with something random between its layers."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.net, self.middle, self.head = mlp(classes=6), middle, nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.middle(self.net(x)))


def around(middle: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Around(middle).double().eval()


def switched(ask: Ask, net: nn.Module, data: Any = None) -> Answer:
    """Off, the loss is that of evaluation mode; on, it differs, is one function, and its gradient is its own."""
    x, y = points() if data is None else data
    net.eval()
    want = float(F.cross_entropy(net(x), y))

    def question() -> tuple[float, list[float], float, float]:
        off = ma.Objective(net, F.cross_entropy, (x, y))
        on = ma.Objective(net, F.cross_entropy, (x, y), dropout=True)
        v, w, h = probe(on.size), on.point(), 1e-6
        slope = (float(on.loss(w + h * v)) - float(on.loss(w - h * v))) / (2 * h)
        need(off.settings.get("dropout") != on.settings.get("dropout"), "the settings do not tell them apart")
        return float(off.loss()), [float(on.loss()), float(on.loss())], slope, float(on.gradient() @ v)

    off, on, slope, along = ask(question)
    need(abs(off - want) < 1e-9, f"off: {off}, in evaluation mode {want}")
    need(on[0] == on[1], f"on: two values {on}")
    need(abs(slope - along) < 1e-4 * (1 + abs(slope)), f"on: slope {slope}, gradient {along}")
    need(abs(on[0] - want) > 1e-6 or ask.said, "labelled as dropped, and nothing is dropped")
    return None


ANY = ("right", "refused", "warned")


@case("dropout", "right")
def dropout_layer(ask: Ask) -> Answer:
    """nn.Dropout."""
    return switched(ask, around(nn.Dropout(0.5)))


@case("dropout", "right")
def alpha_dropout(ask: Ask) -> Answer:
    """nn.AlphaDropout and nn.FeatureAlphaDropout."""
    return switched(ask, around(nn.Sequential(nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3))))


@case("dropout", "right")
def channels_dropped(ask: Ask) -> Answer:
    """nn.Dropout2d on feature maps."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 6, 2), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(24, 2)))
    return switched(ask, net, (normal(6, 1, 3, 3), points(6)[1]))


class StochasticDepth(nn.Module):
    """Drops whole samples, under a name without "drop" in it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return x
        return x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(1 - self.p) / (1 - self.p)


class DropPath(nn.Module):
    """The same as the library of image models has it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Any:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x.div(keep) * (keep + torch.rand(len(x), 1, dtype=x.dtype)).floor_()


@case("dropout", *ANY)
def stochastic_depth(ask: Ask) -> Answer:
    """StochasticDepth with a rate named p."""
    return switched(ask, around(StochasticDepth(0.5)))


@case("dropout", *ANY)
def drop_path(ask: Ask) -> Answer:
    """DropPath with a rate named drop_prob."""
    return switched(ask, around(DropPath(0.5)))


class Functional(nn.Module):
    """Functional dropout that follows the training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.5

    def forward(self, x: Tensor) -> Any:
        return F.dropout(x, self.rate, training=self.training)


@case("dropout", *ANY)
def functional_dropout(ask: Ask) -> Answer:
    """F.dropout(..., training=self.training)."""
    return switched(ask, around(Functional()))


class InTheRoot(nn.Module):
    """Functional dropout in the forward of the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, self.training))


@case("dropout", *ANY)
def functional_dropout_in_the_root(ask: Ask) -> Answer:
    """F.dropout in the forward of the network itself, which also holds layers."""
    return switched(ask, seeded(InTheRoot))


@case("dropout", *ANY)
def randomised_rectifier(ask: Ask) -> Answer:
    """nn.RReLU, whose slopes are random in training."""
    return switched(ask, around(nn.RReLU(0.1, 0.9)))


class GaussianNoise(nn.Module):
    """Additive noise in training."""

    def forward(self, x: Tensor) -> Any:
        return x + 0.5 * torch.randn_like(x) if self.training else x


@case("dropout", *ANY)
def gaussian_noise(ask: Ask) -> Answer:
    """A layer that adds noise in training."""
    return switched(ask, around(GaussianNoise()))


class Shake(nn.Module):
    """Shake-shake: a random convex combination of two branches in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        share = torch.rand(len(x), 1, dtype=x.dtype) if self.training else 0.5
        return share * self.a(x) + (1 - share) * self.b(x)


@case("dropout", *ANY)
def shake_shake(ask: Ask) -> Answer:
    """A random combination of two branches in training."""
    return switched(ask, around(Shake()))


class LayerDrop(nn.Module):
    """Skips whole layers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            if not self.training or float(torch.rand(())) > 0.5:
                x = x + layer(x)
        return x


@case("dropout", *ANY)
def layer_drop(ask: Ask) -> Answer:
    """Whole layers that are skipped at random in training."""
    return switched(ask, around(LayerDrop()))


class LastStep(nn.Module):
    """A recurrent network of two layers, with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, 2, batch_first=True, dropout=0.5), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


@case("dropout", *ANY)
def recurrent_dropout(ask: Ask) -> Answer:
    """nn.LSTM(dropout=0.5) between two layers."""
    return switched(ask, seeded(LastStep), (normal(6, 3, 2), points(6)[1]))


class Attention(nn.Module):
    """Attention with dropout on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.attention(x, x, x)[0].mean(1))


@case("dropout", *ANY)
def attention_dropout(ask: Ask) -> Answer:
    """nn.MultiheadAttention(dropout=0.5)."""
    return switched(ask, seeded(Attention), (normal(6, 3, 4), points(6)[1]))


class HardWired(nn.Module):
    """Dropout that is always on (Monte Carlo dropout)."""

    def forward(self, x: Tensor) -> Any:
        return F.dropout(x, 0.5, training=True)


@case("dropout", *ANY)
def dropout_that_is_always_on(ask: Ask) -> Answer:
    """F.dropout(training=True), which no mode turns off: one draw, and the gradient is that of the draw."""
    net, (x, y) = around(HardWired()), points()

    def question() -> tuple[Tensor, Tensor]:
        objective = ma.Objective(net, F.cross_entropy, (x, y))
        v, w, h = probe(objective.size), objective.point(), 1e-6
        slope = (objective.loss(w + h * v) - objective.loss(w - h * v)) / (2 * h)
        return objective.gradient() @ v, slope

    along, slope = ask(question)
    return along, slope, 1e-4


@case("dropout", "right")
def statistics_stay_in_evaluation(ask: Ask) -> Answer:
    """BatchNorm keeps its policy when dropout is on."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.0), nn.Linear(4, 2)))
    x, y = points()
    want = F.cross_entropy(net(x), y)
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y), dropout=True).loss()), want, 1e-9
