"""What torch's own tests ask of a step: missing gradients, modes of autograd, closures, loss scaling, reproducibility.

Opt-in: ``MSAM_INTEGRATIONS=1 python -m pytest tests/integrations``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .optimizers import (
    CLASSES,
    Ours,
    at_rest,
    closure_of,
    each_class,
    each_implementation,
    every_kind,
    furthest,
    give,
    opt_in,
    options_of,
    ordinary,
    plain_step,
    same,
    step,
    true_weights,
    values,
)

pytestmark = opt_in
STEPS = 5

# --------------------------------------------------------------------------------------------------- missing gradients


@each_implementation
@each_class
def test_without_gradients_nothing_happens(ours: Ours, how: dict[str, Any]) -> None:
    params = every_kind()
    before = values(params)
    opt = ours.make(params, **options_of(ours, {}), **how)
    for p in params:
        p.grad = None
    opt.step((lambda: torch.zeros(())) if ours.two else None)
    true = true_weights(opt)
    assert furthest(true, before) < 1e-6
    if ours.name != "random":
        assert same(params, before)


@each_implementation
@each_class
def test_some_gradients_are_missing(ours: Ours, how: dict[str, Any]) -> None:
    """At ρ = 0 as torch; at ρ > 0 the parameter without one has its true weights still."""
    params, others, third = every_kind(torch.float64), every_kind(torch.float64), every_kind(torch.float64)
    rest = at_rest(ours).make(params, **options_of(ours, {}), **how)
    plain = ours.torch(others, **options_of(ours, {}), **how)
    opt = ours.make(third, **options_of(ours, {}), **how)
    start = values(third)

    def with_holes(tensors: Any, inner: Callable[[], Any]) -> Callable[[], Any]:
        def closure() -> Any:
            value = inner()
            tensors[0].grad = tensors[5].grad = None
            return value

        return closure

    for number in range(STEPS):
        for optimizer, tensors in ((rest, params), (opt, third)):
            closure = with_holes(tensors, closure_of(tensors, number))
            if ours.two:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        give(others, number + (500 if ours.two else 0))
        others[0].grad = others[5].grad = None
        plain.step()
        assert same(params, others)
    true = true_weights(opt)
    assert furthest([true[0], true[5]], [start[0], start[5]]) < 1e-12


@each_class
def test_zero_gradients_move_nothing_without_momentum_or_decay(ours: Ours) -> None:
    params = ordinary(torch.float64)
    opt = ours.make(params, **options_of(ours, {}), weight_decay=0.0)
    before = values(params)
    for _ in range(3):
        step(ours, opt, params, 0, factor=0.0)
    assert furthest(true_weights(opt), before) < 1e-13
    if ours.name != "random":
        assert same(params, before)


@each_class
def test_parameters_that_need_no_gradient(ours: Ours) -> None:
    params = ordinary()
    params[1].requires_grad_(False)
    opt = ours.make(params, **options_of(ours, {}))
    before = values(params)

    def closure() -> Tensor:
        give(params[:1], 0)
        return torch.zeros(())

    for _ in range(3):
        opt.step(closure)
    assert same(true_weights(opt)[1:], before[1:])


# --------------------------------------------------------------------------------------------- modes of autograd, loss


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__)
@each_implementation
@each_class
def test_modes_of_autograd_change_nothing(ours: Ours, how: dict[str, Any], mode: Any) -> None:
    """A step in one of them between steps outside; torch's own does the same."""
    params, others = ordinary(), ordinary()
    opt, plain = (ours.make(tensors, **options_of(ours, {}), **how) for tensors in (params, others))
    third = ordinary()
    control = ours.torch(third, **options_of(ours, {}), **how)
    for number in range(STEPS):
        if number == 2:
            with mode():
                step(ours, opt, params, number)
            with mode():
                plain_step(ours, control, third, number)
        else:
            step(ours, opt, params, number)
            plain_step(ours, control, third, number)
        step(ours, plain, others, number)
        assert all(p.requires_grad and p.is_leaf for p in params)
    assert same(params, others)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
@each_class
def test_a_closure_runs_with_gradients_and_its_loss_comes_back(ours: Ours, outer: Any) -> None:
    params = ordinary()
    opt = ours.make(params, **options_of(ours, {}))
    seen = []

    def closure() -> Tensor:
        opt.zero_grad()
        seen.append(torch.is_grad_enabled())
        value = torch.stack([p.square().sum() for p in params]).sum()
        value.backward()
        return value

    with outer():
        expected = float(torch.stack([p.detach().square().sum() for p in params]).sum())
        value = opt.step(closure)
        assert torch.is_grad_enabled() == (outer is torch.enable_grad)
    assert all(seen)
    assert float(value.detach()) == pytest.approx(expected)
    if not ours.two:
        assert opt.step() is None


@each_class
def test_loss_scaling(ours: Ours) -> None:
    """The scaler's step is the plain one, and a step that overflowed has not been."""
    params, others = ordinary(torch.float64), ordinary(torch.float64)
    opt, plain = (ours.make(tensors, **options_of(ours, {})) for tensors in (params, others))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10_000)
    for number in range(STEPS):
        for bad in (True, False) if number == 2 else (False,):
            scaler.scale(torch.zeros(()))
            factor = float("inf") if bad else scaler.get_scale()
            give(params, number, factor)
            if ours.two:
                opt.first_step()
                give(params, number + 500, factor)
            scaler.step(opt)
            scaler.update()
        step(ours, plain, others, number)
    assert scaler.get_scale() == 128.0
    assert furthest(true_weights(opt), true_weights(plain)) < 1e-12
    if ours.name != "random":
        assert furthest(params, others) < 1e-12


# ----------------------------------------------------------------------------------------------------- reproducibility


@each_implementation
@each_class
def test_twice_the_same(ours: Ours, how: dict[str, Any]) -> None:
    """Also where torch is told to use deterministic algorithms only; no global generator is read."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(bool(seed))
        try:
            params = every_kind()
            opt = ours.make(params, **options_of(ours, {}), **how)
            state = torch.get_rng_state()
            for number in range(STEPS):
                step(ours, opt, params, number)
            assert torch.equal(torch.get_rng_state(), state)
            found.append(values(params))
        finally:
            torch.use_deterministic_algorithms(False)
    assert same(*found)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_defaults_have_torchs_names(base: str) -> None:
    for ours in CLASSES:
        if ours.base == base:
            theirs = ours.torch(ordinary()).defaults
            mine = ours.make(ordinary(), **options_of(ours, {})).defaults
            missing = set(theirs) - set(mine) - {"nesterov", "differentiable", "decoupled_weight_decay", "capturable"}
            assert not missing, ours.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
@each_class
def test_a_compiled_step(ours: Ours) -> None:
    """Traced, and run as it was traced; random noise is made on the host and may be refused."""
    torch._dynamo.reset()
    params, others = ordinary(), ordinary()
    opt, plain = (ours.make(tensors, **options_of(ours, {}), foreach=False) for tensors in (params, others))
    first: Any = torch.compile(opt.first_step, backend="eager") if ours.two else None
    compiled: Any = torch.compile(opt.step, backend="eager")
    for number in range(3):
        give(params, number)
        if ours.two:
            first()
            give(params, number + 500)
        try:
            compiled()
        except RuntimeError:
            if ours.name != "random":
                raise
            return
        step(ours, plain, others, number)
    assert furthest(params, others) < 1e-6
    assert furthest(true_weights(opt), true_weights(plain)) < 1e-6
