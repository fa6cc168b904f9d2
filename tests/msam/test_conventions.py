"""Other conventions of SAM: closures that clear nothing, gradients that are left, spellings of other packages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam

from .cases import BY_NAME
from .workloads import backward, closure_of, furthest, loss, network, same, snapshot, train

SAMS = ["SAM", "ASAM", "AdamWSAM"]
each_sam = pytest.mark.parametrize("name", SAMS)

# What closures do; each is a function of the model, the optimizer and the step.


def bare(model: nn.Module, opt: Any, step: int) -> Callable[[], Tensor]:
    """The closure of davda54/sam, of pytorch_optimizer and of skorch: it clears nothing."""
    return lambda: backward(loss(model, step))


def in_place(model: nn.Module, opt: Any, step: int) -> Callable[[], Tensor]:
    """Gradients are set to zero, and stay where they are."""

    def closure() -> Tensor:
        opt.zero_grad(set_to_none=False)
        return backward(loss(model, step))

    return closure


def by_model(model: nn.Module, opt: Any, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        return backward(loss(model, step))

    return closure


def late(model: nn.Module, opt: Any, step: int) -> Callable[[], Tensor]:
    """Lightning's order: forward, clear, backward."""

    def closure() -> Tensor:
        value = loss(model, step)
        opt.zero_grad()
        return backward(value)

    return closure


def clipping(closure: Callable[..., Callable[[], Tensor]]) -> Callable[..., Callable[[], Tensor]]:
    def make(model: nn.Module, opt: Any, step: int) -> Callable[[], Tensor]:
        inner = closure(model, opt, step)

        def clipped() -> Tensor:
            value = inner()
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            return value

        return clipped

    return make


# What a loop does before step(closure), and after it.


def nothing(opt: Any, closure: Callable[[], Any]) -> None:
    """Gradients of the step before are left."""


def clear(opt: Any, closure: Callable[[], Any]) -> None:
    opt.zero_grad()


def evaluate(opt: Any, closure: Callable[[], Any]) -> None:
    """davda54/sam: the first gradient is the caller's."""
    closure()


def accumulate(opt: Any, closure: Callable[[], Any]) -> None:
    """Lightning's automatic optimization: the parts before are there, and the last part is the closure's."""
    opt.zero_grad()
    closure()
    closure()


CLEARING = {"None": closure_of, "zeros": in_place, "model": by_model, "late": late, "clipped": clipping(in_place)}
RIGHT = [(name, closure, before) for name, closure in CLEARING.items() for before in (nothing, clear, evaluate)]
RIGHT += [("bare", bare, clear), ("bare, clipped", clipping(bare), clear)]
REFUSED = [
    (name, closure, before)
    for name, closure in (("bare", bare), ("clipped", clipping(bare)))
    for before in (evaluate, accumulate)
]


@each_sam
@pytest.mark.parametrize(
    ("closure", "before"), [row[1:] for row in RIGHT], ids=[f"{row[0]}-{row[2].__name__}" for row in RIGHT]
)
def test_the_step_is_that_of_two_calls(name: str, closure: Any, before: Any) -> None:
    """Against first_step and second_step, with the gradients of each pass alone."""
    model, other = network(norm=False), network(norm=False)
    opt, plain = BY_NAME[name].make(model.parameters()), BY_NAME[name].make(other.parameters())
    for step in range(4):
        before(opt, closure(model, opt, step))
        value = opt.step(closure(model, opt, step))
        assert float(value.detach()) == pytest.approx(float(loss(other, step).detach()))
        plain.zero_grad()
        backward(loss(other, step))
        plain.first_step(zero_grad=True)
        backward(loss(other, step))
        plain.second_step(zero_grad=True)
    assert furthest(model.parameters(), other.parameters()) < 1e-14


@each_sam
@pytest.mark.parametrize(
    ("closure", "before"), [row[1:] for row in REFUSED], ids=[f"{row[0]}-{row[2].__name__}" for row in REFUSED]
)
def test_gradients_that_are_added_to_are_refused(name: str, closure: Any, before: Any) -> None:
    model = network(norm=False)
    opt = BY_NAME[name].make(model.parameters())
    before(opt, bare(model, opt, 0))
    weights, smallest = snapshot(model.parameters()), min(model.parameters(), key=lambda p: p.numel())
    assert smallest.grad is not None
    kept = smallest.grad.clone()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\).*first_step\(\)"):
        opt.step(closure(model, opt, 0))
    assert same(model.parameters(), weights)
    assert torch.equal(smallest.grad, kept)


def test_a_closure_that_fails_leaves_the_gradients() -> None:
    model = network(norm=False)
    opt = BY_NAME["SAM"].make(model.parameters())
    backward(loss(model, 0))
    before = snapshot(p.grad for p in model.parameters() if p.grad is not None)

    def closure() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert same((p.grad for p in model.parameters() if p.grad is not None), before)


def test_parameters_without_elements_and_without_use() -> None:
    """Neither says whether a closure clears."""
    model, other = network(norm=False), network(norm=False)
    empty, unused = nn.Parameter(torch.empty(0).double()), nn.Parameter(torch.ones(1).double())
    opt = BY_NAME["SAM"].make([empty, unused, *model.parameters()])
    plain = BY_NAME["SAM"].make(other.parameters())
    empty.grad, unused.grad = torch.zeros_like(empty), torch.ones_like(unused)
    train(model, opt, range(3), True)
    train(other, plain, range(3), True)
    assert same(model.parameters(), other.parameters())


# Loss scaling with clipping.


def scaled_step(model: nn.Module, opt: Any, scaler: Any, step: int, early: bool, clip: tuple[bool, bool]) -> None:
    """Both of SAM's passes; gradients are unscaled in the first or in the second one, and clipped where asked."""
    for second in (False, True):
        scaler.scale(loss(model, step)).backward()
        if early != second:
            scaler.unscale_(opt)
        if clip[second]:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if not second:
            opt.first_step(zero_grad=True)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


@pytest.mark.parametrize("scale", [16.0, 1024.0, 65536.0])
@pytest.mark.parametrize("clip", [(False, False), (True, False)], ids=str)
@each_sam
def test_unscaling_the_first_gradient_only_is_refused(name: str, clip: tuple[bool, bool], scale: float) -> None:
    model = network(torch.float32, norm=False)
    opt, scaler = BY_NAME[name].make(model.parameters()), torch.amp.GradScaler("cpu", init_scale=scale)
    weights = snapshot(model.parameters())
    with pytest.raises(RuntimeError, match=r"unscale_.*after the second"):
        scaled_step(model, opt, scaler, 0, True, clip)
    assert same(model.parameters(), weights)
    assert not opt.perturbed


@pytest.mark.parametrize("scale", [1.0, 16.0, 65536.0])
@pytest.mark.parametrize("clip", [(False, False), (False, True), (True, True)], ids=str)
@each_sam
def test_unscaling_the_second_gradient_is_right(name: str, clip: tuple[bool, bool], scale: float) -> None:
    """Against no scaler at all; a clipped first gradient is no other step."""
    model, other = network(norm=False), network(norm=False)
    opt, plain = BY_NAME[name].make(model.parameters()), BY_NAME[name].make(other.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(4):
        scaled_step(model, opt, scaler, step, False, clip)
        backward(loss(other, step))
        plain.first_step(zero_grad=True)
        backward(loss(other, step))
        if clip[1]:
            nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        plain.second_step(zero_grad=True)
    assert furthest(model.parameters(), other.parameters()) < 1e-12


# Spellings of other packages.

SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "keyword": lambda ps: msam.SAM(ps, base_optimizer=torch.optim.SGD, lr=0.1),  # type: ignore[call-arg]
    "position": lambda ps: msam.SAM(ps, torch.optim.SGD, lr=0.1, momentum=0.9),  # type: ignore[misc,arg-type]
    "alone": lambda ps: msam.SAM(ps, torch.optim.SGD),  # type: ignore[arg-type]
    "instance": lambda ps: msam.SAM(ps, torch.optim.SGD(ps, lr=0.1)),  # type: ignore[arg-type]
    "instance by keyword": lambda ps: msam.SAM(ps, base_optimizer=torch.optim.SGD(ps, lr=0.1)),  # type: ignore[call-arg]
    "AdamW": lambda ps: msam.SAM(ps, torch.optim.AdamW, lr=1e-3),  # type: ignore[misc,arg-type]
    "AdamW for AdamWSAM": lambda ps: msam.AdamWSAM(ps, torch.optim.AdamW, lr=1e-3),  # type: ignore[misc,arg-type]
    "keyword of AdamWSAM": lambda ps: msam.AdamWSAM(ps, base_optimizer=torch.optim.AdamW),  # type: ignore[call-arg]
    "MSAM": lambda ps: msam.MSAM(ps, torch.optim.SGD, lr=0.1),  # type: ignore[misc,arg-type]
    "AdamWMSAM": lambda ps: msam.AdamWMSAM(ps, base_optimizer=torch.optim.AdamW),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("make", SPELLINGS.values(), ids=SPELLINGS)
def test_a_base_optimizer_gets_one_sentence(make: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"base optimizer.*SAM.*AdamW"):
        make(list(network().parameters()))


def test_constructors_are_still_read_by_tools_and_copied() -> None:
    opt = msam.SAM(network().parameters(), 0.1, 0.2, 0.9)
    group = copy.deepcopy(opt).param_groups[0]
    assert (group["lr"], group["rho"], group["momentum"]) == (0.1, 0.2, 0.9)
