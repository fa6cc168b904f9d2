"""Strengths that change: which one counts at which step, and that the true weights stay meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import msam

from . import reference
from .cases import ADAMW, SGD
from .workloads import Twin, assert_network, furthest, network, same, saved_state, train, true_weights

LR = SGD["lr"]


def cosine_strength(t: int) -> float:
    """From 0.3 to 0.1 over ten steps."""
    return 0.1 + 0.2 * (1 + math.cos(math.pi * min(1, t / 10))) / 2


def ramp_after_jump(t: int) -> float:
    """A ramp over eight steps, nothing in the first three."""
    return 0.3 * min(1, t / 8) if t >= 3 else 0.0


VALUES: list[tuple[str, Callable[[], Any], Callable[[int], float]]] = [
    ("constant", lambda: msam.Constant(0.3), lambda t: 0.3),
    ("jump", lambda: msam.Jump(0.3, steps=5), lambda t: 0.3 if t >= 5 else 0.0),
    ("ramp", lambda: msam.Ramp(0.3, steps=8), lambda t: 0.3 * min(1, t / 8)),
    ("cosine", lambda: msam.Cosine(0.3, steps=10, final=0.1), cosine_strength),
    ("product", lambda: msam.Jump(2.0, steps=3) * msam.Ramp(0.3, steps=8) * 0.5, ramp_after_jump),
]
each_schedule = pytest.mark.parametrize(
    ("schedule", "rho"), [row[1:] for row in VALUES], ids=[row[0] for row in VALUES]
)
OPTIMIZERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("MSAM", SGD, dict(direction="momentum")),
    ("SAM", SGD, dict(direction="gradient")),
    ("AdamWMSAM", ADAMW, dict(base="adamw", direction="momentum")),
    ("AdamWSAM", ADAMW, dict(base="adamw", direction="gradient")),
]
each_optimizer = pytest.mark.parametrize(("cls", "options", "twin"), OPTIMIZERS, ids=[row[0] for row in OPTIMIZERS])


@each_schedule
@each_optimizer
def test_the_gradient_of_step_t_is_taken_at_rho_of_t(
    schedule: Any, rho: Any, cls: str, options: dict[str, Any], twin: dict[str, Any]
) -> None:
    model, problem = network(), Twin(network())
    opt = getattr(msam, cls)(model.parameters(), rho=schedule(), **options)
    train(model, opt, range(15), closure="SAM" in cls and "MSAM" not in cls)
    states = reference.trajectory(problem, problem.weights, 15, rho=rho, **options, **twin)
    assert_network(model, opt, states[-1].weights, problem)
    problem = Twin(network())
    late = reference.trajectory(problem, problem.weights, 15, rho=lambda t: rho(t + 1), **options, **twin)
    if rho(3) != rho(4) or rho(4) != rho(5):
        assert furthest(true_weights(opt), late[-1].weights) > 1e-6


def cosine(t: int) -> float:
    """A learning rate."""
    return float(LR * (1 + math.cos(math.pi * t / 20)) / 2)


def test_following_the_learning_rate() -> None:
    """The perturbation of step t is applied at the end of step t-1, and follows the learning rate of that step."""
    model, problem = network(), Twin(network())
    opt = msam.MSAM(model.parameters(), **{**SGD, "rho": msam.FollowLR(0.3)})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
    for step in range(15):
        train(model, opt, [step])
        scheduler.step()
    states = reference.trajectory(
        problem,
        problem.weights,
        15,
        **{**SGD, "lr": cosine},
        direction="momentum",
        rho=lambda t: 0.3 * cosine(max(t - 1, 0)) / LR,
    )
    assert_network(model, opt, states[-1].weights, problem)


@each_schedule
def test_schedule_resumes_with_the_state(schedule: Any, rho: Any) -> None:
    model, other = network(), network()
    opt = msam.MSAM(model.parameters(), rho=schedule(), **SGD)
    train(model, opt, range(6))
    weights, state = saved_state(model), saved_state(opt)
    resumed = msam.MSAM(other.parameters(), rho=schedule(), **SGD)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(model, opt, range(6, 15))
    train(other, resumed, range(6, 15))
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", ["Constant", "Jump", "Ramp", "Cosine", "FollowLR"])
def test_bad_strengths(make: str, value: float) -> None:
    more = {} if make in ("Constant", "FollowLR") else {"steps": 3}
    with pytest.raises(ValueError, match=r"value|rho"):
        getattr(msam, make)(value, **more)


@pytest.mark.parametrize("steps", [-1, float("nan")])
@pytest.mark.parametrize("make", ["Jump", "Ramp", "Cosine"])
def test_bad_steps(make: str, steps: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        getattr(msam, make)(1.0, steps=steps)


# What is removed is what was applied, whatever changed in between.


def shaken(opt: Any, change: str, step: int) -> None:
    """Change a hyper-parameter between two steps."""
    group = opt.param_groups[0]
    if change == "rho":
        group["rho"] = 0.5 + 0.4 * math.sin(step)
    elif change == "lr":
        group["lr"] = LR * (1 + 0.9 * math.sin(step))
    elif change == "perturb":
        group["perturb"] = step % 2 == 0
    elif change == "momentum":
        group["momentum"] = 0.9 if step % 2 else 0.5


@pytest.mark.parametrize("change", ["rho", "lr", "perturb", "momentum", "nothing"])
@pytest.mark.parametrize("normalize", ["l2", "lr"])
def test_what_is_removed_is_what_was_applied(change: str, normalize: Any) -> None:
    """Any change after step t leaves the true weights of step t where they are."""
    model = network()
    perturbation = msam.Perturbation(direction="momentum", rho=0.5, normalize=normalize)
    opt = msam.PerturbedSGD(model.parameters(), **SGD, perturbation=perturbation)
    for step in range(10):
        train(model, opt, [step])
        before = true_weights(opt)
        shaken(opt, change, step)
        assert furthest(true_weights(opt), before) < 1e-14
        frozen = [p.grad.zero_() for p in model.parameters() if p.grad is not None]  # a step that moves nothing ...
        assert frozen
        lr, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], 0.0
        opt.step()  # ... but takes the perturbation off and puts the next one on
        opt.param_groups[0]["lr"] = lr
        assert furthest(true_weights(opt), before) < 1e-13
