"""What torch's own tests ask of an optimizer beside its numbers: hooks, profiling, copies, printing.

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
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .optimizers import (
    MU,
    Ours,
    closure_of,
    each_class,
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
STEPS = 3


def made(ours: Ours, params: Any = None) -> Any:
    return ours.make(ordinary() if params is None else params, **options_of(ours, {}))


def plain(ours: Ours, params: Any = None) -> Any:
    return ours.torch(ordinary() if params is None else params, **(MU if ours.base == "sgd" else {}))


def parameters(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


# ------------------------------------------------------------------------------------------------------ hooks of steps


def step_events(opt: Any, act: Callable[[], None]) -> list[str]:
    """What hooks of all kinds see while a step is taken, in their order; removed, they see nothing."""
    seen: list[str] = []

    def note(name: str) -> Any:
        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            assert optimizer is opt
            assert isinstance(args, tuple)
            assert isinstance(kwargs, dict)
            seen.append(name)

        return hook

    handles = [
        opt.register_step_post_hook(note("after 1")),
        opt.register_step_pre_hook(note("before 1")),
        register_optimizer_step_post_hook(note("after, any optimizer")),
        register_optimizer_step_pre_hook(note("before, any optimizer")),
        opt.register_step_pre_hook(note("before 2")),
        opt.register_step_post_hook(note("after 2")),
    ]
    try:
        act()
        events = list(seen)
    finally:
        for handle in handles:
            handle.remove()
    act()
    assert seen == events
    return events


@each_class
def test_hooks_of_a_step_come_in_torchs_order(ours: Ours) -> None:
    opt, other = made(ours), plain(ours)
    mine = step_events(opt, lambda: step(ours, opt, parameters(opt), 0))
    assert mine == step_events(other, lambda: plain_step(ours, other, parameters(other), 0))
    assert len(mine) == 6


@each_class
def test_a_step_in_two_calls_is_one_step_for_hooks(ours: Ours) -> None:
    """Whatever counts steps by hooks counts one, before anything of the second pass and after it."""
    if not ours.two:
        pytest.skip("one gradient a step")
    opt, other = made(ours), plain(ours)
    params = parameters(opt)

    def act() -> None:
        give(params, 0)
        opt.first_step()
        give(params, 1)
        opt.second_step()

    assert step_events(opt, act) == step_events(other, lambda: plain_step(ours, other, parameters(other), 0))


@each_class
def test_a_hook_sees_the_weights_before_and_after(ours: Ours) -> None:
    opt = made(ours)
    params, seen = parameters(opt), []
    opt.register_step_pre_hook(lambda *_: seen.append(values(params)))
    opt.register_step_post_hook(lambda *_: seen.append(values(params)))
    before = values(params)
    step(ours, opt, params, 0)
    assert same(seen[0], before)
    assert same(seen[1], params)
    assert not same(seen[0], seen[1])


@each_class
def test_hooks_enclose_the_passes_of_a_closure(ours: Ours) -> None:
    """Hooks of a module's forward lie between those of the step, once a pass."""
    layer = torch.nn.Linear(3, 1)
    opt = made(ours, layer.parameters())
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("forward begins"))
    layer.register_forward_hook(lambda *_: seen.append("forward ends"))
    layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append("gradient"))
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        opt.zero_grad()
        value = layer(torch.ones(2, 3)).sum()
        value.backward()
        return value  # type: ignore[no-any-return]

    opt.step(closure)
    passes = ["forward begins", "forward ends", "gradient"] * (2 if ours.two else 1)
    assert seen == ["before", *passes, "after"]


@each_class
def test_a_hook_before_the_step_may_change_gradients(ours: Ours) -> None:
    """Clipping by hook: at one gradient a step it is what the step is taken with, as for torch."""
    if ours.two:
        pytest.skip("its closure makes the gradients")
    params, others = ordinary(), ordinary()
    opt, other = made(ours, params), made(ours, others)

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        for p in parameters(optimizer):
            p.grad.mul_(0.5)

    opt.register_step_pre_hook(halve)
    for number in range(STEPS):
        step(ours, opt, params, number)
        step(ours, other, others, number, factor=0.5)
    assert furthest(params, others) < 1e-6


@each_class
def test_a_hook_may_give_another_closure(ours: Ours) -> None:
    """What a hook before the step returns takes the arguments' place; anything but a pair is refused."""
    opt = made(ours)
    params = parameters(opt)
    opt.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure_of(params, 7)), {}))
    assert float(opt.step(lambda: torch.tensor(-1.0))) == 8.0
    bad = made(ours)
    bad.register_step_pre_hook(lambda *_: "nonsense")
    give(parameters(bad), 0)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        bad.step(closure_of(parameters(bad), 0))


@each_class
def test_the_class_is_hooked_once_for_profilers(ours: Ours) -> None:
    """``profile_hook_step`` marks the method; one event a step bears the class's name."""
    opt = made(ours)
    step(ours, opt, parameters(opt), 0)
    assert getattr(type(opt).step, "hooked", False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for number in range(STEPS):
            step(ours, opt, parameters(opt), number)
            opt.zero_grad()
    names = [event.name for event in profile.events()]
    name = type(opt).__name__
    assert names.count(f"Optimizer.step#{name}.step") == STEPS
    # SAM clears gradients between its passes, too
    assert names.count(f"Optimizer.zero_grad#{name}.zero_grad") in (STEPS, 2 * STEPS)
    assert not [n for n in names if n.startswith("Optimizer.step#") and n != f"Optimizer.step#{name}.step"]


# ----------------------------------------------------------------------------------------------------- hooks of states


def state_events(opt: Any) -> list[str]:
    """What the four kinds of hooks see, two of each, the second put before the first."""
    seen: list[str] = []

    def note(name: str) -> Any:
        return lambda optimizer, *rest: seen.append(f"{name} {len(rest)} {optimizer is opt}")

    handles = []
    for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        register = getattr(opt, f"register_{kind}_hook")
        handles += [register(note(f"{kind} 1")), register(note(f"{kind} 2"), prepend=True)]
    state = opt.state_dict()
    opt.load_state_dict(state)
    events = list(seen)
    for handle in handles:
        handle.remove()
    opt.load_state_dict(opt.state_dict())
    assert seen == events
    return events


@each_class
def test_hooks_of_states_come_in_torchs_order(ours: Ours) -> None:
    opt, other = made(ours), plain(ours)
    for number in range(STEPS):
        step(ours, opt, parameters(opt), number)
        plain_step(ours, other, parameters(other), number)
    assert state_events(opt) == state_events(other)


@each_class
def test_a_hook_before_the_state_changes_what_is_saved(ours: Ours) -> None:
    opt = made(ours)
    step(ours, opt, parameters(opt), 0)

    def before(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.125

    opt.register_state_dict_pre_hook(before)
    assert opt.state_dict()["param_groups"][0]["lr"] == 0.125


@each_class
def test_hooks_may_replace_states(ours: Ours) -> None:
    """After saving: what the hook returns is the state. Before loading: what it returns is loaded."""
    opt = made(ours)
    step(ours, opt, parameters(opt), 0)
    saved: dict[str, Any] = copy.deepcopy(opt.state_dict())

    def stamped(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "stamp": 1}

    def changed(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.25} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    opt.register_state_dict_post_hook(stamped)
    assert opt.state_dict()["stamp"] == 1
    loaded = []
    opt.register_load_state_dict_pre_hook(changed)
    opt.register_load_state_dict_post_hook(lambda optimizer: loaded.append(optimizer.param_groups[0]["lr"]))
    opt.load_state_dict(saved)
    assert loaded == [0.25]
    assert opt.param_groups[0]["lr"] == 0.25
    assert saved["param_groups"][0]["lr"] != 0.25


# --------------------------------------------------------------------------------------------------- copies and prints


def pickled(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@each_class
def test_a_copy_is_an_optimizer_of_its_own(ours: Ours, copied: Callable[[Any], Any]) -> None:
    """It has every public attribute, takes hooks, goes on the same, and leaves the first one alone."""
    opt = made(ours, every_kind())
    for number in range(STEPS):
        step(ours, opt, parameters(opt), number)
    other = copied(opt)
    public = [{name for name in vars(one) if not name.startswith("_")} for one in (opt, other)]
    assert public[0] == public[1]
    before = values(parameters(opt))
    assert same(parameters(other), before)
    seen: list[int] = []
    other.register_step_post_hook(lambda *_: seen.append(1))
    step(ours, other, parameters(other), STEPS)
    assert seen == [1]
    assert same(parameters(opt), before)
    step(ours, opt, parameters(opt), STEPS)
    assert same(parameters(opt), parameters(other))
    assert same(true_weights(opt), true_weights(other))


@each_class
def test_it_can_be_printed(ours: Ours) -> None:
    opt = made(ours)
    for _ in range(2):
        text = repr(opt)
        assert text.startswith(type(opt).__name__)
        assert "Parameter Group 0" in text
        assert "lr: " in text
        step(ours, opt, parameters(opt), 0)
    opt.add_param_group({"params": ordinary(), "lr": 0.625})
    assert "Parameter Group 1" in repr(opt)
    assert "lr: 0.625" in repr(opt)


@each_class
def test_clearing_gradients(ours: Ours) -> None:
    opt = made(ours)
    give(parameters(opt), 0)
    opt.zero_grad(set_to_none=False)
    assert all(isinstance(p.grad, Tensor) and not p.grad.any() for p in parameters(opt))
    opt.zero_grad()
    assert all(p.grad is None for p in parameters(opt))


@each_class
def test_it_is_one_of_torchs(ours: Ours) -> None:
    """And takes no group that torch's own would not take."""
    opt = made(ours)
    no_group: Any = parameters(opt)
    assert isinstance(opt, torch.optim.Optimizer)
    with pytest.raises((ValueError, TypeError)):
        opt.add_param_group({"params": parameters(opt)})
    with pytest.raises(TypeError):
        opt.add_param_group(no_group)
    with pytest.raises((ValueError, TypeError)):
        opt.add_param_group({"params": [torch.ones(2, requires_grad=True) * 2]})
    assert len(opt.param_groups) == 1


# ---------------------------------------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize(
    "average",
    [torch.optim.swa_utils.get_swa_multi_avg_fn, lambda: torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)],
    ids=["swa", "ema"],
)
@each_class
def test_averages_of_the_true_weights(ours: Ours, average: Any) -> None:
    """``AveragedModel`` fed inside ``unperturbed()`` averages what torch's twin of the true weights averages."""
    model = torch.nn.Linear(3, 2).double()
    opt = made(ours, model.parameters())
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average())
    kept: list[list[Tensor]] = []
    for number in range(4):
        step(ours, opt, list(model.parameters()), number)
        with opt.unperturbed():
            averaged.update_parameters(model)
            kept.append(values(model.parameters()))
    expected = kept[0]
    for count, weights in enumerate(kept[1:], 1):
        share = 1 / (count + 1) if average is torch.optim.swa_utils.get_swa_multi_avg_fn else 0.5
        expected = [e + share * (w - e) for e, w in zip(expected, weights, strict=True)]
    assert furthest(averaged.module.parameters(), expected) < 1e-9  # torch takes 1 / n in float32
