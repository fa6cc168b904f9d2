"""The object that owns the displacement: its way there and back under every policy, and what it leaves in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import msam
from msam.perturbation import global_norm

from . import reference
from .cases import BY_NAME, NAMED, RHO, SGD, Case, general
from .workloads import (
    Twin,
    assert_network,
    backward,
    furthest,
    loss,
    network,
    same,
    saved_state,
    snapshot,
    train,
    true_weights,
)

EVERY = [
    *NAMED,
    general("sgd", dict(direction="last_gradient", rho=RHO)),
    general("sgd", dict(direction="random", rho=RHO)),
    general("sgd", dict(direction="momentum", rho=RHO, scale="relative")),
]
each_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


@each_case
def test_an_optimizer_is_freed_with_its_last_reference(case: Case) -> None:
    """As torch's own: no cycle keeps its buffers until the collector comes."""
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(2), case.closure)
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("restore", ["auto", "subtract", "copy"])
def test_scalars_and_copies_keep_their_memory(restore: str) -> None:
    """A captured graph finds them where they were."""
    model = network()
    opt = BY_NAME["MSAM"].make(model.parameters(), restore=restore)
    train(model, opt, range(2))

    def places() -> list[int]:
        copies = [state["true_weight"] for state in opt.state.values() if "true_weight" in state]
        return [tensor.data_ptr() for tensor in (opt.param_groups[0]["applied"], *copies)]

    before, applied = places(), opt.param_groups[0]["applied"].clone()
    assert len(before) == (1 + len(list(model.parameters())) if restore == "copy" else 1)
    train(model, opt, range(2, 4))
    assert places() == before
    assert not torch.equal(opt.param_groups[0]["applied"], applied)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("after", ["auto", "subtract", "copy"])
@pytest.mark.parametrize("before", ["auto", "copy"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_state_saved_under_another_policy_goes_on(before: str, after: str, fused: bool, mode: str) -> None:
    model, other, case = network(), network(), BY_NAME["MSAM"]
    opt = case.make(model.parameters(), restore=before)
    train(model, opt, range(5))
    getattr(opt, mode)()
    resumed = case.make(other.parameters(), restore=after)
    other.load_state_dict(saved_state(model))
    resumed.load_state_dict(saved_state(opt))
    resumed.param_groups[0]["fused"] = fused  # in the state it is what it was
    resumed.train()
    train(other, resumed, range(5, 10))
    twin = Twin(network())
    states = reference.trajectory(twin, twin.weights, 10, **case.twin)
    assert_network(other, resumed, states[-1].weights, twin)
    assert all(("true_weight" in state) == (after == "copy") for state in resumed.state.values())


@each_case
def test_displacement_is_the_same_in_both_modes(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(4), case.closure)
    if case.closure:
        backward(loss(model, 4))
        opt.first_step(zero_grad=True)  # what stands is known without the gradient
    shift = {p: e.clone() for p, e in opt.displacement().items()}
    assert shift
    opt.eval()
    assert opt.displacement().keys() == shift.keys()
    assert furthest(opt.displacement().values(), shift.values()) < 1e-13
    assert not opt.perturbed


def test_suspended_weights_share_no_memory_with_what_is_kept() -> None:
    model = network(torch.float32)
    opt = BY_NAME["MSAM"].make(model.parameters())
    train(model, opt, range(3))
    stored = snapshot(model.parameters())
    opt.eval()
    assert same([opt.state[p]["perturbed_weight"] for p in model.parameters()], stored)
    opt.train()
    assert not any("perturbed_weight" in state for state in opt.state.values())


def test_group_added_between_the_passes_of_sam() -> None:
    model, late = network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = BY_NAME["SAM"].make(model.parameters())
    backward(loss(model, 0))
    before = snapshot(model.parameters())
    opt.first_step()
    opt.add_param_group({"params": [late], "lr": 0.0})
    assert furthest(true_weights(opt)[:-1], before) == 0
    opt.param_groups[0]["lr"] = 0.0
    opt.second_step()
    assert same(model.parameters(), before)


def test_one_of_two_groups_is_displaced() -> None:
    model = network()
    tensors = list(model.parameters())
    opt = BY_NAME["MSAM"].make([{"params": tensors[:2], "perturb": False}, {"params": tensors[2:]}])
    train(model, opt, range(3))
    assert opt.perturbed
    assert opt.displacement().keys() == set(tensors[2:])


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_a_strength_of_zero_takes_back_what_stands(fused: bool) -> None:
    """Also after a fused step, which leaves the weights displaced."""
    model = network()
    opt = BY_NAME["MSAM"].make(model.parameters(), fused=fused)
    train(model, opt, range(3))
    assert opt.perturbed
    opt.param_groups[0]["rho"] = 0.0
    train(model, opt, [3])
    assert not opt.perturbed
    assert opt.displacement() == {}
    assert same(model.parameters(), true_weights(opt))


@pytest.mark.parametrize("name", ["MSAM", "NAG", "SAM", "AdamWSAM"])
def test_no_copy_lasts_where_none_is_needed(name: str) -> None:
    model = network(torch.float32)
    opt = BY_NAME[name].make(model.parameters())
    train(model, opt, range(2), BY_NAME[name].closure)
    assert not any("true_weight" in state for state in opt.state.values())


def climb(model: nn.Module, opt: Any, step: int) -> list[torch.Tensor]:
    """SAM's first pass; the copies of the true weights that stand after it."""
    opt.zero_grad()
    backward(loss(model, step))
    opt.first_step(zero_grad=True)
    return [opt.state[p]["true_weight"] for p in model.parameters()]


def test_copies_of_sam_lie_where_they_lay() -> None:
    """New memory in every step would cost as much time as the rest of it."""
    model = network(torch.float32)
    opt = BY_NAME["SAM"].make(model.parameters())
    places = []
    for step in range(3):
        places.append([copy.data_ptr() for copy in climb(model, opt, step)])
        backward(loss(model, step))
        opt.second_step()
    assert places[0] == places[1] == places[2]


def test_copies_that_were_handed_out_are_not_written() -> None:
    """Another optimizer that took a state between the two passes returns to the true weights of then."""
    model, other = network(torch.float32), network(torch.float32)
    opt, taker = BY_NAME["SAM"].make(model.parameters()), BY_NAME["SAM"].make(other.parameters())
    before = snapshot(climb(model, opt, 0))
    other.load_state_dict(saved_state(model))
    taker.load_state_dict(opt.state_dict())
    for step in range(3):
        backward(loss(model, step))
        opt.second_step()
        climb(model, opt, step)
    assert same(true_weights(taker), before)


def test_copies_follow_the_precision() -> None:
    """``model.to(dtype)`` between two steps: the copy of before does not fit."""
    model = network(torch.float64)
    opt = BY_NAME["SAM"].make(model.parameters())
    climb(model, opt, 0)
    backward(loss(model, 0))
    opt.second_step()
    model.to(torch.float32)
    opt.zero_grad()
    true = snapshot(model.parameters())
    copies = climb(model, opt, 1)
    assert {copy.dtype for copy in copies} == {torch.float32}
    assert same(copies, true)
    opt.eval()
    assert same(model.parameters(), true)


@pytest.mark.parametrize("scale", ["none", "relative"])
def test_copies_last_only_while_the_weights_are_displaced(scale: str) -> None:
    """The last gradient is subtracted; scaled by weights it is copied, until eval mode puts the copy in place."""
    model = network(torch.float32)
    opt = general("sgd", dict(direction="last_gradient", rho=RHO, scale=scale)).make(model.parameters())
    train(model, opt, range(2))
    assert all(("true_weight" in state) == (scale == "relative") for state in opt.state.values())
    opt.eval()
    assert not any("true_weight" in state for state in opt.state.values())


def test_ten_thousand_weights_return_to_the_bit() -> None:
    """Subtracting and adding alone would not bring all of them back."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(10_000, generator=generator))
    opt = msam.MSAM([weight], **SGD, rho=30.0)
    weight.grad = torch.randn(10_000, generator=generator)
    opt.step()
    stored, shift = weight.detach().clone(), opt.displacement()[weight]
    assert not torch.equal((stored - shift) + shift, stored)
    opt.eval()
    opt.train()
    assert torch.equal(weight, stored)


def test_subtracting_keeps_no_copy_in_any_precision() -> None:
    model = network(torch.bfloat16)
    opt = BY_NAME["MSAM"].make(model.parameters(), restore="subtract")
    train(model, opt, range(2))
    assert opt.perturbed
    assert not any("true_weight" in state for state in opt.state.values())


def test_a_state_of_more_groups_is_refused() -> None:
    tensors = list(network().parameters())
    opt = BY_NAME["MSAM"].make([{"params": tensors[:2]}, {"params": tensors[2:]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        BY_NAME["MSAM"].make(tensors[:2]).load_state_dict(opt.state_dict())


def test_a_group_of_strength_zero_beside_another() -> None:
    model = network()
    tensors = list(model.parameters())
    opt = BY_NAME["MSAM"].make([{"params": tensors[:2], "rho": 0.0}, {"params": tensors[2:]}])
    train(model, opt, range(3))
    lengths = [float(opt.displacement()[p].norm()) for p in tensors]
    assert lengths[:2] == [0.0, 0.0]
    assert min(lengths[2:]) > 0


def test_two_passes_of_sam_at_strength_zero() -> None:
    model, other = network(), network()
    opt, plain = BY_NAME["SAM"].make(model.parameters(), rho=0.0), torch.optim.SGD(other.parameters(), **SGD)
    for step in range(3):
        backward(loss(model, step))
        opt.first_step()
        opt.second_step(zero_grad=True)
    train(other, plain, range(3))
    assert same(model.parameters(), other.parameters())


def test_two_precisions_in_a_group_come_back_each_in_its_way() -> None:
    """float32 is subtracted, bfloat16 copied, in one group and to the bit where it is copied."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = msam.MSAM([a, b], **{**SGD, "lr": 0.0, "weight_decay": 0.0}, rho=RHO)
    for step in range(6):
        a.grad, b.grad = torch.full_like(a, step - 2.0), torch.full_like(b, 1.0)
        opt.step()
        assert opt.perturbed
    assert ["true_weight" in opt.state[p] for p in (a, b)] == [False, True]
    opt.eval()
    assert furthest([a], [torch.ones(3)]) < 1e-6
    assert torch.equal(b, torch.ones_like(b))


# The norm.

NORMS: dict[str, list[torch.Tensor]] = {
    "empty": [],
    "one": [torch.full((4,), 0.5)],
    "many pieces": [torch.rand(3_000_001, generator=torch.Generator().manual_seed(0))],
    "not contiguous": [torch.arange(12.0).view(3, 4).T, torch.ones(2)],
    "bfloat16": [torch.full((300,), 0.5, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)],
    "next to nothing": [torch.full((7,), 1e-23), torch.full((200_000,), 3e-23)],
    "subnormal": [torch.full((7,), 1e-42)],
    "large": [torch.full((7,), 1e18), torch.full((200_000,), 3e18)],
    "next to nothing beside zeros": [torch.zeros(9), torch.full((3,), -1e-30)],
    "large in bfloat16": [torch.full((300,), 2.0**100, dtype=torch.bfloat16)],
    "small in bfloat16": [torch.full((300,), 2.0**-100, dtype=torch.bfloat16)],
    "large in half precision": [torch.full((300,), 6e4, dtype=torch.float16)],
    "not contiguous, large": [torch.full((3, 4), 1e25).T],
    "small in two precisions": [torch.full((3,), 1e-25), torch.full((3,), 1e-25, dtype=torch.float64)],
    "zeros": [torch.zeros(5), torch.zeros(2, 2)],
    "three precisions": [torch.ones(3, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16)],
}


@pytest.mark.parametrize("tensors", NORMS.values(), ids=NORMS)
def test_norm_over_all(tensors: list[Any]) -> None:
    """Three million squares in one float32 sum would be off by more than this."""
    expected = sum(float(t.double().square().sum()) for t in tensors) ** 0.5
    norm = global_norm(tensors)
    assert float(norm) == pytest.approx(expected, rel=2e-6 if expected > 1e-38 else 0.1, abs=0.0)
    assert norm.dtype == (torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32)


@pytest.mark.parametrize("size", [1e-23, 1e18, 1e-30, 1e25])
@pytest.mark.parametrize("name", ["MSAM", "SAM", "ASAM", "AdamWMSAM", "AdamWSAM"])
def test_gradients_of_any_size_displace_by_rho(name: str, size: float) -> None:
    """ε has its length and its direction, in float32."""
    weight = nn.Parameter(torch.ones(3, 4))
    opt = BY_NAME[name].make([weight], lr=0.0, weight_decay=0.0)
    pattern = torch.arange(1.0, 13.0).view(3, 4)
    weight.grad = size * pattern
    if BY_NAME[name].closure:
        opt.first_step()
    else:
        opt.step()
    sign = 1 if BY_NAME[name].closure else -1
    expected = sign * RHO * pattern.double() / pattern.double().norm()
    assert furthest(opt.displacement().values(), [expected]) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_that_is_not_finite(bad: float) -> None:
    assert not torch.isfinite(global_norm([torch.ones(3), torch.tensor([1.0, bad])]))


def test_a_direction_too_short_to_be_scaled_displaces_nothing() -> None:
    """ρ / ‖v‖ would overflow."""
    weight = nn.Parameter(torch.ones(3))
    opt = msam.MSAM([weight], lr=0.0, rho=0.3)
    weight.grad = torch.full_like(weight, 1e-40)
    opt.step()
    assert torch.equal(weight, torch.ones(3))
    assert not opt.displacement()[weight].any()
