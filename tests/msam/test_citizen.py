"""What every optimizer of torch can do: groups, schedulers, hooks, clipping, accumulation, loss scaling."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import msam

from . import reference
from .cases import ADAMW, BY_NAME, LR, NAMED, RHO, SGD, Case, each_implementation, general
from .workloads import (
    Twin,
    assert_network,
    backward,
    batch,
    closure_of,
    furthest,
    hide,
    loss,
    missing,
    network,
    same,
    snapshot,
    train,
    true_weights,
)

EVERY = [*NAMED, *(general("sgd", dict(direction=d, rho=RHO)) for d in ("last_gradient", "random"))]
FOLLOWED = [*NAMED, general("sgd", dict(direction="last_gradient", rho=RHO))]
each_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
each_followed = pytest.mark.parametrize("case", FOLLOWED, ids=lambda case: case.name)
each_one_gradient = pytest.mark.parametrize("case", [c for c in FOLLOWED if not c.closure], ids=lambda case: case.name)


def twin_of(case: Case, steps: int, edit: Any = None, parts: int = 1, **change: Any) -> tuple[Twin, list[Tensor]]:
    """The twin after some steps, and its weights."""
    twin = Twin(network(), edit, parts)
    return twin, reference.trajectory(twin, twin.weights, steps, **{**case.twin, **change})[-1].weights


# Groups.


@each_followed
def test_groups_share_one_norm(case: Case) -> None:
    """As many groups as tensors give the trajectory of one group."""
    model = network()
    opt = case.make([{"params": [p]} for p in model.parameters()])
    train(model, opt, range(10), case.closure)
    twin, weights = twin_of(case, 10)
    assert_network(model, opt, weights, twin)


@each_followed
def test_groups_with_their_own_numbers(case: Case) -> None:
    model, lr = network(), case.twin["lr"]
    tensors = list(model.parameters())
    rhos = {} if case.name.startswith("NAG") else {"rho": 0.1}
    opt = case.make([{"params": tensors[:2]}, {"params": tensors[2:], "lr": lr / 2, "weight_decay": 0.02, **rhos}])
    train(model, opt, range(10), case.closure)
    rho, decay = case.twin["rho"], case.twin["weight_decay"]
    count = len(tensors) - 2
    change: dict[str, Any] = dict(lr=[lr] * 2 + [lr / 2] * count, weight_decay=[decay] * 2 + [0.02] * count)
    twin, weights = twin_of(case, 10, rho=[rho] * 2 + [0.1 if rhos else rho] * count, **change)
    assert_network(model, opt, weights, twin)


@each_followed
def test_group_added_later(case: Case) -> None:
    """While the weights are displaced; until then the other tensors are not there at all."""
    model = network()
    tensors = list(model.parameters())
    opt = case.make(tensors[:2])
    train(model, opt, range(4), case.closure, after_backward=without_tail)
    opt.add_param_group({"params": tensors[2:]})
    train(model, opt, range(4, 10), case.closure)
    twin, weights = twin_of(case, 10, lambda g, step, call: [*g[:2], *([None] * len(g[2:]) if step < 4 else g[2:])])
    assert_network(model, opt, weights, twin)


def without_tail(model: nn.Module, step: int) -> None:
    for p in list(model.parameters())[2:]:
        p.grad = None


def test_group_added_in_eval_mode() -> None:
    model = network()
    tensors = list(model.parameters())
    opt = BY_NAME["MSAM"].make(tensors[:2])
    train(model, opt, range(4), after_backward=without_tail)
    opt.eval()
    opt.add_param_group({"params": tensors[2:]})
    opt.train()
    train(model, opt, range(4, 10))
    twin, weights = twin_of(BY_NAME["MSAM"], 10, lambda g, t, c: [*g[:2], *([None] * len(g[2:]) if t < 4 else g[2:])])
    assert_network(model, opt, weights, twin)


@each_followed
def test_frozen_parameters(case: Case) -> None:
    model = network()
    frozen = model.get_parameter("3.weight")
    frozen.requires_grad_(False)
    before = frozen.clone()
    opt = case.make(model.parameters())
    train(model, opt, range(10), case.closure)
    assert torch.equal(frozen, before)
    index = [p is frozen for p in model.parameters()].index(True)
    twin, weights = twin_of(case, 10, lambda g, t, c: [None if i == index else x for i, x in enumerate(g)])
    assert_network(model, opt, weights, twin)


@each_followed
def test_parameter_frozen_half_way(case: Case) -> None:
    """It goes back to its true weights in the next step and is displaced no more, whatever its momentum."""
    model = network()
    opt = case.make(model.parameters())
    last = model.get_parameter("3.bias")
    train(model, opt, range(5), case.closure)
    before = true_weights(opt)
    last.requires_grad_(False)
    train(model, opt, range(5, 10), case.closure)
    assert furthest([last], [before[-1]]) < 1e-14
    assert torch.equal(last, true_weights(opt)[-1])
    moves = [True] * (len(before) - 1)
    edit: Any = lambda g, t, c: [*g[:-1], None if t >= 5 else g[-1]]  # noqa: E731
    twin, weights = twin_of(case, 10, edit, mask=lambda t: [*moves, t <= 5])
    assert_network(model, opt, weights, twin)


@each_case
def test_unused_parameters(case: Case) -> None:
    model, unused = network(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    other = network()
    opt, plain = case.make([unused, *model.parameters()]), case.make(other.parameters())
    train(model, opt, range(8), case.closure)
    train(other, plain, range(8), case.closure)
    if case.twin["direction"] != "random":  # whose noise would be drawn for it, too
        assert furthest(model.parameters(), other.parameters()) < 1e-14
    assert furthest([true_weights(opt)[0]], [torch.ones(3, dtype=torch.float64)]) < 1e-14


@each_case
def test_step_without_any_gradient(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(3), case.closure)
    before = true_weights(opt)
    opt.zero_grad()
    opt.step((lambda: None) if case.closure else None)
    assert furthest(true_weights(opt), before) < 1e-14


# Closures, hooks.


@each_one_gradient
def test_closure_is_the_plain_form(case: Case) -> None:
    model, other = network(), network()
    opt = case.make(model.parameters())
    train(model, opt, range(8), closure=True)
    train(other, case.make(other.parameters()), range(8))
    assert same(model.parameters(), other.parameters())
    expected = loss(model, 3).detach()
    assert torch.equal(opt.step(closure_of(model, opt, 3)).detach(), expected)


@each_case
def test_closures_run_with_gradients_enabled(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    with torch.no_grad():
        opt.step(closure_of(model, opt, 0))
    assert all(p.grad is not None for p in model.parameters())


@each_case
def test_number_of_evaluations_and_of_collected_statistics(case: Case) -> None:
    model, calls = network(), []
    opt = case.make(model.parameters())

    def closure() -> Tensor:
        calls.append(1)
        return closure_of(model, opt, 0)()

    for _ in range(5):
        opt.step(closure)
    assert len(calls) == (10 if case.closure else 5)
    assert int(model.get_buffer("1.num_batches_tracked")) == 5
    assert model.training
    assert model.get_submodule("1").training
    assert model.get_submodule("1").momentum == 0.1


def test_second_closure_uses_the_statistics_of_its_batch() -> None:
    """Not collecting is not evaluating: an unused statistic never reaches SAM's second gradient."""
    model, other = network(), network()
    with torch.no_grad():
        other.get_buffer("1.running_mean").fill_(5.0)
        other.get_buffer("1.running_var").fill_(9.0)
    for net in (model, other):
        train(net, BY_NAME["SAM"].make(net.parameters()), range(3), closure=True)
    assert same(model.parameters(), other.parameters())


@each_case
def test_step_hooks_run_once(case: Case) -> None:
    model, seen = network(), []
    opt = case.make(model.parameters())
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("before")),
        opt.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    train(model, opt, range(3), case.closure)
    assert seen == ["before", "after"] * 3
    for handle in handles:
        handle.remove()
    train(model, opt, range(3), case.closure)
    assert len(seen) == 6


@each_case
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "plain"])
def test_gradient_hook_sees_the_first_gradient_before_anything_moves(case: Case, closure: bool) -> None:
    model = network()
    opt = case.make(model.parameters())
    stored: list[Tensor] = []
    seen: list[float] = []

    def hook(optimizer: Any) -> None:
        assert optimizer is opt
        assert same(model.parameters(), stored)
        expected = Twin(model)([p.detach() for p in model.parameters()], len(seen))
        seen.append(
            furthest([p.grad for p in model.parameters() if p.grad is not None], [g for g in expected if g is not None])
        )
        momenta.append([v.clone() for p in model.parameters() for v in opt.state[p].values() if isinstance(v, Tensor)])

    momenta: list[list[Tensor]] = []
    handle = opt.register_gradient_hook(hook)
    for step in range(4):
        stored[:] = snapshot(model.parameters())
        held = [v.clone() for p in model.parameters() for v in opt.state[p].values() if isinstance(v, Tensor)]
        if case.closure and not closure:
            closure_of(model, opt, step)()
            opt.first_step()
            closure_of(model, opt, step)()
            opt.second_step()
        else:
            train(model, opt, [step], closure)
        assert len(seen) == step + 1
        assert same(momenta[-1], held)
    assert max(seen) < 1e-12
    handle.remove()
    train(model, opt, [4], case.closure)
    assert len(seen) == 4


# Learning rates.

SCHEDULERS: dict[str, tuple[Callable[[Any], Any], Callable[[int], float]]] = {
    "step": (lambda opt: torch.optim.lr_scheduler.StepLR(opt, 4, 0.5), lambda t: float(0.5 ** (t // 4))),
    "exponential": (lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.8), lambda t: float(0.8**t)),
    "lambda": (lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)), lambda t: 1 / (1 + t)),
}


@pytest.mark.parametrize(("schedule", "factor"), SCHEDULERS.values(), ids=SCHEDULERS)
@each_followed
def test_lr_schedulers(case: Case, schedule: Callable[[Any], Any], factor: Callable[[int], float]) -> None:
    model = network()
    opt = case.make(model.parameters())
    scheduler = schedule(opt)
    for step in range(10):
        train(model, opt, [step], case.closure)
        scheduler.step()
    twin, weights = twin_of(case, 10, lr=lambda t: case.twin["lr"] * factor(t))
    assert_network(model, opt, weights, twin)


@each_followed
def test_learning_rate_as_a_tensor(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters(), foreach=False, lr=torch.tensor(case.twin["lr"], dtype=torch.float64))
    train(model, opt, range(8), case.closure)
    twin, weights = twin_of(case, 8)
    assert_network(model, opt, weights, twin)


def test_one_cycle_cycles_the_momentum() -> None:
    model = network()
    opt = BY_NAME["MSAM"].make(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=LR, total_steps=12)
    seen = []
    for step in range(10):
        seen.append(opt.param_groups[0]["momentum"])
        train(model, opt, [step])
        scheduler.step()
    assert len(set(seen)) == 10
    assert furthest(true_weights(opt), twin_of(BY_NAME["MSAM"], 10)[1]) > 1e-4


# Gradients changed on the way: clipping, accumulation, loss scaling.


def clipped(gradients: list[Any], step: int, call: int) -> list[Any]:
    total = float(sum(float((g**2).sum()) for g in gradients) ** 0.5)
    return [g * min(1.0, 0.05 / (total + 1e-6)) for g in gradients]


def clip_all(model: nn.Module, step: int) -> None:
    clip_grad_norm_(model.parameters(), 0.05)


@each_followed
def test_clipping(case: Case) -> None:
    """After every backward, as a closure does it: SAM's second gradient, too."""
    model = network()
    opt = case.make(model.parameters())
    train(
        model,
        opt,
        range(10),
        case.closure,
        after_backward=clip_all,
    )
    twin, weights = twin_of(case, 10, clipped)
    assert_network(model, opt, weights, twin)


@each_followed
def test_accumulation(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())

    def accumulate(step: int) -> None:
        opt.zero_grad()
        for part in range(3):
            backward(loss(model, 3 * step + part) / 3)

    for step in range(8):
        accumulate(step)
        if case.closure:
            opt.first_step()
            with msam.frozen_batchnorm_statistics(model):
                accumulate(step)
            opt.second_step()
        else:
            opt.step()
    twin, weights = twin_of(case, 8, parts=3)
    assert_network(model, opt, weights, twin)


def scaled_step(
    model: nn.Module, opt: Any, scaler: Any, step: int, factor: float = 1.0, clipping: bool = False
) -> None:
    opt.zero_grad()
    scaler.scale(loss(model, step) * factor).backward()
    if clipping:
        scaler.unscale_(opt)
        clip_grad_norm_(model.parameters(), 0.05)
    scaler.step(opt)
    scaler.update()


def scaler_of() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000)


@each_implementation
@pytest.mark.parametrize("clipping", [False, True], ids=["", "clip"])
@each_one_gradient
def test_loss_scaling(case: Case, clipping: bool, how: dict[str, Any]) -> None:
    model, scaler = network(), scaler_of()
    opt = case.make(model.parameters(), **how)
    for step in range(10):
        scaled_step(model, opt, scaler, step, clipping=clipping)
    twin, weights = twin_of(case, 10, clipped if clipping else None)
    assert_network(model, opt, weights, twin)


@each_implementation
@pytest.mark.parametrize("when", [0, 3])
@each_one_gradient
def test_step_skipped_on_infinity(case: Case, when: int, how: dict[str, Any]) -> None:
    """Weights, buffers and displacement stay, to the bit, and training goes on as if the step had not been."""
    model, other, scaler = network(torch.float32), network(torch.float32), scaler_of()
    opt, plain = case.make(model.parameters(), **how), case.make(other.parameters(), **how)
    for step in range(when):
        scaled_step(model, opt, scaler, step)
        train(other, plain, [step])
    before = snapshot([*model.parameters(), *(v for p in model.parameters() for v in opt.state[p].values())])
    shift = [e.clone() for e in opt.displacement().values()]
    scaled_step(model, opt, scaler, when, factor=float("inf"))
    assert scaler.get_scale() == 512.0
    after = [*model.parameters(), *(v for p in model.parameters() for v in opt.state[p].values())]
    assert same(before, after[: len(before)])
    assert same(shift, opt.displacement().values())
    for step in range(when, when + 4):
        scaled_step(model, opt, scaler, step)
        train(other, plain, [step])
    assert same(model.parameters(), other.parameters())


def scaled_passes(
    model: nn.Module,
    opt: Any,
    scaler: Any,
    step: int,
    factors: tuple[float, float] = (1.0, 1.0),
    clipping: bool = False,
) -> None:
    """Both of SAM's; the second gradient is clipped."""
    opt.zero_grad()
    scaler.scale(loss(model, step) * factors[0]).backward()
    opt.first_step(zero_grad=True)
    with msam.frozen_batchnorm_statistics(model):
        scaler.scale(loss(model, step) * factors[1]).backward()
    if clipping:
        scaler.unscale_(opt)
        clip_grad_norm_(model.parameters(), 0.05)
    scaler.step(opt)
    scaler.update()


each_sam = pytest.mark.parametrize("name", ["SAM", "AdamWSAM"])
each_step = pytest.mark.parametrize("how", [{}, dict(fused=True)], ids=str)


@each_step
@pytest.mark.parametrize("clipping", [False, True], ids=["", "clip"])
@each_sam
def test_loss_scaling_of_both_passes(name: str, clipping: bool, how: dict[str, Any]) -> None:
    """``scaler.step`` after ``first_step`` is the second step; the normalised displacement does not see the scale.

    ``scaler.unscale_`` may stand between ``backward`` and ``scaler.step``: not unscaled twice.
    """
    model, scaler = network(), scaler_of()
    opt = BY_NAME[name].make(model.parameters(), **how)
    for step in range(10):
        scaled_passes(model, opt, scaler, step, clipping=clipping)
    edit: Any = lambda g, step, call: clipped(g, step, call) if call else g  # noqa: E731
    twin, weights = twin_of(BY_NAME[name], 10, edit if clipping else None)
    assert_network(model, opt, weights, twin)


@each_step
@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
@each_sam
def test_infinity_in_either_pass_skips_the_step(name: str, bad: int, how: dict[str, Any]) -> None:
    """True weights and buffers stay, whichever pass overflowed, and the next step is an ordinary one."""
    model, scaler = network(), scaler_of()
    opt = BY_NAME[name].make(model.parameters(), **how)
    scaled_passes(model, opt, scaler, 0)
    before = true_weights(opt)
    scaled_passes(model, opt, scaler, 1, (float("inf"), 1.0) if bad == 0 else (1.0, float("inf")))
    assert same(true_weights(opt), before)
    for step in range(1, 5):
        scaled_passes(model, opt, scaler, step)
    _, weights = twin_of(BY_NAME[name], 5)
    assert furthest(true_weights(opt), weights) < 1e-10


@pytest.mark.parametrize("normalize", ["l2", "none", "lr"])
@pytest.mark.parametrize("scale", ["none", "adaptive", "relative"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_first_gradient_that_is_not_finite_displaces_nothing(normalize: str, scale: str, bad: float) -> None:
    model = network()
    opt = general("sgd", dict(direction="gradient", normalize=normalize, scale=scale, rho=RHO)).make(model.parameters())
    before = snapshot(model.parameters())
    backward(loss(model, 0))
    gradient = model.get_parameter("3.bias").grad
    assert gradient is not None
    gradient[1] = bad
    assert all(not e.any() for e in opt.displacement().values())
    opt.first_step()
    assert same(model.parameters(), before)
    assert all(not e.any() for e in opt.displacement().values())


def test_an_unused_scaler_changes_nothing() -> None:
    model, other, scaler = network(), network(), torch.amp.GradScaler("cpu", enabled=False)
    opt, plain = BY_NAME["SAM"].make(model.parameters()), BY_NAME["SAM"].make(other.parameters())
    for step in range(4):
        closure_of(model, opt, step)()
        opt.first_step()
        with msam.frozen_batchnorm_statistics(model):
            closure_of(model, opt, step)()
        scaler.step(opt)
        scaler.update()
    train(other, plain, range(4), closure=True)
    assert same(model.parameters(), other.parameters())


@each_case
def test_autocast_to_bfloat16(case: Case) -> None:
    model = network(torch.float32)
    opt = case.make(model.parameters())

    def closure() -> Tensor:
        opt.zero_grad()
        x, y = batch(0, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            value = nn.functional.cross_entropy(model(x), y)
        return backward(value)

    first = float(opt.step(closure).detach())
    for _ in range(30):
        opt.step(closure)
    with opt.unperturbed():
        assert float(closure().detach()) < first


# Other.


def test_parameters_of_two_precisions() -> None:
    """One norm over all, each moved in its own precision."""
    a, b = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(4, dtype=torch.float32))
    opt = msam.MSAM([a, b], lr=0.1, rho=1.0)
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 2.0)
    opt.step()
    shift = opt.displacement()
    norm = (3 * 9 + 4 * 4) ** 0.5
    assert furthest([shift[a], shift[b]], [torch.full((3,), -3 / norm), torch.full((4,), -2 / norm)]) < 1e-6
    assert (a.dtype, b.dtype) == (torch.float64, torch.float32)


def test_defaults_are_those_of_torch() -> None:
    for ours, theirs in ((msam.PerturbedSGD, torch.optim.SGD), (msam.PerturbedAdamW, torch.optim.AdamW)):
        one, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        shared = (set(one) & set(other)) - {"params"}
        assert {"lr", "weight_decay", "maximize", "foreach", "fused"} <= shared
        assert {name: one[name].default for name in shared} == {name: other[name].default for name in shared}


def test_numbers_reach_the_groups() -> None:
    model = network()
    for case, options in ((BY_NAME["MSAM"], SGD), (BY_NAME["AdamWMSAM"], ADAMW)):
        group = case.make(model.parameters()).param_groups[0]
        assert {name: group[name] for name in options} == options


def test_repr_names_the_class() -> None:
    assert repr(BY_NAME["MSAM"].make(network().parameters())).startswith("MSAM")


@pytest.mark.parametrize("name", ["MSAM", "NAG", "SAM", "AdamWMSAM"])
def test_compiled_step(name: str) -> None:
    """``torch.compile`` traces the step; the backend runs what was traced as it is."""
    torch.compiler.reset()  # traces of optimizers that are gone count against the limit of traces
    model, other = network(torch.float32), network(torch.float32)
    opt, plain = BY_NAME[name].make(model.parameters()), BY_NAME[name].make(other.parameters())
    first: Callable[[], Any] = torch.compile(opt.first_step, backend="eager")
    step: Callable[[], Any] = torch.compile(opt.step, backend="eager")
    for t in range(5):
        closure_of(model, opt, t)()
        if BY_NAME[name].closure:
            first()
            with msam.frozen_batchnorm_statistics(model):
                closure_of(model, opt, t)()
        step()
    train(other, plain, range(5), BY_NAME[name].closure)
    assert furthest(model.parameters(), other.parameters()) < 1e-6
    assert furthest(true_weights(opt), true_weights(plain)) < 1e-6


# The fused step that does not go back first, and what makes it go back.


def test_fused_steps_with_all_that_interrupts_them() -> None:
    """A missing gradient, a group that stops moving and moves again, a learning rate next to nothing."""
    model = network()
    moves = [t not in (6, 7) for t in range(17)]
    rates = [LR * (1e-9 if t in (10, 11) else 1.0) for t in range(16)]
    opt = BY_NAME["MSAM"].make(model.parameters(), fused=True)
    for step in range(16):
        opt.param_groups[0]["lr"] = rates[step]
        opt.param_groups[0]["perturb"] = moves[step + 1]
        train(model, opt, [step], after_backward=hide if step == 3 else None)
    count = len(list(model.parameters()))
    twin, weights = twin_of(
        BY_NAME["MSAM"],
        16,
        lambda g, t, c: missing(g, t, c) if t == 3 else g,
        lr=lambda t: rates[t],
        mask=lambda t: [moves[t]] * count,
    )
    assert_network(model, opt, weights, twin)


@pytest.mark.parametrize("weight_decay_at", ["true", "perturbed"])
def test_fused_steps_with_a_decay_as_large_as_the_momentum(weight_decay_at: str) -> None:
    """λ |c| of the order of μ, with either sign: the factor of the buffer changes sign."""
    for sign in (1, -1):
        case = general(
            "sgd", dict(direction="momentum", rho=0.5, sign=sign), weight_decay=2.0, weight_decay_at=weight_decay_at
        )
        model = network()
        opt = case.make(model.parameters(), fused=True)
        train(model, opt, range(12))
        twin, weights = twin_of(case, 12)
        assert_network(model, opt, weights, twin)


def fused_against_the_twin(gradient: Callable[[int], float], steps: int, **switches: Any) -> float:
    """Largest error of four float32 weights, from 0 on, along gradients fixed in advance."""
    case = general("sgd", dict(direction="momentum", **switches.pop("perturbation")), **switches)
    weight = nn.Parameter(torch.zeros(4))
    opt = case.make([weight], fused=True)
    for step in range(steps):
        weight.grad = torch.full_like(weight, gradient(step))
        opt.step()
    start = [torch.zeros(4, dtype=torch.float64)]
    states = reference.trajectory(lambda w, t: [torch.full_like(w[0], gradient(t))], start, steps, **case.twin)
    return furthest(true_weights(opt), states[-1].weights)


@pytest.mark.parametrize("pause", [90, 220])
def test_fused_steps_after_gradients_vanished(pause: int) -> None:
    """The buffer is next to nothing, ρ / ‖v‖ over the learning rate 4e4 or 4e10, and then a gradient of 1 comes."""
    options: dict[str, Any] = dict(perturbation=dict(rho=RHO), weight_decay=0.0)
    assert fused_against_the_twin(lambda t: float(t in (0, pause)), pause + 1, **options) < 2e-6


def test_fused_steps_where_decay_cancels_the_momentum() -> None:
    """At λ c = μ the in-place step would divide by zero."""
    assert fused_against_the_twin(lambda t: 0.5, 3, perturbation=dict(rho=0.45, sign=-1), weight_decay=2.0) < 1e-6


def test_statistics_estimated_at_the_true_weights() -> None:
    """The average over the batches of what each finds at the true weights, and nothing else is changed."""
    model = network()
    opt = BY_NAME["MSAM"].make(model.parameters())
    train(model, opt, range(6))
    before = snapshot(model.parameters())
    data = [batch(step)[0] for step in range(4)]
    msam.update_batchnorm_statistics(model, data, opt)
    with opt.unperturbed():
        inputs = [x @ model.get_parameter("0.weight").detach().T for x in data]
    mean = torch.stack([h.mean(0) for h in inputs]).mean(0)
    variance = torch.stack([h.var(0) for h in inputs]).mean(0)
    assert furthest([model.get_buffer("1.running_mean"), model.get_buffer("1.running_var")], [mean, variance]) < 1e-12
    assert same(model.parameters(), before)
    assert model.training
    assert model.get_submodule("1").momentum == 0.1


def statistics(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Mean over the samples of each batch's own statistics, of a network's first layer."""
    hidden = [x @ model.get_parameter("0.weight").detach().T for x in inputs]
    count = sum(map(len, hidden))
    mean = torch.stack([len(h) / count * h.mean(0) for h in hidden]).sum(0)
    return [mean, torch.stack([len(h) / count * h.var(0) for h in hidden]).sum(0)]


def test_statistics_of_ragged_batches_weigh_what_they_hold() -> None:
    model = network().eval()
    inputs = [batch(0)[0], batch(1)[0][:5]]
    msam.update_batchnorm_statistics(model, [(x, "ignored") for x in inputs], device="cpu")
    found = [model.get_buffer("1.running_mean"), model.get_buffer("1.running_var")]
    assert furthest(found, statistics(model, inputs)) < 1e-12
    assert not any(m.training for m in model.modules())


def test_statistics_of_batches_of_another_kind() -> None:
    model = network()
    inputs = [batch(step)[0] for step in range(3)]
    msam.update_batchnorm_statistics(model, [{"x": x} for x in inputs], forward=lambda m, b: m(b["x"]))
    found = [model.get_buffer("1.running_mean"), model.get_buffer("1.running_var")]
    assert furthest(found, statistics(model, inputs)) < 1e-12
    without = network(norm=False)
    msam.update_batchnorm_statistics(without, [])  # nothing to estimate, nothing to ask for
    assert without.training


def test_statistics_interrupted_leave_weights_and_modes() -> None:
    model = network()
    opt = BY_NAME["MSAM"].make(model.parameters())
    train(model, opt, range(3))
    before = snapshot(model.parameters())
    with pytest.raises(ZeroDivisionError):
        msam.update_batchnorm_statistics(model, [batch(0)[0]], opt, forward=lambda m, b: 1 / 0)
    assert same(model.parameters(), before)
    assert all(m.training for m in model.modules())
    assert model.get_submodule("1").momentum == 0.1


def test_frozen_statistics_of_shared_layers_come_back() -> None:
    layer = nn.BatchNorm1d(6)
    norm = nn.InstanceNorm1d(3, track_running_stats=True)
    model = nn.Sequential(layer, nn.Linear(6, 6), layer, nn.Unflatten(1, (3, 2)), norm).double()
    before = snapshot(model.buffers())

    def evaluate_and_fail() -> None:
        with msam.frozen_batchnorm_statistics(model):
            model(batch(0)[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate_and_fail()
    assert same(model.buffers(), before)
    assert (layer.track_running_stats, norm.momentum) == (True, 0.1)
    model(batch(0)[0])
    assert not same([layer.running_mean, norm.running_mean], [before[0], before[3]])  # type: ignore[list-item]
