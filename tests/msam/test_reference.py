"""The twins themselves: equal to torch where they coincide, and to one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import reference
from .workloads import Twin, furthest, hide, missing, network, train

STEPS = 60

TORCH: list[tuple[str, Any, dict[str, Any]]] = [
    ("plain", torch.optim.SGD, dict(lr=0.1)),
    ("momentum", torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=1e-2)),
    ("dampening", torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=1e-2)),
    ("maximize", torch.optim.SGD, dict(lr=0.01, momentum=0.9, maximize=True)),
    ("adamw", torch.optim.AdamW, dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)),
    ("adamw-maximize", torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, maximize=True)),
]


@pytest.mark.parametrize(("name", "cls", "options"), TORCH, ids=[row[0] for row in TORCH])
@pytest.mark.parametrize("edit", [None, missing], ids=["all", "missing"])
def test_without_perturbation_is_torch(name: str, cls: Any, options: dict[str, Any], edit: Any) -> None:
    model = network()
    twin = Twin(model, edit)
    states = reference.trajectory(
        twin, twin.weights, STEPS, base="sgd" if cls is torch.optim.SGD else "adamw", **options
    )
    opt = cls(model.parameters(), **options)
    stored = train(model, opt, range(STEPS), after_backward=hide if edit else None)
    assert max(furthest(a, s.weights) for a, s in zip(stored, states, strict=True)) < 1e-11
    for name_, values in states[-1].buffers.items():
        held = [opt.state[p][name_] for p in model.parameters() if name_ in opt.state[p]]
        assert not held or furthest(held, values) < 1e-11
    assert furthest(model.buffers(), twin.buffers.values()) < 1e-11


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_nag_is_nesterov(weight_decay: float) -> None:
    model = network()
    twin = Twin(model)
    states = reference.trajectory(
        twin,
        twin.weights,
        STEPS + 1,
        lr=0.1,
        momentum=0.9,
        direction="momentum",
        normalize="lr",
        rho=0.9,
        weight_decay=weight_decay,
        weight_decay_at="perturbed",
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    for t, stored in enumerate(train(model, opt, range(STEPS))):
        perturbed = [w + e for w, e in zip(states[t].weights, states[t + 1].buffers["displacement"], strict=True)]
        assert furthest(stored, perturbed) < 1e-11


def test_algorithm1_is_the_definition() -> None:
    options: dict[str, Any] = dict(lr=0.1, momentum=0.9, rho=0.3, weight_decay=5e-3)
    twin, other = Twin(network()), Twin(network())
    stored = reference.algorithm1(twin, twin.weights, 100, **options)
    states = reference.trajectory(other, other.weights, 100, direction="momentum", **options)
    for t in range(99):
        perturbed = [w + e for w, e in zip(states[t].weights, states[t + 1].buffers["displacement"], strict=True)]
        assert furthest(stored[t].weights, perturbed) < 1e-11
    assert furthest(stored[-1].weights, states[-1].weights) < 1e-11
    assert furthest(stored[-1].buffers["momentum_buffer"], states[-1].buffers["momentum_buffer"]) < 1e-10


def test_sam_on_a_quadratic_by_hand() -> None:
    hessian = torch.tensor([3.0, 1.0], dtype=torch.float64)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (state,) = reference.trajectory(lambda ws, _: [hessian * ws[0]], [w], 1, lr=0.1, direction="gradient", rho=0.5)
    g = torch.tensor([3.0, -2.0], dtype=torch.float64)
    expected = w - 0.1 * hessian * (w + 0.5 * g / 13**0.5)
    assert furthest(state.weights, [expected]) < 1e-15


def test_numbers_by_step_and_by_tensor() -> None:
    ones = [torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    states = reference.trajectory(lambda ws, _: [w * 0 + 1 for w in ws], ones, 2, lr=lambda t: [1.0 + t, 10.0 + t])
    assert [float(w[0]) for w in states[-1].weights] == [1 - 1 - 2, 1 - 10 - 11]


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(base="adam"), "base must be"),
    (dict(direction="up"), "unknown direction"),
    (dict(direction="random"), "needs directions"),
    (dict(direction="gradient", normalize="l1"), "normalize must be"),
    (dict(direction="gradient", scale="log"), "scale must be"),
    (dict(lr=[0.1, 0.2]), "one number for each of the 1 tensors"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[row[1] for row in BAD])
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.trajectory(lambda ws, _: ws, [torch.ones(2)], 1, **options)
