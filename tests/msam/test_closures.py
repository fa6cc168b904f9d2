"""Closures as people write them: an exact step of SAM, computed by hand in float64, or a refusal in one sentence.

Two gradients are exact only if the second is not added to the first. An optimizer may clear between the two; but where
gradients were there before a closure that does not clear, the second pass lacks what made them, and no step is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam

from . import reference
from .cases import ADAMW, BY_NAME, RHO, SGD, Case, general
from .workloads import Twin, assert_network, backward, furthest, loss, network, same, snapshot, train, true_weights

STEPS = 5
TWO = [
    BY_NAME["SAM"],
    BY_NAME["ASAM"],
    BY_NAME["AdamWSAM"],
    general("sgd", dict(direction="gradient", rho=0.1, normalize="none")),  # this one sees a gradient twice as long
    general("adamw", dict(direction="gradient", rho=9.0, normalize="lr")),
]
ONE = [
    BY_NAME["MSAM"],
    BY_NAME["NAG"],
    BY_NAME["AdamWMSAM"],
    general("sgd", dict(direction="last_gradient", rho=RHO)),
]
each_two = pytest.mark.parametrize("case", TWO, ids=lambda case: case.name)
each_one = pytest.mark.parametrize("case", ONE, ids=lambda case: case.name)
each_case = pytest.mark.parametrize("case", [*TWO, *ONE], ids=lambda case: case.name)


def exact(case: Case, steps: int = STEPS, edit: Any = None, parts: int = 1) -> tuple[Twin, list[Tensor]]:
    """The twin after some steps, and its weights."""
    twin = Twin(network(), edit, parts)
    return twin, reference.trajectory(twin, twin.weights, steps, **case.twin)[-1].weights


def is_a_sentence(text: str) -> bool:
    """One line that names what was expected."""
    return "\n" not in text and ("closure" in text or "gradient" in text or "clear" in text)


def exact_or_refused(
    case: Case, step: Callable[[nn.Module, Any, int], Any], start: Callable[[Any], None] | None = None
) -> None:
    """Steps of a network; at a refusal, the weights are those of before and stand nowhere else."""
    model = network()
    opt = case.make(model.parameters())
    if start:
        start(model)
    for number in range(STEPS):
        before = true_weights(opt)
        try:
            step(model, opt, number)
        except RuntimeError as refusal:
            if not is_a_sentence(str(refusal)):
                raise
            gap = furthest(true_weights(opt), before)
            assert gap < 1e-14
            assert opt.perturbed == (case.between and number > 0)
            return
    twin, weights = exact(case)
    assert_network(model, opt, weights, twin)


def stale(model: nn.Module) -> None:
    """Gradients of something else are there: of a validation, of a penalty, of another optimizer's loss."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)


def zeros(model: nn.Module) -> None:
    """Gradients are there and zero, as after ``zero_grad(set_to_none=False)``."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


# --------------------------------------------------------------------------------------- closures that clear, each way


def by_optimizer(model: nn.Module, opt: Any) -> None:
    opt.zero_grad()


def by_optimizer_to_zero(model: nn.Module, opt: Any) -> None:
    opt.zero_grad(set_to_none=False)


def by_model(model: nn.Module, opt: Any) -> None:
    model.zero_grad()


def by_model_to_zero(model: nn.Module, opt: Any) -> None:
    model.zero_grad(set_to_none=False)


def by_hand(model: nn.Module, opt: Any) -> None:
    for p in model.parameters():
        p.grad = None


@torch.no_grad()
def by_hand_to_zero(model: nn.Module, opt: Any) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.detach_().zero_()


CLEARS = [by_optimizer, by_optimizer_to_zero, by_model, by_model_to_zero, by_hand, by_hand_to_zero]


@pytest.mark.parametrize("there", [None, stale, zeros], ids=["nothing", "stale", "zeros"])
@pytest.mark.parametrize("clear", CLEARS, ids=lambda clear: clear.__name__)
@each_case
def test_a_closure_that_clears_is_exact(case: Case, clear: Any, there: Any) -> None:
    """Whatever was there before: the optimizer may not refuse what is right."""
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        if there:
            there(model)

        def closure(step: int = step) -> Tensor:
            clear(model, opt)
            return backward(loss(model, step))

        opt.step(closure)
    twin, weights = exact(case)
    assert_network(model, opt, weights, twin)


@pytest.mark.parametrize("there", [None, stale], ids=["nothing", "stale"])
@each_case
def test_a_closure_that_sets_gradients_is_exact(case: Case, there: Any) -> None:
    """By ``torch.autograd.grad``: nothing is cleared, and nothing is added."""
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        if there:
            there(model)

        def closure(step: int = step) -> Tensor:
            value = loss(model, step)
            gradients = torch.autograd.grad(value, list(model.parameters()))
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g
            return value.detach()

        opt.step(closure)
    twin, weights = exact(case)
    assert_network(model, opt, weights, twin)


@each_case
def test_a_closure_that_accumulates_by_itself_is_exact(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        stale(model)

        def closure(step: int = step) -> Tensor:
            opt.zero_grad()
            return torch.stack([backward(loss(model, 3 * step + part) / 3).detach() for part in range(3)]).sum()

        opt.step(closure)
    twin, weights = exact(case, parts=3)
    assert_network(model, opt, weights, twin)


@each_case
def test_skorch(case: Case) -> None:
    """Its ``train_step``: a closure that clears, evaluates, and keeps what it found for its records."""
    model, steps = network(), []
    opt = case.make(model.parameters())
    for number in range(STEPS):

        def step_fn(number: int = number) -> Tensor:
            opt.zero_grad(set_to_none=True)
            value = loss(model, number)
            value.backward()
            steps.append({"loss": value, "batch": number})
            return steps[-1]["loss"]  # type: ignore[return-value]

        opt.step(step_fn)
    twin, weights = exact(case)
    assert_network(model, opt, weights, twin)
    assert len(steps) == STEPS * (1 + case.closure)


# ------------------------------------------------------------------------------------------- closures that do not clear


def without_clearing(model: nn.Module, step: int) -> Callable[[], Tensor]:
    return lambda: backward(loss(model, step))


def cleared_before(model: nn.Module, opt: Any, step: int) -> None:
    opt.zero_grad()
    opt.step(without_clearing(model, step))


def cleared_to_zero_before(model: nn.Module, opt: Any, step: int) -> None:
    opt.zero_grad(set_to_none=False)
    opt.step(without_clearing(model, step))


def cleared_after(model: nn.Module, opt: Any, step: int) -> None:
    opt.step(without_clearing(model, step))
    opt.zero_grad()


@pytest.mark.parametrize("order", [cleared_before, cleared_to_zero_before, cleared_after], ids=lambda o: o.__name__)
@each_case
def test_cleared_outside_of_the_closure(case: Case, order: Any) -> None:
    """As PyTorch's loops do it; with one gradient a step it is exact, and may not be refused."""
    if case.closure:
        exact_or_refused(case, order)
        return
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        order(model, opt, step)
    twin, weights = exact(case)
    assert_network(model, opt, weights, twin)


@each_two
def test_davda54_and_pytorch_optimizer(case: Case) -> None:
    """Their loop: the first backward by hand, and a closure that makes the second pass and does not clear."""

    def step(model: nn.Module, opt: Any, number: int) -> None:
        backward(loss(model, number))
        with_frozen = without_clearing(model, number)
        with msam.frozen_batchnorm_statistics(model):
            opt.step(with_frozen)
        opt.zero_grad()

    exact_or_refused(case, step)


@each_two
def test_davda54_in_two_calls(case: Case) -> None:
    """The other loop of the same page, as it stands there."""
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        backward(loss(model, step))
        opt.first_step(zero_grad=True)
        with msam.frozen_batchnorm_statistics(model):
            backward(loss(model, step))
        opt.second_step(zero_grad=True)
    twin, weights = exact(case)
    assert_network(model, opt, weights, twin)


@each_two
def test_stale_gradients_and_a_closure_that_does_not_clear(case: Case) -> None:
    """They would be part of both gradients: right is a refusal, or a step that does not know of them."""

    def step(model: nn.Module, opt: Any, number: int) -> None:
        stale(model)
        opt.step(without_clearing(model, number))

    exact_or_refused(case, step)


@each_one
def test_gradients_that_are_there_are_added_to(case: Case) -> None:
    """With one gradient a step, as torch's own: whoever does not clear accumulates."""
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        opt.zero_grad()
        backward(loss(model, 2 * step) / 2)
        opt.step(lambda step=step: backward(loss(model, 2 * step + 1) / 2))
    twin, weights = exact(case, parts=2)
    assert_network(model, opt, weights, twin)


# ------------------------------------------------------------------------------------------------------------ Lightning


def lightning(model: nn.Module, opt: Any, parts: int, step: int) -> Iterator[Callable[[], Tensor]]:
    """What its loop runs for every mini-batch: forward, clearing at the first of a step, backward."""
    for part in range(parts):

        def closure(part: int = part) -> Tensor:
            value = loss(model, parts * step + part) / parts
            if part == 0:
                opt.zero_grad()
            return backward(value)

        yield closure


def lightning_step(model: nn.Module, opt: Any, parts: int, step: int) -> None:
    *before, last = lightning(model, opt, parts, step)
    for closure in before:
        closure()
    opt.step(last)


@each_case
def test_lightning(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        lightning_step(model, opt, 1, step)
    twin, weights = exact(case)
    assert_network(model, opt, weights, twin)


@each_one
def test_lightning_accumulates(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    for step in range(STEPS):
        lightning_step(model, opt, 3, step)
    twin, weights = exact(case, parts=3)
    assert_network(model, opt, weights, twin)


@each_two
def test_lightning_accumulates_for_sam(case: Case) -> None:
    """The last mini-batch's closure knows nothing of the others: no exact step exists, and none is taken."""
    model = network()
    opt = case.make(model.parameters())
    before = snapshot(model.parameters())
    with pytest.raises(RuntimeError, match=r"(?i)accumulat|clear") as refusal:
        lightning_step(model, opt, 3, 0)
    assert is_a_sentence(str(refusal.value))
    assert same(model.parameters(), before)
    assert not opt.perturbed
    opt.zero_grad()
    for step in range(STEPS):  # and in two calls it goes
        for closure in lightning(model, opt, 3, step):
            closure()
        opt.first_step()
        with msam.frozen_batchnorm_statistics(model):
            for closure in lightning(model, opt, 3, step):
                closure()
        opt.second_step()
    gap = furthest(true_weights(opt), exact(case, parts=3)[1])
    assert gap < 1e-10


# ----------------------------------------------------------------------------------------------------- what it returns


@each_case
def test_the_loss_returned_is_that_of_the_first_pass(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(2), case.closure)
    found = []

    def closure() -> Tensor:
        opt.zero_grad()
        found.append(backward(loss(model, 2)).detach().clone())
        return found[-1]

    value = opt.step(closure)
    assert torch.equal(value, found[0])
    if case.closure:
        assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_the_twin_of_closures_is_torch(cls: Any) -> None:
    """At ρ = 0 a closure that does not clear is what it is for torch: the sum of the gradients."""
    model, other = network(), network()
    name, options = ("PerturbedSGD", SGD) if cls is torch.optim.SGD else ("PerturbedAdamW", ADAMW)
    opt, plain = getattr(msam, name)(model.parameters(), **options), cls(other.parameters(), **options)
    for step in range(STEPS):
        for net, optimizer in ((model, opt), (other, plain)):
            stale(net)
            optimizer.step(without_clearing(net, step))
    assert same(model.parameters(), other.parameters())
