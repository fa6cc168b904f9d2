"""The displacement: its formula, what the optimizers say about it, and what it is computed from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import msam

from . import reference
from .cases import MU, NAMED, RHO, SGD, Case, general
from .workloads import (
    Twin,
    assert_network,
    backward,
    closure_of,
    furthest,
    loss,
    network,
    same,
    snapshot,
    train,
    true_weights,
)

SHAPES = ((3, 2), (4,), ())
SWITCHES = list(
    itertools.product(
        ("momentum", "gradient", "last_gradient", "random"),
        ("l2", "none", "lr"),
        ("none", "adaptive", "relative"),
        (1, -1),
    )
)
examples = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def tensors(seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def norm(values: list[Tensor]) -> float:
    return float(sum(float((v**2).sum()) for v in values) ** 0.5)


def displacement(
    direction: str, d: list[Tensor], w: list[Tensor], rho: float, lr: float = 0.1, **more: Any
) -> list[Tensor]:
    return msam.Perturbation(direction=direction, rho=rho, **more).displacement(d, w, rho=rho, lr=lr)  # type: ignore[arg-type]


seeds = st.integers(0, 2**31)
strengths = st.floats(1e-3, 1e3)
sizes = st.floats(1e-6, 1e6)


@examples
@given(
    switches=st.sampled_from(SWITCHES), rho=strengths, lr=st.floats(1e-6, 1e2), seed=seeds, size=st.floats(1e-6, 1e6)
)
def test_formula_is_the_twins(switches: tuple[Any, ...], rho: float, lr: float, seed: int, size: float) -> None:
    direction, normalize, scale, sign = switches
    d, w = tensors(seed, size), tensors(seed + 1)
    more: dict[str, Any] = dict(normalize=normalize, scale=scale)
    expected = reference.displacement(d, w, rho=rho, lr=lr, sign=-sign if direction == "momentum" else sign, **more)
    result = displacement(direction, d, w, rho, lr, sign=sign, **more)
    assert [e.shape for e in result] == [x.shape for x in w]
    assert furthest(result, expected) <= 1e-12 * norm(expected)


@examples
@given(rho=strengths, seed=seeds, size=sizes)
def test_length_is_rho(rho: float, seed: int, size: float) -> None:
    assert norm(displacement("momentum", tensors(seed, size), tensors(seed + 1), rho)) == pytest.approx(rho, rel=1e-12)
    assert norm(
        displacement("gradient", tensors(seed, size), tensors(seed + 1), rho, scale="relative")
    ) == pytest.approx(rho, rel=1e-12)


@examples
@given(rho=strengths, seed=seeds)
def test_adaptive_length_is_rho_in_units_of_the_weights(rho: float, seed: int) -> None:
    w = tensors(seed + 1)
    moved = displacement("gradient", tensors(seed), w, rho, scale="adaptive")
    assert norm([e / x.abs() for e, x in zip(moved, w, strict=True)]) == pytest.approx(rho, rel=1e-9)


@examples
@given(rho=strengths, seed=seeds, factor=sizes, scale=st.sampled_from(("none", "adaptive", "relative")))
def test_l2_does_not_see_the_length_of_the_direction(rho: float, seed: int, factor: float, scale: str) -> None:
    d, w = tensors(seed), tensors(seed + 1)
    one = displacement("momentum", d, w, rho, scale=scale)
    other = displacement("momentum", [factor * x for x in d], w, rho, scale=scale)
    assert furthest(one, other) <= 1e-12 * norm(one)


@examples
@given(switches=st.sampled_from(SWITCHES[::2]), rho=strengths, seed=seeds)
def test_sign_turns_the_displacement_round(switches: tuple[Any, ...], rho: float, seed: int) -> None:
    direction, normalize, scale, _ = switches
    more: dict[str, Any] = dict(normalize=normalize, scale=scale)
    d, w = tensors(seed), tensors(seed + 1)
    plus, minus = (displacement(direction, d, w, rho, sign=sign, **more) for sign in (1, -1))
    assert same(plus, [-e for e in minus])
    inner = sum(float((e * x).sum()) for e, x in zip(plus, d, strict=True))
    assert inner * (-1 if direction == "momentum" else 1) > 0


@pytest.mark.parametrize("scale", ["none", "adaptive", "relative"])
@pytest.mark.parametrize("normalize", ["l2", "none", "lr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_zero_direction_gives_zero(scale: str, normalize: str, dtype: torch.dtype) -> None:
    zeros = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    ones = [torch.ones(shape, dtype=dtype) for shape in SHAPES]
    result = displacement("momentum", zeros, ones, 2.0, scale=scale, normalize=normalize)
    assert all(torch.count_nonzero(e) == 0 for e in result)
    result = displacement("momentum", ones, zeros, 2.0, scale="relative", normalize=normalize)  # no NaN at zero weights
    assert all(torch.count_nonzero(e) == 0 for e in result)


# What an optimizer says its displacement is.

EVERY = [
    *NAMED,
    *(
        general("sgd", dict(direction=d, rho=RHO, scale=s))
        for d in ("last_gradient", "random")
        for s in ("none", "relative")
    ),
    general("sgd", dict(direction="momentum", rho=RHO, scale="adaptive")),
]
each_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


@each_case
def test_displacement_is_what_separates_stored_from_true_weights(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    for step in range(6):
        train(model, opt, [step], case.closure)
        if not case.closure:
            before, true, shift = snapshot(model.parameters()), true_weights(opt), opt.displacement()
            zero = torch.zeros(())
            applied = [w + shift.get(p, zero) for w, p in zip(true, model.parameters(), strict=True)]
            assert furthest(applied, before) < 1e-13
            assert norm(list(shift.values())) > 0
            assert same(model.parameters(), before)


@each_case
def test_displacement_of_the_coming_step(case: Case) -> None:
    """Asked after backward and before step, for every direction; nothing moves."""
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(5), case.closure)
    closure_of(model, opt, 5)()
    before, true = snapshot(model.parameters()), true_weights(opt)
    shift = opt.displacement()
    assert same(model.parameters(), before)
    if case.closure:
        opt.first_step()
        applied = [w + shift[p] for w, p in zip(true, model.parameters(), strict=True)]
        assert furthest(model.parameters(), applied) < 1e-14
    else:
        assert furthest(before, [w + shift[p] for w, p in zip(true, model.parameters(), strict=True)]) < 1e-13


def test_displacement_of_sam_is_the_formula() -> None:
    model = network()
    opt = msam.SAM(model.parameters(), rho=RHO, **SGD)
    closure_of(model, opt, 0)()
    gradients = [p.grad for p in model.parameters()]
    expected = reference.displacement(gradients, list(model.parameters()), rho=RHO)
    shift = opt.displacement()
    assert furthest([shift[p] for p in model.parameters()], expected) < 1e-15


def test_displacement_of_msam_is_the_formula() -> None:
    model = network()
    opt = msam.MSAM(model.parameters(), rho=RHO, **SGD)
    train(model, opt, range(4))
    velocities = [opt.state[p]["momentum_buffer"] for p in model.parameters()]
    expected = reference.displacement(velocities, true_weights(opt), rho=RHO, sign=-1)
    shift = opt.displacement()
    assert furthest([shift[p] for p in model.parameters()], expected) < 1e-13


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("switches", [row for row in SWITCHES if row[0] != "random"], ids=str)
def test_the_weights_move_by_the_formula(switches: tuple[Any, ...], base: str, maximize: bool) -> None:
    """What separates the weights from the true ones is ``Perturbation.displacement``, and what the twin computes."""
    direction, normalize, scale, sign = switches
    more: dict[str, Any] = dict(normalize=normalize, scale=scale)
    model = network()
    opt = general(base, dict(direction=direction, sign=sign, rho=0.1, **more), maximize=maximize).make(
        model.parameters()
    )
    parameters, lr = list(model.parameters()), opt.param_groups[0]["lr"]
    backward(loss(model, 0))
    gradients = snapshot(p.grad for p in parameters if p.grad is not None)
    (opt.first_step if direction == "gradient" else opt.step)()
    key = "momentum_buffer" if base == "sgd" else "exp_avg"
    d = [opt.state[p][key] for p in parameters] if direction == "momentum" else gradients
    true, outward = true_weights(opt), sign
    if direction == "momentum":
        outward = -sign
    elif maximize:
        d = [-x for x in d]
    formula = opt.perturbation.displacement(d, true, rho=0.1, lr=lr)
    twins = reference.displacement(d, true, rho=0.1, lr=lr, sign=outward, **more)
    moved = [p.detach() - w for p, w in zip(parameters, true, strict=True)]
    assert furthest(moved, formula) < 1e-15
    assert norm(formula) > 1e-6
    assert furthest(twins, formula) < 1e-15


def test_displacement_of_none_is_empty() -> None:
    model = network()
    opt = msam.PerturbedSGD(model.parameters(), **SGD, perturbation=None)
    train(model, opt, range(2))
    assert opt.displacement() == {}
    assert not opt.perturbed


# The random direction.


def random_case(seed: int, **more: Any) -> Case:
    return general("sgd", dict(direction="random", rho=RHO, seed=seed, **more))


@pytest.mark.parametrize("scale", ["none", "adaptive", "relative"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_random_follows_the_twin_along_its_directions(base: str, scale: str) -> None:
    """The displacements it reports, given to the twin as directions, make the same trajectory."""
    case = general(base, dict(direction="random", rho=RHO, scale=scale))
    model, problem, shifts = network(), Twin(network()), []
    opt = case.make(model.parameters())
    for step in range(12):
        shift = opt.displacement()
        shifts.append([shift[p].clone() if p in shift else torch.zeros_like(p) for p in model.parameters()])
        train(model, opt, [step])
    plain = {**case.twin, "scale": "none", "normalize": "none", "rho": 1.0}  # the displacements are given whole
    states = reference.trajectory(problem, problem.weights, 12, directions=lambda t: shifts[t], **plain)
    assert_network(model, opt, states[-1].weights, problem)
    other = Twin(network())
    wrong = reference.trajectory(other, other.weights, 12, directions=lambda t: shifts[t], **{**plain, "rho": 0.0})
    assert furthest(states[-1].weights, wrong[-1].weights) > 1e-4


def test_random_has_length_rho_and_a_new_direction_every_step() -> None:
    model = network()
    opt = random_case(0).make(model.parameters())
    seen: list[Tensor] = []
    for step in range(8):
        train(model, opt, [step])
        seen.append(torch.cat([e.flatten() for e in opt.displacement().values()]))
        assert float(seen[-1].norm()) == pytest.approx(RHO, rel=1e-12)
    cosines = [float(a @ b) / RHO**2 for a, b in itertools.combinations(seen, 2)]
    assert max(map(abs, cosines)) < 0.6  # 91 parameters: the standard deviation is 0.1
    assert len({round(c, 12) for c in cosines}) == len(cosines)


def test_random_is_gaussian() -> None:
    """Mean, variance and fourth moment over 40,000 values; uniform ones would have a fourth moment of 1.8."""
    weight = torch.nn.Parameter(torch.zeros(40_000))
    opt = msam.PerturbedSGD([weight], lr=0.0, perturbation=msam.Perturbation(direction="random", rho=200.0))
    weight.grad = torch.zeros_like(weight)
    opt.step()
    (values,) = opt.displacement().values()
    assert abs(float(values.mean())) < 0.025
    assert float(values.square().mean()) == pytest.approx(1.0, abs=1e-4)
    assert float(values.pow(4).mean()) == pytest.approx(3.0, abs=0.25)


def final(case: Case) -> list[Tensor]:
    model = network()
    train(model, case.make(model.parameters()), range(6), case.closure)
    return snapshot(model.parameters())


def test_seed_makes_the_trajectory() -> None:
    assert same(final(random_case(1)), final(random_case(1)))
    assert furthest(final(random_case(1)), final(random_case(2))) > 1e-3


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_global_generator_is_neither_read_nor_advanced(case: Case) -> None:
    torch.manual_seed(1)
    first, state = final(case), torch.get_rng_state()
    torch.manual_seed(2)
    assert same(first, final(case))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


# The subset.


def only_norm(model: torch.nn.Module) -> list[bool]:
    return [p.ndim == 1 and p.shape[0] == 8 for p in model.parameters()]


@pytest.mark.parametrize("direction", ["momentum", "gradient", "last_gradient"])
@pytest.mark.parametrize("scale", ["none", "adaptive", "relative"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("how", ["filter", "group"])
def test_normalisation_layers_only(base: str, direction: str, scale: str, how: str) -> None:
    """By the ready-made filter, or by groups that are not perturbed: the norm is over what is displaced."""
    model, problem = network(), Twin(network())
    mask = only_norm(model)
    assert sum(mask) == 2
    switches: dict[str, Any] = dict(direction=direction, scale=scale, rho=RHO)
    if how == "filter":
        case = general(base, {**switches, "subset": msam.normalization_layers(model)})
        opt = case.make(model.parameters())
    else:
        case = general(base, switches)
        opt = case.make([{"params": [p], "perturb": m} for p, m in zip(model.parameters(), mask, strict=True)])
    train(model, opt, range(10), case.closure)
    twin = {k: v for k, v in case.twin.items() if k != "subset"}
    states = reference.trajectory(problem, problem.weights, 10, mask=mask, **twin)
    assert_network(model, opt, states[-1].weights, problem)
    other = Twin(network())
    everything = reference.trajectory(other, other.weights, 10, **twin)
    assert furthest(states[-1].weights, everything[-1].weights) > 1e-4


def test_parameters_outside_the_subset_do_not_move() -> None:
    model = network()
    subset = msam.normalization_layers(model)
    opt = msam.MSAM(model.parameters(), rho=RHO, subset=subset, **SGD)
    train(model, opt, range(3))
    true = true_weights(opt)
    moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), true, strict=True)]
    assert moved == only_norm(model)


def test_subset_by_name() -> None:
    model, problem = network(), Twin(network())
    opt = msam.MSAM(model.named_parameters(), rho=RHO, subset=msam.NamedSubset(frozenset({"3.weight"})), **SGD)
    train(model, opt, range(10))
    mask = [name == "3.weight" for name in problem.names]
    states = reference.trajectory(problem, problem.weights, 10, mask=mask, direction="momentum", rho=RHO, **SGD)
    assert_network(model, opt, states[-1].weights, problem)


# The presets: each row against its twin. Random rows have their own test above.

PRESETS = [name for name, row in msam.PRESETS.items() if row.direction != "random"]
WANTED = {
    "msam": dict(direction="momentum", normalize="l2", scale="none", sign=1),
    "sam": dict(direction="gradient", normalize="l2", scale="none", sign=1),
    "asam": dict(direction="gradient", normalize="l2", scale="adaptive", sign=1),
    "nag": dict(direction="momentum", normalize="lr", scale="none", sign=1),
    "adaptive_msam": dict(direction="momentum", normalize="l2", scale="adaptive", sign=1),
    "relative_msam": dict(direction="momentum", normalize="l2", scale="relative", sign=1),
    "msam_unnormalized": dict(direction="momentum", normalize="none", scale="none", sign=1),
    "msam_lr": dict(direction="momentum", normalize="lr", scale="none", sign=1),
    "last_gradient": dict(direction="last_gradient", normalize="l2", scale="none", sign=1),
    "last_gradient_negative": dict(direction="last_gradient", normalize="l2", scale="none", sign=-1),
    "random": dict(direction="random", normalize="l2", scale="none", sign=1),
}


@pytest.mark.parametrize("name", WANTED)
def test_rows_are_what_they_are_called(name: str) -> None:
    perturbation = msam.PRESETS[name]()
    assert {key: getattr(perturbation, key) for key in WANTED[name]} == WANTED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_follow_their_twins(name: str) -> None:
    row: Any = msam.PRESETS[name]
    model, problem = network(), Twin(network())
    rho = MU if name == "nag" else 0.1
    more = {"subset": msam.normalization_layers(model)} if row.normalization_only else {}
    perturbation = row(rho, **more)
    switches: dict[str, Any] = dict(
        direction=row.direction, normalize=row.normalize, scale=row.scale, sign=row.sign, rho=rho
    )
    case = general(row.optimizer, switches, weight_decay_at=row.weight_decay_at)
    cls: Callable[..., Any] = msam.PerturbedSGD if row.optimizer == "sgd" else msam.PerturbedAdamW
    options = {k: v for k, v in case.twin.items() if k not in switches and k != "base"}
    opt = cls(model.parameters(), **options, perturbation=perturbation)
    train(model, opt, range(12), case.closure)
    mask = only_norm(model) if row.normalization_only else None
    states = reference.trajectory(problem, problem.weights, 12, mask=mask, **case.twin)
    assert_network(model, opt, states[-1].weights, problem)
    for change in (dict(rho=0.0), dict(sign=-row.sign)):
        other = Twin(network())
        wrong = reference.trajectory(other, other.weights, 12, mask=mask, **{**case.twin, **change})
        assert furthest(states[-1].weights, wrong[-1].weights) > 1e-5


def test_steps_from_msam_to_nag_end_at_nag() -> None:
    ours, theirs = network(), network()
    row: Any = msam.PRESETS["nag"]
    opt = msam.PerturbedSGD(ours.parameters(), **SGD, perturbation=row(MU), weight_decay_at=row.weight_decay_at)
    train(ours, opt, range(20))
    train(theirs, msam.NAG(theirs.parameters(), **SGD), range(20))
    assert same(ours.parameters(), theirs.parameters())


def test_norm_only_preset_wants_its_filter() -> None:
    with pytest.raises(ValueError, match=r"normalization_layers|subset"):
        msam.PRESETS["bn_only_msam"]()


def test_momentum_direction_without_momentum_is_refused() -> None:
    perturbation = msam.Perturbation(direction="momentum", rho=RHO)
    with pytest.raises(ValueError, match="momentum"):
        msam.PerturbedSGD(network().parameters(), lr=0.1, momentum=0.0, perturbation=perturbation)


def test_nothing_is_displaced_before_there_is_a_direction() -> None:
    """The first step of MSAM is SGD's: ``v = 0`` gives ``ε = 0``."""
    model = network()
    before = snapshot(model.parameters())
    opt = msam.MSAM(model.parameters(), rho=RHO, **SGD)
    backward(loss(model, 0))
    assert same(model.parameters(), before)
    assert all(float(e.abs().max()) == 0 for e in opt.displacement().values())
