"""States as ``torch.distributed.checkpoint`` carries them: by name, nested and flat, into fresh and used optimizers.

A flat state names every option of a group for every parameter, and a loader takes the keys that it has itself: a state
that gains keys while it trains would lose them. torch's own optimizers go through the same tests, as a control.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import msam

from .cases import BY_NAME, NAMED, RHO, Case, general, torch_twin
from .workloads import backward, furthest, loss, network, same, snapshot, train, true_weights

STEPS = 4
TORCH = [Case(f"torch-{base}", torch_twin(base), {"direction": None, "base": base}) for base in ("sgd", "adamw")]
OURS = [
    *NAMED,
    general("sgd", dict(direction="last_gradient", rho=RHO)),
    general("sgd", dict(direction="random", rho=RHO, seed=3)),
    general("sgd", dict(direction="momentum", rho=0.3, scale="adaptive")),
    general("adamw", dict(direction="random", rho=RHO, seed=3)),
    general("sgd", dict(direction="momentum", rho=msam.Ramp(RHO, steps=6))),
    general("sgd", dict(direction="momentum", rho=RHO), restore="copy"),
]
# without a count of steps: torch's own AdamW counts the one that is taken to make the buffers
ASKED = [case for case in [*TORCH, *OURS] if case.twin["direction"] != "random" and case.twin.get("base") != "adamw"]
ASKED = [case for case in ASKED if not isinstance(case.twin.get("rho"), msam.Schedule)]
each_case = pytest.mark.parametrize("case", [*TORCH, *OURS], ids=lambda case: case.name)
each_of_ours = pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
each_form = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def start(
    case: Case, steps: int, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> tuple[nn.Module, Any]:
    """A network and its optimizer, with the parameters in two groups, after some steps."""
    model = network(dtype, seed)
    tensors = list(model.parameters())
    opt = case.make([{"params": tensors[:2]}, {"params": tensors[2:]}], **more)
    train(model, opt, range(steps), case.closure)
    return model, opt


def through_a_file(state: Any) -> Any:
    """As a file of plain data brings it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def true(case: Case, opt: Any) -> list[Tensor]:
    """The true weights; torch's own optimizers have no others."""
    return true_weights(opt) if case in OURS else snapshot(p for group in opt.param_groups for p in group["params"])


def options(flat: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flat)


@pytest.mark.parametrize("used", [0, 2], ids=["fresh", "used"])
@each_form
@each_dtype
@each_case
def test_a_run_goes_on_bit_for_bit(case: Case, dtype: torch.dtype, flat: bool, used: int) -> None:
    """Weights and state together, of a run that has taken some steps, into a fresh run or one that took others."""
    model, opt = start(case, STEPS, dtype)
    weights, state = through_a_file(get_state_dict(model, opt, options=options(flat)))
    stored = snapshot(model.parameters())
    other, resumed = start(case, used, dtype, seed=1)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options(flat))
    assert same(other.parameters(), stored), "the weights are those that were loaded"
    assert same(true(case, resumed), true(case, opt))
    for net, optimizer in ((model, opt), (other, resumed)):
        train(net, optimizer, range(STEPS, 2 * STEPS), case.closure)
    assert same(model.parameters(), other.parameters())
    assert same(true(case, opt), true(case, resumed))


@each_form
@each_of_ours
def test_a_run_saved_in_eval_mode_goes_on(case: Case, flat: bool) -> None:
    model, opt = start(case, STEPS)
    opt.eval()
    weights, state = through_a_file(get_state_dict(model, opt, options=options(flat)))
    opt.train()
    other, resumed = start(case, 0, seed=1)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options(flat))
    resumed.train()
    for net, optimizer in ((model, opt), (other, resumed)):
        train(net, optimizer, range(STEPS, 2 * STEPS), case.closure)
    assert same(model.parameters(), other.parameters())


@each_form
@pytest.mark.parametrize("case", [c for c in OURS if c.closure], ids=lambda case: case.name)
def test_a_run_saved_between_the_passes_goes_on(case: Case, flat: bool) -> None:
    """Torch's flat form takes the names of buffers from a fresh optimizer, which has no copies: it is refused."""
    model, opt = start(case, STEPS)
    backward(loss(model, STEPS))
    opt.first_step(zero_grad=True)
    weights, state = through_a_file(get_state_dict(model, opt, options=options(flat)))
    other, resumed = start(case, 0, seed=1)
    if flat:
        with pytest.raises(ValueError, match="expected 'true_weight' of every displaced parameter"):
            set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options(flat))
        return
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options(flat))
    assert resumed.perturbed
    for net, optimizer in ((model, opt), (other, resumed)):
        with msam.frozen_batchnorm_statistics(net):
            backward(loss(net, STEPS))
        optimizer.second_step(zero_grad=True)
        train(net, optimizer, range(STEPS + 1, 2 * STEPS), case.closure)
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("steps", [0, STEPS], ids=["fresh", "stepped"])
@each_form
@each_case
def test_asking_for_the_state_moves_no_weight(case: Case, flat: bool, steps: int) -> None:
    """Of a fresh optimizer torch's function takes a step, with gradients and a learning rate of zero."""
    model, opt = start(case, steps)
    before, held = snapshot(model.parameters()), true(case, opt)
    get_optimizer_state_dict(model, opt, options=options(flat))
    assert same(model.parameters(), before)
    assert same(true(case, opt), held)


@each_form
@pytest.mark.parametrize("case", ASKED, ids=lambda case: case.name)
def test_training_goes_on_after_asking_a_fresh_optimizer(case: Case, flat: bool) -> None:
    """As if nobody had asked: without decay the buffers that torch's function leaves behind are zero."""
    (model, opt), (other, asked) = (start(case, 0, weight_decay=0.0) for _ in range(2))
    get_optimizer_state_dict(other, asked, options=options(flat))
    for net, optimizer in ((model, opt), (other, asked)):
        train(net, optimizer, range(3), case.closure)
    gap = furthest(other.parameters(), model.parameters())
    assert gap < 1e-6


@each_case
def test_a_state_has_one_schema(case: Case) -> None:
    """The keys of a fresh optimizer's groups are those of one that trained; a flat state is one of plain values."""
    opts = [start(case, steps)[1] for steps in (0, 1, STEPS)]
    keys = [[sorted(group) for group in opt.state_dict()["param_groups"]] for opt in opts]
    assert keys[0] == keys[1] == keys[2]
    states = [[sorted(state) for state in opt.state_dict()["state"].values()] for opt in opts]
    assert states[1] == states[2]


@each_case
def test_a_flat_state_names_every_value(case: Case) -> None:
    model, opt = start(case, STEPS)
    state = get_optimizer_state_dict(model, opt, options=options(flat=True))
    names = [name for name, _ in model.named_parameters()]
    assert all(key.startswith(("state.", "param_groups.")) for key in state)
    assert all(any(f".{name}." in key for name in names) for key in state)
    for name in names:
        found = {key.split(f".{name}.")[1] for key in state if key.startswith("param_groups.") and f".{name}." in key}
        assert {"lr", "weight_decay"} <= found


@each_form
@each_of_ours
def test_the_state_alone_into_a_run_with_its_weights(case: Case, flat: bool) -> None:
    """``set_optimizer_state_dict`` after the model has been loaded by other means."""
    model, opt = start(case, STEPS)
    state = through_a_file(get_optimizer_state_dict(model, opt, options=options(flat)))
    other, resumed = start(case, 0, seed=1)
    other.load_state_dict(through_a_file(model.state_dict()))
    set_optimizer_state_dict(other, resumed, state, options=options(flat))
    assert same(other.parameters(), model.parameters())
    assert same(true_weights(resumed), true_weights(opt))


# dcp.save warns that it assumes what no_dist=True says
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning:torch.distributed.checkpoint")
@each_form
@each_case
def test_a_checkpoint_on_disk(case: Case, flat: bool, tmp_path: Path) -> None:
    """Saved by one run; read into the state of a fresh one, in place, as the format wants it."""
    model, opt = start(case, STEPS)
    weights, state = get_state_dict(model, opt, options=options(flat))
    save({"model": weights, "optimizer": state}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    other, resumed = start(case, 0, seed=1)
    weights, state = get_state_dict(other, resumed, options=options(flat))
    room: dict[str, Any] = {"model": weights, "optimizer": state}
    load(room, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    set_state_dict(
        other, resumed, model_state_dict=room["model"], optim_state_dict=room["optimizer"], options=options(flat)
    )
    assert same(true(case, resumed), true(case, opt))
    for net, optimizer in ((model, opt), (other, resumed)):
        train(net, optimizer, range(STEPS, 2 * STEPS), case.closure)
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_nested_state_of_torch(base: str) -> None:
    """A run of torch's optimizer goes on with ours: its momentum counts, and nothing is displaced."""
    model = network(torch.float32)
    plain = torch_twin(base)(model.parameters())
    train(model, plain, range(STEPS))
    weights, state = through_a_file(get_state_dict(model, plain))
    other = network(torch.float32, 1)
    opt = BY_NAME["MSAM" if base == "sgd" else "AdamWMSAM"].make(other.parameters())
    set_state_dict(other, opt, model_state_dict=weights, optim_state_dict=state)
    assert same(true_weights(opt), model.parameters())
    assert not opt.perturbed
    train(model, plain, [STEPS])
    train(other, opt, [STEPS])
    assert furthest(true_weights(opt), model.parameters()) < 1e-6  # there and back in float32
    assert opt.perturbed
