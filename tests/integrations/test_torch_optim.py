"""What torch's own tests ask of an optimizer, asked of every class of ours: inputs, numbers, groups, learning rates.

Opt-in: ``MSAM_INTEGRATIONS=1 python -m pytest tests/integrations``, with the package expecttest, which torch's test
suite needs. The cases are torch's (``torch.testing._internal.common_optimizers``); the bodies follow the intent of its
``test_optim.py``. The oracle is torch's own optimizer at ρ = 0, and elsewhere one implementation for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .optimizers import (
    CLASSES,
    IMPLEMENTATIONS,
    Ours,
    at_rest,
    each_class,
    each_error,
    each_implementation,
    each_input,
    each_refused,
    errors,
    every_kind,
    furthest,
    give,
    inputs,
    mixed,
    opt_in,
    options_of,
    ordinary,
    plain_step,
    refused,
    same,
    step,
    true_weights,
    values,
)

pytestmark = opt_in
STEPS = 5

# ----------------------------------------------------------------------------------------------- inputs that must fail


@each_error
def test_bad_inputs_fail_as_torch_says(ours: Ours, error: Any) -> None:
    """The same error, or TypeError for tensors where we take numbers, in a sentence of ours or of torch's."""
    given = error.optimizer_error_input
    params = ordinary() if given.params is None else given.params
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            ours.make(params, **options_of(ours, given.kwargs))
        return
    with pytest.raises((error.error_type, TypeError)) as raised:
        ours.make(params, **options_of(ours, given.kwargs))
    assert len(str(raised.value)) > 10


@each_refused
def test_options_of_torch_that_are_not_ours_are_refused_by_name(ours: Ours, given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="|".join(ours.lacks)):
        ours.make(ordinary(), **options_of(ours, given))


@each_class
def test_differentiable_steps_are_refused(ours: Ours) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match="differentiable"):
        ours.make(ordinary(), differentiable=True, **options_of(ours, {}))


@each_class
def test_capturable_is_what_it_is_for_torch(ours: Ours) -> None:
    """SGD has no such option. AdamW's is for accelerators, and its step on a CPU fails in torch's words."""
    if ours.base == "sgd":
        with pytest.raises(TypeError, match="capturable"):
            ours.make(ordinary(), capturable=True, **options_of(ours, {}))
        return
    params = ordinary()
    opt = ours.make(params, capturable=True)
    before = values(params)
    with pytest.raises((RuntimeError, AssertionError), match="capturable"):
        step(ours, opt, params, 0)
    assert same(params, before)


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
@each_class
def test_complex_parameters_are_refused(ours: Ours, shape: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match="complex"):
        ours.make([nn.Parameter(torch.ones(shape, dtype=torch.complex64))], **options_of(ours, {}))
    opt = ours.make(ordinary(), **options_of(ours, {}))
    with pytest.raises(TypeError, match="complex"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(shape, dtype=torch.complex64))]})
    assert len(opt.param_groups) == 1


# ------------------------------------------------------------------------------------------------- what torch would do


@each_implementation
@each_input
def test_without_strength_it_is_torch_to_the_bit(ours: Ours, given: dict[str, Any], how: dict[str, Any]) -> None:
    """Numbers, nothing, gaps, transposed: in every implementation."""
    if ours.base == "adamw" and how.get("foreach") and isinstance(given.get("lr"), Tensor):
        pytest.skip("torch's AdamW refuses a tensor there")
    fused = bool(how.get("fused"))
    params, others = every_kind(fused=fused), every_kind(fused=fused)
    opt = at_rest(ours).make(params, **options_of(ours, given), **how)
    plain = ours.torch(others, **options_of(ours, given), **how)
    for number in range(STEPS):
        step(ours, opt, params, number)
        plain_step(ours, plain, others, number)
        assert same(params, others)


@each_input
def test_implementations_agree(ours: Ours, given: dict[str, Any]) -> None:
    """Sums over all parameters are taken in other orders; in float64 that is all."""
    found = []
    for how in IMPLEMENTATIONS:
        params = every_kind(torch.float64, fused=True)
        opt = ours.make(params, **options_of(ours, given), **how)
        for number in range(STEPS):
            step(ours, opt, params, number)
        found.append((values(params), true_weights(opt)))
    for stored, true in found[1:]:
        assert furthest(stored, found[0][0]) < 1e-12
        assert furthest(true, found[0][1]) < 1e-12


@each_class
def test_parameters_of_every_kind_move_and_come_back(ours: Ours) -> None:
    params = every_kind(torch.float64)
    layout = [(p.shape, p.stride(), p.data_ptr()) for p in params]
    opt = ours.make(params, **options_of(ours, {}), lr=0.0, weight_decay=0.0)
    before = values(params)
    for number in range(STEPS):
        step(ours, opt, params, number)
    if opt.perturbed and ours.name != "NAG":  # whose ε is as long as the learning rate
        assert furthest(params, before) > 1e-3
    opt.eval()
    assert furthest(params, before) < 1e-12
    assert [(p.shape, p.stride(), p.data_ptr()) for p in params] == layout


@each_implementation
@each_class
def test_precisions_in_one_group(ours: Ours, how: dict[str, Any]) -> None:
    """Each keeps its own, and the loop agrees up to bfloat16's rounding."""
    found = []
    for options in (dict(foreach=False, fused=False), how):
        params = mixed()
        opt = ours.make(params, **options_of(ours, {}), **options)
        for number in range(STEPS):
            step(ours, opt, params, number)
        assert [p.dtype for p in params] == [p.dtype for p in mixed()]
        found.append(true_weights(opt))
    exact = [i for i, p in enumerate(mixed()) if p.dtype is not torch.bfloat16]
    assert furthest([found[1][i] for i in exact], [found[0][i] for i in exact]) < 1e-3
    assert furthest(found[1], found[0]) < 0.1


@each_implementation
@each_class
def test_nothing_but_empty_parameters(ours: Ours, how: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(2, 0))]
    opt = ours.make(params, **options_of(ours, {}), **how)
    for number in range(3):
        step(ours, opt, params, number)
    opt.eval()
    opt.train()
    assert all(p.numel() == 0 for p in params)


@each_implementation
@each_class
def test_default_precision_is_not_the_parameters(ours: Ours, how: dict[str, Any]) -> None:
    found = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            params = every_kind()
            opt = ours.make(params, **options_of(ours, {}), **how)
            for number in range(STEPS):
                step(ours, opt, params, number)
            found.append(true_weights(opt))
        finally:
            torch.set_default_dtype(torch.float32)
    assert furthest(found[0], found[1]) < 1e-6


# ------------------------------------------------------------------------------------------------------------- descent


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def distance(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 40).reshape(8, 5)
    value: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return value


SCHEDULES: list[Callable[[Any], list[Any]]] = [
    lambda opt: [],
    lambda opt: [torch.optim.lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
    lambda opt: [torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
    lambda opt: [
        torch.optim.lr_scheduler.StepLR(opt, gamma=0.99, step_size=10),
        torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.99),
        torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
    ],
]


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
@each_input
def test_it_goes_in_the_right_direction(ours: Ours, given: dict[str, Any], schedule: int) -> None:
    """Down; and up under ``maximize``, whether plain or with schedules of the learning rate on top."""
    torch.manual_seed(0)
    model = network()
    options = options_of(ours, given)
    if "lr" not in options:
        options["lr"] = 0.02
    options["weight_decay"] = min(options.get("weight_decay", 0.0), 0.01)
    opt = ours.make(model.parameters(), **options)
    schedulers = SCHEDULES[schedule](opt)

    def closure() -> Tensor:
        opt.zero_grad()
        value = distance(model)
        value.backward()
        return value

    first = float(distance(model).detach())
    for _ in range(30):
        value = opt.step(closure)
        for scheduler in schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(value.detach())
            else:
                scheduler.step()
    opt.eval()
    last = float(distance(model).detach())
    assert last > first if options.get("maximize") else last < first


@each_implementation
@each_class
def test_maximize_is_descent_of_the_negative(ours: Ours, how: dict[str, Any]) -> None:
    params, others = every_kind(), every_kind()
    up = ours.make(params, maximize=True, **options_of(ours, {}), **how)
    down = ours.make(others, **options_of(ours, {}), **how)
    for number in range(STEPS):
        step(ours, up, params, number)
        step(ours, down, others, number, factor=-1.0)
    if ours.name == "random":  # whose ε follows the objective's sign, too: only the true weights are the same
        assert furthest(true_weights(up), true_weights(down)) < 1e-6
        return
    assert furthest(params, others) < 1e-6
    assert furthest(true_weights(up), true_weights(down)) < 1e-6


# -------------------------------------------------------------------------------------------------------------- groups


@each_implementation
@each_class
def test_groups_have_rates_and_decays_of_their_own(ours: Ours, how: dict[str, Any]) -> None:
    """As torch at ρ = 0, also in a group that comes later; at ρ > 0 with no number left where another belongs."""
    later = {"lr": 0.5, "weight_decay": 0.2}
    rest = at_rest(ours)
    params, others = every_kind(torch.float64), every_kind(torch.float64)
    opt = rest.make([{"params": params[:2], "lr": 0.1}, {"params": params[2:5]}], **options_of(ours, {}), **how)
    plain = ours.torch([{"params": others[:2], "lr": 0.1}, {"params": others[2:5]}], **options_of(ours, {}), **how)
    for optimizer, tensors in ((opt, params), (plain, others)):
        give(tensors, 99)
        optimizer.add_param_group({"params": tensors[5:], **later})
    for number in range(STEPS):
        step(ours, opt, params, number)
        plain_step(ours, plain, others, number)
        assert same(params, others)
    assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in plain.param_groups]


@each_class
def test_a_group_that_does_not_learn_stays(ours: Ours) -> None:
    params = ordinary(torch.float64)
    opt = ours.make(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.0, "weight_decay": 0.5}], **options_of(ours, {})
    )
    before = values(params)
    for number in range(STEPS):
        step(ours, opt, params, number)
    true = true_weights(opt)
    assert furthest(true[1:], before[1:]) < 1e-14
    assert furthest(true[:1], before[:1]) > 1e-4


@each_class
def test_one_group_for_each_parameter_is_one_group(ours: Ours) -> None:
    params, others = every_kind(torch.float64), every_kind(torch.float64)
    opt = ours.make([{"params": [p]} for p in params], **options_of(ours, {}))
    one = ours.make(others, **options_of(ours, {}))
    for number in range(STEPS):
        step(ours, opt, params, number)
        step(ours, one, others, number)
    assert furthest(params, others) < 1e-13


# ------------------------------------------------------------------------------------------------------ learning rates


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("how", [dict(foreach=False, fused=False), dict(fused=True)], ids=["loop", "fused"])
@each_class
def test_a_tensor_for_a_learning_rate(ours: Ours, how: dict[str, Any], shape: tuple[int, ...]) -> None:
    """What it is filled with counts, in place and without a new one."""
    params, others = ordinary(), ordinary()
    rate = torch.full(shape, 0.1)
    opt = ours.make(params, lr=rate, **options_of(ours, {}), **how)
    plain = ours.make(others, lr=0.1, **options_of(ours, {}), **how)
    for number in range(STEPS):
        if number == 2:
            opt.param_groups[0]["lr"].fill_(0.03)
            plain.param_groups[0]["lr"] = 0.03
        step(ours, opt, params, number)
        step(ours, plain, others, number)
    assert isinstance(opt.param_groups[0]["lr"], Tensor)
    assert furthest(true_weights(opt), true_weights(plain)) < 1e-6
    assert furthest(params, others) < 1e-5


def test_torchs_inputs_are_there() -> None:
    """Not one class without a case: a change of torch's table would be seen here."""
    names = {ours.name for ours in CLASSES}
    assert {case.values[0].name for case in inputs()} == names
    assert {case.values[0].name for case in errors()} == names
    assert {case.values[0].name for case in refused()} == {ours.name for ours in CLASSES if ours.base == "sgd"}
