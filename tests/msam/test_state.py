"""True and perturbed weights, the switch between them, and saving and resuming in either mode."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import msam

from .cases import ADAMW, BY_NAME, NAMED, RHO, SGD, Case, general, torch_twin
from .workloads import backward, furthest, loss, network, same, saved_state, snapshot, train, true_weights

EVERY = [
    *NAMED,
    general("sgd", dict(direction="last_gradient", rho=RHO)),
    general("sgd", dict(direction="random", rho=RHO, seed=3)),
    general("sgd", dict(direction="momentum", rho=0.3, scale="adaptive")),
    general("sgd", dict(direction="momentum", rho=0.3, scale="relative")),
    general("adamw", dict(direction="random", rho=RHO, seed=3)),
]
each_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
each_between = pytest.mark.parametrize("case", [c for c in EVERY if not c.closure], ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def start(case: Case, steps: int = 7, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A model and its optimizer after some steps."""
    model = network(dtype)
    opt = case.make(model.parameters())
    train(model, opt, range(steps), case.closure)
    return model, opt


def everything(model: nn.Module, opt: Any) -> list[torch.Tensor]:
    """Parameters, network buffers and optimizer buffers."""
    states = [v for p in model.parameters() for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
    return snapshot([*model.parameters(), *model.buffers(), *states])


@each_between
@each_dtype
def test_eval_and_train_are_idempotent_and_exact(case: Case, dtype: torch.dtype) -> None:
    model, opt = start(case, dtype=dtype)
    stored, displacement = snapshot(model.parameters()), opt.displacement()
    assert opt.perturbed
    opt.eval()
    true = snapshot(model.parameters())
    assert not opt.perturbed
    assert not same(stored, true)
    opt.eval()
    assert same(model.parameters(), true)
    opt.train()
    assert opt.perturbed
    assert same(model.parameters(), stored)
    opt.train()
    assert same(model.parameters(), stored)
    tolerance = 1e-6 if dtype is torch.float32 else 0.02
    moved = [w + displacement[p] for w, p in zip(true, model.parameters(), strict=True)]
    assert furthest(moved, stored) < tolerance


@each_case
def test_switching_changes_nothing_in_the_trajectory(case: Case) -> None:
    (model, opt), (other, plain) = start(case, 0), start(case, 0)
    for step in range(12):
        train(model, opt, [step], case.closure)
        with opt.unperturbed():
            pass
        opt.eval()
        opt.train()
        train(other, plain, [step], case.closure)
        assert same(everything(model, opt), everything(other, plain))


@each_case
def test_unperturbed_restores_after_an_exception(case: Case) -> None:
    model, opt = start(case)
    before, flag = snapshot(model.parameters()), opt.perturbed
    with pytest.raises(ZeroDivisionError), opt.unperturbed():
        raise ZeroDivisionError
    assert same(model.parameters(), before)
    assert opt.perturbed == flag


@each_between
def test_unperturbed_nests(case: Case) -> None:
    model, opt = start(case)
    before = snapshot(model.parameters())
    with opt.unperturbed():
        true = snapshot(model.parameters())
        with opt.unperturbed():
            assert same(model.parameters(), true)
        assert same(model.parameters(), true)
        assert not opt.perturbed
    assert same(model.parameters(), before)
    assert opt.perturbed


@each_between
def test_unperturbed_inside_eval_stays_in_eval(case: Case) -> None:
    model, opt = start(case)
    opt.eval()
    true = snapshot(model.parameters())
    with opt.unperturbed():
        assert same(model.parameters(), true)
    assert same(model.parameters(), true)
    assert not opt.perturbed


def test_perturbed_is_false_before_the_first_step_and_in_between_for_sam() -> None:
    model, opt = start(BY_NAME["MSAM"], 0)
    assert not opt.perturbed or all(float(e.abs().max()) == 0 for e in opt.displacement().values())
    model, opt = start(BY_NAME["SAM"])
    assert not opt.perturbed
    backward(loss(model, 0))
    before = snapshot(model.parameters())
    opt.first_step()
    assert opt.perturbed
    assert not same(model.parameters(), before)
    with opt.unperturbed():
        assert same(model.parameters(), before)
    backward(loss(model, 0))
    opt.second_step()
    assert not opt.perturbed


def test_true_weights_are_exact_between_the_passes_of_sam() -> None:
    """A second step at zero learning rate leaves the weights as they were, to the bit."""
    model, opt = start(BY_NAME["SAM"])
    opt.param_groups[0]["lr"] = 0.0
    before = snapshot(model.parameters())
    train(model, opt, range(5), closure=True)
    assert same(model.parameters(), before)


def test_first_step_is_idempotent() -> None:
    """A second call takes the first displacement back before it displaces along the gradient now there."""
    model, opt = start(BY_NAME["SAM"])
    backward(loss(model, 7))
    opt.first_step()
    moved = snapshot(model.parameters())
    opt.first_step()
    assert same(model.parameters(), moved)


def test_weights_changed_in_eval_are_displaced_from_where_they_are() -> None:
    model, opt = start(BY_NAME["MSAM"])
    displacement = {p: e.clone() for p, e in opt.displacement().items()}
    with opt.unperturbed(), torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        changed = snapshot(model.parameters())
    assert (
        furthest(model.parameters(), [w + displacement[p] for w, p in zip(changed, model.parameters(), strict=True)])
        < 1e-6
    )
    assert furthest(true_weights(opt), changed) < 1e-6


@pytest.mark.parametrize("mode", ["train", "eval", "unperturbed"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@each_case
@each_dtype
def test_resumes_bit_for_bit(case: Case, mode: str, used: bool, dtype: torch.dtype) -> None:
    model, opt = start(case, dtype=dtype)
    if mode == "unperturbed":
        with opt.unperturbed():
            weights, state = saved_state(model), saved_state(opt)
    else:
        getattr(opt, mode)()
        weights, state = saved_state(model), saved_state(opt)
        opt.train()
    train(model, opt, range(7, 14), case.closure)

    other, resumed = start(case, 3 if used else 0, dtype)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    resumed.train()
    train(other, resumed, range(7, 14), case.closure)
    assert same(everything(model, opt), everything(other, resumed))
    assert same(true_weights(opt), true_weights(resumed))


@each_case
def test_state_loaded_before_the_weights_resumes_too(case: Case) -> None:
    model, opt = start(case)
    weights, state = saved_state(model), saved_state(opt)
    other, resumed = start(case, 0)
    resumed.load_state_dict(state)
    other.load_state_dict(weights)
    train(model, opt, range(7, 14), case.closure)
    train(other, resumed, range(7, 14), case.closure)
    assert same(everything(model, opt), everything(other, resumed))


@each_between
def test_state_saved_in_eval_knows_its_mode(case: Case) -> None:
    model, opt = start(case)
    opt.eval()
    weights, state = saved_state(model), saved_state(opt)
    other, resumed = start(case, 0)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert not resumed.perturbed
    assert same(other.parameters(), model.parameters())
    assert same(true_weights(resumed), true_weights(opt))


@each_case
def test_state_dict_does_not_move_weights(case: Case) -> None:
    model, opt = start(case)
    before = everything(model, opt)
    opt.state_dict()
    assert same(everything(model, opt), before)


def pickled(things: Any) -> Any:
    """Whole objects through a file and back, as a trainer's checkpoint of its own making."""
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@each_case
def test_copies_continue_bit_for_bit(case: Case, mode: str, copied: Callable[[Any], Any]) -> None:
    model, opt = start(case)
    getattr(opt, mode)()
    other, twin = copied((model, opt))
    opt.train()
    twin.train()
    train(model, opt, range(7, 14), case.closure)
    train(other, twin, range(7, 14), case.closure)
    assert same(everything(model, opt), everything(other, twin))


def test_state_keys_are_those_of_torch() -> None:
    for case in NAMED:
        model, opt = start(case)
        other = torch_twin(case.twin.get("base", "sgd"))(model.parameters())
        train(network(torch.float32), other, [])
        plain = network(torch.float32)
        other = torch_twin(case.twin.get("base", "sgd"))(plain.parameters())
        train(plain, other, range(2))
        assert set(opt.state_dict()["state"][0]) == set(other.state_dict()["state"][0])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_state_of_torch_loads(base: str) -> None:
    """Training goes on from torch's own optimizer, with the momentum it had."""
    model = network(torch.float32)
    plain = torch_twin(base)(model.parameters())
    train(model, plain, range(7))
    other = copy.deepcopy(model)
    opt = (
        msam.MSAM(other.parameters(), **SGD, rho=0.0)
        if base == "sgd"
        else msam.AdamWMSAM(other.parameters(), **ADAMW, rho=0.0)
    )
    opt.load_state_dict(saved_state(plain))
    train(model, plain, range(7, 14))
    train(other, opt, range(7, 14))
    assert same(true_weights(opt), model.parameters())


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_torch_loads_our_state(base: str) -> None:
    model = network(torch.float32)
    opt = (
        msam.MSAM(model.parameters(), **SGD, rho=0.0)
        if base == "sgd"
        else msam.AdamWMSAM(model.parameters(), **ADAMW, rho=0.0)
    )
    train(model, opt, range(7))
    other = copy.deepcopy(model)
    plain = torch_twin(base)(other.parameters())
    plain.load_state_dict(saved_state(opt))
    train(model, opt, range(7, 14))
    train(other, plain, range(7, 14))
    assert same(true_weights(opt), other.parameters())


@each_case
def test_parameters_keep_their_storage(case: Case) -> None:
    """Nothing rebinds ``p.data``: graphs, flat buffers and shared parameters keep pointing at the weights."""
    model = network(torch.float32)
    opt = case.make(model.parameters())
    where = [p.data_ptr() for p in model.parameters()]
    train(model, opt, range(3), case.closure)
    opt.eval()
    assert [p.data_ptr() for p in model.parameters()] == where
    opt.train()
    assert [p.data_ptr() for p in model.parameters()] == where


@each_case
def test_gradients_are_left_as_backward_made_them(case: Case) -> None:
    """Weight decay and perturbation go nowhere near ``p.grad``."""
    model = network(torch.float32)
    opt = case.make(model.parameters())
    seen: list[list[torch.Tensor]] = []

    def keep(model: nn.Module, step: int) -> None:
        seen.append(snapshot(p.grad for p in model.parameters() if p.grad is not None))

    train(model, opt, range(4), case.closure, after_backward=keep)
    assert same((p.grad for p in model.parameters() if p.grad is not None), seen[-1])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["SAM", "ASAM", "AdamWSAM"])
def test_saved_between_the_passes_of_sam(name: str, mode: str) -> None:
    """Model and optimizer saved after ``first_step`` finish the step elsewhere, bit for bit."""
    model, opt = start(BY_NAME[name])
    backward(loss(model, 7))
    opt.first_step(zero_grad=True)
    getattr(opt, mode)()
    weights, state = saved_state(model), saved_state(opt)
    other, resumed = start(BY_NAME[name], 0)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert opt.perturbed == resumed.perturbed == (mode == "train")
    for net, optimizer in ((model, opt), (other, resumed)):
        optimizer.train()
        with msam.frozen_batchnorm_statistics(net):
            backward(loss(net, 7))
        optimizer.second_step(zero_grad=True)
        train(net, optimizer, range(8, 10), closure=True)
    assert same(everything(model, opt), everything(other, resumed))


def test_state_saved_in_eval_may_change_its_direction() -> None:
    """The true weights are in place, so that nothing along the old direction has to be taken back."""
    model, opt = start(general("sgd", dict(direction="last_gradient", rho=RHO)))
    opt.eval()
    other, resumed = start(BY_NAME["MSAM"], 0)
    other.load_state_dict(saved_state(model))
    resumed.load_state_dict(saved_state(opt))
    resumed.train()
    assert same(other.parameters(), model.parameters())
    train(other, resumed, range(7, 10))
    assert resumed.perturbed


def test_copied_filter_goes_by_name() -> None:
    model = network()
    subset = copy.deepcopy(msam.normalization_layers(model))
    opt = msam.MSAM(model.named_parameters(), rho=RHO, subset=subset, **SGD)
    train(model, opt, range(3))
    assert [p.shape == (8,) for p in model.parameters()] == [p in opt.displacement() for p in model.parameters()]
