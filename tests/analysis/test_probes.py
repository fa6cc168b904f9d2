"""Probes that cost losses, gradients and products, against a forward pass from the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import msam
import msam_analysis as ma
from msam_analysis import probes
from msam_analysis.measures.alignment import sam_msam_angle

from .cases import MLP
from .oracles import dense_hessian, flatten, reference_loss

RHO = 0.3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "MSAM": lambda p: msam.MSAM(p, lr=0.1, rho=RHO, momentum=0.9),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
Make = Callable[[ma.Objective], Any]


def record(name: str, make: Make, steps: int = 4) -> tuple[list[dict[str, float]], list[tuple[Tensor, Tensor]]]:
    """Train with one probe; return its rows, and true weights and momentum before every step, by hand."""
    model, data = MLP.model().eval(), MLP.data()
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    monitor = ma.Monitor(optimizer, [make(ma.Objective(model, MLP.loss_fn, data))], every=1)
    seen = []
    for step in range(steps):
        key = "exp_avg" if name == "AdamW" else "momentum_buffer"
        v = torch.cat([optimizer.state.get(p, {}).get(key, torch.zeros_like(p)).flatten() for p in parameters])
        w = flatten(model)
        if name == "MSAM" and step:
            w = w + RHO * v / v.norm()
        seen.append((w, v.clone()))
        optimizer.zero_grad()
        F.cross_entropy(model(data[step % 3][0]), data[step % 3][1]).backward()
        optimizer.step()
    return monitor.rows, seen


@pytest.fixture(scope="module")
def loss() -> Callable[[Tensor], Tensor]:
    return reference_loss(MLP, MLP.model(), MLP.data())


@each_optimizer
def test_loss_along_momentum(name: str, loss: Callable[[Tensor], Tensor]) -> None:
    """``L(w + a v/‖v‖)`` at the true weights; without momentum there is only the loss itself."""
    rows, seen = record(name, lambda o: probes.LossAlongMomentum(o, [0.5, -0.25, 0.5]))
    assert list(rows[0]) == ["step", "loss_along/-0.25", "loss_along/0", "loss_along/0.5"]
    assert [math.isnan(rows[0][f"loss_along/{a}"]) for a in ("-0.25", "0", "0.5")] == [True, False, True]
    for row, (w, v) in zip(rows[1:], seen[1:], strict=True):
        for offset in (-0.25, 0.0, 0.5):
            assert row[f"loss_along/{offset:g}"] == pytest.approx(float(loss(w + offset * v / v.norm())), rel=1e-10)


def test_the_batch_of_now(loss: Callable[[Tensor], Tensor]) -> None:
    """Any probe takes a function that returns the objective of the moment."""
    model, data = MLP.model().eval(), MLP.data()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    now: list[Any] = []

    def objective() -> ma.Objective:
        return ma.Objective(model, MLP.loss_fn, now)

    asked: list[Any] = [
        probes.LossAlongMomentum(objective, []),
        probes.HeldOutCosine(objective),
        probes.TopEigenvalues(objective, tolerance=1e-6),
        probes.SamAngle(objective, [1.0], 0.1),
        probes.PerturbationRise(objective),
    ]
    monitor = ma.Monitor(optimizer, asked, every=1)
    for batch in data:
        now[:] = [batch]
        w = flatten(model)
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        mine = reference_loss(MLP, model, [batch])
        row = monitor.rows[-1]
        assert row["loss_along/0"] == row["loss_before"] == pytest.approx(float(mine(w)), rel=1e-10)
        top = torch.linalg.eigvalsh(dense_hessian(mine, w))[-1]
        assert row["lambda_1"] == pytest.approx(float(top), rel=1e-9)


@each_optimizer
def test_cosine_on_held_out_data(name: str, loss: Callable[[Tensor], Tensor]) -> None:
    rows, seen = record(name, probes.HeldOutCosine)
    assert math.isnan(rows[0]["held_out_cosine"])
    for row, (w, v) in zip(rows[1:], seen[1:], strict=True):
        g = torch.func.grad(loss)(w)
        assert row["held_out_cosine"] == pytest.approx(float(g @ v / g.norm() / v.norm()), abs=1e-10)


def test_fresh_batches_in_turn() -> None:
    """Batch after batch, of the sizes the data has, and from the first again."""
    rows, seen = record("SGD", lambda o: probes.HeldOutCosine(o, in_turn=True), steps=6)
    for step, (row, (w, v)) in enumerate(zip(rows, seen, strict=True)):
        g = torch.func.grad(reference_loss(MLP, MLP.model(), [MLP.data()[step % 3]]))(w)
        expected = float(g @ v / g.norm() / v.norm())
        assert row["held_out_cosine"] == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_fresh_batches_and_a_fixed_one_tell_apart_what_the_paper_does() -> None:
    """A4: v is made of past batches; on the one batch it was all made of, the gradient is nearly along it."""
    model, data = MLP.model().eval(), MLP.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    fixed = ma.Objective(model, MLP.loss_fn, [data[0]])
    monitor = ma.Monitor(optimizer, [probes.HeldOutCosine(fixed)], every=1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
    assert (monitor.frame()["held_out_cosine"][1:] > 0.9999).all()


@each_optimizer
def test_the_angle_to_sam_is_that_of_the_pure_function(name: str) -> None:
    rows, seen = record(name, lambda o: probes.SamAngle(o, [0.5, 2.0], rho_sam=0.1))
    objective = ma.Objective(MLP.model().eval(), MLP.loss_fn, MLP.data())
    assert not math.isnan(rows[0]["sam_angle/0"])
    assert math.isnan(rows[0]["sam_angle/2"])
    for row, (w, v) in zip(rows[1:], seen[1:], strict=True):
        expected = sam_msam_angle(objective, v, [0.5, 2.0], rho_sam=0.1, w=w)
        got = [row[f"sam_angle/{rho}"] for rho in ("0", "0.5", "2")]
        np.testing.assert_allclose(got, expected.angles.numpy(), atol=1e-7)
        np.testing.assert_allclose(row["rho_0"], expected.rho_0, rtol=1e-7)
        np.testing.assert_allclose([row["rho_0_low"], row["rho_0_high"]], expected.bracket, rtol=1e-12)


@each_optimizer
@pytest.mark.parametrize("confirm", [True, False])
def test_tracked_eigenvalues(name: str, confirm: bool, loss: Callable[[Tensor], Tensor]) -> None:
    """The largest ones of the dense Hessian at the true weights, each within the residual that is recorded."""
    rows, seen = record(name, lambda o: probes.TopEigenvalues(o, 2, tolerance=1e-5, confirm=confirm))
    for row, (w, _) in zip(rows, seen, strict=True):
        dense = torch.linalg.eigvalsh(dense_hessian(loss, w)).flip(0)[:2].tolist()
        assert row["lambda_converged"] == 1
        assert row["lambda_residual"] <= 1e-5 * row["lambda_1"]
        assert abs(row["lambda_1"] - dense[0]) <= row["lambda_residual"] + 1e-12
        assert abs(row["lambda_2"] - dense[1]) <= row["lambda_residual"] + 1e-12


def test_tracking_starts_from_the_last_vector() -> None:
    """Where nothing has moved, the second search needs one product for each vector; a first one needs more."""
    model = MLP.model().eval()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    probe = probes.TopEigenvalues(objective, confirm=False)
    probe(optimizer, 0)
    vectors = probe.state_dict()["start"]
    again = ma.top_eigenvalues(objective, 1, tolerance=1e-2, start=vectors, confirm=False)
    cold = ma.top_eigenvalues(objective, 1, tolerance=1e-2, confirm=False)
    assert again.hvps < cold.hvps
    assert probe(optimizer, 1)["lambda_1"] == pytest.approx(float(again.values[0]), rel=1e-12)


def test_a_search_that_does_not_converge_says_so() -> None:
    model = MLP.model().eval()
    probe = probes.TopEigenvalues(ma.Objective(model, MLP.loss_fn, MLP.data()), max_hvps=2, tolerance=1e-9)
    with pytest.warns(ma.ConvergenceWarning, match="top_eigenvalues"):
        row = probe(OPTIMIZERS["SGD"](model.parameters()), 0)
    assert row["lambda_converged"] == 0


def test_a_probe_with_a_state_has_both_halves() -> None:
    """What is saved is what is loaded: a fresh probe with the state records what the old one would."""
    model = MLP.model().eval()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    F.cross_entropy(model(MLP.data()[0][0]), MLP.data()[0][1]).backward()
    optimizer.step()
    pairs: list[tuple[Any, Any]] = [
        (probes.HeldOutCosine(objective, in_turn=True), probes.HeldOutCosine(objective, in_turn=True)),
        (probes.TopEigenvalues(objective, confirm=False), probes.TopEigenvalues(objective, confirm=False)),
    ]
    for old, new in pairs:
        first: Mapping[str, float] = old(optimizer, 1)
        new.load_state_dict(old.state_dict())
        assert new(optimizer, 2) == old(optimizer, 2)
        assert old(optimizer, 3) != first


BAD: dict[str, tuple[Callable[[ma.Objective], Any], type[Exception], str]] = {
    "an offset": (
        lambda o: probes.LossAlongMomentum(o, [math.inf]),
        ValueError,
        r"offsets must be finite, got \[inf\]",
    ),
    "turns of a function": (
        lambda o: probes.HeldOutCosine(lambda: o, in_turn=True),
        TypeError,
        r"in_turn takes the batches of an Objective in turn, got function",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call(ma.Objective(MLP.model(), MLP.loss_fn, MLP.data()))


@pytest.mark.parametrize("name", ["LossAlongMomentum", "HeldOutCosine", "SamAngle"])
def test_an_optimizer_without_momentum_is_refused(name: str) -> None:
    model = MLP.model().eval()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    asked: dict[str, Any] = {
        "LossAlongMomentum": lambda: probes.LossAlongMomentum(objective, [1.0]),
        "HeldOutCosine": lambda: probes.HeldOutCosine(objective),
        "SamAngle": lambda: probes.SamAngle(objective, [1.0], 0.1),
    }
    with pytest.raises(RuntimeError, match="SGD keeps no momentum"):
        asked[name]()(torch.optim.SGD(model.parameters(), lr=0.1), 0)
