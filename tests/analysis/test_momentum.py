"""The momentum-gradient cosine and what a monitor records, against numpy and runs by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import msam
import msam_analysis as ma

from .cases import CONVNET, MLP, PARTIAL, normal
from .oracles import dense_hessian, flatten, reference_loss

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, tuple[Make, str]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2), "momentum_buffer"),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), "exp_avg"),
    "MSAM": (lambda p: msam.MSAM(p, lr=0.1, rho=0.3, momentum=0.9, weight_decay=1e-2), "momentum_buffer"),
    "NAG": (lambda p: msam.NAG(p, lr=0.1, momentum=0.9), "momentum_buffer"),
    "AdamWMSAM": (lambda p: msam.AdamWMSAM(p, lr=0.01, rho=0.3), "exp_avg"),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def backward(model: nn.Module, batch: Any) -> None:
    model.zero_grad()
    x, y = batch
    F.cross_entropy(model(x), y).backward()


def joined(tensors: Any) -> np.ndarray:
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a)) / np.sqrt(np.sum(b * b)))


def by_hand(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], key: str) -> float:
    if not optimizer.state or key not in optimizer.state[parameters[0]]:
        return math.nan
    return cosine(joined(optimizer.state[p][key] for p in parameters), joined(p.grad for p in parameters))


# --- the cosine


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_cosine(name: str, dtype: torch.dtype) -> None:
    make, key = OPTIMIZERS[name]
    model, data = MLP.model(dtype).eval(), MLP.data(dtype)
    parameters = list(model.parameters())
    optimizer = make(parameters)
    for step in range(7):
        backward(model, data[step % 3])
        got, expected = ma.momentum_gradient_cosine(optimizer), by_hand(optimizer, parameters, key)
        assert isinstance(got, float)
        if step == 0:
            assert math.isnan(got)
        else:
            assert got == pytest.approx(expected, abs=1e-6 if dtype == torch.float32 else 1e-13)
            assert got != 0.0
        optimizer.step()


def test_cosine_is_over_all_groups_together() -> None:
    """One angle in the space of all parameters, not a mean of angles."""
    model, data = MLP.model().eval(), MLP.data()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[3].parameters(), "lr": 1e-3}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    backward(model, data[0])
    optimizer.step()
    backward(model, data[1])
    whole = ma.momentum_gradient_cosine(optimizer)
    assert whole == pytest.approx(by_hand(optimizer, list(model.parameters()), "momentum_buffer"), abs=1e-13)
    parts = [by_hand(optimizer, list(layer.parameters()), "momentum_buffer") for layer in (model[0], model[3])]
    assert whole != pytest.approx(np.mean(parts), abs=1e-3)


def test_sign_and_closed_form() -> None:
    """One overshooting step on a parabola: the gradient turns round and the cosine is −1."""
    w = nn.Parameter(torch.tensor([1.0, 2.0]).double())
    optimizer = torch.optim.SGD([w], lr=1.5, momentum=0.9)
    cosines = []
    for _ in range(2):
        optimizer.zero_grad()
        (w @ w / 2).backward()
        cosines.append(ma.momentum_gradient_cosine(optimizer))
        optimizer.step()
    assert math.isnan(cosines[0])
    assert cosines[1] == pytest.approx(-1.0, abs=1e-15)


def test_parameters_without_gradient_or_buffer_count_as_zero() -> None:
    model, data = PARTIAL.model(), PARTIAL.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    used = [*model.body.parameters(), *model.head.parameters()]
    for x, y in data[:2]:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        got = ma.momentum_gradient_cosine(optimizer)
        if optimizer.state:
            expected = by_hand(optimizer, used, "momentum_buffer")
            assert got == pytest.approx(expected, abs=1e-13)
        optimizer.step()
    model.head.weight.grad = None
    got = ma.momentum_gradient_cosine(optimizer)
    v = joined(optimizer.state[p]["momentum_buffer"] for p in used)
    g = joined(torch.zeros_like(p) if p.grad is None else p.grad for p in used)
    assert got == pytest.approx(cosine(v, g), abs=1e-13)


class Transfers(TorchDispatchMode):
    """Counts the single numbers that are fetched from a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_device_is_not_waited_for_at_every_parameter() -> None:
    """A loop that is watched at every step must stay fast: everything is fetched at once, in the end."""
    parameters = [nn.Parameter(normal(3, seed=seed)) for seed in range(20)]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    with Transfers() as transfers:  # type: ignore[no-untyped-call]
        assert ma.momentum_gradient_cosine(optimizer) == pytest.approx(1.0, abs=1e-15)
    assert transfers.count <= 3


def test_zero_gradient_has_no_angle() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.ones(2)
    optimizer.step()
    w.grad = torch.zeros(2)
    assert math.isnan(ma.momentum_gradient_cosine(optimizer))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients(scale: float) -> None:
    """Squares of float32 numbers leave the range of float32; the angle does not."""
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.0, momentum=0.9)
    w.grad = scale * torch.tensor([1.0, 0.0])
    optimizer.step()
    w.grad = scale * torch.tensor([1.0, 1.0])
    assert ma.momentum_gradient_cosine(optimizer) == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_no_momentum() -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(RuntimeError, match=r"SGD keeps no momentum.*momentum > 0"):
        ma.momentum_gradient_cosine(optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"SGD keeps no momentum.*momentum > 0"):
        ma.momentum_gradient_cosine(optimizer)


def test_no_gradient() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match=r"no parameter.*gradient.*after loss\.backward\(\).*before optimizer\.step"):
        ma.momentum_gradient_cosine(optimizer)


# --- the monitor


class Spy:
    """A probe that takes down what it sees."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.seen: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        self.seen.append((step, joined(self.parameters), joined(p.grad for p in self.parameters)))
        return {"spied": float(step) ** 2}


@each_optimizer
@pytest.mark.parametrize("every", [1, 3])
def test_monitor_records_the_cosine_at_its_steps(name: str, every: int) -> None:
    make, key = OPTIMIZERS[name]
    model, data = MLP.model().eval(), MLP.data()
    parameters = list(model.parameters())
    optimizer = make(parameters)
    spy = Spy(parameters)
    monitor = ma.Monitor(optimizer, probes=[ma.probes.MomentumGradientCosine(), spy], every=every)
    expected, before = [], []
    for step in range(8):
        backward(model, data[step % 3])
        if step % every == 0:
            expected.append(by_hand(optimizer, parameters, key))
            before.append((joined(parameters), joined(p.grad for p in parameters)))
        optimizer.step()
    frame = monitor.frame()
    assert isinstance(frame, pd.DataFrame)
    assert frame["step"].tolist() == list(range(0, 8, every))
    np.testing.assert_allclose(frame["cosine"], expected, atol=1e-13)
    assert frame["spied"].tolist() == [float(step) ** 2 for step in range(0, 8, every)]
    assert [step for step, _, _ in spy.seen] == list(range(0, 8, every))
    for (_, weights, gradients), (weights_before, gradients_before) in zip(spy.seen, before, strict=True):
        np.testing.assert_array_equal(weights, weights_before)
        np.testing.assert_array_equal(gradients, gradients_before)


@each_optimizer
def test_monitor_of_a_loop_with_closures(name: str) -> None:
    """As Lightning and L-BFGS users write it: the gradient recorded is the one this step makes, never a stale one."""
    make, key = OPTIMIZERS[name]
    model, data = MLP.model().eval(), MLP.data()
    parameters = list(model.parameters())
    optimizer = make(parameters)
    monitor = ma.Monitor(optimizer, probes=[ma.probes.MomentumGradientCosine()], every=1)
    expected = []
    for batch in data:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            expected.append(by_hand(optimizer, parameters, key))
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    np.testing.assert_allclose(monitor.frame()["cosine"], expected, atol=1e-13)


def test_default_is_every_fiftieth_step() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    monitor = ma.Monitor(optimizer, probes=[ma.probes.MomentumGradientCosine()])
    for _ in range(101):
        w.grad = torch.ones(2)
        optimizer.step()
    assert monitor.frame()["step"].tolist() == [0, 50, 100]


def test_before_the_first_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    frame = ma.Monitor(optimizer, probes=[ma.probes.MomentumGradientCosine()]).frame()
    assert len(frame) == 0
    assert "step" in frame.columns


def test_closing_ends_the_recording() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)

    def step() -> None:
        w.grad = torch.ones(2)
        optimizer.step()

    with ma.Monitor(optimizer, probes=[ma.probes.MomentumGradientCosine()], every=1) as monitor:
        step()
        step()
    step()
    monitor.close()
    assert monitor.frame()["step"].tolist() == [0, 1]
    failed = ma.Monitor(optimizer, probes=[Spy([w])], every=1)

    def fail() -> None:
        with failed:
            step()
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    step()
    assert len(failed.frame()) == 1


def rise(
    name: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 5
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Train with a monitor; take down weights, momentum and gradient before every step."""
    model, data = MLP.model().eval(), MLP.data()
    parameters = list(model.parameters())
    optimizer = make(parameters)
    objective = ma.Objective(model, MLP.loss_fn, data)
    monitor = ma.Monitor(optimizer, probes=[ma.probes.PerturbationRise(objective)], every=1)
    seen = []
    for step in range(steps):

        def closure(batch: Any = data[step % 3]) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        record: dict[str, Any] = {"w": torch.from_numpy(joined(parameters))}
        states = [optimizer.state.get(p, {}).get("momentum_buffer") for p in parameters]
        record["v"] = torch.zeros(len(record["w"])).double() if states[0] is None else torch.from_numpy(joined(states))
        if name == "SAM":
            with torch.enable_grad():
                closure()
            record["g"] = torch.from_numpy(joined(p.grad for p in parameters))
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
        seen.append(record)
    return monitor.frame(), seen


def check_rise(frame: pd.DataFrame, pairs: list[tuple[Tensor, Tensor]]) -> None:
    reference = reference_loss(MLP, MLP.model(), MLP.data())
    before = [float(reference(w)) for w, _ in pairs]
    after = [float(reference(w + epsilon)) for w, epsilon in pairs]
    assert frame["step"].tolist() == list(range(len(pairs)))
    np.testing.assert_allclose(frame["loss_before"], before, rtol=1e-10)
    np.testing.assert_allclose(frame["loss_after"], after, rtol=1e-10)


def unit(v: Tensor) -> Tensor:
    return v / v.norm() if v.any() else v


def test_rise_of_msam() -> None:
    """Algorithm 1 keeps the perturbed weights: ``w = w̃ + ρ v/‖v‖``."""
    frame, seen = rise("MSAM", lambda p: msam.MSAM(p, lr=0.1, rho=0.4, momentum=0.9))
    check_rise(frame, [(s["w"] + 0.4 * unit(s["v"]), -0.4 * unit(s["v"])) for s in seen])
    assert (frame["loss_before"] != frame["loss_after"])[1:].all()


def test_rise_of_nag() -> None:
    frame, seen = rise("NAG", lambda p: msam.NAG(p, lr=0.1, momentum=0.9))
    check_rise(frame, [(s["w"] + 0.09 * s["v"], -0.09 * s["v"]) for s in seen])


def test_rise_of_sam() -> None:
    frame, seen = rise("SAM", lambda p: msam.SAM(p, lr=0.1, rho=0.4, momentum=0.9))
    check_rise(frame, [(s["w"], 0.4 * unit(s["g"])) for s in seen])
    assert (frame["loss_after"] > frame["loss_before"]).mean() > 0.5


def test_no_rise_without_perturbation() -> None:
    frame, seen = rise("SGD", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    check_rise(frame, [(s["w"], torch.zeros_like(s["w"])) for s in seen])


@pytest.mark.parametrize("perturbed", [False, True])
def test_curvature(perturbed: bool) -> None:
    """``dᵀHd / dᵀd`` at the true weights along momentum and gradient, against the dense Hessian."""
    model, data = MLP.model().eval(), MLP.data()
    parameters = list(model.parameters())
    rho = 0.4 if perturbed else 0.0
    optimizer: torch.optim.Optimizer = (
        msam.MSAM(parameters, lr=0.1, rho=rho, momentum=0.9)
        if perturbed
        else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    )
    objective = ma.Objective(model, MLP.loss_fn, data)
    reference = reference_loss(MLP, model, data)
    monitor = ma.Monitor(optimizer, probes=[ma.probes.Curvature(objective, seed=0)], every=1)
    expected: dict[str, list[float]] = {"momentum": [], "gradient": []}
    extremes = []
    for batch in data:
        backward(model, batch)
        g = torch.from_numpy(joined(p.grad for p in parameters))
        v = torch.zeros_like(g)
        if optimizer.state and "momentum_buffer" in optimizer.state[parameters[0]]:
            v = torch.from_numpy(joined(optimizer.state[p]["momentum_buffer"] for p in parameters))
        hessian = dense_hessian(reference, flatten(model) + rho * unit(v))
        extremes.append(torch.linalg.eigvalsh(hessian)[[0, -1]].tolist())
        expected["gradient"].append(float(g @ hessian @ g / (g @ g)))
        expected["momentum"].append(float(v @ hessian @ v / (v @ v)) if v.any() else math.nan)
        optimizer.step()
    frame = monitor.frame()
    np.testing.assert_allclose(frame["curvature_gradient"], expected["gradient"], rtol=1e-8)
    np.testing.assert_allclose(frame["curvature_momentum"], expected["momentum"], rtol=1e-8)
    random = frame["curvature_random"].tolist()
    assert len(set(random)) == 3
    assert all(low < value < high for value, (low, high) in zip(random, extremes, strict=True))


def test_curvature_by_seed() -> None:
    def run(seed: int) -> list[float]:
        model, data = MLP.model().eval(), MLP.data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        objective = ma.Objective(model, MLP.loss_fn, data)
        monitor = ma.Monitor(optimizer, probes=[ma.probes.Curvature(objective, seed=seed)], every=1)
        for batch in data:
            backward(model, batch)
            optimizer.step()
        values: list[float] = monitor.frame()["curvature_random"].tolist()
        return values

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_random_curvature_is_along_another_direction_than_what_else_is_random() -> None:
    """One seed for everything in a script must not make the direction plotted the direction measured."""
    model, data = MLP.model().eval(), MLP.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = ma.Objective(model, MLP.loss_fn, data)
    along = ma.curvature_along(objective, ma.directions.random(objective, seed=0, normalize="none"))
    with ma.Monitor(optimizer, probes=[ma.probes.Curvature(objective)], every=1) as monitor:
        backward(model, data[0])
        optimizer.step()
    assert monitor.frame()["curvature_random"][0] != pytest.approx(along, rel=1e-3)


@pytest.mark.parametrize("name", ["SGD", "MSAM", "SAM"])
def test_monitored_training_is_the_same_training(name: str) -> None:
    """With dropout and BatchNorm, every probe at every step: bit for bit the same weights, buffers and state."""

    def run(monitored: bool) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model, data = CONVNET.model(), CONVNET.data()
            make: dict[str, Make] = {
                "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
                "MSAM": lambda p: msam.MSAM(p, lr=0.1, rho=0.3, momentum=0.9),
                "SAM": lambda p: msam.SAM(p, lr=0.1, rho=0.3, momentum=0.9),
            }
            optimizer = make[name](list(model.parameters()))
            if monitored:
                objective = ma.Objective(model, CONVNET.loss_fn, data)
                probes: list[Any] = [
                    ma.probes.MomentumGradientCosine(),
                    ma.probes.PerturbationRise(objective),
                    ma.probes.Curvature(objective),
                ]
                monitor = ma.Monitor(optimizer, probes=probes, every=1)
            for x, y in data * 2:

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    optimizer.zero_grad()
                    loss = CONVNET.loss_fn(model(x), y)
                    loss.backward()
                    return loss  # type: ignore[no-any-return]

                if name == "SAM":
                    optimizer.step(closure)  # type: ignore[arg-type]
                else:
                    closure()
                    optimizer.step()
            if monitored:
                assert monitor.frame()["step"].tolist() == list(range(6))
            state = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
            return [*model.parameters(), *model.buffers(), *state, torch.get_rng_state()]

    plain, monitored = run(False), run(True)
    assert len(plain) == len(monitored)
    assert all(torch.equal(a, b) for a, b in zip(plain, monitored, strict=True))


def test_a_probe_that_raises_moves_nothing() -> None:
    """The error comes out of step(); the step has not been taken."""
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)

    def probe(optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        raise ArithmeticError("the probe went off")

    w.grad = torch.ones(2)
    with ma.Monitor(optimizer, probes=[probe], every=1), pytest.raises(ArithmeticError, match="probe went off"):
        optimizer.step()
    assert torch.equal(w, torch.ones(2))
    assert not optimizer.state
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("every", [0, -1, 2.5])
def test_bad_every(every: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=rf"every must be a positive integer, got {every}"):
        ma.Monitor(optimizer, probes=[ma.probes.MomentumGradientCosine()], every=every)


def test_bad_probes() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"probes is empty.*expected"):
        ma.Monitor(optimizer, probes=[])


def test_two_probes_of_one_name() -> None:
    """Refused when they are given or, for probes that name themselves as they go, at the first step."""
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    w.grad = normal(2, seed=1).float()
    with pytest.raises(ValueError, match=r"cosine"):
        _ = ma.Monitor(optimizer, probes=[ma.probes.MomentumGradientCosine()] * 2), optimizer.step()
