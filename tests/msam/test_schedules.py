"""Strengths that change: which one counts at which step, and that nothing drifts meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import msam
from msam import reference

from .cases import ADAMW, MU, SGD
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


STEPS = 2000
SHAPES = ((119,),)


class Line:
    """Gradients fixed in advance, zero on average: nothing pulls an error back, so every lost digit stays."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w0 = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]
        noise = [torch.randn(STEPS, *s, generator=generator, dtype=torch.float64) for s in SHAPES]
        self.gradients = [n.to(dtype) for n in noise]

    def __call__(self, weights: Any, step: int) -> list[torch.Tensor]:
        return [g[step].to(w.dtype) for g, w in zip(self.gradients, weights, strict=True)]


def walk(
    dtype: torch.dtype, make: Callable[[Any], Any], before: Callable[[Any, int], None] | None = None
) -> tuple[Any, Line]:
    """An optimizer after 2,000 steps along the line."""
    line = Line(dtype)
    weights = [nn.Parameter(w.clone()) for w in line.w0]
    opt = make(weights)
    for step in range(STEPS):
        if before:
            before(opt, step)
        for p, g in zip(weights, line(weights, step), strict=True):
            p.grad = g
        opt.step()
    return opt, line


def rms(weights: Any, exact: Any) -> float:
    """Root mean square error over all weights."""
    gaps = torch.cat([(w.detach().double() - e).flatten() for w, e in zip(weights, exact, strict=True)])
    return float(gaps.square().mean().sqrt())


def strength(t: int) -> float:
    """A ρ that is never twice the same."""
    return 1 + math.sin(t)


def drift(dtype: torch.dtype, base: str, lr: float, **more: Any) -> tuple[float, float]:
    """Error of the true weights after 2,000 steps against float64: ours with ρ changing each step, and torch's own."""
    options: dict[str, Any] = dict(lr=lr, weight_decay=0.0, **({"momentum": MU} if base == "sgd" else {}))

    def set_rho(opt: Any, step: int) -> None:
        opt.param_groups[0]["rho"] = strength(step + 1)

    ours: Any = msam.MSAM if base == "sgd" else msam.AdamWMSAM
    theirs: Any = torch.optim.SGD if base == "sgd" else torch.optim.AdamW
    opt, line = walk(dtype, lambda p: ours(p, rho=0.0, **options, **more), set_rho)
    assert opt.perturbed
    plain, _ = walk(dtype, lambda p: theirs(p, **options))
    twin: dict[str, Any] = dict(base=base, direction="momentum", rho=strength)
    exact = reference.trajectory(line, [w.double() for w in line.w0], STEPS, **twin, **options)[-1].weights
    return rms(true_weights(opt), exact), rms(plain.param_groups[0]["params"], exact)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_no_drift_in_float32(base: str, lr: float) -> None:
    """2,000 roundings of weights near one: no more than a few times what torch's own step loses."""
    ours, plain = drift(torch.float32, base, lr)
    assert ours < 4 * plain + 5e-6


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_no_drift_of_the_fused_step(lr: float) -> None:
    """It never returns to the true weights; at the smaller learning rate ``|c| / lr`` passes 1e4 now and then."""
    ours, plain = drift(torch.float32, "sgd", lr, fused=True)
    assert ours < 4 * plain + 5e-6


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_no_drift_in_bfloat16(base: str, lr: float) -> None:
    """Perturbing adds no error that grows: torch's own step is met up to one rounding of a weight (2⁻⁸ of it)."""
    ours, plain = drift(torch.bfloat16, base, lr)
    assert ours < 1.5 * plain + 2**-8


def test_adding_and_subtracting_drifts_in_bfloat16() -> None:
    """The measurement sees what the default avoids."""
    ours, plain = drift(torch.bfloat16, "sgd", 0.0, restore="subtract")
    assert plain == 0
    assert ours > 4 * 2**-8


@pytest.mark.parametrize("defect", [False, True])
def test_drift_of_removing_with_the_present_rho(defect: bool) -> None:
    """The defect this guards against, written out at learning rate zero: it is found by the same numbers."""
    line = Line(torch.float64)
    w, v = [x.clone() for x in line.w0], [torch.zeros_like(x) for x in line.w0]

    def add(rho: float) -> None:
        norm = torch.cat([x.flatten() for x in v]).norm().clamp(min=1e-30)
        w[:] = [a + rho * b / norm for a, b in zip(w, v, strict=True)]

    for step in range(STEPS):
        add(strength(step + 1) if defect else strength(step))
        v[:] = [MU * b + g for b, g in zip(v, line(w, step), strict=True)]
        add(-strength(step + 1))
    add(strength(STEPS))
    assert (rms(w, line.w0) > 0.1) if defect else (rms(w, line.w0) < 1e-12)
