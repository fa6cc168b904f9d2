"""No measurement leaves a trace in the model, in its optimizer or in the generators, not even one that fails."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import msam_analysis as ma

from .cases import CASES, CONVNET, MLP, PARTIAL, TAGGER, TRANSFORMER, Case, concatenate, normal

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def raw(tensor: torch.Tensor | None) -> Any:
    """Everything there is to a tensor: where it lies, how often it was written to, its bytes."""
    if tensor is None:
        return None
    data = tensor.detach().contiguous().view(-1).numpy().tobytes()
    return id(tensor), tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape), tensor.stride(), data


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Take down the model and the process's random and numerical state."""
    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = raw(parameter)
        state[f"requires_grad {name}"] = parameter.requires_grad
        state[f"grad {name}"] = raw(parameter.grad)
        state[f"hooks of {name}"] = len(parameter._backward_hooks or {})
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = raw(buffer)
    for name, module in model.named_modules():
        state[f"mode {name}"] = module.training
        state[f"identity {name}"] = id(module)
        state[f"attributes {name}"] = sorted(vars(module))
        state[f"forward hooks {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        if isinstance(module, nn.BatchNorm2d):
            state[f"options {name}"] = (module.momentum, module.track_running_stats, module.eps)
        if isinstance(module, nn.Dropout):
            state[f"options {name}"] = module.p
    state["torch generator"] = torch.get_rng_state().numpy().tobytes()
    state["numpy generator"] = repr(np.random.get_state(legacy=False))
    state["python generator"] = random.getstate()
    state["gradients on"] = torch.is_grad_enabled()
    state["default dtype"] = torch.get_default_dtype()
    state["deterministic"] = torch.are_deterministic_algorithms_enabled()
    state["threads"] = torch.get_num_threads()
    state["attention kernels"] = (
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )
    return state


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Compare before and after, whether or not the body raises."""
    before = snapshot(model)
    try:
        yield
    finally:
        after = snapshot(model)
        assert before.keys() == after.keys()
        assert [key for key in before if before[key] != after[key]] == []


def lived_in(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """Return a model in the middle of training: mixed modes, gradients on some parameters, NaN in one."""
    model = case.model(dtype)
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        if index % 2 == 0:
            parameter.grad = normal(*parameter.shape, seed=index).to(dtype)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad.view(-1)[0] = float("nan")
    return model


class Alarm:
    """A loss that raises in the given call once it is armed."""

    def __init__(self, loss_fn: Callable[..., Any]) -> None:
        self.loss_fn = loss_fn
        self.armed: int | None = None

    def __call__(self, first: Any, second: Any) -> Any:
        if self.armed is not None:
            self.armed -= 1
            if self.armed == 0:
                raise ArithmeticError("the alarm went off")
        return self.loss_fn(first, second)


def direction(objective: ma.Objective) -> torch.Tensor:
    return normal(objective.size, seed=120).to(objective.point().dtype)


def interpolated(objective: ma.Objective) -> ma.Direction:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ma.ApproximationWarning)  # statistics of BatchNorm, told elsewhere
        return ma.directions.interpolation(objective, objective.point() + 1.0)


def plane(objective: ma.Objective) -> tuple[torch.Tensor, torch.Tensor]:
    return direction(objective), direction(objective).flip(0)


# Probes that evaluate the loss.
PROBES: dict[str, Callable[[ma.Objective], Any]] = {
    "loss": lambda o: o.loss(),
    "loss elsewhere": lambda o: o.loss(o.point() + direction(o)),
    "gradient": lambda o: o.gradient(),
    "gradient elsewhere": lambda o: o.gradient(o.point() + direction(o)),
    "loss_and_gradient": lambda o: o.loss_and_gradient(),
    "hvp": lambda o: o.hvp(direction(o)),
    "hvp elsewhere": lambda o: o.hvp(direction(o), o.point() + direction(o)),
    "hessian matvec": lambda o: o.hessian().matvec(direction(o)),
    "hessian matmat": lambda o: o.hessian() @ torch.stack(plane(o), dim=1),
    "hessian to_scipy": lambda o: o.hessian().to_scipy() @ direction(o).numpy(),
    "gauss_newton matvec": lambda o: o.gauss_newton() @ direction(o),
    "gauss_newton matmat": lambda o: o.gauss_newton() @ torch.stack(2 * plane(o), dim=1),
    "other samples": lambda o: o.with_samples(torch.tensor([8, 0, 0]), batch_size=2).hvp(direction(o)),
    "other parameters": lambda o: o.with_parameters("*weight").gradient(),
    "lanczos": lambda o: ma.top_eigenvalues(o, k=2, tolerance=1e-2),
    "power": lambda o: ma.top_eigenvalues(o, k=1, method="power", tolerance=1e-1),
    "trace": lambda o: ma.trace(o, draws=3),
    "ball l2": lambda o: ma.ball_sharpness(o, 0.1),
    "ball linf": lambda o: ma.ball_sharpness(o, 0.01, norm="linf"),
    "ball adaptive": lambda o: ma.ball_sharpness(o, 0.1, adaptive=True),
    "average": lambda o: ma.average_sharpness(o, 0.1, draws=3),
    "average adaptive": lambda o: ma.average_sharpness(o, 0.1, adaptive=True, draws=3),
    "gradient direction": lambda o: ma.directions.gradient(o).normalized(o, "filter"),
    "eigenvector direction": ma.directions.eigenvector,
    "slice_1d": lambda o: ma.slice_1d(o, ma.Direction(direction(o), "given"), points=3),
    "slice_2d": lambda o: ma.slice_2d(o, (ma.Direction(plane(o)[0], "x"), ma.Direction(plane(o)[1], "y")), points=3),
}
QUIET: dict[str, Callable[[ma.Objective], Any]] = {
    "point": lambda o: o.point().add_(1.0),
    "settings": lambda o: dict(o.settings),
    "vector": lambda o: o.vector({}),
    "views": lambda o: [view.add_(1.0) for view in o.layout.views(o.point()).values()],
    "random filter": lambda o: ma.directions.random(o, seed=1).vector.mul_(2.0),
    "random layer": lambda o: ma.directions.random(o, seed=1, normalize="layer"),
    "random l2": lambda o: ma.directions.random(o, seed=1, normalize="l2"),
    "random none": lambda o: ma.directions.random(o, seed=1, normalize="none"),
    "interpolation": interpolated,
}


def with_policies(cases: tuple[Case, ...]) -> list[Any]:
    return [
        pytest.param(case, policy, id=f"{case.name}-{policy}")
        for case in cases
        for policy in (*case.policies, *(["recalibrate"] if len(case.policies) > 1 else []))
    ]


@pytest.mark.parametrize(("case", "policy"), with_policies((CONVNET, PARTIAL, TAGGER, TRANSFORMER)))
@pytest.mark.parametrize("probe", [*PROBES, *QUIET])
@pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")
def test_every_probe(case: Case, policy: Any, probe: str) -> None:
    model = lived_in(case)
    with untouched(model):
        objective = ma.Objective(model, case.loss_fn, case.data(), batchnorm=policy)
    with untouched(model):
        (PROBES | QUIET)[probe](objective)


# The second call of the loss is half way through the data; probes of many evaluations fail in a later one, too.
SEVERAL = [probe for probe in PROBES if probe.startswith(("ball", "average", "slice"))]


@pytest.mark.parametrize(("probe", "call"), [(probe, 2) for probe in PROBES] + [(probe, 8) for probe in SEVERAL])
@pytest.mark.parametrize(("case", "policy"), with_policies((MLP, CONVNET, TRANSFORMER)))
@pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")
def test_every_probe_that_fails_half_way(case: Case, policy: Any, probe: str, call: int) -> None:
    model = lived_in(case)
    alarm = Alarm(case.loss_fn)
    objective = ma.Objective(model, alarm, case.data(), batchnorm=policy)
    before = objective.loss()
    alarm.armed = call
    with untouched(model), pytest.raises(ArithmeticError, match="alarm"):
        PROBES[probe](objective)
    alarm.armed = None
    assert torch.equal(objective.loss(), before)


FUSE = {"lit": False}


class Explosive(nn.Module):
    """A layer that raises in its forward pass; the layers before it have run by then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if FUSE["lit"]:
            raise ArithmeticError("the layer went off")
        return x


@pytest.mark.parametrize("policy", ["eval", "batch", "recalibrate"])
@pytest.mark.parametrize("probe", PROBES)
def test_a_forward_pass_that_fails_behind_batchnorm(policy: Any, probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CONVNET.model()
    model.insert(2, Explosive())
    objective = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), batchnorm=policy)
    monkeypatch.setitem(FUSE, "lit", True)
    with untouched(model), pytest.raises(ArithmeticError, match="layer"):
        PROBES[probe](objective)


@pytest.mark.parametrize("policy", ["eval", "batch", "recalibrate"])
def test_construction_from_a_loader(policy: Any) -> None:
    """A DataLoader draws a number from torch's generator each time it is iterated over."""
    model = lived_in(CONVNET)
    loader = DataLoader(TensorDataset(*concatenate(CONVNET.data())), batch_size=8)
    with untouched(model):
        objective = ma.Objective(model, CONVNET.loss_fn, loader, batchnorm=policy)
        objective.loss()
        objective.hvp(direction(objective))
        ma.slice_1d(objective, ma.Direction(direction(objective), "given"), points=3)


class Noisy(TensorDataset):
    """Draws from every generator there is."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)  # type: ignore[no-untyped-call]
        return x + torch.randn(()) + np.random.rand() + random.random(), y


def test_refusing_an_augmenting_loader() -> None:
    model = lived_in(MLP)
    loader = DataLoader(Noisy(*concatenate(MLP.data())), batch_size=8)
    with untouched(model), pytest.raises(ValueError, match=r"differs between two passes.*augments"):
        ma.Objective(model, MLP.loss_fn, loader).loss()


@each_case
def test_data_are_not_written_to(case: Case) -> None:
    data = case.data()
    tensors = [value for batch in data for value in (batch.values() if isinstance(batch, dict) else batch)]
    before = [raw(tensor) for tensor in tensors]
    objective = ma.Objective(case.model(), case.loss_fn, data)
    objective.loss_and_gradient()
    objective.hvp(direction(objective))
    assert [raw(tensor) for tensor in tensors] == before


class InPlace(nn.Module):
    """Scales its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.mul_(0.5))
        return out


@pytest.mark.parametrize(
    "form", [list, lambda data: data[0], lambda data: DataLoader(TensorDataset(*concatenate(data)), 8)]
)
def test_a_model_that_works_in_place(form: Callable[[Any], Any]) -> None:
    """It changes neither the caller's data nor what the next evaluation sees."""
    model, data = InPlace(), MLP.data()
    before = [raw(tensor) for batch in data for tensor in batch]
    objective = ma.Objective(model, F.cross_entropy, form(data))
    same = ma.Objective(model.layer, F.cross_entropy, form([(0.5 * x, y) for x, y in data]))
    for _ in range(3):
        assert float(objective.loss()) == pytest.approx(float(same.loss()), rel=1e-12)
        torch.testing.assert_close(objective.gradient(), same.gradient(), rtol=1e-10, atol=1e-12)
        v = direction(objective)
        torch.testing.assert_close(objective.hvp(v), same.hvp(v), rtol=1e-10, atol=1e-12)
    assert [raw(tensor) for batch in data for tensor in batch] == before


def test_a_loss_that_takes_its_labels_out_of_the_batch() -> None:
    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        labels = batch.pop("y")
        return F.cross_entropy(model(**batch), labels)

    data = [{"input": x, "y": y} for x, y in MLP.data()]
    model = MLP.model()
    objective = ma.Objective(model, loss_fn, data)
    expected = ma.Objective(model, F.cross_entropy, MLP.data()).loss()
    for _ in range(2):
        assert torch.equal(objective.loss(), expected)
    assert all(batch.keys() == {"input", "y"} for batch in data)


def test_hooks_of_the_model_are_not_called() -> None:
    """An activation recorder records what its owner runs; results say that hooks were left out."""
    model, seen = MLP.model(), []
    handles = [
        model[0].register_forward_hook(lambda *args: seen.append(args)),
        model[0].register_forward_pre_hook(lambda *args: seen.append(args)),
        model[0].register_full_backward_hook(lambda *args: seen.append(args)),
    ]
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    with untouched(model):
        with pytest.warns(ma.ApproximationWarning, match="2 forward hooks of the model are left out"):
            objective.examine()
        objective.loss_and_gradient()
        objective.hvp(direction(objective))
    assert not seen
    assert objective.settings["hooks left out"] == 3
    for handle in handles:
        handle.remove()
    assert "hooks left out" not in ma.Objective(model, MLP.loss_fn, MLP.data()).settings


def test_a_criterion_with_buffers() -> None:
    """A criterion may count its calls; measuring is none."""

    class Counting(nn.CrossEntropyLoss):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__(weight=torch.ones(3).double())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(output, target)

    criterion = Counting()
    objective = ma.Objective(MLP.model(), criterion, MLP.data())
    with untouched(criterion):
        objective.loss_and_gradient()


def test_the_generator_of_apple_silicon_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one; here it is played by another."""
    device, model, data = torch.Generator().manual_seed(3), MLP.model(), MLP.data()
    before = device.get_state()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", device.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", device.set_state)
    monkeypatch.setattr(torch.mps, "manual_seed", device.manual_seed)

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target) * torch.rand((), generator=device).double()

    objective = ma.Objective(model, loss_fn, data)
    assert torch.equal(objective.loss(), objective.loss())
    assert torch.equal(device.get_state(), before)


def test_vectors_given_are_not_written_to() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    w, v = direction(objective), direction(objective).flip(0)
    before = raw(w), raw(v)
    objective.loss(w)
    objective.loss_and_gradient(w)
    objective.hvp(v, w)
    objective.hessian(w) @ v
    objective.layout.views(w)
    ma.slice_1d(objective, v, points=3)
    ma.slice_2d(objective, (v, w), points=3)
    ma.directions.interpolation(objective, w).normalized(objective, "filter")
    assert (raw(w), raw(v)) == before
    assert not w.requires_grad


def test_a_graph_of_the_caller_stays_alive() -> None:
    """A measurement between forward and backward of a training step changes nothing about that step."""
    gradients = []
    for measure in (False, True):
        model = MLP.model().eval()
        x, y = MLP.data()[0]
        loss = F.cross_entropy(model(x), y)
        if measure:
            ma.top_eigenvalues(ma.Objective(model, MLP.loss_fn, MLP.data()), k=1, tolerance=1e-2)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def training(measure: Callable[[nn.Module, torch.optim.Optimizer], Any] | None) -> list[torch.Tensor]:
    """Train with dropout and BatchNorm, measuring on the way or not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = CONVNET.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in CONVNET.data():
            optimizer.zero_grad()
            CONVNET.loss_fn(model(x), y).backward()
            if measure:
                measure(model, optimizer)
            optimizer.step()
    return [*model.parameters(), *model.buffers()]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for policy in ("eval", "batch", "recalibrate"):
        objective = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), batchnorm=policy)
        ma.top_eigenvalues(objective, k=1, tolerance=0.1)
        ma.ball_sharpness(objective, 0.1)
        ma.slice_1d(objective, ma.directions.random(objective), points=3)
    ma.momentum_gradient_cosine(optimizer)


@pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")
def test_measured_training_is_the_same_training() -> None:
    """Dropout draws the same masks, BatchNorm counts the same batches, the end is the same to the bit."""

    def careful(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if optimizer.state:
            everything(model, optimizer)

    plain, measured = training(None), training(careful)
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


def written(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [raw(value) for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_momentum_probes_leave_the_optimizer_alone(kind: Any) -> None:
    model = MLP.model().eval()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, **options)
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    for x, y in MLP.data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = written(optimizer)
        with untouched(model):
            ma.momentum_gradient_cosine(optimizer)
            if optimizer.state:
                ma.directions.momentum(optimizer, objective)
        assert written(optimizer) == before
        optimizer.step()
