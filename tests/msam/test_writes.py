"""Others write to displaced weights: what was written counts as the true weights, whatever wrote it, and is said."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune, vector_to_parameters

import msam

from .cases import BY_NAME, NAMED, RHO, SGD, Case, general
from .workloads import backward, closure_of, furthest, loss, network, same, saved_state, snapshot, train, true_weights

SAID = pytest.warns(UserWarning, match=r"true weights.*unperturbed\(\)")


def preset(name: str, model: nn.Module, restore: str = "auto", **more: Any) -> Any:
    """The optimizer of a preset, with a strength that leaves the network stable."""
    row = msam.PRESETS[name]
    rho = min(row.rho, RHO)
    perturbation = row(rho, subset=msam.normalization_layers(model)) if row.normalization_only else row(rho)
    if row.optimizer == "adamw":
        return msam.PerturbedAdamW(model.parameters(), perturbation=perturbation, restore=restore, **more)  # type: ignore[arg-type]
    return msam.PerturbedSGD(model.parameters(), **{**SGD, **more}, perturbation=perturbation, restore=restore)  # type: ignore[arg-type]


def displace(model: nn.Module, opt: Any, steps: int = 3) -> None:
    """Train until the weights are displaced; SAM's are between its passes."""
    climbs = opt.perturbation.direction == "gradient"
    train(model, opt, range(steps), climbs)
    if climbs:
        closure_of(model, opt, steps)()
        opt.first_step(zero_grad=True)
    assert opt.perturbed


def policies(name: str) -> list[str]:
    lasts = msam.PRESETS[name](subset=lambda n, p: True).lasts
    return ["auto", "copy", "subtract"] if lasts else ["auto", "copy"]


EVERY = [
    (name, restore, dtype)
    for name in msam.PRESETS
    for restore in policies(name)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "restore", "dtype"), EVERY, ids=lambda value: str(value).removeprefix("torch."))
def test_weights_loaded_while_displaced_are_the_true_ones(name: str, restore: str, dtype: torch.dtype) -> None:
    """Early stopping's ``model.load_state_dict(best)``, in all methods, policies and precisions, to the bit."""
    model, best = network(dtype), saved_state(network(dtype, seed=7))
    opt = preset(name, model, restore)
    displace(model, opt)
    model.load_state_dict(best)
    with SAID:
        opt.eval()
    assert same(model.state_dict().values(), best.values())
    opt.train()
    assert same(model.state_dict().values(), best.values())
    train(model, opt, [4], msam.PRESETS[name].direction == "gradient")


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("decay", ["true", "perturbed"])
@pytest.mark.parametrize("name", ["msam", "nag", "adaptive_msam", "random", "last_gradient", "sam", "asam"])
def test_the_next_step_starts_from_what_was_loaded(name: str, decay: str, fused: bool) -> None:
    """It is the step of torch's SGD from there, with the momentum there was and the gradient that is in place."""
    model, other = network(), network(seed=7)
    opt = preset(name, model, weight_decay_at=decay, fused=fused)
    displace(model, opt)
    plain = torch.optim.SGD(other.parameters(), **SGD)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        plain.state[q]["momentum_buffer"] = opt.state[p]["momentum_buffer"].clone()
    model.load_state_dict(saved_state(other))
    train(other, plain, [4])
    closure_of(model, opt, 4)()
    with SAID:
        opt.step()
    assert furthest(true_weights(opt), other.parameters()) < 1e-12


# What writes, and which of the network's parameters it writes.

FIRST, ALL = (0,), (0, 1, 2, 3, 4)
OTHER = network(torch.float32, seed=7)


def without_gradient(write: Callable[[list[Any]], Any]) -> Callable[[nn.Module], Any]:
    def act(model: nn.Module) -> None:
        with torch.no_grad():
            write(list(model.parameters()))

    return act


def assign(model: nn.Module) -> None:
    model.get_parameter("0.weight").data = 2 * OTHER.get_parameter("0.weight").detach()


def remove_pruned(model: nn.Module) -> None:
    layer: Any = model.get_submodule("0")
    prune.l1_unstructured(layer, "weight", amount=5)
    prune.remove(layer, "weight")


def broadcast(model: nn.Module) -> None:
    nn.parallel.DistributedDataParallel(model)


def inference(model: nn.Module) -> None:
    with torch.inference_mode():
        next(model.parameters()).copy_(OTHER.get_parameter("0.weight"))


def another_optimizer(model: nn.Module) -> None:
    backward(loss(model, 0))
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=True).step()


def another_of_ours(model: nn.Module) -> None:
    other = msam.MSAM(model.parameters(), lr=0.1, rho=RHO)
    backward(loss(model, 0))
    other.step()
    other.eval()


def loaded_and_moved(model: nn.Module) -> None:
    model.load_state_dict(OTHER.state_dict())
    model.share_memory()


def averaged(model: nn.Module) -> None:
    for p, q in zip(model.parameters(), OTHER.parameters(), strict=True):
        p.detach().mul_(0.5).add_(q.detach(), alpha=0.5)


WRITES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "load_state_dict": (lambda model: model.load_state_dict(OTHER.state_dict()), ALL),
    "one layer loaded": (lambda model: model[0].load_state_dict(OTHER[0].state_dict()), FIRST),
    "clamp_": (without_gradient(lambda ps: [p.clamp_(-0.1, 0.1) for p in ps]), ALL),
    "mask": (without_gradient(lambda ps: ps[0].mul_(ps[0] > 0)), FIRST),
    "item": (without_gradient(lambda ps: ps[0].__setitem__(0, 1.0)), FIRST),
    "foreach": (without_gradient(lambda ps: torch._foreach_mul_(ps, 0.5)), ALL),
    "foreach copy": (without_gradient(lambda ps: torch._foreach_copy_(ps, list(OTHER.parameters()))), ALL),
    "average": (averaged, ALL),
    "init": (lambda model: nn.init.xavier_uniform_(model[0].weight), FIRST),
    "reset_parameters": (lambda model: model[0].reset_parameters(), FIRST),
    "p.data = ": (assign, FIRST),
    "vector_to_parameters": (lambda model: vector_to_parameters(torch.linspace(-1, 1, 91), model.parameters()), ALL),
    "pruned for good": (remove_pruned, FIRST),
    "swap_tensors": (lambda model: torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(8, 6))), FIRST),
    "inference_mode": (inference, FIRST),
    "torch's SGD": (another_optimizer, ALL),
    "another MSAM": (another_of_ours, ALL),
    "loaded, then moved": (loaded_and_moved, ALL),
    "DistributedDataParallel": (broadcast, ALL),
}
WAYS = [("msam", "auto"), ("msam", "copy"), ("relative_msam", "auto"), ("last_gradient", "auto"), ("sam", "auto")]
each_way = pytest.mark.parametrize(("name", "restore"), WAYS)


@each_way
@pytest.mark.parametrize(("write", "which"), WRITES.values(), ids=WRITES)
@pytest.mark.usefixtures("process_group")
def test_what_was_written_counts_and_the_rest_is_taken_back(
    name: str, restore: str, write: Any, which: tuple[int, ...]
) -> None:
    model, untouched = network(torch.float32), network(torch.float32)
    opt, twin = preset(name, model, restore), preset(name, untouched, restore)
    displace(model, opt)
    displace(untouched, twin)
    write(model)
    written, true = snapshot(opt.param_groups[0]["params"]), true_weights(twin)
    with SAID:
        opt.eval()
    expected = [written[i] if i in which else true[i] for i in range(len(true))]
    assert same(opt.param_groups[0]["params"], expected)


# What moves weights, and writes none.

MOVES: dict[str, Callable[[Any], Any]] = {
    "there and back": lambda model: model.double().float(),
    "shared memory": lambda model: model.share_memory(),
    "layout": lambda model: setattr(model[0].weight, "data", model[0].weight.data.T.contiguous().T),
    "p.data of its own": lambda model: setattr(model[0].weight, "data", model[0].weight.data),
}


@each_way
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_weights_are_taken_back(name: str, restore: str, move: Any) -> None:
    model, untouched = network(torch.float32), network(torch.float32)
    opt, twin = preset(name, model, restore), preset(name, untouched, restore)
    displace(model, opt)
    displace(untouched, twin)
    move(model)
    assert same(true_weights(opt), true_weights(twin))


@each_way
def test_weights_of_another_precision_are_taken_back(name: str, restore: str) -> None:
    """``model.to(torch.bfloat16)`` rounds, and writes nothing else."""
    model, untouched = network(torch.float32), network(torch.float32)
    opt, twin = preset(name, model, restore), preset(name, untouched, restore)
    displace(model, opt)
    displace(untouched, twin)
    model.to(torch.bfloat16)
    opt.eval()
    assert furthest(model.parameters(), true_weights(twin)) < 0.01


def test_memory_given_back_by_a_framework_is_not_read() -> None:
    """A storage of no bytes, as frameworks that gather weights leave behind."""
    model = network(torch.float32)
    opt = preset("msam", model)
    displace(model, opt)
    weight = model.get_parameter("0.weight")
    old = weight.data
    weight.data = torch.ones_like(weight)
    old.untyped_storage().resize_(0)
    with SAID:
        opt.eval()
    assert torch.equal(weight, torch.ones_like(weight))


# Where it is noticed: at every entrance.

ENTRANCES: dict[str, Callable[[Any], Any]] = {
    "eval": lambda opt: opt.eval(),
    "unperturbed": true_weights,
    "displacement": lambda opt: opt.displacement(),
    "perturbed": lambda opt: opt.perturbed,
    "state_dict": lambda opt: opt.state_dict(),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES)
@each_way
def test_every_entrance_notices(name: str, restore: str, enter: Any) -> None:
    model = network(torch.float32)
    opt = preset(name, model, restore)
    displace(model, opt)
    model.load_state_dict(OTHER.state_dict())
    with SAID:
        enter(opt)
    assert not opt.perturbed
    assert opt.displacement() == {}
    assert same(true_weights(opt), OTHER.parameters())


def test_a_state_saved_after_loading_resumes_there() -> None:
    model = network(torch.float32)
    opt = preset("msam", model)
    displace(model, opt)
    model.load_state_dict(OTHER.state_dict())
    with SAID:
        state = saved_state(opt)
    other = network(torch.float32)
    resumed = preset("msam", other)
    other.load_state_dict(saved_state(model))
    resumed.load_state_dict(state)
    assert same(true_weights(resumed), OTHER.parameters())


def test_writing_after_every_step() -> None:
    """A projection of displaced weights is what it is: true from then on; inside ``unperturbed`` it needs no word."""
    model, other = network(), network()
    opt, twin = preset("msam", model), preset("msam", other)
    for step in range(3):
        train(model, opt, [step])
        with torch.no_grad():
            expected = model.get_parameter("0.weight").clamp_(-0.1, 0.1).clone()
        with SAID:
            assert torch.equal(true_weights(opt)[0], expected)
        train(other, twin, [step])
        with twin.unperturbed(), torch.no_grad():
            other.get_parameter("0.weight").clamp_(-0.1, 0.1)
        assert float(true_weights(twin)[0].abs().max()) <= 0.1 + 1e-12


@each_way
def test_writes_between_writes_of_ours_are_told_once(name: str, restore: str) -> None:
    model = network(torch.float32)
    opt = preset(name, model, restore)
    displace(model, opt)
    model[0].load_state_dict(OTHER[0].state_dict())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.eval()
        opt.train()
        opt.eval()
    assert len(seen) == 1


def test_both_orders_of_loading_resume() -> None:
    """The weights that belong to a state may be loaded before it or after it, into fresh objects or trained ones."""
    model = network(torch.float32)
    opt = preset("msam", model)
    displace(model, opt)
    weights, state, true = saved_state(model), saved_state(opt), true_weights(opt)
    for trained, weights_first in itertools.product((False, True), repeat=2):
        other = network(torch.float32, seed=3)
        resumed = preset("msam", other)
        if trained:
            displace(other, resumed, 5)
        if weights_first:
            other.load_state_dict(weights)
        resumed.load_state_dict(state)
        if not weights_first:
            other.load_state_dict(weights)
        assert resumed.perturbed
        assert same(true_weights(resumed), true)


@pytest.mark.parametrize("case", [*NAMED, general("sgd", dict(direction="random", rho=RHO))], ids=lambda c: c.name)
def test_our_own_writes_are_none_of_others(case: Case) -> None:
    """Warnings are errors here: steps, switches, copies and saved states in every implementation say nothing."""
    for how in ({}, dict(foreach=True), dict(foreach=False), dict(fused=True)):
        model = network()
        opt = case.make(model.parameters(), **how)
        for step in range(4):
            train(model, opt, [step], case.closure)
            with opt.unperturbed(), opt.unperturbed():
                model.load_state_dict(saved_state(model))
            opt.train()
            state = opt.state_dict()
            copied_model, copied = copy.deepcopy((model, opt))
            train(copied_model, copied, [step], case.closure)
            copied.load_state_dict(state)
        opt.eval()


def test_an_embedding_that_renormalises_itself_is_left_out() -> None:
    """``max_norm`` writes in every forward pass, at the displaced weights."""
    embedding = nn.Embedding(5, 3, max_norm=0.5)
    head = nn.Linear(3, 2)
    plain: Any = [{"params": embedding.parameters(), "perturb": False}, {"params": head.parameters()}]
    for groups, said in ((plain, 0), ([*embedding.parameters(), *head.parameters()], 2)):
        opt = msam.MSAM(groups, lr=0.1, rho=0.5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                opt.zero_grad()
                backward(head(embedding(torch.arange(5))).square().mean())
                opt.step()
        assert len(seen) == said


def through_data(weight: Tensor) -> None:
    weight.data.zero_()


def through_numpy(weight: Tensor) -> None:
    weight.detach().numpy().fill(0)


def through_a_fused_optimizer(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()


def through_a_collective(weight: Tensor) -> None:
    dist.all_reduce(weight.detach())


@pytest.mark.parametrize(
    "write", [through_data, through_numpy, through_a_fused_optimizer, through_a_collective], ids=lambda f: f.__name__
)
@pytest.mark.usefixtures("process_group")
def test_what_nobody_can_see(write: Any) -> None:
    """No integer of a tensor knows of these; the documentation says so. A torch that raises one makes this fail."""
    weight = nn.Parameter(torch.ones(3))
    before = (weight._version, weight.data_ptr())
    write(weight)
    assert (weight._version, weight.data_ptr()) == before


def test_a_compiled_step_looks_at_nothing() -> None:
    """Its writes are not mistaken for others', in the compiled step or after it."""
    model = network(torch.float32)
    opt = BY_NAME["MSAM"].make(model.parameters())
    train(model, opt, range(2))
    step: Callable[[], Any] = torch.compile(opt.step, backend="eager")
    for t in range(2, 4):
        closure_of(model, opt, t)()
        step()
    opt.eval()
