"""Every optimizer follows its twin, and the comparison would notice if it did not perturb, or the wrong way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import msam

from . import reference
from .cases import (
    ADAMW,
    BY_NAME,
    IMPLEMENTATIONS,
    LR,
    MU,
    NAMED,
    PAIRS,
    RHO,
    SGD,
    SWITCHES,
    Case,
    each_implementation,
    general,
    pairwise,
    torch_twin,
)
from .workloads import (
    Twin,
    assert_network,
    backward,
    closure_of,
    furthest,
    hide,
    loss,
    missing,
    network,
    same,
    snapshot,
    train,
    true_weights,
)

TOL = 1e-10
each_case = pytest.mark.parametrize("case", NAMED + PAIRS, ids=lambda case: case.name)
each_named = pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)


def follow(case: Case, steps: int, **change: Any) -> tuple[Twin, list[reference.State]]:
    """The twin's trajectory from the network's weights."""
    twin = Twin(network())
    return twin, reference.trajectory(twin, twin.weights, steps, **{**case.twin, **change})


def check_stored(case: Case, stored: list[list[torch.Tensor]], states: list[reference.State]) -> None:
    """The stored weights are ``w + ε`` for perturbations that live between steps, ``w`` for the others."""
    for t, tensors in enumerate(stored):
        w = states[t].weights
        if case.between:
            w = [a + e for a, e in zip(w, states[t + 1].buffers["displacement"], strict=True)]
        assert furthest(tensors, w) < TOL


def test_every_pair_of_switches_occurs() -> None:
    names = ("base", "direction", "normalize", "scale", "sign", "weight_decay_at")
    rows = [tuple(case.twin[name] for name in names) for case in PAIRS]
    for (i, some), (j, others) in itertools.combinations(enumerate(SWITCHES), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(some, others))


@each_case
def test_follows_the_twin(case: Case) -> None:
    model, steps = network(), 12
    opt = case.make(model.parameters())
    _, states = follow(case, steps + 1)
    stored = train(model, opt, range(steps), case.closure)
    check_stored(case, stored, states)
    twin, states = follow(case, steps)
    assert_network(model, opt, states[-1].weights, twin, TOL)
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        if name in states[-1].buffers:
            held = [opt.state[p][name] for p in model.parameters()]
            assert furthest(held, states[-1].buffers[name]) < TOL


@each_case
def test_twin_tells_no_perturbation_and_the_wrong_sign_apart(case: Case) -> None:
    _, states = follow(case, 12)
    for change in (dict(rho=0.0), dict(sign=-case.twin.get("sign", 1))):
        _, others = follow(case, 12, **change)
        assert furthest(states[-1].weights, others[-1].weights) > 1e5 * TOL


@each_named
def test_no_perturbation_and_the_wrong_sign_leave_the_twin(case: Case) -> None:
    _, states = follow(case, 12)
    for switch in (dict(rho=0.0), dict(rho=case.twin["rho"], sign=-1)):
        keys = ("direction", "normalize", "scale")
        perturbation = {k: case.twin[k] for k in keys if k in case.twin}
        at = case.twin.get("weight_decay_at", "true")
        wrong = general(case.twin.get("base", "sgd"), {**perturbation, **switch}, weight_decay_at=at)
        model = network()
        opt = wrong.make(model.parameters())
        train(model, opt, range(12), case.closure)
        assert furthest(true_weights(opt), states[-1].weights) > 1e5 * TOL


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_msam_is_algorithm_1_over_200_steps(rho: float) -> None:
    model, twin, other = network(), Twin(network()), Twin(network())
    options: dict[str, Any] = dict(**SGD, rho=rho)
    opt = msam.MSAM(model.parameters(), **options)
    stored = train(model, opt, range(200))
    states = reference.algorithm1(twin, twin.weights, 200, **options)
    assert max(furthest(a, s.weights) for a, s in zip(stored[:-1], states[:-1], strict=True)) < TOL
    assert (
        furthest([opt.state[p]["momentum_buffer"] for p in model.parameters()], states[-1].buffers["momentum_buffer"])
        < TOL
    )
    assert_network(model, opt, states[-1].weights, twin, TOL)
    definition = reference.trajectory(other, other.weights, 200, direction="momentum", **options)
    assert furthest(definition[-1].weights, states[-1].weights) < TOL / 100  # the problem does not magnify rounding


@each_named
def test_follows_the_twin_over_200_steps(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    twin, states = follow(case, 200)
    train(model, opt, range(200), case.closure)
    assert_network(model, opt, states[-1].weights, twin, TOL)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("maximize", [False, True])
def test_nag_is_torch_nesterov_at_every_step(weight_decay: float, maximize: bool) -> None:
    ours, theirs = network(), network()
    options: dict[str, Any] = dict(
        lr=0.01 if maximize else LR, momentum=MU, weight_decay=weight_decay, maximize=maximize
    )
    stored = train(ours, msam.NAG(ours.parameters(), **options), range(200))
    expected = train(theirs, torch.optim.SGD(theirs.parameters(), nesterov=True, **options), range(200))
    assert max(furthest(a, b) for a, b in zip(stored, expected, strict=True)) < TOL
    assert furthest(ours.buffers(), theirs.buffers()) < TOL


def test_nag_is_told_apart_from_torch_sgd() -> None:
    ours, theirs = network(), network()
    train(ours, msam.NAG(ours.parameters(), **SGD), range(12))
    train(theirs, torch.optim.SGD(theirs.parameters(), **SGD), range(12))
    assert furthest(ours.parameters(), theirs.parameters()) > 1e5 * TOL


def sam_by_hand(model: torch.nn.Module, rho: float, steps: int) -> None:
    """SAM's two gradients around torch's own SGD; statistics of the first pass."""
    opt = torch.optim.SGD(model.parameters(), **SGD)
    for step in range(steps):
        closure_of(model, opt, step)()
        collected = snapshot(model.buffers())
        parameters = list(model.parameters())
        w = snapshot(parameters)
        norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
        with torch.no_grad():
            for p in parameters:
                assert p.grad is not None
                p.add_(p.grad, alpha=rho / float(norm))
        closure_of(model, opt, step)()
        with torch.no_grad():
            for tensor, value in zip([*parameters, *model.buffers()], [*w, *collected], strict=True):
                tensor.copy_(value)
        opt.step()


def test_sam_is_its_two_gradients_with_closures() -> None:
    ours, theirs = network(), network()
    train(ours, msam.SAM(ours.parameters(), rho=0.3, **SGD), range(60), closure=True)
    sam_by_hand(theirs, 0.3, 60)
    assert furthest(ours.parameters(), theirs.parameters()) < TOL
    assert furthest(ours.buffers(), theirs.buffers()) < TOL


@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("SAM", "ASAM", "AdamWSAM")], ids=lambda case: case.name)
@pytest.mark.parametrize("zero_grad", [True, False])
def test_first_and_second_step_are_the_closure_form(case: Case, zero_grad: bool) -> None:
    model, other = network(), network()
    opt = case.make(model.parameters())
    train(other, case.make(other.parameters()), range(20), closure=True)
    for step in range(20):
        backward(loss(model, step))
        opt.first_step(zero_grad=zero_grad)
        if not zero_grad:
            opt.zero_grad()
        with msam.frozen_batchnorm_statistics(model):
            backward(loss(model, step))
        opt.second_step(zero_grad=zero_grad)
        if not zero_grad:
            opt.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert same(model.parameters(), other.parameters())
    assert same(model.buffers(), other.buffers())


def test_step_of_sam_returns_the_first_loss() -> None:
    model = network()
    opt = BY_NAME["SAM"].make(model.parameters())
    for step in range(4):
        expected = loss(model, step).detach()  # collects statistics, which training mode does not read
        assert torch.equal(opt.step(closure_of(model, opt, step)).detach(), expected)


ZERO: list[tuple[str, dict[str, Any]]] = [
    ("MSAM", {}),
    ("MSAM", dict(dampening=0.3)),
    ("MSAM", dict(maximize=True)),
    ("SAM", {}),
    ("SAM", dict(adaptive=True)),
    ("NAG", {}),
    ("AdamWMSAM", {}),
    ("AdamWMSAM", dict(maximize=True)),
    ("AdamWSAM", {}),
]


@pytest.mark.parametrize(
    ("row", "how", "dtype"), pairwise(ZERO, IMPLEMENTATIONS, (torch.float32, torch.float64)), ids=str
)
def test_rho_zero_is_torch_to_the_bit(row: tuple[str, dict[str, Any]], how: dict[str, Any], dtype: torch.dtype) -> None:
    name, more = row
    case = BY_NAME[name]
    base = case.twin.get("base", "sgd")
    same_in_torch = {k: v for k, v in more.items() if k != "adaptive"}
    ours, theirs = network(dtype), network(dtype)
    if name == "NAG":
        opt = msam.PerturbedSGD(
            ours.parameters(), **SGD, **how, perturbation=rho_zero(direction="momentum", normalize="lr")
        )
    else:
        opt = case.make(ours.parameters(), **more, **how, rho=0.0)
    other = torch_twin(base)(theirs.parameters(), **same_in_torch, **how)
    compare_to_the_bit(ours, opt, theirs, other, case.closure)


def rho_zero(**switches: Any) -> Any:
    return msam.Perturbation(rho=0.0, **switches)


NOTHING: list[dict[str, Any] | None] = [
    None,
    *(dict(direction=d) for d in ("momentum", "gradient", "last_gradient", "random")),
]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("switches", NOTHING, ids=str)
def test_no_perturbation_is_torch_to_the_bit(base: str, switches: dict[str, Any] | None) -> None:
    ours, theirs = network(torch.float32), network(torch.float32)
    perturbation = None if switches is None else rho_zero(**switches)
    cls: Any = msam.PerturbedSGD if base == "sgd" else msam.PerturbedAdamW
    options = {k: v for k, v in torch_twin(base)(theirs.parameters()).defaults.items() if k in PASSED}
    opt = cls(ours.parameters(), **options, perturbation=perturbation)
    gradient = switches is not None and switches["direction"] == "gradient"
    compare_to_the_bit(ours, opt, theirs, torch_twin(base)(theirs.parameters()), gradient)


PASSED = ("lr", "momentum", "betas", "eps", "weight_decay")


def compare_to_the_bit(ours: Any, opt: Any, theirs: Any, other: Any, closure: bool) -> None:
    stored, expected = train(ours, opt, range(25), closure), train(theirs, other, range(25))
    assert all(same(a, b) for a, b in zip(stored, expected, strict=True))
    assert same(true_weights(opt), expected[-1])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        held = {k: v for k, v in opt.state[p].items() if isinstance(v, torch.Tensor) and k in other.state[q]}
        assert held.keys() == {k for k, v in other.state[q].items() if v is not None}
        assert all(torch.equal(v, other.state[q][k]) for k, v in held.items())
    assert same(ours.buffers(), theirs.buffers())


@each_case
def test_gradients_missing_in_some_steps(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(10), case.closure, after_backward=hide)
    twin = Twin(network(), edit=missing)
    states = reference.trajectory(twin, twin.weights, 10, **case.twin)
    assert_network(model, opt, states[-1].weights, twin, TOL)


@pytest.mark.parametrize("hidden", [{0: 1}, {1: 1}, {0: 1, 1: 0}, {0: 0, 1: 0}], ids=str)
def test_second_pass_with_other_gradients(hidden: dict[int, int]) -> None:
    """``hidden[pass] = tensor``: which tensor has no gradient in which of SAM's passes."""
    model = network()
    opt = BY_NAME["SAM"].make(model.parameters())

    def edit(gradients: list[Any], step: int, call: int) -> list[Any]:
        return [None if hidden.get(call) == i else g for i, g in enumerate(gradients)]

    def one_pass(step: int, call: int) -> None:
        closure_of(model, opt, step)()
        if call in hidden:
            list(model.parameters())[hidden[call]].grad = None

    for step in range(10):
        one_pass(step, 0)
        opt.first_step()
        with msam.frozen_batchnorm_statistics(model):
            one_pass(step, 1)
        opt.second_step()
    twin = Twin(network(), edit)
    states = reference.trajectory(twin, twin.weights, 10, **BY_NAME["SAM"].twin)
    assert_network(model, opt, states[-1].weights, twin, TOL)


@each_case
def test_maximize_is_minimising_the_negative(case: Case) -> None:
    model, other = network(), network()
    opt, negated = case.make(model.parameters(), maximize=True), case.make(other.parameters())
    train(model, opt, range(5), case.closure)
    train(other, negated, range(5), case.closure, after_backward=negate)
    assert furthest(true_weights(opt), true_weights(negated)) < TOL


def negate(model: torch.nn.Module, step: int) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.neg_()


@each_implementation
@each_named
def test_every_implementation_follows_the_twin(case: Case, how: dict[str, Any]) -> None:
    model = network()
    opt = case.make(model.parameters(), **how)
    twin, states = follow(case, 12)
    train(model, opt, range(12), case.closure)
    assert_network(model, opt, states[-1].weights, twin, TOL)


@pytest.mark.parametrize("restore", ["auto", "subtract", "copy"])
@pytest.mark.parametrize("case", [case for case in NAMED if case.between], ids=lambda case: case.name)
def test_every_way_back_to_the_true_weights_follows_the_twin(case: Case, restore: str) -> None:
    model = network()
    opt = case.make(model.parameters(), restore=restore)
    twin, states = follow(case, 12)
    train(model, opt, range(12), case.closure)
    assert_network(model, opt, states[-1].weights, twin, TOL)


@each_implementation
@pytest.mark.parametrize("name", ["AdamWMSAM", "AdamWSAM"])
def test_decay_of_the_updated_weights(name: str, how: dict[str, Any]) -> None:
    """(1 − η λ) times the weights after the step, as the paper's authors have it for AdamW, written out in float64."""
    case = BY_NAME[name]
    model = network()
    opt = case.make(model.parameters(), weight_decay_at="updated", **how)
    train(model, opt, range(8), case.closure)
    twin = Twin(network())
    weights: list[Any] = [w.clone() for w in twin.weights]
    (beta1, beta2), lr, decay, eps = ADAMW["betas"], ADAMW["lr"], ADAMW["weight_decay"], ADAMW["eps"]
    first: list[Any] = [torch.zeros_like(w) for w in weights]
    second: list[Any] = [torch.zeros_like(w) for w in weights]
    for step in range(8):
        sign, along = (1, twin(weights, step)) if case.closure else (-1, first)
        norm = sum(float(d.square().sum()) for d in along if d is not None) ** 0.5
        at = [w + sign * RHO * d / norm if norm else w for w, d in zip(weights, along, strict=True)]
        for i, g in enumerate(twin(at, step)):
            assert g is not None
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g.square()
            bias1, bias2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
            move = lr * (first[i] / bias1) / ((second[i] / bias2).sqrt() + eps)
            weights[i] = (1 - lr * decay) * (weights[i] - move)
    assert_network(model, opt, weights, twin)
