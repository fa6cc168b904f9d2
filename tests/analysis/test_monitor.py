"""What a monitor records, against loops written by hand from the formulas, whatever is done to gradients and hooks."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam
import msam_analysis as ma
from msam_analysis import probes
from msam_analysis.monitor.probes import Every, MomentumGradientCosine, Norms

from .cases import CONVNET, MLP, PARTIAL, normal
from .oracles import flatten, reference_loss

LR, MU, WD, RHO = 0.1, 0.9, 1e-2, 0.3
STEPS = 6


# --- loops by hand: one flat float64 vector, nothing of the package


@dataclass
class Hand:
    """An optimizer by its formulas. ``update`` gets the gradient and returns the change of the weights."""

    epsilon: Callable[[Hand, Tensor | None], Tensor | float] = lambda hand, g: 0.0
    twice: bool = False
    decays_there: bool = False  # weight decay at the displaced weights
    damping: float = 0.0
    kind: str = "sgd"
    v: Tensor | None = None
    second: Tensor | None = None
    t: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)

    def update(self, w: Tensor, g: Tensor) -> Tensor:
        """Advance the buffer and return the new weights."""
        decay = WD * (w + self.epsilon(self, None) if self.decays_there else w)
        self.t += 1
        if self.kind == "adamw":
            self.v = 0.1 * g if self.v is None else 0.9 * self.v + 0.1 * g
            self.second = 1e-3 * g**2 if self.second is None else 0.999 * self.second + 1e-3 * g**2
            ratio = (self.v / (1 - 0.9**self.t)) / ((self.second / (1 - 0.999**self.t)).sqrt() + 1e-8)
            return w - LR * WD * w - LR * ratio
        d = g + decay
        self.v = d if self.v is None else MU * self.v + (1 - self.damping) * d
        return w - LR * (d + MU * self.v if self.kind == "nesterov" else self.v)


def no_shift(hand: Hand, g: Tensor | None) -> float:
    return 0.0


def along_momentum(hand: Hand, g: Tensor | None) -> Tensor | float:
    return 0.0 if hand.v is None else -RHO * hand.v / hand.v.norm()


def nesterov(hand: Hand, g: Tensor | None) -> Tensor | float:
    return 0.0 if hand.v is None else -LR * MU * hand.v


def along_gradient(hand: Hand, g: Tensor | None) -> Tensor | float:
    return 0.0 if g is None else RHO * g / g.norm()


SGD: dict[str, Any] = {"lr": LR, "momentum": MU, "weight_decay": WD}
Make = Callable[[Any], torch.optim.Optimizer]

HANDS: dict[str, Callable[[], Hand]] = {
    "SGD": lambda: Hand(no_shift),
    "dampened": lambda: Hand(no_shift, damping=0.5),
    "torch's Nesterov": lambda: Hand(no_shift, kind="nesterov"),
    "AdamW": lambda: Hand(no_shift, kind="adamw"),
    "NAG": lambda: Hand(nesterov, decays_there=True),
    "MSAM": lambda: Hand(along_momentum),
    "AdamWMSAM": lambda: Hand(along_momentum, kind="adamw"),
    "SAM": lambda: Hand(along_gradient, twice=True),
}
OPTIMIZERS: dict[str, tuple[Make, str]] = {
    "SGD": (lambda p: torch.optim.SGD(p, **SGD), "SGD"),
    "dampened": (lambda p: torch.optim.SGD(p, **SGD, dampening=0.5), "dampened"),
    "torch's Nesterov": (lambda p: torch.optim.SGD(p, **SGD, nesterov=True), "torch's Nesterov"),
    "foreach": (lambda p: torch.optim.SGD(p, **SGD, foreach=True), "SGD"),
    "fused": (lambda p: torch.optim.SGD(p, **SGD, fused=True), "SGD"),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=WD), "AdamW"),
    "fused AdamW": (lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=WD, fused=True), "AdamW"),
    "NAG": (lambda p: msam.NAG(p, **SGD), "NAG"),
    "MSAM": (lambda p: msam.MSAM(p, **SGD, rho=RHO), "MSAM"),
    "fused MSAM": (lambda p: msam.MSAM(p, **SGD, rho=RHO, fused=True), "MSAM"),
    "AdamWMSAM": (lambda p: msam.AdamWMSAM(p, lr=LR, rho=RHO, weight_decay=WD), "AdamWMSAM"),
    "SAM": (lambda p: msam.SAM(p, **SGD, rho=RHO), "SAM"),
}

TREATMENTS = {  # what a loop does to its gradients, and what remains of that
    "plain": "as they are",
    "scaled": "as they are",
    "clipped by norm": "shorter",
    "unscaled and clipped": "shorter",
    "clipped by value": "bent",
}


def treated(treatment: str, g: Tensor) -> Tensor:
    if treatment == "shorter":
        return g * min(1.0, 0.2 / (float(g.norm()) + 1e-6))
    return g.clamp(-0.05, 0.05) if treatment == "bent" else g


def angle(a: Tensor | None, b: Tensor) -> float:
    if a is None:
        return math.nan
    return float(np.sum(a.numpy() * b.numpy()) / math.sqrt(np.sum(a.numpy() ** 2)) / math.sqrt(np.sum(b.numpy() ** 2)))


def length(a: Tensor | None) -> float:
    return math.nan if a is None else float(np.sqrt(np.sum(a.numpy() ** 2)))


def layers(model: nn.Module, by: str) -> dict[str, slice]:
    """Where each layer is in the flat vector; a module's parameters follow one another."""
    found: dict[str, slice] = {}
    start = 0
    for name, parameter in model.named_parameters():
        layer = name if by == "parameter" else name.rpartition(".")[0]
        found[layer] = slice(found[layer].start if layer in found else start, start := start + parameter.numel())
    return found


@functools.cache
def by_hand(name: str, treatment: str, by: str = "module") -> pd.DataFrame:
    """Train in float64 and take down what a monitor should."""
    hand = HANDS[name]()
    model, data = MLP.model(), MLP.data()
    w, where = flatten(model), {"": slice(None), **{f"/{name}": part for name, part in layers(model, by).items()}}
    rows = []
    for step in range(STEPS):
        gradient = torch.func.grad(reference_loss(MLP, model, [data[step % 3]]))
        first: Tensor = gradient(w) if hand.twice else gradient(w + hand.epsilon(hand, None))
        g = treated(treatment, gradient(w + hand.epsilon(hand, first)) if hand.twice else first)
        shown = first if hand.twice else g
        v, before = hand.v, w
        w = hand.update(w, g)
        row: dict[str, float] = {"step": step}
        for suffix, part in where.items():
            row[f"cosine{suffix}"] = angle(None if v is None else v[part], shown[part])
            row[f"cosine_after{suffix}"] = angle(hand.v[part] if hand.v is not None else None, g[part])
            row[f"weights_norm{suffix}"] = length(before[part])
            row[f"momentum_norm{suffix}"] = length(None if v is None else v[part])
            row[f"gradient_norm{suffix}"] = length(g[part])
            row[f"step_norm{suffix}"] = length((w - before)[part])
        rows.append(row)
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


# --- the loops of users


def train(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    treatment: str = "plain",
    *,
    steps: int = STEPS,
    scaler: torch.amp.GradScaler | None = None,
    poison: Callable[[int, int], bool] = lambda step, part: False,
) -> None:
    """Take steps; where ``poison`` says so, a gradient overflows."""
    data = MLP.data(next(model.parameters()).dtype)
    if scaler is None and "scaled" in treatment:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    parameters = list(model.parameters())

    def backward(step: int, part: int) -> None:
        x, y = data[step % 3]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if poison(step, part):
            assert parameters[0].grad is not None
            parameters[0].grad[0, 0] = math.inf

    for step in range(steps):
        backward(step, 0)
        if isinstance(optimizer, msam.SAM):
            optimizer.first_step()
            backward(step, 1)
        if treatment == "unscaled and clipped":
            assert scaler is not None
            scaler.unscale_(optimizer)
        if treatment in ("clipped by norm", "unscaled and clipped"):
            nn.utils.clip_grad_norm_(parameters, 0.2)
        elif treatment == "clipped by value":
            nn.utils.clip_grad_value_(parameters, 0.05)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def monitored(name: str, treatment: str, by: probes.By = "module") -> pd.DataFrame:
    model = MLP.model().eval()
    optimizer = OPTIMIZERS[name][0](list(model.parameters()))
    asked: list[Any] = [MomentumGradientCosine(after=True, model=model, by=by), Norms(model=model, by=by)]
    monitor = ma.Monitor(optimizer, asked, every=1)
    train(optimizer, model, treatment)
    return monitor.frame()


def check(got: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert set(got.columns) == set(expected.columns)
    for column in expected:
        np.testing.assert_allclose(got[column], expected[column], rtol=1e-9, atol=1e-10, err_msg=column)
    assert got["cosine"][1:].abs().min() > 1e-3


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cosines_and_norms_are_those_of_a_loop_by_hand(name: str, treatment: str) -> None:
    """Before and after the step, globally and in every module; float64, so that only rounding is between the two."""
    check(monitored(name, treatment), by_hand(OPTIMIZERS[name][1], TREATMENTS[treatment]))


def test_every_parameter_can_be_a_layer() -> None:
    check(monitored("MSAM", "plain", "parameter"), by_hand("MSAM", "as they are", "parameter"))


def test_clipping_by_the_global_norm_and_loss_scales_change_no_first_angle() -> None:
    """One step from the same start: only the length of the gradient differs, and Norms tells it unscaled."""
    rows = {}
    for treatment in ("plain", "clipped by norm", "scaled"):
        model = MLP.model().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU, fused=treatment == "scaled")
        train(optimizer, model, steps=2)
        with ma.Monitor(optimizer, [MomentumGradientCosine(), Norms(["gradient"])], every=1) as monitor:
            train(optimizer, model, treatment, steps=1)
        rows[treatment] = monitor.frame().iloc[0]
    assert rows["clipped by norm"]["cosine"] == pytest.approx(rows["plain"]["cosine"], rel=1e-12)
    assert rows["scaled"]["cosine"] == pytest.approx(rows["plain"]["cosine"], rel=1e-12)
    assert rows["scaled"]["gradient_norm"] == pytest.approx(rows["plain"]["gradient_norm"], rel=1e-12)
    assert rows["clipped by norm"]["gradient_norm"] == pytest.approx(0.2, rel=1e-5)


def test_maximizing_minus_the_loss_is_minimizing_it() -> None:
    """The buffer holds gradients of what is minimised, and the gradient shown is of the same."""
    frames = []
    for maximize in (False, True):
        model = MLP.model().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU, maximize=maximize)
        monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True), Norms()], every=1)
        for x, y in MLP.data():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (-loss if maximize else loss).backward()
            optimizer.step()
        frames.append(monitor.frame())
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-12)


def test_a_kernel_that_writes_into_the_gradient_is_seen_through() -> None:
    """Torch's foreach kernel of Nesterov's method leaves the direction of the step in ``.grad``."""
    frames, left = [], []
    for foreach in (False, True):
        model = MLP.model().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU, nesterov=True, foreach=foreach)
        monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True), Norms()], every=1)
        train(optimizer, model, steps=3)
        frames.append(monitor.frame())
        left.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-10)
    assert float((left[0] - left[1]).norm()) > 0.1 * float(left[0].norm())


# --- hooks, closures, wrappers


def flipped(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Do something to the gradient that no angle survives."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.view(-1)[::2] *= -3.0


@pytest.mark.parametrize("name", ["SGD", "fused", "AdamW", "MSAM"])
def test_the_order_of_hooks_does_not_matter(name: str) -> None:
    """What is recorded is what enters the buffer, be a hook that changes gradients registered before or after."""
    frames = []
    for first in (True, False):
        model = MLP.model().eval()
        optimizer = OPTIMIZERS[name][0](list(model.parameters()))
        if first:
            optimizer.register_step_pre_hook(flipped)
        monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True), Norms()], every=1)
        if not first:
            optimizer.register_step_pre_hook(flipped)
        train(optimizer, model)
        frames.append(monitor.frame())
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    plain = monitored(name, "plain")
    assert abs(frames[0]["gradient_norm"][0] / plain["gradient_norm"][0] - 1) > 0.1


def test_one_record_a_step_of_an_optimizer_that_evaluates_often() -> None:
    """L-BFGS: the gradient is the first one, at the weights before the step; nothing here has momentum."""
    model = MLP.model().eval()
    x, y = MLP.data()[0]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    lengths, evaluations = [], 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if evaluations % 3 == 1:
            lengths.append(
                float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
            )
        return loss

    monitor = ma.Monitor(optimizer, [Norms()], every=1)
    for _ in range(2):
        optimizer.step(closure)
    assert evaluations == 6
    np.testing.assert_allclose(monitor.frame()["gradient_norm"], lengths, rtol=1e-12)
    assert monitor.frame()["momentum_norm"].isna().all()


def test_what_step_returns_stays_what_it_was() -> None:
    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    x, y = MLP.data()[0]
    with ma.Monitor(optimizer, [Norms()], every=1):
        F.cross_entropy(model(x), y).backward()
        assert optimizer.step() is None
        assert optimizer.step(None) is None
        assert optimizer.step(lambda: 3.5) == 3.5
        assert optimizer.step(closure=lambda: 4.5) == 4.5


def test_accumulated_gradients_are_one_record() -> None:
    whole, parts = MLP.model().eval(), MLP.model().eval()
    (x, y), (x2, y2) = MLP.data()[:2]
    frames = []
    for model in (whole, parts):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
        monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True)], every=1)
        for _ in range(3):
            optimizer.zero_grad()
            if model is whole:
                F.cross_entropy(model(torch.cat([x, x2])), torch.cat([y, y2])).backward()
            else:
                for inputs, labels in ((x, y), (x2, y2)):
                    (F.cross_entropy(model(inputs), labels) / 2).backward()
            optimizer.step()
        frames.append(monitor.frame())
    pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-10)


class Wrapped:
    """As Lightning and accelerate hand optimizers out."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class Bare(torch.optim.SGD):
    """An optimizer whose step knows no closure."""

    def step(self) -> None:  # type: ignore[override]
        super().step()


@pytest.mark.parametrize("kind", ["wrapped", "no closure", "scheduled"])
def test_any_kind_of_optimizer(kind: str) -> None:
    def make(p: Any) -> torch.optim.Optimizer:
        return Bare(p, **SGD) if kind == "no closure" else torch.optim.SGD(p, **SGD)

    model = MLP.model().eval()
    optimizer = make(list(model.parameters()))
    if kind == "scheduled":  # a scheduler puts a step of its own on the optimizer
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    given: Any = Wrapped(optimizer) if kind == "wrapped" else optimizer
    monitor = ma.Monitor(given, [MomentumGradientCosine(after=True), Norms()], every=1)
    train(optimizer, model)
    np.testing.assert_allclose(monitor.frame()["cosine"], monitored("SGD", "plain")["cosine"], rtol=1e-12)
    np.testing.assert_allclose(monitor.frame()["cosine_after"], monitored("SGD", "plain")["cosine_after"], rtol=1e-12)


def test_parameters_without_gradients_and_several_groups() -> None:
    """A layer that is not used has no angle, its momentum no length; a parameter of nobody's is not asked for."""
    model, data = PARTIAL.model(), PARTIAL.data()
    groups = [{"params": model.body.parameters(), "lr": 0.2}, {"params": [*model.head.parameters()], "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    asked: list[Any] = [MomentumGradientCosine(after=True, model=model, by="module"), Norms(model=model, by="module")]
    monitor = ma.Monitor(optimizer, asked, every=1)
    for x, y in data[:2]:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        model.head.weight.grad = model.head.bias.grad = None
        optimizer.step()
    frame = monitor.frame()
    assert frame["cosine/head"].isna().all()
    assert frame["gradient_norm/head"].isna().all()
    assert (frame["step_norm/head"] == 0).all()
    assert frame["cosine/body"][1] == pytest.approx(frame["cosine"][1], abs=1e-13)


class Inherited(torch.optim.SGD):
    """A step that calls its parent's: torch hooks both of them, once a plain SGD has been made."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class InheritedStarred(torch.optim.SGD):
    """The same, and the parent sees no closure of the caller's."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class InheritedMsam(msam.MSAM):
    """The same of one of ours."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("child", "parent"),
    [(Inherited, torch.optim.SGD), (InheritedStarred, torch.optim.SGD), (InheritedMsam, msam.MSAM)],
)
def test_a_step_that_calls_its_parents_is_one_step(child: Any, parent: Any) -> None:
    found = {}
    for kind in (parent, child):
        weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = kind([weight], lr=LR, momentum=MU)
        calls: list[int] = []

        counted: Any = lambda _, step, calls=calls: calls.append(step) or {}  # noqa: E731 - one for each kind
        with ma.Monitor(optimizer, [MomentumGradientCosine(after=True), counted], every=2) as monitor:
            for step in range(5):
                weight.grad = torch.tensor([1.0 + step, step - 3.0], dtype=torch.float64)
                optimizer.step()
        assert monitor.step == 5
        assert calls == [0, 2, 4]
        found[kind] = monitor.frame()
    pd.testing.assert_frame_equal(found[child], found[parent])


def test_a_step_that_failed_is_followed_by_one_that_counts() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=MU)
    with ma.Monitor(optimizer, [Norms()], every=1) as monitor:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1.0 / 0.0)
        weight.grad = torch.ones(2)
        optimizer.step()
    assert [row["gradient_norm"] for row in monitor.rows] == pytest.approx([math.sqrt(2)])


def test_sparse_gradients_and_sparse_momentum() -> None:
    """SGD keeps a sparse buffer of sparse gradients; the same numbers as from a dense embedding."""
    frames = {}
    for sparse in (False, True):
        embedding = nn.Embedding(6, 3, sparse=sparse).double()
        with torch.no_grad():
            embedding.weight.copy_(normal(6, 3, seed=4))
        optimizer = torch.optim.SGD(embedding.parameters(), lr=LR, momentum=MU)
        with ma.Monitor(optimizer, [MomentumGradientCosine(after=True), Norms()], every=1) as monitor:
            for step in range(4):
                optimizer.zero_grad()
                embedding(torch.tensor([1, 1, step])).square().sum().backward()
                optimizer.step()
        frames[sparse] = monitor.frame()
    pd.testing.assert_frame_equal(frames[True], frames[False])
    assert frames[True]["cosine"].iloc[1:].abs().min() > 0.01


def test_a_step_without_gradients_has_no_angle() -> None:
    """Torch lets it pass, and so does a monitor: alternating optimizers, branches that were not taken."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=MU)
    with ma.Monitor(optimizer, [MomentumGradientCosine(after=True), Norms()], every=1) as monitor:
        optimizer.step()
        weight.grad = torch.tensor([1.0, 2.0])
        optimizer.step()
        weight.grad = None
        optimizer.step()
    table = monitor.frame()
    assert table["cosine_after"].isna().tolist() == [True, False, True]
    assert table["cosine"].isna().all()
    assert table["gradient_norm"].isna().tolist() == [True, False, True]
    assert table["step_norm"].tolist()[::2] == [0.0, 0.0]


def test_complex_parameters_count_with_both_parts() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=MU)
    grads = [torch.tensor([1 + 2j, -1j]), torch.tensor([2 - 1j, 3 + 1j])]
    with ma.Monitor(optimizer, [MomentumGradientCosine()], every=1) as monitor:
        for grad in grads:
            weight.grad = grad.to(torch.complex128)
            optimizer.step()
    first, second = (torch.view_as_real(grad.to(torch.complex128)).flatten() for grad in grads)
    assert monitor.rows[1]["cosine"] == pytest.approx(float(first @ second / first.norm() / second.norm()))


def test_autocast_around_the_step_changes_nothing() -> None:
    rows = []
    for enabled in (False, True):
        model = MLP.model(torch.float32).eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
        monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True), Norms()], every=1)
        x, y = MLP.data(torch.float32)[0]
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        rows.append(monitor.frame())
    pd.testing.assert_frame_equal(rows[0], rows[1], check_exact=True)


# --- steps that a scaler leaves out


SKIPPED: dict[str, tuple[str, Callable[[int, int], bool], bool]] = {  # optimizer, where it overflows, seen without help
    "SGD": ("SGD", lambda step, part: step in (2, 3), False),
    "MSAM": ("MSAM", lambda step, part: step in (2, 3), False),
    "fused": ("fused", lambda step, part: step in (2, 3), True),
    "fused AdamW": ("fused AdamW", lambda step, part: step in (2, 3), True),
    "SAM, first gradient": ("SAM", lambda step, part: step in (2, 3) and part == 0, True),
    "SAM, second gradient": ("SAM", lambda step, part: step in (2, 3) and part == 1, True),
}


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("case", SKIPPED)
def test_a_step_left_out_is_no_step(case: str, helped: bool) -> None:
    """Rows are those of the steps taken, numbered without a gap; what was left out is counted where it can be seen."""
    name, poison, seen = SKIPPED[case]
    model = MLP.model().eval()
    optimizer = OPTIMIZERS[name][0](list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True)], every=2, scaler=scaler if helped else None)
    train(optimizer, model, scaler=scaler, steps=7, poison=poison)
    assert monitor.step == 5
    assert monitor.skipped == (2 if seen or helped else 0)
    frame = monitor.frame()
    assert frame["step"].tolist() == [0, 2, 4]
    assert frame.iloc[1:].notna().all(axis=None)
    # The same network on the batches that counted, one by one: steps 0, 1, 4, 5, 6 of the run above.
    again = MLP.model().eval()
    other = OPTIMIZERS[name][0](list(again.parameters()))
    calm = ma.Monitor(other, [MomentumGradientCosine(after=True)], every=1)
    data = MLP.data()
    for step in (0, 1, 4, 5, 6):
        for part in range(2 if name == "SAM" else 1):
            other.zero_grad()
            F.cross_entropy(again(data[step % 3][0]), data[step % 3][1]).backward()
            if isinstance(other, msam.SAM) and part == 0:
                other.first_step()
        other.step()
    np.testing.assert_allclose(frame["cosine"], calm.frame()["cosine"][::2], rtol=1e-9)
    np.testing.assert_allclose(frame["cosine_after"], calm.frame()["cosine_after"][::2], rtol=1e-9)


def test_a_scaler_gets_its_own_step_back() -> None:
    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = dict(vars(scaler))
    outer = ma.Monitor(optimizer, [Norms()], every=1, scaler=scaler)
    inner = ma.Monitor(optimizer, [Norms()], every=1, scaler=scaler)
    other.param_groups[0]["params"][0].grad = torch.full((1,), math.inf)
    scaler.scale(torch.ones(()))
    scaler.step(other)  # not ours: nothing to count
    scaler.update()
    train(optimizer, model, scaler=scaler, steps=3, poison=lambda step, part: step == 1)
    assert (outer.skipped, inner.skipped) == (1, 1)
    inner.close()
    train(optimizer, model, scaler=scaler, steps=1, poison=lambda step, part: True)
    assert (outer.skipped, inner.skipped) == (2, 1)
    outer.close()
    outer.close()
    assert vars(scaler).keys() == before.keys()


def test_a_disabled_scaler_leaves_nothing_out() -> None:
    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    monitor = ma.Monitor(optimizer, [MomentumGradientCosine()], every=1, scaler=scaler)
    train(optimizer, model, scaler=scaler)
    assert (monitor.step, monitor.skipped) == (STEPS, 0)


def test_capturing_a_graph_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed then, and what a probe would fetch is not there; played on a CPU."""
    for name in ("SGD", "MSAM"):
        model = MLP.model().eval()
        optimizer = OPTIMIZERS[name][0](list(model.parameters()))
        monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True)], every=1)
        train(optimizer, model, steps=2)
        with monkeypatch.context() as patch:
            patch.setattr("msam_analysis.monitor.attachment._capturing", lambda: True)
            optimizer.step()
        train(optimizer, model, steps=1)
        assert monitor.frame()["step"].tolist() == [0, 1, 2]
        assert monitor.skipped == 0


# --- periods, costs, listeners


class Ask:
    """A probe that counts."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, list[int]()

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        self.steps.append(step)
        return {self.name: float(step)}


def test_a_probe_with_a_period_of_its_own() -> None:
    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    often, seldom, never_together = Ask("often"), Ask("seldom"), Ask("odd")
    monitor = ma.Monitor(optimizer, [often, Every(seldom, 4), Every(never_together, 3)], every=2)
    train(optimizer, model, steps=9)
    assert (often.steps, seldom.steps, never_together.steps) == ([0, 2, 4, 6, 8], [0, 4, 8], [0, 3, 6])
    frame = monitor.frame()
    assert frame["step"].tolist() == [0, 2, 3, 4, 6, 8]
    assert frame["seldom"].dropna().tolist() == [0, 4, 8]
    assert monitor.cost()["calls"].tolist() == [5, 3, 3]
    assert monitor.cost()["period"].tolist() == [2, 4, 3]


def test_cost_is_the_time_of_each_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 1 whenever it is read: a call takes 1, and one with a second half 3 in all."""
    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    monitor = ma.Monitor(optimizer, [Ask("a"), Every(Norms(["weights"]), 2)], every=1)
    assert monitor.cost()["per_call"].isna().all()
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    train(optimizer, model, steps=4)
    cost = monitor.cost().set_index("probe")
    assert cost["seconds"].tolist() == [4.0, 4.0]  # Norms of weights: asked, and asked for a second half, twice
    assert cost["per_call"].tolist() == [1.0, 2.0]
    assert ((cost["share"] > 0) & (cost["share"] < 1)).all()
    assert list(cost.index) == ["Ask", "Norms(of=['weights'], by='parameter')"]


def test_listeners_are_told_of_rows() -> None:
    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    monitor = ma.Monitor(optimizer, [Ask("a")], every=2)
    seen: list[int] = []
    handle = monitor.on_record(lambda told: seen.append(len(told.rows)))
    train(optimizer, model, steps=5)
    handle.remove()
    train(optimizer, model, steps=5)
    assert seen == [1, 2, 3]


def test_a_forgotten_monitor_is_gone_and_the_loop_goes_on() -> None:
    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    scaler = torch.amp.GradScaler("cpu")
    monitor = ma.Monitor(optimizer, [MomentumGradientCosine(after=True)], every=1, scaler=scaler)
    train(optimizer, model, scaler=scaler)
    gone = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert gone() is None
    train(optimizer, model, scaler=scaler)


def test_half_a_probe_that_raises_after_the_step_costs_its_numbers() -> None:
    """The weights have moved: the training goes on, the row lacks these numbers, and it is said once."""

    class Broken:
        def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
            return {}

        def across(self, optimizer: torch.optim.Optimizer, step: int) -> probes.Finish:
            def finish(grads: Mapping[Tensor, Tensor]) -> Mapping[str, float]:
                raise ArithmeticError("the probe went off")

            return finish

    model = MLP.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MU)
    monitor = ma.Monitor(optimizer, [Broken(), Norms(["weights"])], every=1)
    with pytest.warns(
        UserWarning, match="Broken failed at step 0 .ArithmeticError: the probe went off.*goes on"
    ) as said:
        train(optimizer, model, steps=3)
    assert len(said) == 1
    assert [sorted(row) for row in monitor.rows] == [["step", "weights_norm"]] * 3


@pytest.mark.parametrize("name", ["SGD", "fused", "AdamW", "MSAM", "SAM"])
def test_training_with_every_probe_is_the_same_training(name: str) -> None:
    """With dropout and BatchNorm: bit for bit the same weights, buffers, gradients, state and random numbers."""

    def run(watched: bool) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model, data = CONVNET.model(), CONVNET.data()
            optimizer = OPTIMIZERS[name][0](list(model.parameters()))
            objective = ma.Objective(model, CONVNET.loss_fn, data)
            asked: list[Any] = [
                MomentumGradientCosine(after=True, model=model),
                Norms(model=model),
                probes.PerturbationRise(objective),
                probes.LossAlongMomentum(objective, [-0.1, 0.1]),
                probes.HeldOutCosine(objective, in_turn=True),
                probes.SamAngle(objective, [0.1, 0.2], rho_sam=0.1),
                probes.Curvature(objective),
                probes.TopEigenvalues(objective, tolerance=0.1, confirm=False),
                *(probes.CriticalSharpness(objective, along) for along in ("gradient", "momentum", "update")),
            ]
            monitor = ma.Monitor(optimizer, asked, every=1) if watched else None
            for x, y in data:
                for part in range(2 if name == "SAM" else 1):
                    optimizer.zero_grad()
                    CONVNET.loss_fn(model(x), y).backward()
                    if isinstance(optimizer, msam.SAM) and part == 0:
                        optimizer.first_step()
                optimizer.step()
            assert monitor is None or len(monitor.rows) == 3
            state = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            return [*model.parameters(), *model.buffers(), *state, *gradients, torch.get_rng_state()]

    plain, watched = run(False), run(True)
    assert len(plain) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


# --- errors


def weight() -> nn.Parameter:
    return nn.Parameter(normal(2, seed=1))


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no optimizer": (
        lambda: ma.Monitor(nn.Linear(1, 1), [Norms()]),  # type: ignore[arg-type]
        TypeError,
        r"expected a torch\.optim optimizer, got Linear: pass",
    ),
    "a period of 0": (lambda: Every(Norms(), 0), ValueError, r"period must be a positive integer, got 0"),
    "another layer": (lambda: MomentumGradientCosine(by="block"), ValueError, r"by must be one of .*got 'block'"),  # type: ignore[arg-type]
    "another vector": (lambda: Norms(["bias"]), ValueError, r"of must be some of .*got \['bias'\]"),  # type: ignore[list-item]
    "one vector": (lambda: Norms("step"), ValueError, r"of must be some of .*got 'step'"),  # type: ignore[arg-type]
    "no vector": (lambda: Norms([]), ValueError, r"of must be some of"),
    "another direction": (
        lambda: probes.CriticalSharpness(None, "step"),  # type: ignore[arg-type]
        ValueError,
        r"direction must be one of .*got 'step'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_model_of_other_parameters() -> None:
    w = weight()
    w.grad = torch.ones(2).double()
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    with (
        ma.Monitor(optimizer, [Norms(model=nn.Linear(1, 1))], every=1),
        pytest.raises(ValueError, match=r"none of the optimizer's parameters belongs to the model"),
    ):
        optimizer.step()
