"""The edge of stability on quadratics: just inside stays, just outside grows; and what running optimizers do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import msam
import msam_analysis as ma

INSIDE, OUTSIDE = 0.99, 1.01
STEPS = 4000


def simulated(curvature: float, rule: dict[str, float]) -> float:
    """How much a step's recurrence grows or shrinks the weight in the long run, by iterating it: log of the size."""
    lr, momentum = rule["lr"], rule["momentum"]
    w, v, log = 1.0, 0.0, 0.0
    for _ in range(STEPS):
        seen = w - rule.get("lookahead", 0.0) * v
        gradient = curvature * seen
        gradient = curvature * (seen + rule.get("ascent", 0.0) * gradient)
        gradient += rule.get("weight_decay", 0.0) * (seen if rule.get("decays_ahead") else w)
        v = momentum * v + (1 - rule.get("dampening", 0.0)) * gradient
        w -= lr * v
        size = max(abs(w), abs(v) * lr, 1e-300)
        w, v, log = w / size, v / size, log + math.log(size)
    return log


rules = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 1.0),
        "momentum": st.floats(0.0, 0.98),
        "dampening": st.sampled_from([0.0, 0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 1e-3]),
    }
)


def check(rule: dict[str, Any]) -> None:
    edge = ma.stability_edge(**rule)
    assert 0 < edge < math.inf
    assert simulated(INSIDE * edge, rule) < 0
    assert simulated(OUTSIDE * edge, rule) > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules, st.floats(0.0, 10.0), st.booleans())
def test_lookahead(rule: dict[str, Any], times: float, ahead: bool) -> None:
    check(rule | {"lookahead": times * rule["lr"], "decays_ahead": ahead})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules, st.floats(0.01, 5.0), st.booleans())
def test_lookahead_backwards(rule: dict[str, Any], times: float, ahead: bool) -> None:
    check(rule | {"lookahead": -times * rule["lr"], "decays_ahead": ahead})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules, st.floats(1e-4, 10.0))
def test_ascent(rule: dict[str, Any], times: float) -> None:
    check(rule | {"ascent": times * rule["lr"]})


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rules)
def test_neither(rule: dict[str, Any]) -> None:
    check(rule)


def test_closed_forms() -> None:
    assert ma.stability_edge(0.1) == pytest.approx(20)
    assert ma.stability_edge(0.1, 0.9) == pytest.approx(38)
    assert ma.stability_edge(0.1, 0.9, lookahead=0.09) == pytest.approx(3.8 / (0.1 * 2.8))
    assert ma.stability_edge(0.1, 0.9, dampening=0.9) == pytest.approx(380)
    level = ma.stability_edge(0.1, 0.9, ascent=0.3)
    assert level + 0.3 * level**2 == pytest.approx(38)
    assert ma.stability_edge(0.1, 0.9, ascent=-1.0) == math.inf  # a step down that is long enough never climbs
    assert ma.stability_edge(0.1, 0.0, lookahead=-0.2) == pytest.approx(5)


class Bowl(nn.Module):
    """A quadratic with given curvatures, far from its minimum in every direction."""

    def __init__(self, curvatures: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 0.5 * (self.curvatures * self.w.square()).sum() * x.mean()
        return out


DATA = [(torch.ones(1, dtype=torch.float64),)]


def value(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch[0])
    return out


def perturbed(name: str, rho: float, **options: Any) -> Callable[[Any], Any]:
    return lambda p: msam.PerturbedSGD(p, 0.1, 0.6, perturbation=msam.PRESETS[name](rho), **options)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9),
    "dampened, decayed": lambda p: torch.optim.SGD(p, 0.1, 0.7, dampening=0.3, weight_decay=0.2),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.1, 0.8, nesterov=True, weight_decay=0.2),
    "NAG": lambda p: msam.NAG(p, 0.1, 0.8, weight_decay=0.2),
    "without normalisation": perturbed("msam_unnormalized", 0.05, weight_decay=0.2),
    "without normalisation, decay ahead": perturbed(
        "msam_unnormalized", 0.05, weight_decay=0.2, weight_decay_at="perturbed"
    ),
    "by the learning rate": perturbed("msam_lr", 0.8),
    "away": lambda p: msam.PerturbedSGD(
        p, 0.1, 0.6, perturbation=msam.Perturbation(direction="momentum", rho=0.05, normalize="none", sign=-1)
    ),
    "climbing": lambda p: msam.PerturbedSGD(
        p, 0.1, 0.6, perturbation=msam.Perturbation(direction="gradient", rho=0.05, normalize="none")
    ),
}


def trained(name: str, curvature: float, steps: int = 1500) -> float:
    """How far a weight is after training on one curvature, from 1; negative: it shrank."""
    model = Bowl([curvature])
    optimizer = OPTIMIZERS[name](model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value(model, DATA[0])
        loss.backward()
        return loss

    climbs = getattr(getattr(optimizer, "perturbation", None), "direction", "") == "gradient"
    for _ in range(steps):
        if climbs:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if not 1e-30 < abs(float(model.w.detach())) < 1e30:
            break
    return math.log(abs(float(model.w.detach())) + 1e-300)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_running_optimizers(name: str) -> None:
    model = Bowl([1.0])
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        value(model, DATA[0]).backward()
        if name != "climbing":
            optimizer.step()
    edge = ma.edge_of_stability(optimizer)
    assert edge.quantity == "edge of stability, Hessian"
    assert trained(name, 0.97 * edge) < 0 < trained(name, 1.03 * edge)


@pytest.mark.parametrize(("make", "share"), [
    (lambda p: msam.MSAM(p, 0.1, momentum=0.9, rho=0.3), "momentum"),
    (lambda p: msam.SAM(p, 0.1, momentum=0.9, rho=0.3), "gradient"),
])  # fmt: skip
def test_normalised_displacements_are_those_of_the_step(make: Callable[[Any], Any], share: str) -> None:
    model = Bowl([3.0, 1.0])
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value(model, DATA[0])
        loss.backward()
        return loss

    for _ in range(3):
        if share == "gradient":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    optimizer.zero_grad()
    if share == "gradient":
        assert math.isnan(ma.edge_of_stability(optimizer))
        value(model, DATA[0]).backward()
        level = float(ma.edge_of_stability(optimizer))
        assert level + level**2 * 0.3 / float(model.w.grad.norm()) == pytest.approx(38)  # type: ignore[union-attr]
    else:
        norm = float(optimizer.state[model.w]["momentum_buffer"].norm())
        assert float(ma.edge_of_stability(optimizer)) == pytest.approx(3.8 / (0.1 + 0.6 / norm))


def test_before_the_first_step_msam_is_sgd() -> None:
    model = Bowl([1.0])
    assert float(ma.edge_of_stability(msam.MSAM(model.parameters(), 0.1, momentum=0.9, rho=0.3))) == pytest.approx(38)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_adam_family_is_preconditioned(kind: Any) -> None:
    model = Bowl([4.0, 1.0])
    optimizer = kind(model.parameters(), lr=0.01, betas=(0.9, 0.99))
    probe = ma.probes.EdgeOfStability(ma.Objective(model, value, DATA, examine=False))
    first = probe(optimizer, 0)
    assert math.isnan(first["edge_ratio"])
    assert first["edge"] == pytest.approx(2 * 1.9 / (0.1 * 0.01))
    squares = torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        value(model, DATA[0]).backward()
        squares = 0.99 * squares + 0.01 * model.w.grad.square()  # type: ignore[union-attr]
        optimizer.step()
    divided = (squares / (1 - 0.99**5)).sqrt() + 1e-8
    assert probe(optimizer, 5)["edge_lambda"] == pytest.approx(float((model.curvatures / divided).max()), rel=1e-6)


def test_adam_leaves_its_edge() -> None:
    """Steps whose preconditioner stands still grow just beyond the edge and shrink just inside."""
    for factor, grows in ((0.97, False), (1.03, True)):
        p, lr, beta = 2.0, 0.01, 0.9
        curvature = factor * p * ma.stability_edge(lr, beta, dampening=beta)
        w, m = 1.0, 0.0
        for _ in range(1500):
            m = beta * m + (1 - beta) * curvature * w
            w -= lr * m / p
        assert (abs(w) > 1) == grows


def test_probe_in_training() -> None:
    model = Bowl([3.0, 1.0])
    optimizer = msam.MSAM(model.parameters(), 0.01, momentum=0.9, rho=0.3)
    objective = ma.Objective(model, value, DATA, examine=False)
    with ma.Monitor(optimizer, [ma.probes.EdgeOfStability(objective)], every=1) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            value(model, DATA[0]).backward()
            optimizer.step()
    frame = monitor.frame()
    np.testing.assert_allclose(frame["edge_lambda"], 3.0, rtol=1e-8)
    np.testing.assert_allclose(frame["edge_ratio"], 3.0 / frame["edge"])
    assert frame["edge"].iloc[0] == pytest.approx(380)
    assert frame["edge"].iloc[1] < 100
    probe, other = ma.probes.EdgeOfStability(objective), ma.probes.EdgeOfStability(objective)
    probe(optimizer, 0)
    other.load_state_dict(probe.state_dict())
    assert torch.equal(other.state_dict()["start"], probe.state_dict()["start"])


def groups(optimizer: Any) -> Any:
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.4})
    return optimizer


W = [nn.Parameter(torch.ones(2))]
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "lr": (lambda: ma.stability_edge(0.0), "lr must be a positive number, got 0.0"),
    "momentum": (lambda: ma.stability_edge(0.1, 1.0), "momentum must be at least 0 and below 1, got 1.0"),
    "dampening": (lambda: ma.stability_edge(0.1, dampening=1.0), "dampening must be below 1"),
    "decay": (lambda: ma.stability_edge(0.1, weight_decay=-1.0), "weight_decay must be a number of at least 0"),
    "nan": (lambda: ma.stability_edge(0.1, lookahead=math.nan), "lookahead must be a number, got nan"),
    "infinite": (lambda: ma.stability_edge(0.1, ascent=math.inf), "ascent must be a number, got inf"),
    "both": (lambda: ma.stability_edge(0.1, lookahead=1.0, ascent=2.0), "lookahead or ascent, got 1.0 and 2.0"),
    "other": (lambda: ma.edge_of_stability(torch.optim.Adagrad(W)), "no edge is known for Adagrad: expected SGD"),
    "AdamW": (lambda: ma.edge_of_stability(msam.AdamWMSAM(W)), "no edge is known for AdamWMSAM with a displacement"),
    "scaled": (
        lambda: ma.edge_of_stability(msam.SAM(W, 0.1, momentum=0.9, rho=1.0, adaptive=True)),
        "scaled by the weights or of some parameters only",
    ),
    "random": (
        lambda: ma.edge_of_stability(msam.PerturbedSGD(W, 0.1, 0.9, perturbation=msam.PRESETS["random"](1.0))),
        "no edge is known for a displacement along 'random'",
    ),
    "groups": (
        lambda: ma.edge_of_stability(groups(torch.optim.SGD(W))),
        r"groups of the optimizer have different edges \(5, 10\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name: str) -> None:
    ask, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ask()
