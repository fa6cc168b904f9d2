"""What torch's own tests ask of states and schedulers: round trips, old states, names, every learning rate schedule.

Opt-in: ``MSAM_INTEGRATIONS=1 python -m pytest tests/integrations``. The oracle is the same done to torch's own.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from .optimizers import (
    Ours,
    at_rest,
    each_class,
    each_implementation,
    each_input,
    every_kind,
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
STEPS = 3


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh(params: Any) -> list[Any]:
    """New parameters where others stand."""
    others = every_kind()
    with torch.no_grad():
        for new, old in zip(others, params, strict=True):
            new.copy_(old)
    return others


# --------------------------------------------------------------------------------------------------------- round trips


@each_implementation
@each_input
def test_a_state_goes_through_a_file(ours: Ours, given: dict[str, Any], how: dict[str, Any]) -> None:
    """Nothing but plain data; the copy goes on as the first one, to the bit."""
    if ours.base == "adamw" and how.get("foreach") and isinstance(given.get("lr"), Tensor):
        pytest.skip("torch's AdamW refuses a tensor there")
    params = every_kind(fused=True)
    opt = ours.make(params, **options_of(ours, given), **how)
    for number in range(STEPS):
        step(ours, opt, params, number)
    others = every_kind(fused=True)
    with torch.no_grad():
        for new, old in zip(others, params, strict=True):
            new.copy_(old)
    resumed = ours.make(others, **options_of(ours, given), **how)
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    for number in range(STEPS, 2 * STEPS):
        step(ours, opt, params, number)
        step(ours, resumed, others, number)
    assert same(params, others)
    assert same(true_weights(opt), true_weights(resumed))


@each_class
def test_loading_is_deterministic_and_leaves_the_state_alone(ours: Ours) -> None:
    """Two optimizers from one state; what they do with it changes neither it nor the other."""
    params = every_kind()
    opt = ours.make(params, **options_of(ours, {}))
    for number in range(STEPS):
        step(ours, opt, params, number)
    state = through_a_file(opt.state_dict())
    found = []
    for _ in range(2):
        others = fresh(params)
        resumed = ours.make(others, **options_of(ours, {}))
        resumed.load_state_dict(copy.deepcopy(state))
        for number in range(STEPS, 2 * STEPS):
            step(ours, resumed, others, number)
        found.append(values(others))
    assert same(*found)


@each_class
def test_a_state_is_plain_and_numbered(ours: Ours) -> None:
    opt = ours.make([{"params": ordinary()}, {"params": ordinary()}], **options_of(ours, {}))
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    assert state["state"] == {}
    for group in opt.param_groups:
        give(group["params"], 0)
    params = [p for group in opt.param_groups for p in group["params"]]
    step(ours, opt, params, 0)
    assert set(opt.state_dict()["state"]) <= set(range(4))


@each_class
def test_states_of_another_shape_are_refused(ours: Ours) -> None:
    """And leave the optimizer as it was."""
    params = ordinary()
    opt = ours.make(params, **options_of(ours, {}))
    step(ours, opt, params, 0)
    before, held = through_a_file(opt.state_dict()), values(params)
    more = ours.make([{"params": ordinary()}, {"params": ordinary()}], **options_of(ours, {})).state_dict()
    fewer = ours.make(ordinary()[:1], **options_of(ours, {})).state_dict()
    for state in (more, fewer):
        with pytest.raises(ValueError, match="parameter group"):
            opt.load_state_dict(state)
    after = opt.state_dict()
    assert repr(after["param_groups"]) == repr(before["param_groups"])
    assert all(
        torch.equal(torch.as_tensor(after["state"][i][key]), torch.as_tensor(value))
        for i, state in before["state"].items()
        for key, value in state.items()
    )
    assert same(params, held)


# ---------------------------------------------------------------------------------------------------------- old states


@each_class
def test_a_state_without_torchs_newer_flags_loads(ours: Ours) -> None:
    """As one that was saved before torch had them."""
    params = every_kind()
    opt = ours.make(params, **options_of(ours, {}))
    for number in range(STEPS):
        step(ours, opt, params, number)
    state = through_a_file(opt.state_dict())
    for group in state["param_groups"]:
        for flag in ("foreach", "maximize", "fused", "capturable", "differentiable", "decoupled_weight_decay"):
            group.pop(flag, None)
    others = fresh(params)
    resumed = ours.make(others, **options_of(ours, {}))
    resumed.load_state_dict(state)
    for number in range(STEPS, 2 * STEPS):
        step(ours, opt, params, number)
        step(ours, resumed, others, number)
    assert same(params, others)


@pytest.mark.parametrize("kind", [float, int])
@each_class
def test_a_count_of_steps_that_is_a_number_loads(ours: Ours, kind: type[Any]) -> None:
    """Adam's ``step`` was one before it was a tensor."""
    params = every_kind()
    opt = ours.make(params, **options_of(ours, {}))
    for number in range(STEPS):
        step(ours, opt, params, number)
    state = through_a_file(opt.state_dict())
    steps = [one for one in state["state"].values() if "step" in one]
    assert bool(steps) == (ours.base == "adamw")
    for one in steps:
        one["step"] = kind(one["step"])
    others = fresh(params)
    resumed = ours.make(others, **options_of(ours, {}))
    resumed.load_state_dict(state)
    control = ours.torch(fresh(params), **options_of(ours, {}))
    theirs: dict[str, Any] = control.state_dict()
    control.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": theirs["param_groups"]})
    plain_step(ours, control, control.param_groups[0]["params"], STEPS)
    for number in range(STEPS, 2 * STEPS):
        step(ours, opt, params, number)
        step(ours, resumed, others, number)
    assert same(params, others)


@each_class
def test_a_state_of_torch_and_back(ours: Ours) -> None:
    """What torch's own saved goes on here as there at ρ = 0, and what is saved here there."""
    params, others = every_kind(), every_kind()
    plain = ours.torch(params, **options_of(ours, {}))
    opt = at_rest(ours).make(others, **options_of(ours, {}))
    for number in range(STEPS):
        plain_step(ours, plain, params, number)
        step(ours, opt, others, number)
    here, there = fresh(params), fresh(others)
    mine = at_rest(ours).make(here, **options_of(ours, {}))
    mine.load_state_dict(through_a_file(plain.state_dict()))
    theirs = ours.torch(there, **options_of(ours, {}))
    theirs.load_state_dict(through_a_file(opt.state_dict()))
    for number in range(STEPS, 2 * STEPS):
        plain_step(ours, plain, params, number)
        step(ours, mine, here, number)
        plain_step(ours, theirs, there, number)
    assert same(here, params)
    assert same(there, params)


@pytest.mark.parametrize("named", ["saved", "loaded", "both"])
@each_class
def test_states_with_names_and_without(ours: Ours, named: str) -> None:
    """A state of named parameters loads where they have none, and the other way round; torch's own does both."""

    def with_names(params: Any, wanted: bool) -> Any:
        return [(f"layer.{i}", p) for i, p in enumerate(params)] if wanted else params

    params = every_kind()
    opt = ours.make(with_names(params, named != "loaded"), **options_of(ours, {}))
    for number in range(STEPS):
        step(ours, opt, params, number)
    state = through_a_file(opt.state_dict())
    assert ("param_names" in state["param_groups"][0]) == (named != "loaded")
    others = fresh(params)
    resumed = ours.make(with_names(others, named != "saved"), **options_of(ours, {}))
    resumed.load_state_dict(state)
    for number in range(STEPS, 2 * STEPS):
        step(ours, opt, params, number)
        step(ours, resumed, others, number)
    assert same(params, others)
    if named == "both":
        assert resumed.param_groups[0]["param_names"] == [f"layer.{i}" for i in range(len(params))]


@each_class
def test_buffers_take_the_parameters_precision(ours: Ours) -> None:
    """A float32 state in a bfloat16 run is cast as torch casts it; counts of steps are not."""
    params = ordinary()
    opt, plain = ours.make(params, **options_of(ours, {})), ours.torch(ordinary(), **options_of(ours, {}))
    step(ours, opt, params, 0)
    plain_step(ours, plain, plain.param_groups[0]["params"], 0)
    kinds = []
    for make, source in ((ours.make, opt), (ours.torch, plain)):
        if source is opt:
            opt.eval()
        other = make(ordinary(torch.bfloat16), **options_of(ours, {}))
        other.load_state_dict(source.state_dict())
        state = other.state[other.param_groups[0]["params"][0]]
        kinds.append({key: value.dtype for key, value in state.items() if isinstance(value, Tensor)})
    assert {key: kinds[0].get(key) for key in kinds[1]} == kinds[1]


# --------------------------------------------------------------------------------------------- learning rate schedules

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.8),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 4], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.4, 0.8, 4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5, 1e-3),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 1),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=12),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 6, 2.0),
    "SWALR": lambda opt: SWALR(opt, 0.02, anneal_epochs=4),
}
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def advance(scheduler: Any, number: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(float(number))
    else:
        scheduler.step()


def test_no_class_of_torchs_schedulers_is_missing() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


@each_scheduler
@each_class
def test_every_scheduler_sets_what_it_sets_for_torch(ours: Ours, name: str) -> None:
    """Learning rate and momentum at ρ = 0 and at ρ > 0; and at ρ = 0 the weights."""
    options = {**options_of(ours, {}), "lr": 0.1, **({"momentum": 0.9} if ours.base == "sgd" else {})}
    params, others, third = ordinary(), ordinary(), ordinary()
    rest, plain = at_rest(ours).make(params, **options), ours.torch(others, **options)
    opt = ours.make(third, **options)
    schedulers = [SCHEDULERS[name](one) for one in (rest, plain, opt)]
    for number in range(8):
        rates = [(one.param_groups[0]["lr"], one.param_groups[0].get("momentum")) for one in (rest, plain, opt)]
        assert rates[0] == rates[1] == rates[2]
        step(ours, rest, params, number)
        plain_step(ours, plain, others, number)
        step(ours, opt, third, number)
        for scheduler in schedulers:
            advance(scheduler, number)
        assert same(params, others)


@each_scheduler
@each_class
def test_a_schedule_resumes_with_its_state(ours: Ours, name: str) -> None:
    options = {**options_of(ours, {}), "lr": 0.1, **({"momentum": 0.9} if ours.base == "sgd" else {})}
    params = every_kind()
    opt = ours.make(params, **options)
    scheduler = SCHEDULERS[name](opt)
    for number in range(4):
        step(ours, opt, params, number)
        advance(scheduler, number)
    others = fresh(params)
    resumed = ours.make(others, **options)
    again = SCHEDULERS[name](resumed)
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for number in range(4, 8):
        step(ours, opt, params, number)
        step(ours, resumed, others, number)
        advance(scheduler, number)
        advance(again, number)
    assert opt.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]
    assert same(params, others)


@each_class
def test_a_step_in_two_calls_comes_before_the_schedulers(ours: Ours) -> None:
    """Schedulers watch ``step`` and warn if they come first; here warnings are errors."""
    if not ours.two:
        pytest.skip("one gradient a step")
    params = ordinary()
    opt = ours.make(params, **options_of(ours, {}))
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    for number in range(3):
        give(params, number)
        opt.first_step()
        give(params, number + 500)
        opt.second_step()
        scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.125 * opt.defaults["lr"])


@each_class
def test_a_tensor_learning_rate_is_scheduled_in_place(ours: Ours) -> None:
    params = ordinary()
    opt = ours.make(params, lr=torch.tensor(0.1), **options_of(ours, {}), foreach=False)
    rate = opt.param_groups[0]["lr"]
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    for number in range(2):
        step(ours, opt, params, number)
        scheduler.step()
    assert opt.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.025)
