"""Training: the same bits for the same seed, the textbook's steps, records that change nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msam import Perturbation, normalization_layers
from msam.filters import ParameterFilter
from msam_analysis.studies import digits
from msam_analysis.studies.training import Trained, train
from msam_analysis.studies.workloads import DIGITS, Recipe, Workload, formula, workload
from tests.msam import reference

from .toy import CLASSES, FEATURES, SAMPLES, STEPS, TOY, Features, samples, split

OPTIMIZERS = ("SGD", "NAG", "SAM", "MSAM")
MU, DECAY, LR = TOY.recipe.momentum, TOY.recipe.weight_decay, TOY.recipe.lr
NEVER = 10**9

# How each optimizer reads in the textbook: where its gradient is taken.
TEXTBOOK: dict[str, dict[str, Any]] = {
    "SGD": {"direction": None},
    "NAG": {"direction": "momentum", "normalize": "lr", "rho": 0.9},
    "SAM": {"direction": "gradient", "rho": 0.1},
    "MSAM": {"direction": "momentum", "rho": 0.3},
}

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def state(trained: Trained) -> dict[str, Tensor]:
    """Return everything that a run ends with."""
    found = dict(trained.model.state_dict())
    buffers = [trained.optimizer.state[p]["momentum_buffer"] for p in trained.model.parameters()]
    return found | {f"momentum {i}": buffer for i, buffer in enumerate(buffers)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Watched(nn.Sequential):
    """A network that takes down what it is trained on and how often it is differentiated."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.batches: list[Tensor] = []
        self.backward_passes = 0
        next(self.parameters()).register_post_accumulate_grad_hook(self._count)

    def _count(self, _: Tensor) -> None:
        self.backward_passes += 1

    def forward(self, x: Tensor) -> Tensor:
        # Measurements look at private copies, in eval mode.
        if self.training and torch.is_grad_enabled():
            self.batches.append(x[:, 0].long())
        for layer in self:
            x = layer(x)
        return x


class Laboratory:
    """The toy in float64 and without BatchNorm, so that a gradient is a function of weights and samples alone."""

    def __init__(self) -> None:
        self.inputs, self.labels = samples(SAMPLES, seed=1)
        self.inputs = self.inputs.double()
        self.made: list[Watched] = []
        self.initial: list[list[Tensor]] = []

    def network(self) -> nn.Module:
        model = Watched(Features(), nn.Linear(FEATURES - 1, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
        self.made.append(model)
        self.initial.append([p.detach().clone() for p in model.parameters()])
        return model

    def workload(self, **changes: Any) -> Workload:
        data = split(self.inputs, self.labels, 25)
        settings = {"network": self.network, "train": lambda: data, "test": lambda: data} | changes
        return dataclasses.replace(TOY, **settings)

    def train(self, name: str, seed: int = 0, *, every: int = NEVER, **options: Any) -> Trained:
        return train(self.workload(), name, seed, every=every, **options)

    def order(self, name: str) -> list[Tensor]:
        """Return the samples of every step of the last run: SAM sees each batch twice."""
        seen = self.made[-1].batches
        return seen[::2] if name == "SAM" else seen

    def gradient(self, order: Sequence[Tensor]) -> Callable[[list[Tensor], int], list[Tensor]]:
        """Return the gradient of the batch of a step, by the formulas of a perceptron."""

        def of(weights: list[Tensor], step: int) -> list[Tensor]:
            w1, b1, w2, b2 = leaves = [w.clone().requires_grad_() for w in weights]
            x, y = self.inputs[order[step], 1:], self.labels[order[step]]
            loss = F.cross_entropy(torch.tanh(x @ w1.T + b1) @ w2.T + b2, y)
            return list(torch.autograd.grad(loss, leaves))

        return of

    def textbook(self, name: str) -> list[reference.State]:
        """Repeat the last run, from the definitions."""
        order = self.order(name)
        return reference.trajectory(
            self.gradient(order),
            self.initial[-1],
            STEPS,
            lr=lambda step: LR * (1 + math.cos(math.pi * step / STEPS)) / 2,
            momentum=MU,
            weight_decay=DECAY,
            **TEXTBOOK[name],
        )


@pytest.fixture
def laboratory() -> Laboratory:
    return Laboratory()


# --- reproducible


@each_optimizer
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    first, second, other = (train(TOY, name, seed, every=3) for seed in (4, 4, 5))
    assert same(state(first), state(second))
    assert first.steps.equals(second.steps)
    assert not any(torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))
    assert not first.steps.equals(other.steps)


def test_the_global_generators_are_neither_read_nor_advanced(generators: Callable[[], tuple[object, ...]]) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = generators()
        runs.append(train(TOY, "MSAM", 0, every=2))
        assert generators() == before
    assert same(state(runs[0]), state(runs[1]))


def test_optimizers_share_initial_weights_and_batches(laboratory: Laboratory) -> None:
    orders = []
    for name in OPTIMIZERS:
        laboratory.train(name, seed=3)
        orders.append(laboratory.order(name))
    for order, initial in zip(orders, laboratory.initial, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(order, orders[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(initial, laboratory.initial[0], strict=True))
    laboratory.train("SGD", seed=4)
    assert not torch.equal(laboratory.order("SGD")[0], orders[0][0])
    assert not torch.equal(laboratory.initial[-1][0], laboratory.initial[0][0])


def test_an_epoch_shows_every_sample_once_in_another_order(laboratory: Laboratory) -> None:
    laboratory.train("SGD")
    order = laboratory.order("SGD")
    assert [len(batch) for batch in order] == [16, 16, 16, 12] * 2
    epochs = [torch.cat(order[:4]), torch.cat(order[4:])]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(SAMPLES))
    assert not torch.equal(*epochs)


def test_a_control_draws_with_replacement(laboratory: Laboratory) -> None:
    trained = laboratory.train("SGD", replacement=True)
    order = laboratory.order("SGD")
    assert [len(batch) for batch in order] == [16, 16, 16, 12] * 2
    for epoch in (torch.cat(order[:4]), torch.cat(order[4:])):
        # 60 draws from 60 samples leave (1 - 1/60)^60 = 36 % out; not one is left out with probability 1e-25.
        assert len(epoch.unique()) < SAMPLES
    assert list(trained.steps["epoch"]) == [0] * 4 + [1] * 4


# --- the textbook's steps


@each_optimizer
def test_gradients_are_counted(name: str, laboratory: Laboratory) -> None:
    trained = laboratory.train(name, every=2)
    per_step = 2 if name == "SAM" else 1
    assert laboratory.made[-1].backward_passes == per_step * STEPS
    assert trained.gradients_per_step == per_step
    assert len(laboratory.made[-1].batches) == per_step * STEPS, "records evaluate copies, not the network in training"


@each_optimizer
def test_a_run_is_the_textbook_trajectory(name: str, laboratory: Laboratory) -> None:
    """To 1e-12 in float64 over all 8 steps; weights of size 1, a perturbation of 0.1 or more."""
    trained = laboratory.train(name)
    end = laboratory.textbook(name)[-1]
    for parameter, w in zip(trained.model.parameters(), end.weights, strict=True):
        torch.testing.assert_close(parameter.detach(), w, rtol=0, atol=1e-12)
    buffers = [trained.optimizer.state[p]["momentum_buffer"] for p in trained.model.parameters()]
    for buffer, v in zip(buffers, end.buffers["momentum_buffer"], strict=True):
        torch.testing.assert_close(buffer, v, rtol=0, atol=1e-12)


def test_the_textbook_can_tell_the_optimizers_apart(laboratory: Laboratory) -> None:
    ends = [laboratory.train(name).model.state_dict()["1.weight"] for name in OPTIMIZERS]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert float((a - b).abs().max()) > 1e-4


@each_optimizer
def test_the_learning_rate_decays_by_a_cosine(name: str) -> None:
    steps = train(TOY, name, 0, every=NEVER).steps
    expected = [LR * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert list(steps["lr"]) == pytest.approx(expected, abs=1e-15)
    assert list(steps["step"]) == list(range(STEPS))
    assert list(steps["epoch"]) == [0] * 4 + [1] * 4


@each_optimizer
def test_batchnorm_statistics_belong_to_the_true_weights(name: str) -> None:
    """Mean over batches of the batches' own statistics, each batch weighing what it holds, at the final weights."""
    trained = train(TOY, name, 0, every=NEVER)
    model = trained.model
    assert isinstance(model, nn.Sequential)
    assert not model.training
    with torch.no_grad():
        hidden = [(len(x), model[1](x[:, 1:])) for x, _ in TOY.train()]
    mean = sum(n * h.mean(0) for n, h in hidden) / SAMPLES
    variance = sum(n * h.var(0) for n, h in hidden) / SAMPLES
    torch.testing.assert_close(model[2].running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[2].running_var, variance, rtol=1e-5, atol=1e-6)


# --- records


@each_optimizer
def test_records_do_not_change_training(name: str) -> None:
    """Against the same run with few records, and against a loop that records nothing."""
    watched, left_alone = (train(TOY, name, 2, every=every) for every in (1, NEVER))
    assert same(state(watched), state(left_alone))

    laboratory = Laboratory()
    trained = laboratory.train(name, every=1)
    model = laboratory.network()
    with torch.no_grad():
        for parameter, w in zip(model.parameters(), laboratory.initial[0], strict=True):
            parameter.copy_(w)
    optimizer = laboratory.workload().optimizer(name, model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = laboratory.made[0].batches
    for index in batches[::2] if name == "SAM" else batches:
        x, y = laboratory.inputs[index], laboratory.labels[index]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    optimizer.eval()
    assert same(dict(trained.model.state_dict()), dict(model.state_dict()))


@each_optimizer
def test_cosine_by_hand(name: str, laboratory: Laboratory) -> None:
    """cos(v of the step before, this step's gradient): SAM's first one, the others' one and only."""
    trained = laboratory.train(name)
    order, states = laboratory.order(name), laboratory.textbook(name)
    cosine = list(trained.steps["cosine"])
    assert math.isnan(cosine[0])
    for step in range(1, STEPS):
        before = states[step - 1]
        shift = states[step].buffers["displacement"]
        at = before.weights if name == "SAM" else [w + e for w, e in zip(before.weights, shift, strict=True)]
        g = torch.cat([piece.flatten() for piece in laboratory.gradient(order)(at, step)])
        v = torch.cat([piece.flatten() for piece in before.buffers["momentum_buffer"]])
        assert cosine[step] == pytest.approx(float(g @ v / (g.norm() * v.norm())), abs=1e-10)


@each_optimizer
def test_slow_records_by_hand(name: str, laboratory: Laboratory) -> None:
    """At steps 0, 3, 6: the batch's loss at w and at w + ε, and the loss of the step at the latter."""
    trained = laboratory.train(name, every=3)
    order, states = laboratory.order(name), laboratory.textbook(name)
    recorded = trained.steps.dropna(subset=["rise"])
    assert list(recorded["step"]) == [0, 3, 6]
    assert recorded["curvature_random"].notna().all()
    assert recorded["curvature_momentum"].notna().tolist() == [False, True, True], "no momentum before the first step"

    def loss(weights: list[Tensor], step: int) -> float:
        w1, b1, w2, b2 = weights
        x, y = laboratory.inputs[order[step], 1:], laboratory.labels[order[step]]
        return float(F.cross_entropy(torch.tanh(x @ w1.T + b1) @ w2.T + b2, y))

    for row in recorded.to_dict("records"):
        step = int(row["step"])
        w = states[step - 1].weights if step else laboratory.initial[-1]
        shift = states[step].buffers["displacement"]
        displaced = [a + e for a, e in zip(w, shift, strict=True)]
        assert row["loss_before"] == pytest.approx(loss(w, step), abs=1e-10)
        assert row["loss_after"] == pytest.approx(loss(displaced, step), abs=1e-10)
        assert row["rise"] == pytest.approx(loss(displaced, step) - loss(w, step), abs=1e-10)
        # SAM's step returns the loss of its first pass.
        assert row["train_batch_loss"] == pytest.approx(loss(w if name == "SAM" else displaced, step), abs=1e-10)


def test_curvature_by_hand(laboratory: Laboratory) -> None:
    """Along momentum and gradient: dᵀHd / dᵀd with the dense Hessian of the training loss at the true weights."""
    trained = laboratory.train("MSAM", every=STEPS - 1)
    order, states = laboratory.order("MSAM"), laboratory.textbook("MSAM")
    w = states[-2].weights
    x, y = laboratory.inputs[:, 1:], laboratory.labels

    def loss(flat: Tensor) -> Tensor:
        w1, b1, w2, b2 = (p.view_as(q) for p, q in zip(flat.split([q.numel() for q in w]), w, strict=True))
        return F.cross_entropy(torch.tanh(x @ w1.T + b1) @ w2.T + b2, y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in w]))
    assert isinstance(hessian, Tensor)
    displaced = [a + e for a, e in zip(w, states[-1].buffers["displacement"], strict=True)]
    along = {
        "momentum": states[-2].buffers["momentum_buffer"],
        "gradient": laboratory.gradient(order)(displaced, STEPS - 1),
    }
    row = trained.steps.iloc[-1]
    for name, pieces in along.items():
        d = torch.cat([piece.flatten() for piece in pieces])
        assert row[f"curvature_{name}"] == pytest.approx(float(d @ hessian @ d / (d @ d)), rel=1e-8)


def test_a_run_without_slow_records() -> None:
    with_records, without = (train(TOY, "MSAM", 0, every=every) for every in (1, None))
    assert same(state(with_records), state(without))
    assert "rise" not in without.steps.columns
    assert without.steps["cosine"].equals(with_records.steps["cosine"])


def test_a_tick_for_every_step() -> None:
    ticks: list[float] = []
    train(TOY, "SAM", 0, every=NEVER, tick=ticks.append)
    assert ticks == [1.0] * STEPS


def test_a_tick_that_raises_ends_the_run() -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TOY, "SAM", 0, every=NEVER, tick=stop)


# --- workloads


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown workload 'imagenet': expected one of \['digits'"):
        workload("imagenet")
    with pytest.raises(ValueError, match=r"unknown optimizer 'Adam': expected one of \['SGD'"):
        train(TOY, "Adam", 0)


RECIPE: dict[str, object] = {
    "epochs": 3,
    "batch_size": 15,
    "lr": 0.2,
    "momentum": 0.8,
    "weight_decay": 1e-3,
    "base": "adamw",
    "schedule": "constant",
    "warmup": 1,
    "clip": 1.0,
    "label_smoothing": 0.1,
}
CHANGES: dict[str, Callable[[Workload], Workload]] = {
    "the name": lambda w: dataclasses.replace(w, name="other"),
    **{
        name: lambda w, change={name: value}: dataclasses.replace(  # type: ignore[misc]
            w, recipe=dataclasses.replace(w.recipe, **change)
        )
        for name, value in RECIPE.items()
    },
    "rho": lambda w: dataclasses.replace(
        w, perturbations={**w.perturbations, "MSAM": Perturbation(direction="momentum", rho=0.4)}
    ),
    "the direction": lambda w: dataclasses.replace(
        w, perturbations={**w.perturbations, "MSAM": w.perturbations["SAM"]}
    ),
    "an input": lambda w: dataclasses.replace(w, train=lambda: [(x + 1e-3, y) for x, y in w.train()]),
    "a label": lambda w: dataclasses.replace(w, train=lambda: [(x, (y + 1) % 3) for x, y in w.train()]),
    "the test set": lambda w: dataclasses.replace(w, test=lambda: w.test()[:1]),
    "what is trained on and what tested": lambda w: dataclasses.replace(
        w, train=lambda: w.train()[:-1], test=lambda: [w.train()[-1], *w.test()]
    ),
    "the batches of the training set": lambda w: dataclasses.replace(w, train=lambda: split(*samples(60, seed=1), 30)),
    "the network": lambda w: dataclasses.replace(w, network=lambda: nn.Sequential(Features(), nn.Linear(4, 3))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_changes_with_all_that_decides_a_run(change: str) -> None:
    assert CHANGES[change](TOY).fingerprint("MSAM") != TOY.fingerprint("MSAM")


def test_every_field_of_a_recipe_is_changed_above() -> None:
    assert list(RECIPE) == [field.name for field in dataclasses.fields(Recipe)]


@pytest.mark.parametrize("name", RECIPE)
def test_every_field_of_a_recipe_changes_the_run(name: str) -> None:
    changed = CHANGES[name](TOY)
    weights = [dict(train(w, "MSAM", 0, every=NEVER).model.state_dict()) for w in (TOY, changed)]
    assert not same(*weights)


def test_a_warm_up_rises_linearly_and_the_rest_decays() -> None:
    """Two epochs of four steps: the first warms up, and the cosine spans the second."""
    recipe = dataclasses.replace(TOY.recipe, warmup=1)
    steps = train(dataclasses.replace(TOY, recipe=recipe), "SGD", 0, every=NEVER).steps
    expected = [0.25, 0.5, 0.75, 1.0] + [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert list(steps["lr"]) == pytest.approx([LR * factor for factor in expected], abs=1e-15)


def test_a_constant_learning_rate() -> None:
    recipe = dataclasses.replace(TOY.recipe, schedule="constant")
    assert set(train(dataclasses.replace(TOY, recipe=recipe), "SGD", 0, every=NEVER).steps["lr"]) == {LR}


def test_fingerprints() -> None:
    assert TOY.fingerprint("MSAM") == dataclasses.replace(TOY, description="other words").fingerprint("MSAM")
    assert len({TOY.fingerprint(name) for name in OPTIMIZERS}) == 4
    assert TOY.fingerprint("SGD", 1) != TOY.fingerprint("SGD", 2)


def only_weights(name: str | None, parameter: Tensor) -> bool:
    return parameter.ndim > 1


def with_subset(subset: ParameterFilter) -> Workload:
    return dataclasses.replace(TOY, perturbations={"MSAM": Perturbation(direction="momentum", rho=0.3, subset=subset)})


def test_perturbations_count_by_value() -> None:
    """The same function made anew is the same; other code, or another value in it, is another."""

    def longer_than(length: int) -> ParameterFilter:
        return lambda name, parameter: len(parameter) > length

    assert with_subset(longer_than(3)).fingerprint("MSAM") == with_subset(longer_than(3)).fingerprint("MSAM")
    chosen: list[ParameterFilter] = [longer_than(3), longer_than(4), only_weights, normalization_layers(TOY.network())]
    assert len({with_subset(subset).fingerprint("MSAM") for subset in chosen}) == len(chosen)


def test_layers_without_weights_count() -> None:
    """Two networks with the same parameters, and initial weights that differ in size alone."""
    tanh, relu = (nn.Sequential(Features(), nn.Linear(4, 3), layer) for layer in (nn.Tanh(), nn.ReLU()))

    def shown(model: nn.Module, scale: float = 1.0) -> str:
        def network() -> nn.Module:
            copied = copy.deepcopy(model)
            for parameter in copied.parameters():
                parameter.data.fill_(0.1 * scale)
            return copied

        return dataclasses.replace(TOY, network=network).fingerprint("SGD")

    assert len({shown(tanh), shown(relu), shown(tanh, 2.0)}) == 3
    assert shown(tanh) == shown(tanh)


def test_formulas() -> None:
    shown = [formula(p) for p in DIGITS.perturbations.values() if p is not None]
    assert shown == ["ε = −ρ η v, ρ = 0.9", "ε = +ρ g/‖g‖, ρ = 0.5", "ε = −ρ v/‖v‖, ρ = 3.0"]


def test_digits() -> None:
    """1,000 and 797 real images, apart; exactly 400 labels wrong; standardised by the training pixels."""
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    true = {image.tobytes(): label for image, label in zip(bunch.images, bunch.target, strict=True)}
    assert len(true) == 1797, "no image twice"
    x, y, tested, answers = digits.load()
    assert (x.shape, tested.shape) == ((1000, 1, 8, 8), (797, 1, 8, 8))
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-5)
    mean, std = float(bunch.images.mean()), float(bunch.images.std())
    scale, shift = _fit(torch.cat([x, tested]), bunch.images)
    assert (scale, shift) == pytest.approx((std, mean), rel=0.05)

    def original(images: Tensor) -> list[Any]:
        return [true[image.round().double().numpy().tobytes()] for image in images[:, 0].double() * scale + shift]

    wrong = [int(a) != b for a, b in zip(y, original(x), strict=True)]
    assert sum(wrong) == 400
    assert [int(a) for a in answers] == original(tested)
    seen = {image.numpy().tobytes() for image in x}
    assert not any(image.numpy().tobytes() in seen for image in tested)
    assert [len(labels) for _, labels in digits.train_data()] == [500, 500]
    assert sum(len(labels) for _, labels in digits.test_data()) == 797
    assert sum(p.numel() for p in digits.network().parameters()) == 14_458


def _fit(standardised: Tensor, images: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the scale and shift that give back pixels of 0 to 16."""
    low, high = float(standardised.min()), float(standardised.max())
    scale = float(images.max() - images.min()) / (high - low)
    return scale, float(images.min()) - scale * low
