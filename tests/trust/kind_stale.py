"""Stale results: a measurement that goes on where another one stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, case, labels, mlp, need, normal, points, probe

SHELF: dict[str, Any] = {}
LEFT = {"evaluations": 0}  # until the power goes; a global, so that it is no part of the metric


class StoppedError(Exception):
    """The power went."""


def loss_on(objective: Any, w: Tensor, x: Tensor, y: Tensor) -> float:
    """Return the loss of a perceptron's weights on other data, by plain tensors."""
    a, b, c, d = w.split([12, 4, 8, 2])
    return float(F.cross_entropy(torch.tanh(x @ a.view(4, 3).T + b) @ c.view(2, 4).T + d, y))


Metric = Callable[[Any, Tensor], float]
Change = Callable[[], object]


def resumed(
    ask: Ask,
    build: Callable[[], tuple[nn.Module, Any, Any, Metric]],
    change: Change,
    after: int | None = 3,
    plane: bool = False,
) -> Answer:
    """Stop a slice, let something change, go on: the result is that of a new measurement, or a refusal."""
    LEFT["evaluations"] = 10**9 if after is None else after
    v, u = probe(26), probe(26).flip(0)

    def measured(parts: tuple[nn.Module, Any, Any, Metric], path: Path | None) -> Tensor:
        net, f, data, metric = parts
        objective = ma.Objective(net, f, data)
        metrics = {"other": metric}
        found: Any
        if plane:
            found = ma.slice_2d(objective, (v, u), points=3, metrics=metrics, path=path)
        else:
            found = ma.slice_1d(objective, v, points=7, metrics=metrics, path=path)
        return torch.cat([found.loss.reshape(-1).double(), found.metrics["other"].reshape(-1).double()])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice.safetensors"
        parts = build()
        try:
            first = measured(parts, path)
            need(after is None, f"it never stopped: {first}")
        except StoppedError:
            pass
        LEFT["evaluations"] = 10**9
        change()
        want = measured(parts, None)
        return ask(lambda: measured(parts, path)), want, 1e-9


HELD_OUT = (normal(8, 3, seed=21), labels(8, seed=22))
OTHER = (normal(8, 3, seed=31), labels(8, seed=32))


def _plain(metric: Metric) -> tuple[nn.Module, Any, Any, Metric]:
    def spending(objective: Any, w: Tensor) -> float:
        LEFT["evaluations"] -= 1
        if LEFT["evaluations"] < 0:
            raise StoppedError
        return metric(objective, w)

    return mlp(), F.cross_entropy, points(), spending


@case("stale", "right", "refused")
def test_set_in_a_global(ask: Ask) -> Answer:
    """The test set of a metric is a global that was changed."""
    SHELF["test"] = HELD_OUT
    return resumed(ask, lambda: _plain(lambda o, w: loss_on(o, w, *SHELF["test"])), lambda: SHELF.update(test=OTHER))


@case("stale", "right", "refused")
def test_set_in_a_closure(ask: Ask) -> Answer:
    """The test set of a metric is a closure's variable that was changed."""
    x, y = HELD_OUT

    def change() -> None:
        nonlocal x, y
        x, y = OTHER

    return resumed(ask, lambda: _plain(lambda o, w: loss_on(o, w, x, y)), change)


@case("stale", "right", "refused")
def test_set_changed_in_place(ask: Ask) -> Answer:
    """The test set of a metric was changed in place."""
    x, y = HELD_OUT[0].clone(), HELD_OUT[1]
    return resumed(ask, lambda: _plain(lambda o, w: loss_on(o, w, x, y)), lambda: x.mul_(2))


class Evaluator:
    """Holds a test set in an attribute."""

    def __init__(self) -> None:
        self.test = HELD_OUT

    def __call__(self, objective: Any, w: Tensor) -> float:
        return loss_on(objective, w, *self.test)


@case("stale", "right", "refused")
def test_set_in_an_attribute(ask: Ask) -> Answer:
    """The test set of a metric is an attribute that was changed."""
    evaluator = Evaluator()
    return resumed(ask, lambda: _plain(evaluator), lambda: setattr(evaluator, "test", OTHER))


@case("stale", "right", "refused")
def test_set_in_a_default(ask: Ask) -> Answer:
    """The test set of a metric is a default argument that was changed."""

    def metric(objective: Any, w: Tensor, test: Any = HELD_OUT) -> float:
        return loss_on(objective, w, *test)

    return resumed(ask, lambda: _plain(metric), lambda: setattr(metric, "__defaults__", (OTHER,)))


@case("stale", "right", "refused")
def test_set_of_a_plane(ask: Ask) -> Answer:
    """A plane: the test set of its metric was changed."""
    SHELF["test"] = HELD_OUT
    return resumed(
        ask,
        lambda: _plain(lambda o, w: loss_on(o, w, *SHELF["test"])),
        lambda: SHELF.update(test=OTHER),
        plane=True,
    )


@case("stale", "right", "refused")
def finished_slice(ask: Ask) -> Answer:
    """A slice that was finished, read again after the metric's data changed."""
    SHELF["test"] = HELD_OUT
    return resumed(
        ask,
        lambda: _plain(lambda o, w: loss_on(o, w, *SHELF["test"])),
        lambda: SHELF.update(test=OTHER),
        after=None,
    )


@case("stale", "right", "refused")
def another_metric_under_its_name(ask: Ask) -> Answer:
    """Another function under the name of the metric."""
    SHELF["metric"] = lambda o, w: loss_on(o, w, *HELD_OUT)
    return resumed(
        ask,
        lambda: _plain(lambda o, w: float(SHELF["metric"](o, w))),
        lambda: SHELF.update(metric=lambda o, w: float(w.norm())),
    )


@case("stale", "right", "refused")
def data_changed_in_place(ask: Ask) -> Answer:
    """The objective's data were changed in place."""
    x, y = points()

    def build() -> tuple[nn.Module, Any, Any, Metric]:
        net, f, _, metric = _plain(lambda o, w: 0.0)
        return net, f, (x, y), metric

    return resumed(ask, build, lambda: x.mul_(1.5))


@case("stale", "right", "refused")
def criterion_changed(ask: Ask) -> Answer:
    """The criterion's label_smoothing was changed."""
    criterion = nn.CrossEntropyLoss()

    def build() -> tuple[nn.Module, Any, Any, Metric]:
        net, _, data, metric = _plain(lambda o, w: 0.0)
        return net, criterion, data, metric

    return resumed(ask, build, lambda: setattr(criterion, "label_smoothing", 0.2))


@case("stale", "right", "refused")
def weights_trained_on(ask: Ask) -> Answer:
    """The network was trained on."""
    net = mlp()

    def build() -> tuple[nn.Module, Any, Any, Metric]:
        _, f, data, metric = _plain(lambda o, w: 0.0)
        return net, f, data, metric

    return resumed(ask, build, lambda: net[0].weight.data.mul_(1.5))


@case("stale", "right")
def nothing_changed(ask: Ask) -> Answer:
    """Nothing changed: it goes on, and nothing is said."""
    return resumed(ask, lambda: _plain(lambda o, w: loss_on(o, w, *HELD_OUT)), lambda: None)
