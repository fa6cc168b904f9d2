"""Every mistake gets one sentence: what was expected, what came, what to do."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import msam_analysis as ma
from msam_analysis.landscape import logarithmic

from .cases import MLP, concatenate, generator, normal

NAN, INF = math.nan, math.inf

# The mistakes below are such as mypy finds; users without mypy make them, too.
loose: Any = ma
half: Any = 2.5


def dataset() -> TensorDataset:
    return TensorDataset(*concatenate(MLP.data()))


@pytest.fixture
def objective() -> ma.Objective:
    return ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())


# --- data


class Scrambled(Sampler[int]):
    """Another order at every pass, unknown to any list of sampler classes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(torch.randperm(19, generator=generator(self.passes)).tolist())

    def __len__(self) -> int:
        return 19


SHUFFLING: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffle=True": lambda: DataLoader(dataset(), batch_size=8, shuffle=True),
    "seeded": lambda: DataLoader(dataset(), batch_size=8, shuffle=True, generator=generator(1)),
    "whole batch": lambda: DataLoader(dataset(), batch_size=19, shuffle=True),
    "weighted": lambda: DataLoader(dataset(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 19, 19)),
    "subset": lambda: DataLoader(dataset(), batch_size=8, sampler=SubsetRandomSampler(range(10))),
    "batch sampler": lambda: DataLoader(
        dataset(), batch_sampler=BatchSampler(SubsetRandomSampler(range(19)), 8, drop_last=False)
    ),
    "sampler of one's own": lambda: DataLoader(dataset(), batch_size=8, sampler=Scrambled()),
    "batches of one's own": lambda: DataLoader(dataset(), batch_sampler=BatchSampler(Scrambled(), 8, drop_last=False)),
}


@pytest.mark.parametrize("name", SHUFFLING)
def test_shuffling_loader(name: str) -> None:
    with pytest.raises(ValueError, match=r"shuffle.*expected the same batches.*shuffle=False"):
        ma.Objective(MLP.model(), MLP.loss_fn, SHUFFLING[name]()).loss()


class Augmented(TensorDataset):
    """Adds noise to some samples: from torch, from numpy, from python, from a counter, or to the target."""

    def __init__(self, source: str, only: int | None = None) -> None:
        super().__init__(*concatenate(MLP.data()))
        self.source, self.only, self.count = source, only, 0

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)  # type: ignore[no-untyped-call]
        if self.only is not None and index != self.only:
            return x, y
        self.count += 1
        if self.source == "torch":
            return x + torch.rand(()), y
        if self.source == "numpy":
            return x + np.random.rand(), y
        if self.source == "python":
            return x + random.random(), y
        if self.source == "target":
            return x, (y + self.count) % 3
        return x + self.count, y


@pytest.mark.parametrize("only", [None, 0, 18])
@pytest.mark.parametrize("source", ["torch", "numpy", "python", "counter", "target"])
def test_augmenting_loader(source: str, only: int | None) -> None:
    loader = DataLoader(Augmented(source, only), batch_size=8)
    with pytest.raises(ValueError, match=r"differs between two passes.*augments.*expected the same.*list\(loader\)"):
        ma.Objective(MLP.model(), MLP.loss_fn, loader).loss()


def test_frozen_augmentation_is_fine() -> None:
    """What the error recommends."""
    batches = list(DataLoader(Augmented("torch"), batch_size=8))
    objective = ma.Objective(MLP.model(), MLP.loss_fn, batches)
    assert torch.equal(objective.loss(), objective.loss())


class Growing(IterableDataset[Any]):
    """One sample more at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        x, y = concatenate(MLP.data())
        return iter(list(zip(x, y, strict=True))[: 10 + self.passes])


def test_loader_that_changes_its_length() -> None:
    with pytest.raises(ValueError, match=r"differs between two passes.*expected the same"):
        ma.Objective(MLP.model(), MLP.loss_fn, DataLoader(Growing(), batch_size=8)).loss()


@pytest.mark.parametrize(
    "once", [iter, lambda data: (batch for batch in data), lambda data: zip(*zip(*data, strict=True), strict=True)]
)
def test_data_that_can_be_read_once(once: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"iterator, which can be read only once: pass list\(data\)"):
        ma.Objective(MLP.model(), MLP.loss_fn, once(MLP.data()))


def no_samples() -> DataLoader[Any]:
    x, y = concatenate(MLP.data())
    return DataLoader(TensorDataset(x[:0], y[:0]))


def empty_batches() -> list[Any]:
    x, y = concatenate(MLP.data())
    return [(x[:0], y[:0])]


@pytest.mark.parametrize("data", [list, no_samples, empty_batches, lambda: DataLoader(dataset(), 50, drop_last=True)])
def test_empty_data(data: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="data is empty: expected at least one batch"):
        ma.Objective(MLP.model(), MLP.loss_fn, data()).loss()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "batches.*got int.*pass"),
        (None, "batches.*got NoneType.*pass"),
        (torch.ones(3), r"bare tensor.*\(inputs, targets\)"),
    ],
)
def test_data_of_another_type(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ma.Objective(MLP.model(), MLP.loss_fn, data)


# --- the model, its parameters and the loss


def test_model_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str.*pass"):
        loose.Objective("model", MLP.loss_fn, MLP.data())


@pytest.mark.parametrize("policy", ["train", "Eval", "", None, True])
def test_unknown_policy(policy: Any) -> None:
    with pytest.raises(ValueError, match=rf"batchnorm must be one of .*eval.*batch.*recalibrate.*got {policy!r}"):
        ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), batchnorm=policy)


@pytest.mark.parametrize("parameters", ["conv*", ["0.*", "conv*"]])
def test_pattern_without_match(parameters: Any) -> None:
    with pytest.raises(ValueError, match=r"'conv\*'.*expected.*'0\.weight'"):
        ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), parameters=parameters)


@pytest.mark.parametrize("parameters", [[], lambda name, parameter: False])
def test_nothing_selected(parameters: Any) -> None:
    with pytest.raises(ValueError, match=r"selects nothing: expected at least one of"):
        ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), parameters=parameters)


def test_everything_frozen() -> None:
    model = MLP.model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter with requires_grad=True.*unfreeze.*parameters="):
        ma.Objective(model, MLP.loss_fn, MLP.data())


class Locked(nn.Module):
    """A model that holds what nothing can copy."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock = nn.Linear(4, 3).double(), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def test_a_model_that_cannot_be_copied() -> None:
    with pytest.raises(ValueError, match=r"cannot be copied \(TypeError: .*lock.*expected modules .*remove attributes"):
        ma.Objective(Locked(), F.cross_entropy, MLP.data()).loss()


def unreduced(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


EVALUATIONS: dict[str, Callable[[ma.Objective], Any]] = {
    "loss": lambda o: o.loss(),
    "gradient": lambda o: o.gradient(),
    "hvp": lambda o: o.hvp(torch.ones(o.size, dtype=torch.float64)),
    "eigenvalues": lambda o: ma.top_eigenvalues(o, k=1),
    "slice": lambda o: ma.slice_1d(o, torch.ones(o.size, dtype=torch.float64), points=3),
    "ball": lambda o: ma.ball_sharpness(o, 0.1),
}


@pytest.mark.parametrize("probe", EVALUATIONS)
def test_loss_that_is_no_scalar(probe: str) -> None:
    objective = ma.Objective(MLP.model(), unreduced, MLP.data())
    with pytest.raises(ValueError, match=r"loss.*one number, got a tensor of shape \(8,\).*reduction='mean'"):
        EVALUATIONS[probe](objective)


@pytest.mark.parametrize(("value", "name"), [(None, "NoneType"), ("low", "str"), ([1.0], "list")])
def test_loss_that_is_no_tensor(value: Any, name: str) -> None:
    objective = ma.Objective(MLP.model(), lambda output, target: value, MLP.data())
    with pytest.raises(ValueError, match=rf"loss.*one number, got {name}.*reduction='mean'"):
        objective.loss()


@pytest.mark.parametrize("probe", ["gradient", "hvp", "eigenvalues", "ball"])
@pytest.mark.parametrize("detached", [True, False])
def test_loss_that_depends_on_nothing(detached: bool, probe: str) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.detach(), target) if detached else target.double().mean()

    objective = ma.Objective(MLP.model(), loss_fn, MLP.data())
    with pytest.raises(ValueError, match=r"depends on none of the .*parameters.*expected"):
        EVALUATIONS[probe](objective)


class Spare(nn.Module):
    """A layer that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3).double(), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_loss_that_depends_on_nothing_selected() -> None:
    objective = ma.Objective(Spare(), F.cross_entropy, MLP.data(), parameters="spare.*")
    with pytest.raises(ValueError, match=r"depends on none of the 2 selected parameters \(spare\.weight, spare\.bias"):
        objective.gradient()


def test_loss_that_ignores_the_model_it_is_given() -> None:
    """The objective's own model is led into its place; without an examination, the loss depends on nothing."""
    own = MLP.model().eval()
    batches = [{"x": x, "y": y} for x, y in MLP.data()]

    def loss_fn(_model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(own(batch["x"]), batch["y"])

    told = ma.Objective(own, lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]), batches)
    torch.testing.assert_close(ma.Objective(own, loss_fn, batches).gradient(), told.gradient())
    objective = ma.Objective(own, loss_fn, batches, examine=False)
    for probe in ("gradient", "hvp"):
        with pytest.raises(ValueError, match=r"depends on none of the 4 selected .*loss_fn uses the model it is given"):
            EVALUATIONS[probe](objective)


class Once(torch.autograd.Function):
    """A square whose derivative is not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        square: Tensor = x.square()
        return square

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = 2 * x * grad
        return gradient


class OnceDifferentiable(nn.Module):
    """One of its two branches goes through such a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.beside = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Once.apply(self.inside(x)) + self.beside(x)  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, lambda output, target: output.mean()], ids=["curved", "linear"])
@pytest.mark.parametrize("probe", ["hvp", "eigenvalues"])
def test_curvature_that_autograd_would_leave_out(probe: str, loss_fn: Any) -> None:
    objective = ma.Objective(OnceDifferentiable(), loss_fn, MLP.data(), second_derivatives="exact")
    assert objective.gradient().all()
    with pytest.raises(ValueError, match=r"cannot be differentiated twice \(Once is marked once_diff.*use another"):
        EVALUATIONS[probe](objective)


@pytest.mark.parametrize("probe", ["gradient", "hvp"])
def test_gradients_in_inference_mode(probe: str, objective: ma.Objective) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch\.inference_mode.*torch\.no_grad\(\)"):
        EVALUATIONS[probe](objective)


@pytest.mark.parametrize(
    ("extra", "came"),
    [
        (lambda output: (output,), r"of 2 with a tensor of shape \(8, 3\)"),
        (lambda output: (None,), "of 2 with NoneType"),
        (lambda output: (8, output), "of 3"),
    ],
)
def test_loss_with_more_beside_it(extra: Callable[[Tensor], Any], came: str) -> None:
    objective = ma.Objective(MLP.model(), lambda o, y: (F.cross_entropy(o, y), *extra(o)), MLP.data())
    with pytest.raises(ValueError, match=rf"tuple {came}.*expected a mean loss alone, or \(sum, count\).*logits"):
        objective.loss()


@pytest.mark.parametrize("count", [0, -3])
def test_nothing_counted(count: int) -> None:
    """A loss of (sum, 0) on every batch has no mean."""
    objective = ma.Objective(MLP.model(), lambda output, target: (output.sum(), count), MLP.data())
    with pytest.raises(ValueError, match="count"):
        objective.loss()


# --- vectors

VECTORS: dict[str, Callable[[ma.Objective, Any], Any]] = {
    "loss": lambda o, v: o.loss(v),
    "gradient": lambda o, v: o.gradient(v),
    "loss_and_gradient": lambda o, v: o.loss_and_gradient(v),
    "hvp": lambda o, v: o.hvp(v),
    "hvp at": lambda o, v: o.hvp(o.point(), v),
    "hessian at": lambda o, v: o.hessian(v),
    "views": lambda o, v: o.layout.views(v),
    "slice_1d": lambda o, v: ma.slice_1d(o, v, points=3),
    "slice_2d": lambda o, v: ma.slice_2d(o, (o.point(), v), points=3),
    "interpolation": ma.directions.interpolation,
}


@pytest.mark.parametrize("shape", [(58,), (60,), (59, 1), (1, 59), ()])
@pytest.mark.parametrize("name", VECTORS)
def test_vector_of_another_shape(name: str, shape: tuple[int, ...], objective: ma.Objective) -> None:
    with pytest.raises(ValueError, match=rf"(?s)expected .*shape \(59,\).*got .*\({', '.join(map(str, shape))}"):
        VECTORS[name](objective, torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", ["loss", "gradient", "hvp", "hvp at", "slice_1d"])
def test_vector_of_another_dtype_is_taken_at_its_value(name: str) -> None:
    """A float64 vector for a float32 model, and the other way round: the numbers count, the result has the model's."""
    for model_dtype, vector_dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        objective = ma.Objective(MLP.model(model_dtype), MLP.loss_fn, MLP.data(model_dtype))
        vector = normal(59, seed=130).float()
        got = VECTORS[name](objective, vector.to(vector_dtype))
        expected = VECTORS[name](objective, vector.to(model_dtype))
        if isinstance(got, Tensor):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
        else:
            assert torch.equal(got.loss, expected.loss)


def test_operator_on_another_shape(objective: ma.Objective) -> None:
    with pytest.raises(ValueError, match=r"expected a vector of shape \(59,\), got \(3,\)"):
        _ = objective.hessian() @ torch.ones(3).double()
    with pytest.raises(ValueError, match=r"expected a matrix of shape \(59, p\), got \(3, 2\)"):
        _ = objective.hessian() @ torch.ones(3, 2).double()


def test_vector_from_the_wrong_parameters(objective: ma.Objective) -> None:
    with pytest.raises(ValueError, match=r"belongs to a parameter of this objective.*one model"):
        objective.vector({nn.Parameter(torch.ones(2)): torch.ones(2)})


# --- measurements

CALLS: dict[str, tuple[Callable[[ma.Objective], Any], str]] = {
    "k = 0": (lambda o: loose.top_eigenvalues(o, k=0), r"k must be between 1 and .*59.*got 0"),
    "k < 0": (lambda o: loose.top_eigenvalues(o, k=-2), r"k must be between 1 and .*59.*got -2"),
    "k > size": (lambda o: loose.top_eigenvalues(o, k=60), r"k must be between 1 and .*59.*got 60.*fewer"),
    "method": (lambda o: loose.top_eigenvalues(o, method="qr"), r"method must be one of .*lanczos.*power.*got 'qr'"),
    "which": (lambda o: loose.top_eigenvalues(o, which="LM"), r"which must be one of .*largest.*got 'LM'"),
    "tolerance < 0": (lambda o: loose.top_eigenvalues(o, tolerance=-1), r"tolerance must be .*positive.*got -1"),
    "tolerance NaN": (lambda o: loose.top_eigenvalues(o, tolerance=NAN), r"tolerance must be .*positive.*got nan"),
    "max_hvps": (lambda o: loose.top_eigenvalues(o, k=5, max_hvps=3), r"max_hvps must be at least k = 5, got 3"),
    "trace draws": (lambda o: loose.trace(o, draws=0), r"draws must be at least 2.*got 0"),
    "rho < 0": (lambda o: loose.ball_sharpness(o, -0.1), r"rho must be a number >= 0, got -0\.1.*radius"),
    "rho NaN": (lambda o: loose.ball_sharpness(o, NAN), r"rho must be a number >= 0, got nan.*radius"),
    "rho infinite": (lambda o: loose.ball_sharpness(o, INF), r"rho must be a number >= 0, got inf.*radius"),
    "norm": (lambda o: loose.ball_sharpness(o, 0.1, norm="l1"), r"norm must be one of .*l2.*linf.*got 'l1'"),
    "iterations": (lambda o: loose.ball_sharpness(o, 0.1, iterations=0), r"iterations must be at least 1, got 0"),
    "no starts": (lambda o: loose.ball_sharpness(o, 0.1, starts=()), r"starts must be a non-empty sequence, got \(\)"),
    "start": (lambda o: loose.ball_sharpness(o, 0.1, starts=("luck",)), r"start must be one of .*gradient.*got 'luck'"),
    "sigma < 0": (lambda o: loose.average_sharpness(o, -0.1), r"sigma must be a number >= 0, got -0\.1"),
    "sigma NaN": (lambda o: loose.average_sharpness(o, NAN), r"sigma must be a number >= 0, got nan"),
    "average draws": (lambda o: loose.average_sharpness(o, 0.1, draws=0), r"draws must be at least 2.*got 0"),
    "normalize": (
        lambda o: loose.directions.random(o, normalize="unit"),
        r"normalize must be one of .*filter.*got 'unit'",
    ),
    "index > size": (lambda o: loose.directions.eigenvector(o, index=59), r"index.*59"),
    "index < 0": (lambda o: loose.directions.eigenvector(o, index=-1), r"index.*-1"),
    "points": (lambda o: loose.slice_1d(o, o.point(), points=50), r"points must be odd.*got 50.*51"),
    "radius 0": (lambda o: loose.slice_1d(o, o.point(), radius=0.0), r"radius must be a positive number, got 0"),
    "radius NaN": (lambda o: loose.slice_1d(o, o.point(), radius=NAN), r"radius must be a positive number, got nan"),
    "radius < 0": (lambda o: loose.slice_2d(o, (o.point(), o.point()), radius=(1.0, -2.0)), r"radius must be .*got -2"),
    "three radii": (lambda o: loose.slice_2d(o, (o.point(), o.point()), radius=(1.0, 2.0, 3.0)), r"two radii.*got 3"),
    "three points": (lambda o: loose.slice_2d(o, (o.point(), o.point()), points=(3, 3, 3)), r"two .*points.*got 3"),
    "one direction": (lambda o: loose.slice_2d(o, (o.point(),)), r"two directions"),
    "three directions": (lambda o: loose.slice_2d(o, (o.point(),) * 3), r"two directions"),
    "no coordinates": (lambda o: loose.slice_1d(o, o.point(), coordinates=[]), r"coordinates must be finite.*got \[\]"),
    "NaN coordinate": (lambda o: loose.slice_1d(o, o.point(), coordinates=[0.0, NAN]), r"coordinates must be finite"),
    "decreasing": (lambda o: loose.slice_1d(o, o.point(), coordinates=[1.0, 0.0]), r"coordinates must be .*increasing"),
    "start of another size": (
        lambda o: loose.top_eigenvalues(o, start=torch.ones(3)),
        r"start .*\(59,\).*got \(3,",
    ),
    "start of three dimensions": (
        lambda o: loose.top_eigenvalues(o, start=torch.ones(59, 1, 1)),
        r"start .*shape .*\(59, p\), got \(59, 1, 1\)",
    ),
    "ends in another order": (lambda o: logarithmic(2.0, 1.0), r"0 < smallest < largest, got 2\.0 and 1"),
    "an end of zero": (lambda o: logarithmic(0.0, 1.0), r"0 < smallest < largest, got 0\.0 and 1\.0"),
    "one point": (lambda o: logarithmic(1.0, 2.0, points=1), r"points must be an integer .*2, got 1"),
    "half a point": (lambda o: logarithmic(1.0, 2.0, points=half), r"points must be an integer .*got 2\.5"),
    "weights of another shape": (
        lambda o: o.vector({"0.weight": torch.ones(2)}),
        r"expected shape .*'0\.weight', got \(2,\)",
    ),
    "NaN direction": (lambda o: loose.slice_1d(o, o.point() * NAN, points=3), r"direction.*NaN"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_arguments(name: str, objective: ma.Objective) -> None:
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(objective)


TYPES: dict[str, tuple[Callable[[ma.Objective], Any], str]] = {
    "slice along a word": (lambda o: loose.slice_1d(o, "gradient"), r"expected a Direction or a flat tensor, got str"),
    "eigenvalues of a model": (lambda o: loose.top_eigenvalues(MLP.model()), r"expected .*Objective.*got Sequential"),
    "batches without a tensor": (
        lambda o: ma.Objective(MLP.model(), MLP.loss_fn, [{"words": "text"}]).loss(),
        r"a batch holds no tensor with a sample dimension \(got dict\): expected \(inputs, targets\)",
    ),
    "batches of one number": (
        lambda o: ma.Objective(MLP.model(), MLP.loss_fn, [{"number": torch.tensor(1.0)}]).loss(),
        r"a batch holds no tensor with a sample dimension \(got dict\)",
    ),
    "trace of a model": (lambda o: loose.trace(MLP.model(), draws=3), r"expected .*Objective.*got Sequential"),
}


@pytest.mark.parametrize("name", TYPES)
def test_arguments_of_another_type(name: str, objective: ma.Objective) -> None:
    call, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        call(objective)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"expected a square matrix, got shape \(2, 3\)"),
        (torch.ones(4), r"expected a square matrix, got shape \(4,\)"),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), r"expected a symmetric matrix.*\(A \+ A\.T\) / 2"),
    ],
)
def test_bad_matrices(matrix: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ma.MatrixOperator(matrix)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_eigenvalues_of_nan(value: float, method: Any) -> None:
    """A Hessian that is not finite has no eigenvalues: an error, neither an endless loop nor a number."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return (output * value).square().mean()

    objective = ma.Objective(model, loss_fn, (torch.ones(1, 1).double(), torch.ones(1)))
    with pytest.raises(ValueError, match=r"(?i)nan|infinit"):
        ma.top_eigenvalues(objective, k=1, method=method)


def test_momentum_direction_without_momentum(objective: ma.Objective) -> None:
    parameters = list(MLP.model().parameters())
    with pytest.raises(RuntimeError, match=r"SGD keeps no momentum.*momentum > 0"):
        ma.directions.momentum(torch.optim.SGD(parameters, lr=0.1), objective)
    with pytest.raises(RuntimeError, match=r"no momentum yet.*at least one step"):
        ma.directions.momentum(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), objective)


@pytest.mark.parametrize("normalize", ["filter", "layer"])
def test_momentum_direction_without_the_weights(normalize: Any) -> None:
    """What is measured against the weights needs them; the length of the vector does not."""
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    with pytest.raises(ValueError, match=rf"normalize='{normalize}' needs the weights: pass objective="):
        ma.directions.momentum(optimizer, normalize=normalize)
    assert float(ma.directions.momentum(optimizer, normalize="l2").vector.norm()) == pytest.approx(1.0)


def test_momentum_of_another_model(objective: ma.Objective) -> None:
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(ValueError, match=r"belongs to a parameter of this objective.*one model"):
        ma.directions.momentum(optimizer, objective)
