"""Averages of the true weights: torch's own, updated inside ``unperturbed()``, against sums in float64 by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import msam

from .workloads import batch, loss, network

STEPS = 6
DECAY = 0.8

MAKERS: dict[str, Callable[[Any], msam.PerturbedOptimizer]] = {
    "MSAM": lambda p: msam.MSAM(p, lr=0.1, rho=0.5, momentum=0.9),
    "AdamWMSAM": lambda p: msam.AdamWMSAM(p, lr=0.05, rho=0.5),
    "SAM": lambda p: msam.SAM(p, lr=0.1, rho=0.2),
}


def moving(series: list[Tensor]) -> Tensor:
    """What the formula says: the first value, then ``a ← d a + (1 − d) w``."""
    average = series[0]
    for value in series[1:]:
        average = DECAY * average + (1 - DECAY) * value
    return average


AVERAGES: dict[str, tuple[dict[str, Any], Callable[[list[Tensor]], Tensor]]] = {
    "EMA": ({"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}, moving),
    "SWA": ({}, lambda series: torch.stack(series).mean(0)),
}


def trained(name: str, options: dict[str, Any] | None, true: bool = True) -> tuple[Any, nn.Module, list[list[Tensor]]]:
    """The average, the model, and its true weights after every step."""
    model = network(torch.float32)
    optimizer = MAKERS[name](model.parameters())
    average = None if options is None else AveragedModel(model, **options)
    noted: list[list[Tensor]] = []
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, step)
            torch.autograd.backward(value)
            return value

        optimizer.step(closure)
        if average is not None and true:
            with optimizer.unperturbed():
                average.update_parameters(model)
        elif average is not None:
            average.update_parameters(model)
        standing = {} if name == "SAM" else optimizer.displacement()
        noted.append([p.detach() - standing.get(p, torch.zeros(())) for p in model.parameters()])
    return average, model, noted


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("name", MAKERS)
def test_an_average_is_that_of_the_true_weights(name: str, kind: str) -> None:
    options, by_hand = AVERAGES[kind]
    average, _, noted = trained(name, options)
    for i, p in enumerate(average.module.parameters()):
        expected = by_hand([weights[i].double() for weights in noted])
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-6)  # a few roundings of numbers around 1


def test_of_displaced_weights_it_is_another() -> None:
    average, _, noted = trained("MSAM", AVERAGES["EMA"][0], true=False)
    expected = moving([weights[0].double() for weights in noted])
    assert float((average.module[0].weight.detach().double() - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", MAKERS)
def test_the_training_does_not_notice(name: str) -> None:
    _, with_it, _ = trained(name, AVERAGES["EMA"][0])
    _, without, _ = trained(name, None)
    for p, q in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q)


def test_batchnorm_has_the_statistics_at_the_averaged_weights() -> None:
    """Against the mean and variance of what the first layer makes of all samples, in float64."""
    average, _, _ = trained("MSAM", AVERAGES["SWA"][0])
    data = [batch(step, torch.float32) for step in range(5)]
    msam.update_batchnorm_statistics(average, data)
    hidden = [x.double() @ average.module[0].weight.detach().double().T for x, _ in data]
    norm = average.module[1]
    torch.testing.assert_close(norm.running_mean.double(), torch.cat(hidden).mean(0), rtol=0, atol=1e-6)
    variances = torch.stack([h.var(0) for h in hidden]).mean(0)  # each batch's own, as BatchNorm takes them
    torch.testing.assert_close(norm.running_var.double(), variances, rtol=1e-5, atol=1e-6)
