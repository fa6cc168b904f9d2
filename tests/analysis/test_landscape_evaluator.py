"""The points of a slice are the objective's, bit for bit, whatever a network does on the way; so are the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.landscape import metrics
from msam_analysis.landscape.evaluator import Evaluator

from . import cases
from .cases import CASES, CONVNET, MLP, TAGGER, Quadratic, mean_output, normal, split
from .oracles import flatten, symmetric

POINTS = [[0.0, 0.0], [0.3, 0.0], [0.0, -0.7], [0.3, -0.7], [-1.0, 1.0]]


def agree(objective: ma.Objective) -> None:
    """Every row is the loss of the objective at the point that the coordinates say."""
    directions = [ma.directions.random(objective, seed, one_d=True).vector for seed in (1, 2)]
    evaluator = Evaluator(objective, directions)
    rows = evaluator.rows(POINTS)
    assert len({float(row) for row in rows}) == len(POINTS), "the points differ"
    for point, row in zip(POINTS, rows, strict=True):
        w = objective.point()
        for coordinate, direction in zip(point, directions, strict=True):
            if coordinate:
                w.add_(direction, alpha=coordinate)
        assert float(row) == float(objective.loss(w))
    assert torch.equal(evaluator.rows(POINTS), rows), "a second time"
    assert torch.equal(evaluator.center, rows[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("policy", ["eval", "batch", "recalibrate"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_of_every_kind_of_network(case: cases.Case, policy: Any, dtype: torch.dtype) -> None:
    agree(ma.Objective(case.model(dtype), case.loss_fn, case.data(dtype), batchnorm=policy))


@pytest.mark.parametrize("pattern", ["3.*", "*.bias"])
def test_part_of_the_parameters(pattern: str) -> None:
    agree(ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), parameters=pattern))


class Noisy(nn.Module):
    """Draws in every forward pass, or only away from its initial weights."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("start", self.linear.weight.detach().clone())
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        if self.always or not torch.equal(self.linear.weight, self.start):  # type: ignore[arg-type]
            out = out + torch.randn(out.shape, dtype=out.dtype)
        return out


class Counting(nn.Module):
    """Writes to a buffer, replaces another, and puts out what depends on both."""

    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * (1 + self.calls + self.last)
        self.calls += 1
        self.last = out.detach().mean()
        return out


class InPlace(nn.Module):
    """Works in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.mul_(2.0).add_(0.1))
        return out


class Recurrent(nn.Module):
    """Keeps a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x.reshape(len(x), 2, 2))[0][:, -1])
        return out


class Halves(nn.Module):
    """Parameters of two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x.float()).double())
        return out


def weight_norm() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "draws": lambda: Noisy(always=True),
    "draws away from the centre": lambda: Noisy(always=False),
    "writes to buffers": Counting,
    "writes to its input": InPlace,
    "recurrent": Recurrent,
    "two precisions": Halves,
    "parametrised": weight_norm,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_loss_of_unusual_networks(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNUSUAL[name]()
    data = split([6, 6, 3], normal(15, 4, seed=1).float(), cases.labels(15, classes=3, seed=2))
    agree(ma.Objective(model, F.cross_entropy, data))


def test_data_of_other_forms() -> None:
    """Lists as from a loader, one that does not fit the cache, and a loss with parameters of its own."""
    model, data = MLP.model(), MLP.data()
    agree(ma.Objective(model, MLP.loss_fn, [list(batch) for batch in data]))
    agree(ma.Objective(model, MLP.loss_fn, data, cache_bytes=1))
    agree(ma.Objective(model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()), data))


def test_half_precision_warns_of_rounding() -> None:
    objective = ma.Objective(MLP.model().bfloat16(), MLP.loss_fn, MLP.data(torch.bfloat16))
    with pytest.warns(ma.results.ApproximationWarning, match=r"half precision"):
        ma.slice_1d(objective, ma.directions.random(objective), radius=1e-3, points=3)


# --- metrics


@pytest.mark.parametrize("policy", ["eval", "batch", "recalibrate"])
def test_metrics_at_the_same_points(policy: Any) -> None:
    """Against another objective for each metric, which evaluates the point with nothing shared."""
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy)

    def hits(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).double().mean()

    fraction = ma.Objective(model, hits, data, batchnorm=policy)
    d1, d2 = (ma.directions.random(objective, seed).vector for seed in (1, 2))
    measured: dict[str, Any] = {
        "accuracy": metrics.accuracy,
        "each": metrics.sample_losses,
        "slope": metrics.gradient_norm,
        "far": lambda o, w: torch.stack([(w - o.point()).norm(), w.sum()]),
    }
    lines = ma.Direction(d1, "x"), ma.Direction(d2, "y")
    surface = ma.slice_2d(objective, lines, points=(3, 5), metrics=measured)
    assert surface.metrics["each"].shape == (3, 5, 19)
    np.testing.assert_allclose(surface.metrics["each"].mean(2), surface.loss, rtol=1e-12)
    for i, x in enumerate(surface.x):
        for j, y in enumerate(surface.y):
            w = objective.point() + x * d1 + y * d2
            assert float(surface.metrics["accuracy"][i, j]) == pytest.approx(float(fraction.loss(w)), rel=1e-12)
            assert float(surface.metrics["slope"][i, j]) == pytest.approx(float(objective.gradient(w).norm()), rel=1e-9)
            distance = float((x * d1 + y * d2).norm())
            assert surface.metrics["far"][i, j].tolist() == pytest.approx([distance, float(w.sum())], abs=1e-12)
    plain = ma.slice_2d(objective, lines, points=(3, 5))
    assert torch.equal(surface.loss, plain.loss), "metrics change nothing"
    frame = surface.to_frame()
    assert list(frame.columns) == ["x", "y", "loss", "accuracy", "slope"]
    np.testing.assert_array_equal(frame["accuracy"], surface.metrics["accuracy"].flatten())


def test_top_eigenvalue_of_a_quadratic_is_the_same_everywhere() -> None:
    H = symmetric([5.0, 2.0, 1.0, -1.0], seed=20)
    objective = ma.Objective(Quadratic(H, normal(4, seed=1)), mean_output, cases.ONE_SAMPLE)
    line = ma.slice_1d(objective, normal(4, seed=2), points=3, metrics={"top": metrics.top_eigenvalue})
    np.testing.assert_allclose(line.metrics["top"], 5.0, rtol=1e-6)


def test_accuracy_over_positions_and_of_probabilities() -> None:
    output, target = normal(4, 3, 5, seed=1), cases.labels(4, 5, classes=3, seed=2)
    assert metrics.accuracy.per_sample is not None
    by_class = metrics.accuracy.per_sample(output, target)
    np.testing.assert_allclose(by_class, (output.argmax(1) == target).double().mean(1))
    one_hot = F.one_hot(target, 3).movedim(-1, 1).double()
    np.testing.assert_allclose(metrics.accuracy.per_sample(output, one_hot), by_class)


def of_batches_only(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def growing() -> Callable[[Any, Any], Tensor]:
    calls: list[int] = []

    def metric(_objective: Any, _w: Any) -> Tensor:
        calls.append(1)
        return torch.ones(len(calls))

    return metric


BAD: dict[str, tuple[Any, Any, str]] = {
    "scores of another kind": (
        metrics.OutputMetric(lambda output, target: metrics._hits(output.sum(1), target)),
        MLP,
        r"accuracy needs scores .*got \(8,\) and \(8,\)",
    ),
    "not one for each sample": (
        metrics.OutputMetric(lambda o, t: o.mean()),
        MLP,
        r"'m' returned shape \(\).* 8 samples",
    ),
    "no tensor": (metrics.OutputMetric(lambda o, t: 1.0), MLP, r"'m' returned float.* 8 samples"),  # type: ignore[arg-type, return-value]
    "batches of another kind": (metrics.accuracy, TAGGER, r"'m' is read off the output for \(input, target\) batches"),
    "a word": (lambda o, w: "low", MLP, r"'m' returned a str: expected a number or a flat tensor"),
    "a matrix": (lambda o, w: torch.ones(2, 2), MLP, r"'m' returned shape \(2, 2\)"),
    "of changing length": (growing(), MLP, r"'m' returned 2 numbers where there were 1 before"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metrics(name: str) -> None:
    metric, case, message = BAD[name]
    objective = ma.Objective(case.model(), case.loss_fn, case.data())
    with pytest.raises(ValueError, match=message):
        ma.slice_1d(objective, ma.directions.random(objective), points=3, metrics={"m": metric})


def test_losses_of_samples_need_a_reduction() -> None:
    objective = ma.Objective(MLP.model(), of_batches_only, MLP.data())
    with pytest.raises(ValueError, match=r"'m' returned NoneType.*reduction"):
        ma.slice_1d(objective, ma.directions.random(objective), points=3, metrics={"m": metrics.sample_losses})


@pytest.mark.parametrize("name", ["loss", "x", "standard_error", "a/b"])
def test_names_that_are_taken(name: str) -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    with pytest.raises(ValueError, match=r"taken or holds a '/'"):
        ma.slice_1d(objective, ma.directions.random(objective), metrics={name: metrics.accuracy})


def test_metrics_survive_a_file(tmp_path: Any) -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    line = ma.slice_1d(
        objective,
        ma.directions.random(objective),
        points=3,
        metrics={"each": metrics.sample_losses, "accuracy": metrics.accuracy},
    )
    loaded = ma.results.load(line.save(tmp_path / "line.safetensors"))
    assert isinstance(loaded, ma.results.Slice1D)
    assert all(torch.equal(loaded.metrics[name], line.metrics[name]) for name in ("each", "accuracy"))
    assert flatten(MLP.model()).shape == (objective.size,)
