"""States of others: what is taken over, what is refused, and torch's checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_files
from torch.distributed.checkpoint.state_dict_saver import save as write_files

import msam

from .cases import BY_NAME, NAMED, RHO, SGD, Case, general
from .test_writes import preset
from .workloads import closure_of, furthest, network, same, saved_state, snapshot, train, true_weights

EVERY = [
    *NAMED,
    general("sgd", dict(direction="last_gradient", rho=RHO)),
    general("sgd", dict(direction="random", rho=RHO, seed=3)),
    general("sgd", dict(direction="momentum", rho=0.3, scale="relative")),
]
each_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def trained(make: Callable[[Any], Any], steps: int = 3, closure: bool = False) -> tuple[nn.Module, Any]:
    model = network()
    opt = make(model.parameters())
    train(model, opt, range(steps), closure)
    return model, opt


# Refused.


def edited(case: str, edit: Callable[[Any], Any]) -> Callable[[], Any]:
    """A state of ours, changed by hand."""

    def state() -> Any:
        saved = saved_state(trained(BY_NAME[case].make)[1])
        edit(saved)
        return saved

    return state


def of_torch(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: saved_state(trained(lambda ps: getattr(torch.optim, name)(ps, **options))[1])


def group_set(**options: Any) -> Callable[[Any], Any]:
    return lambda saved: saved["param_groups"][0].update(options)


def without(key: str) -> Callable[[Any], Any]:
    return lambda saved: [entries.pop(key) for entries in saved["state"].values()]


def swap_first_two(saved: Any) -> None:
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]


def relative(edit: Callable[[Any], Any]) -> Callable[[], Any]:
    def state() -> Any:
        saved = saved_state(trained(general("sgd", dict(direction="momentum", rho=0.3, scale="relative")).make)[1])
        edit(saved)
        return saved

    return state


RELATIVE = general("sgd", dict(direction="momentum", rho=0.3, scale="relative"))
REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "SGD without momentum": ("MSAM", of_torch("SGD", lr=0.1), "momentum=0"),
    "SGD's lr for AdamW": ("AdamWMSAM", of_torch("SGD", lr=0.1, momentum=0.9), "another method"),
    "SGD's for SAM on AdamW": ("AdamWSAM", of_torch("SGD", lr=0.1, momentum=0.9), "another method"),
    "AdamW's lr for SGD": ("MSAM", of_torch("AdamW"), "another method"),
    "AdamW's for SAM": ("SAM", of_torch("AdamW"), "another method"),
    "Adam's decay in the gradient": ("AdamWMSAM", of_torch("Adam", weight_decay=0.1), "another method"),
    "RMSprop's buffers": ("MSAM", of_torch("RMSprop", momentum=0.9), "square_avg"),
    "MSAM's for AdamW": ("AdamWMSAM", edited("MSAM", lambda s: None), "another method"),
    "AdamWMSAM's for SGD": ("MSAM", edited("AdamWMSAM", lambda s: None), "another method"),
    "foreign buffers": ("MSAM", edited("MSAM", lambda s: s["state"][0].update(delta=torch.ones(8, 6))), "delta"),
    "other parameters": ("MSAM", edited("MSAM", swap_first_two), "shape"),
    "no tensor": ("MSAM", edited("MSAM", lambda s: s["state"][0].update(momentum_buffer=1.0)), "float"),
    "no buffer": ("MSAM", edited("MSAM", without("momentum_buffer")), "momentum_buffer"),
    "no state": ("MSAM", edited("MSAM", lambda s: s["state"].clear()), "momentum_buffer"),
    "no copy": ("relative", relative(without("true_weight")), "true_weight"),
    "rho of NaN": ("MSAM", edited("MSAM", group_set(rho=float("nan"))), "rho"),
    "negative lr": ("MSAM", edited("MSAM", group_set(lr=-0.1)), "lr"),
    "negative decay": ("SAM", edited("MSAM", group_set(weight_decay=-0.1)), "weight_decay"),
    "infinite momentum": ("MSAM", edited("MSAM", group_set(momentum=float("inf"))), "momentum"),
    "betas": ("AdamWMSAM", edited("AdamWMSAM", group_set(betas=(1.0, 0.9))), "betas"),
    "decay nowhere": ("MSAM", edited("MSAM", group_set(weight_decay_at="here")), "weight_decay_at"),
    "no schedule": ("MSAM", edited("MSAM", group_set(rho={"schedule": "Cosinus"})), "Cosinus"),
    "Nesterov": ("MSAM", of_torch("SGD", lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
}


@pytest.mark.parametrize(("name", "state", "word"), REFUSED.values(), ids=REFUSED)
def test_a_refused_state_changes_nothing(name: str, state: Callable[[], Any], word: str) -> None:
    case = RELATIVE if name == "relative" else BY_NAME[name]
    model, opt = trained(case.make, closure=case.closure)
    before, saved = saved_state(opt), state()
    with pytest.raises(ValueError, match=word):
        opt.load_state_dict(saved)
    assert repr(opt.state_dict()) == repr(before)
    train(model, opt, [4], case.closure)


# Taken over.


def number_of_steps(saved: Any) -> None:
    for entries in saved["state"].values():
        entries["step"] = int(entries["step"])


@pytest.mark.parametrize("how", [{}, dict(foreach=True), dict(fused=True)], ids=str)
@pytest.mark.parametrize("name", ["AdamWMSAM", "AdamWSAM"])
def test_steps_that_are_numbers(name: str, how: dict[str, Any]) -> None:
    case = BY_NAME[name]
    make: Callable[[Any], Any] = lambda ps: case.make(ps, **how)  # noqa: E731
    model, opt = trained(make, closure=case.closure)
    saved = saved_state(opt)
    number_of_steps(saved)
    other = copy.deepcopy(model)
    resumed = make(other.parameters())
    resumed.load_state_dict(saved)
    train(model, opt, range(3, 6), case.closure)
    train(other, resumed, range(3, 6), case.closure)
    assert same(model.parameters(), other.parameters())


def authors_file(name: str, model: nn.Module) -> Any:
    """What the paper's authors save, at the true weights: their keys, numbers where torch has tensors."""
    generator = torch.Generator().manual_seed(5)
    buffers = [torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    indices = list(range(len(buffers)))
    if name == "MSAM":
        group: dict[str, Any] = dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=False, rho=0.3)
        group |= dict(inverse_norm_buffer=0.5, params=indices)
        return {"state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers)}, "param_groups": [group]}
    group = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, maximize=False, rho=0.3, norm_factor=[0.5])
    state = {i: {"step": 3, "exp_avg": b, "exp_avg_sq": b.square()} for i, b in enumerate(buffers)}
    return {"state": state, "param_groups": [group | {"params": indices}]}


@pytest.mark.parametrize("name", ["MSAM", "AdamWMSAM"])
def test_files_of_the_papers_authors(name: str) -> None:
    """Their buffers go on, from the true weights: the next step is torch's."""
    model, other = network(), network()
    saved = authors_file(name, model)
    opt = BY_NAME[name].make(model.parameters())
    opt.load_state_dict(copy.deepcopy(saved))
    assert not opt.perturbed
    assert opt.param_groups[0]["rho"] == 0.3
    plain: torch.optim.Optimizer
    if name == "MSAM":
        plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for p, entries in zip(other.parameters(), saved["state"].values(), strict=True):
            plain.state[p]["momentum_buffer"] = entries["momentum_buffer"].clone()
    else:
        plain = torch.optim.AdamW(other.parameters())
        saved["param_groups"][0] = plain.state_dict()["param_groups"][0]
        plain.load_state_dict(saved)
    train(model, opt, [0])
    train(other, plain, [0])
    assert furthest(true_weights(opt), other.parameters()) < 1e-14


def test_buffers_of_none_are_no_buffers() -> None:
    """Older SGD saves None before its first step; momentum accumulates from there."""
    model, other = network(), network()
    opt, plain = BY_NAME["SAM"].make(model.parameters()), BY_NAME["SAM"].make(other.parameters())
    state = saved_state(opt)
    state["state"] = {i: {"momentum_buffer": None} for i in range(5)}
    opt.load_state_dict(state)
    train(model, opt, range(3), True)
    train(other, plain, range(3), True)
    assert same(model.parameters(), other.parameters())


def test_adam_without_decay_is_adamw() -> None:
    model, plain = trained(lambda ps: torch.optim.Adam(ps, lr=0.01))
    opt = BY_NAME["AdamWMSAM"].make(model.parameters())
    opt.load_state_dict(saved_state(plain))
    train(model, opt, [3])
    assert opt.perturbed


def test_a_state_of_another_direction_leaves_no_copy() -> None:
    """Saved in eval mode it may change the perturbation; what was kept for the old one is gone."""
    model, opt = trained(general("sgd", dict(direction="last_gradient", rho=RHO)).make)
    opt.eval()
    assert "perturbed_weight" in opt.state[next(model.parameters())]
    other = BY_NAME["MSAM"].make(model.parameters())
    other.load_state_dict(saved_state(opt))
    assert not any("perturbed_weight" in state for state in other.state.values())


def test_hooks_see_the_callers_dictionary_first() -> None:
    """A hook may repair what would be refused; it sees what was saved, and the second hook what the first returned."""
    _, opt = trained(lambda ps: BY_NAME["MSAM"].make(ps, rho=msam.Jump(RHO, steps=1)))
    saved, seen = saved_state(opt), []
    saved["param_groups"][0]["momentum"] = 0.0
    callers = copy.deepcopy(saved)

    def repair(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(repr(state))
        fixed = copy.deepcopy(state)
        fixed["param_groups"][0]["momentum"] = 0.8
        return fixed

    opt.register_load_state_dict_pre_hook(repair)
    opt.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append(state["param_groups"][0]["momentum"]))
    opt.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.param_groups[0]["momentum"]))
    opt.load_state_dict(saved)
    assert seen == [repr(callers), 0.8, 0.8]
    assert repr(saved) == repr(callers)
    assert opt.param_groups[0]["rho"] == msam.Jump(RHO, steps=1)


# torch's checkpoints.

FLAT = [StateDictOptions(flatten_optimizer_state_dict=flat) for flat in (False, True)]
each_layout = pytest.mark.parametrize("layout", FLAT, ids=["nested", "flat"])


@each_case
def test_saved_state_has_the_keys_of_the_groups(case: Case) -> None:
    _, opt = trained(case.make, closure=case.closure)
    assert opt.state_dict()["param_groups"][0].keys() == opt.param_groups[0].keys()


@each_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", msam.PRESETS)
def test_checkpoints_of_torch_resume_in_fresh_objects(name: str, dtype: torch.dtype, layout: Any) -> None:
    model = network(dtype)
    opt = preset(name, model)
    closure = msam.PRESETS[name].direction == "gradient"
    train(model, opt, range(4), closure)
    opt.zero_grad()
    weights, state = get_state_dict(model, opt, options=layout)
    weights, state = copy.deepcopy((weights, state))
    other = network(dtype, seed=3)
    resumed = preset(name, other)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=layout)
    assert resumed.perturbed == opt.perturbed
    train(model, opt, range(4, 7), closure)
    train(other, resumed, range(4, 7), closure)
    assert same(model.parameters(), other.parameters())
    assert same(true_weights(opt), true_weights(resumed))


@each_layout
@each_case
def test_checkpoints_of_torch_in_eval_mode(case: Case, layout: Any) -> None:
    """The flat layout has no place for what a fresh optimizer does not hold: weights return but for rounding."""
    model, opt = trained(case.make, closure=case.closure)
    opt.zero_grad()
    opt.eval()
    weights, state = copy.deepcopy(get_state_dict(model, opt, options=layout))
    other = network(seed=3)
    resumed = case.make(other.parameters())
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=layout)
    assert same(true_weights(resumed), true_weights(opt))
    for net, optimizer in ((model, opt), (other, resumed)):
        optimizer.train()
        train(net, optimizer, range(3, 6), case.closure)
    assert furthest(model.parameters(), other.parameters()) < 1e-13


@each_layout
@each_case
@pytest.mark.usefixtures("process_group")
def test_checkpoint_files_of_torch(case: Case, layout: Any, tmp_path: Path) -> None:
    """``dcp.save`` and ``dcp.load``, which writes into the tensors of a fresh optimizer's state."""
    model, opt = trained(case.make, closure=case.closure)
    opt.zero_grad()
    other = network(seed=3)
    resumed = case.make(other.parameters())
    weights, state = get_state_dict(model, opt, options=layout)
    write_files({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "files")
    weights, state = get_state_dict(other, resumed, options=layout)
    whole: dict[str, Any] = {"model": weights, "optimizer": state}
    read_files(whole, checkpoint_id=tmp_path / "files")
    set_state_dict(other, resumed, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"], options=layout)
    train(model, opt, range(3, 6), case.closure)
    train(other, resumed, range(3, 6), case.closure)
    assert same(model.parameters(), other.parameters())


@each_layout
@pytest.mark.parametrize("name", msam.PRESETS)
def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(name: str, layout: Any) -> None:
    model, other = network(), network()
    opt, plain = preset(name, model), preset(name, other)
    before = snapshot(model.parameters())
    get_optimizer_state_dict(model, opt, options=layout)
    assert same(model.parameters(), before)
    assert not opt.perturbed
    assert int(opt.param_groups[0]["steps"]) == 0
    closure = msam.PRESETS[name].direction == "gradient"
    train(model, opt, range(4), closure)
    train(other, plain, range(4), closure)
    assert same(model.parameters(), other.parameters())


def test_a_first_step_at_rate_zero_is_a_step() -> None:
    """A warm-up that begins at 0: gradients are there, so it is no question for the state."""
    for name, closure in (("MSAM", False), ("SAM", True)):
        model = network()
        opt = BY_NAME[name].make(model.parameters())
        opt.param_groups[0]["lr"] = 0.0
        before = snapshot(model.parameters())
        train(model, opt, [0], closure)
        assert int(opt.param_groups[0]["steps"]) == 1
        assert opt.perturbed == (name == "MSAM")
        assert furthest(true_weights(opt), before) < 1e-15
    opt = BY_NAME["SAM"].make(model.parameters(), lr=torch.tensor(0.1))
    opt.param_groups[0]["lr"] = torch.tensor(0.0)
    closure_of(model, opt, 0)()
    with pytest.raises(RuntimeError, match="closure"):
        opt.step()


@each_layout
@pytest.mark.parametrize("name", ["MSAM", "SAM", "AdamWMSAM"])
def test_checkpoints_of_torch_with_a_learning_rate_that_is_a_tensor(name: str, layout: Any) -> None:
    case = BY_NAME[name]
    make: Callable[[Any], Any] = lambda ps: case.make(ps, lr=torch.tensor(0.01), foreach=False)  # noqa: E731
    model, opt = trained(make, closure=case.closure)
    opt.zero_grad()
    state = copy.deepcopy(get_optimizer_state_dict(model, opt, options=layout))
    other = copy.deepcopy(model)
    resumed = make(other.parameters())
    set_optimizer_state_dict(other, resumed, state, options=layout)
    train(model, opt, range(3, 6), case.closure)
    train(other, resumed, range(3, 6), case.closure)
    assert same(model.parameters(), other.parameters())


@each_layout
def test_groups_and_schedules_in_checkpoints_of_torch(layout: Any) -> None:
    def make(model: nn.Module) -> Any:
        tensors = list(model.parameters())
        groups = [{"params": tensors[:2], "rho": msam.Ramp(RHO, steps=9)}, {"params": tensors[2:], "lr": 0.01}]
        return msam.MSAM(groups, **SGD, rho=RHO)

    model, other = network(), network(seed=3)
    opt, resumed = make(model), make(other)
    train(model, opt, range(3))
    opt.zero_grad()
    state = copy.deepcopy(get_optimizer_state_dict(model, opt, options=layout))
    other.load_state_dict(saved_state(model))
    set_optimizer_state_dict(other, resumed, state, options=layout)
    assert [g["lr"] for g in resumed.param_groups] == [SGD["lr"], 0.01]
    train(model, opt, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model.parameters(), other.parameters())


# Strengths set by hand.

BAD: list[tuple[Any, type[Exception]]] = [
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    (-float("inf"), ValueError),
    (-0.1, ValueError),
    ("0.3", TypeError),
    (None, TypeError),
    ([0.3], TypeError),
    (True, TypeError),
    (torch.ones(2), ValueError),
]


@pytest.mark.parametrize(("rho", "error"), BAD, ids=[repr(value) for value, _ in BAD])
@each_case
def test_a_strength_set_by_hand_is_checked_before_anything_moves(case: Case, rho: Any, error: type[Exception]) -> None:
    model, opt = trained(case.make, closure=case.closure)
    opt.param_groups[0]["rho"] = rho
    before = [*snapshot(model.parameters()), *(v.clone() for s in opt.state.values() for v in s.values())]
    closure_of(model, opt, 3)()
    with pytest.raises(error, match="rho"):
        opt.first_step() if case.closure else opt.step()
    with pytest.raises(error, match="rho"):
        opt.step(closure_of(model, opt, 3))
    assert same([*model.parameters(), *(v for s in opt.state.values() for v in s.values())], before)
    opt.param_groups[0]["rho"] = 0.2
    train(model, opt, [3], case.closure)


class Doubtful(msam.Schedule):
    """A schedule of somebody else's."""

    def __call__(self, step: int, lr_ratio: Any = 1.0) -> Any:
        return float("nan") if step == 4 else 0.1


def test_a_schedule_that_gives_no_strength() -> None:
    """The step is taken, and the true weights are in place."""
    model, opt = trained(lambda ps: BY_NAME["MSAM"].make(ps, rho=Doubtful()))
    with pytest.raises(ValueError, match="rho"):
        train(model, opt, [3])
    assert not opt.perturbed


# Learning rates that begin at 0.


def strengths(opt: Any, model: nn.Module, rates: list[Any]) -> list[float]:
    """Length of ε after steps at these rates."""
    lengths = []
    for step, rate in enumerate(rates):
        opt.param_groups[0]["lr"] = rate
        train(model, opt, [step])
        lengths.append(float(sum(e.square().sum() for e in opt.displacement().values()) ** 0.5))
    return lengths


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_following_a_rate_that_begins_at_zero(as_tensor: bool) -> None:
    """In proportion to the largest rate so far; 0 at 0."""
    make: Callable[[float], Any] = (lambda x: torch.tensor(x, dtype=torch.float64)) if as_tensor else float
    model = network()
    opt = msam.MSAM(model.parameters(), lr=make(0.0), rho=msam.FollowLR(0.4), momentum=0.9, foreach=False)
    got = strengths(opt, model, [make(rate) for rate in (0.0, 0.01, 0.02, 0.01, 0.0, 0.04, 0.01)])
    assert got == pytest.approx([0.0, 0.4, 0.4, 0.2, 0.0, 0.4, 0.1])


def test_following_a_scheduler_that_warms_up_from_zero() -> None:
    """The scheduler's base is the rate of the constructor, so that the strength follows it in proportion."""
    model = network()
    opt = msam.MSAM(model.parameters(), lr=0.05, rho=msam.FollowLR(0.4), momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min(1.0, t / 4))
    lengths = []
    for step in range(6):
        train(model, opt, [step])
        lengths.append(sum(float(e.square().sum()) for e in opt.displacement().values()) ** 0.5)
        scheduler.step()
    assert lengths == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_largest_rate_is_saved() -> None:
    model = network()
    opt = msam.MSAM(model.parameters(), lr=0.0, rho=msam.FollowLR(0.4), momentum=0.9)
    strengths(opt, model, [0.0, 0.04])
    other = network()
    resumed = msam.MSAM(other.parameters(), lr=0.0, rho=msam.FollowLR(0.4), momentum=0.9)
    other.load_state_dict(saved_state(model))
    resumed.load_state_dict(saved_state(opt))
    assert strengths(resumed, other, [0.01]) == pytest.approx([0.1])
