"""With ``save_true_weights`` files hold the true weights, what is loaded counts as such, and training is as before.

The reference is ``optimizer.unperturbed()`` around the same question, which the tests of the displacement judge.
"""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam
from msam.integrations import save_true_weights, unwrapped

from .workloads import loss, network

Make = Callable[[Any], msam.PerturbedOptimizer]

MAKERS: dict[str, tuple[torch.dtype, Make]] = {
    "MSAM": (torch.float32, lambda p: msam.MSAM(p, lr=0.1, rho=0.5, weight_decay=0.01)),
    "MSAM, fused": (torch.float32, lambda p: msam.MSAM(p, lr=0.1, rho=0.5, fused=True)),
    "MSAM, copied": (torch.bfloat16, lambda p: msam.MSAM(p, lr=0.1, rho=0.5)),
    "AdamWMSAM": (torch.float64, lambda p: msam.AdamWMSAM(p, lr=0.01, rho=0.5)),
    "random": (
        torch.float32,
        lambda p: msam.PerturbedSGD(p, 0.1, 0.9, perturbation=msam.Perturbation(direction="random", rho=0.5)),
    ),
}


def trained(name: str, steps: int = 3, watched: bool = True) -> tuple[nn.Sequential, msam.PerturbedOptimizer]:
    dtype, make = MAKERS[name]
    model = network(dtype)
    optimizer = make(model.parameters())
    if watched:
        save_true_weights(model, optimizer)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def true_ones(model: nn.Module, optimizer: msam.PerturbedOptimizer) -> list[Tensor]:
    with optimizer.unperturbed():
        return [p.detach().clone() for p in model.parameters()]


def now(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def same(these: Any, those: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def through_a_file(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_holds_the_true_weights_and_nothing_moves(name: str) -> None:
    model, optimizer = trained(name)
    displaced, true = now(model), true_ones(model, optimizer)
    saved = model.state_dict()
    assert same([saved[key] for key, _ in model.named_parameters()], true)
    assert not same(displaced, true)
    assert same(model[0].state_dict().values(), true[:1])  # of a module in it
    optimizer.state_dict()
    assert same(now(model), displaced)
    assert optimizer.perturbed


@pytest.mark.parametrize("name", MAKERS)
def test_training_is_the_same_to_the_bit_with_saving_in_it(name: str) -> None:
    model, optimizer = trained(name, steps=0)
    twin, its = trained(name, steps=0, watched=False)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        model.state_dict()
        optimizer.state_dict()
        train(twin, its, range(step, step + 1))
        assert same(now(model), now(twin))


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_that_is_asked_for_in_inference_mode_does_not_stop_the_training(name: str) -> None:
    model, optimizer = trained(name)
    twin, its = trained(name)
    with torch.inference_mode():
        model.state_dict()
        optimizer.state_dict()
    train(model, optimizer, range(3, 5))
    train(twin, its, range(3, 5))
    assert same(now(model), now(twin))


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_training_goes_on_to_the_bit_from_a_file(name: str, model_first: bool) -> None:
    model, optimizer = trained(name)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(3, 6))

    other, its = trained(name, steps=1)  # loaded into one that has a displacement of its own
    if model_first:
        other.load_state_dict(saved["model"])
    its.load_state_dict(saved["optimizer"])
    if not model_first:
        other.load_state_dict(saved["model"])
    assert not its.perturbed
    with pytest.raises(RuntimeError, match="expected train mode"):
        its.step()
    its.train()
    train(other, its, range(3, 6))
    assert same(now(other), now(model))
    assert same(true_ones(other, its), true_ones(model, optimizer))


def test_weights_that_are_loaded_while_displaced_count_as_true() -> None:
    """As ``load_best_model_at_end`` loads; else the old displacement would be taken off the new weights."""
    model, optimizer = trained("MSAM")
    best = {key: torch.full_like(value, 0.25) for key, value in model.state_dict().items()}
    model.load_state_dict(best)
    optimizer.eval()
    assert all(bool((p == 0.25).all()) for p in model.parameters())


@pytest.mark.parametrize("climbed", [False, True])
def test_sam_between_its_two_calls(climbed: bool) -> None:
    """Its state then has the displaced weights in it, as a file of both modes has."""
    model = network(torch.float32)
    optimizer = msam.SAM(model.parameters(), lr=0.1, rho=0.5)
    save_true_weights(model, optimizer)
    true = now(model)
    loss(model, 0).backward()
    if climbed:
        optimizer.first_step(zero_grad=True)
        assert not same(now(model), true)
    displaced = now(model)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert same([saved["model"][key] for key, _ in model.named_parameters()], true)
    assert same(now(model), displaced)

    other = network(torch.float32, seed=1)
    its = msam.SAM(other.parameters(), lr=0.1, rho=0.5)
    other.load_state_dict(saved["model"])
    its.load_state_dict(saved["optimizer"])
    its.train()
    assert same(now(other), displaced)
    for each, which in ((model, optimizer), (other, its)):
        if not climbed:
            which.zero_grad()
            loss(each, 0).backward()
            which.first_step(zero_grad=True)
        loss(each, 0).backward()
        which.second_step()
    assert same(now(other), now(model))


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = msam.MSAM(model.parameters(), lr=0.1, rho=0.5)
    save_true_weights(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = model.state_dict()
    assert address(saved["0.weight"]) == address(saved["1.weight"]) != address(next(model.parameters()))


def test_the_parameters_themselves_are_handed_out_where_they_are_asked_for() -> None:
    model, _ = trained("MSAM")
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight


def test_in_eval_mode_nothing_is_copied() -> None:
    model, optimizer = trained("MSAM")
    optimizer.eval()
    assert address(model.state_dict()["0.weight"]) == address(next(model.parameters()))
    assert not optimizer.param_groups[0]["training"]


def test_a_wrapper_of_the_model_is_seen_through() -> None:
    model, optimizer = trained("MSAM")
    saved = nn.ModuleDict({"module": model}).state_dict()
    assert same([saved[f"module.{key}"] for key, _ in model.named_parameters()], true_ones(model, optimizer))


def test_an_interrupted_state_is_over_with_the_next_one() -> None:
    model, optimizer = trained("MSAM")

    def fail(*_: Any) -> None:
        raise OSError("full")

    broken = model[2].register_state_dict_pre_hook(fail)
    for prefix in ("", "module."):
        with pytest.raises(OSError, match="full"):
            model.state_dict(prefix=prefix)
        assert not optimizer.perturbed  # a step now would say so
        optimizer.train()
    broken.remove()
    true = true_ones(model, optimizer)
    assert same([model.state_dict()[key] for key, _ in model.named_parameters()], true)
    assert optimizer.perturbed


def test_a_copy_of_the_model_is_left_alone() -> None:
    model, optimizer = trained("MSAM")
    average = copy.deepcopy(model)
    saved = average.state_dict()
    assert same([saved[key] for key, _ in average.named_parameters()], now(model))
    average.load_state_dict(saved)
    assert optimizer.perturbed


def test_a_pickled_module_warns_if_it_is_displaced() -> None:
    model, optimizer = trained("MSAM")
    with pytest.warns(UserWarning, match="expected the true weights where a whole module is pickled"):
        pickle.dumps(model)
    with optimizer.unperturbed():
        again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
    assert same([again.state_dict()[key] for key, _ in again.named_parameters()], true_ones(model, optimizer))


def test_a_later_optimizer_takes_the_place_of_an_earlier_one() -> None:
    """Which thinks that its displacement still stands, and is freed when the loop lets go of it."""
    model, first = trained("MSAM")
    first.eval()
    first.train()
    second = msam.MSAM(model.parameters(), lr=0.1, rho=0.5)
    save_true_weights(model, second)
    before = now(model)
    assert same([model.state_dict()[key] for key, _ in model.named_parameters()], before)
    assert first.perturbed
    gone = weakref.ref(second)
    del second
    assert gone() is None
    assert same([model.state_dict()[key] for key, _ in model.named_parameters()], before)


def test_parameters_that_join_later() -> None:
    model = network(torch.float32)
    optimizer = msam.MSAM(model[0].parameters(), lr=0.1, rho=0.5)
    save_true_weights(model, optimizer)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    train(model, optimizer, range(2))
    saved = model.state_dict()
    assert same([saved[key] for key, _ in model.named_parameters()], true_ones(model, optimizer))
    assert not torch.equal(saved["3.weight"], dict(model.named_parameters())["3.weight"])


def test_removed_and_there_is_no_trace() -> None:
    model = network(torch.float32)
    optimizer = msam.MSAM(model.parameters(), lr=0.1, rho=0.5)
    handle = save_true_weights(model, optimizer)
    train(model, optimizer, range(2))
    handle.remove()
    handle.remove()
    assert same([model.state_dict()[key] for key, _ in model.named_parameters()], now(model))
    assert optimizer.state_dict()["param_groups"][0]["training"]


def test_other_optimizers_are_left_alone() -> None:
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert unwrapped(optimizer) is None
    save_true_weights(model, optimizer)
    train(model, optimizer, range(2))
    assert address(model.state_dict()["0.weight"]) == address(next(model.parameters()))
