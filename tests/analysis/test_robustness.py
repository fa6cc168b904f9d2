"""Accuracy on disturbed inputs: against linear classifiers, whose worst case is known."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msam_analysis.measures.robustness import robust_accuracy
from msam_analysis.results import RobustAccuracy, load

SIZES = (0.0, 0.05, 0.2, 0.6)


def linear(seed: int = 0) -> nn.Linear:
    layer = nn.Linear(4, 2).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def points(count: int = 300) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (linear()(x) + 0.5 * linear(seed=2)(x)).argmax(dim=1)


def worst_case(layer: nn.Linear, x: Tensor, labels: Tensor, epsilon: float) -> float:
    """The margin of a linear classifier falls by ε ‖w_y − w_other‖₁, and not by more."""
    sign = 2.0 * labels - 1.0
    difference = layer.weight[1] - layer.weight[0]
    margin = sign * (x @ difference + layer.bias[1] - layer.bias[0])
    return float((margin > epsilon * difference.abs().sum()).double().mean())


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd"])
def test_attacks_find_the_worst_case_of_a_linear_classifier(attack: Any) -> None:
    x, labels = points()
    found = robust_accuracy(linear(), [(x[:170], labels[:170]), (x[170:], labels[170:])], attack, SIZES)
    expected = [worst_case(linear(), x, labels, size) for size in SIZES]
    # Auto-PGD is computed in single precision.
    assert found.accuracies.tolist() == pytest.approx(expected, abs=1 / 300 if attack == "apgd" else 1e-12)
    assert found.clean == expected[0]
    assert 0.9 > expected[0] > expected[-1] > 0


def test_noise_against_the_normal_distribution() -> None:
    """A point at distance d from the boundary is right with probability Φ(d/σ)."""
    x, labels = points(4000)
    layer = linear()
    difference = (layer.weight[1] - layer.weight[0]).detach()
    offset = float(layer.bias[1].detach() - layer.bias[0].detach())
    distance = (2.0 * labels - 1.0) * (x @ difference + offset) / difference.norm()
    found = robust_accuracy(layer, [(x, labels)], "noise", [0.5, 2.0])
    for accuracy, size, error in zip(found.accuracies.tolist(), (0.5, 2.0), found.errors.tolist(), strict=True):
        expected = float(torch.special.ndtr(distance / size).mean())
        assert accuracy == pytest.approx(expected, abs=4 * error)
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 4000))


class Strip(nn.Module):
    """Class 0 in a strip of width 0.4 around 0.3, class 1 on both sides: one step of 0.6 from 0 crosses it."""

    def forward(self, x: Tensor) -> Tensor:
        margin = (x[:, 0] - 0.3).square() - 0.04
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


def test_small_steps_find_what_one_step_crosses() -> None:
    x = torch.zeros(50, 1, dtype=torch.float64)
    labels = torch.ones(50, dtype=torch.int64)
    one, many, auto = (robust_accuracy(Strip(), [(x, labels)], attack, [0.6]) for attack in ("fgsm", "pgd", "apgd"))
    assert (float(one.accuracies), float(many.accuracies)) == (1.0, 0.0)
    # Its first step is of 2 ε, across the strip and to the other side of the ball: it needs to shorten its steps.
    assert float(auto.accuracies) < float(one.accuracies)
    assert (one.steps, many.steps, auto.steps) == (1, 10, 10)
    still = robust_accuracy(Strip(), [(x, labels)], "pgd", [0.6], step_size=0.0)
    assert 0.5 < float(still.accuracies) < 0.8, "two thirds of uniform starts lie beside the strip"


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.seen: list[Tensor] = []

    def __deepcopy__(self, memo: object) -> Recorder:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("attack", ["noise", "fgsm", "pgd", "apgd"])
def test_inputs_stay_in_their_bounds_and_in_the_ball(attack: Any) -> None:
    x, labels = points(50)
    x = x.clamp(-1, 1)
    recorder = Recorder()
    robust_accuracy(recorder, [(x, labels)], attack, [0.3], bounds=(-1.0, 1.0))
    for seen in recorder.seen:
        rounding = 1e-6 if attack == "apgd" else 1e-12
        assert seen.abs().max() <= 1.0 + rounding
        if attack != "noise" and len(seen) == len(x):
            assert (seen - x).abs().max() <= 0.3 + rounding
    assert not torch.equal(recorder.seen[-1], x)


def test_seeds_and_private_state() -> None:
    x, labels = points()
    layer = linear().train()
    state = torch.get_rng_state()
    one, same, other = (robust_accuracy(layer, [(x, labels)], "noise", [1.0], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.accuracies, same.accuracies)
    assert not torch.equal(one.accuracies, other.accuracies)
    assert layer.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())


def test_auto_pgd_draws_from_a_stream_of_its_own() -> None:
    x, labels = points()
    layer = linear().train()
    states = torch.get_rng_state(), np.random.get_state()
    options: dict[str, Any] = {"steps": 1, "step_size": 1e-9}  # where it starts decides
    one, same, other = (
        robust_accuracy(layer, [(x, labels)], "apgd", [0.6], seed=seed, **options) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(one.accuracies, same.accuracies)
    assert not torch.equal(one.accuracies, other.accuracies)
    assert layer.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())


def test_auto_pgd_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "art.attacks", None)
    with pytest.raises(ModuleNotFoundError, match="Adversarial Robustness Toolbox"):
        robust_accuracy(linear(), [points()], "apgd", [0.1])


def test_table_and_file(tmp_path: Path) -> None:
    found = robust_accuracy(linear(), [points()], "pgd", [0.1, 0.2], steps=3, step_size=0.05, bounds=(-9.0, 9.0))
    frame = found.to_frame()
    assert frame["size"].to_list() == [0.0, 0.1, 0.2]
    assert frame["accuracy"].to_list() == [found.clean, *found.accuracies.tolist()]
    read = load(found.save(tmp_path / "pgd.safetensors"))
    assert isinstance(read, RobustAccuracy)
    assert read.to_frame().equals(frame)
    assert read.settings == {"bounds": "-9 to 9", "step_size": 0.05, "seed": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": "magic"}, "attack must be one of"),
        ({"sizes": []}, "sizes must be finite, not negative"),
        ({"sizes": [-1.0]}, "sizes must be finite, not negative"),
        ({"sizes": [math.inf]}, "sizes must be finite, not negative"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"bounds": (1.0, 1.0)}, "bounds must be a smaller and a larger number"),
        ({"attack": "apgd", "loss_fn": nn.functional.multi_margin_loss}, "raises the cross-entropy only"),
        (
            {"attack": "apgd", "data": [(torch.zeros(1, 1, 4).double(), torch.zeros(1, 1).long())]},
            "needs labels of shape",
        ),
        ({"data": [(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))]}, "floating-point"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": linear(), "data": [points()], "attack": "pgd", "sizes": [0.1], **options}
    with pytest.raises(ValueError, match=message):
        robust_accuracy(**arguments)
