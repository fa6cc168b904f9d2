"""The Fisher matrices against gradients of single samples by torch.func, against curvlinops and Gauss-Newton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import msam_analysis as ma
from msam_analysis.objective.fisher import drawing

from .cases import labels, normal
from .oracles import trainable

BATCHES = (5, 3)
OTHER: Any = "other"


class TwoHeads(nn.Module):
    """Puts out two tensors, of which the loss uses both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)[:, 0]


def two_losses(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output[0], target) + (output[1] - target).square().mean()


def perceptron(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs))


def tagger() -> nn.Module:
    """Three predictions a sample, classes in the second dimension."""
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Unflatten(1, (3, 3)))


def tags(*shape: int) -> Tensor:
    found = labels(*shape, classes=3, seed=9)
    found[0, 0] = -100
    return found


Make = Callable[[], tuple[nn.Module, Any, list[Tensor]]]
CASES: dict[str, Make] = {
    "cross-entropy": lambda: (perceptron(3), nn.CrossEntropyLoss(), [labels(n, classes=3, seed=n) for n in BATCHES]),
    "sums": lambda: (
        perceptron(3),
        nn.CrossEntropyLoss(reduction="sum"),
        [labels(n, classes=3, seed=n) for n in BATCHES],
    ),
    "probabilities": lambda: (perceptron(3), nn.CrossEntropyLoss(), [normal(n, 3, seed=n).softmax(1) for n in BATCHES]),
    "values": lambda: (perceptron(2), nn.MSELoss(), [normal(n, 2, seed=n) for n in BATCHES]),
    "sums of values": lambda: (perceptron(2), nn.MSELoss(reduction="sum"), [normal(n, 2, seed=n) for n in BATCHES]),
    "bits": lambda: (
        perceptron(2),
        nn.BCEWithLogitsLoss(),
        [labels(n, 2, classes=2, seed=n).double() for n in BATCHES],
    ),
    "tags": lambda: (tagger(), nn.CrossEntropyLoss(), [tags(n, 3) for n in BATCHES]),
    "functions": lambda: (perceptron(3), F.cross_entropy, [labels(n, classes=3, seed=n) for n in BATCHES]),
    "two outputs": lambda: (TwoHeads(), two_losses, [labels(n, classes=3, seed=n) for n in BATCHES]),
}
KNOWN = [name for name in CASES if name != "two outputs"]


def made(name: str, **options: Any) -> ma.Objective:
    torch.manual_seed(0)
    model, loss_fn, targets = CASES[name]()
    return ma.Objective(model.double(), loss_fn, [(normal(len(y), 4, seed=len(y)), y) for y in targets], **options)


def dense(operator: Any) -> Tensor:
    found: Tensor = operator @ torch.eye(operator.size, dtype=torch.float64)
    return found


def sample_gradients(o: ma.Objective, targets: list[Tensor] | None = None) -> tuple[Tensor, float]:
    """``∂(n_b ℓ_b)/∂w`` of every sample alone, as rows, and what all batches weigh."""
    model, total = o.model, 0.0
    rows = []
    loss_fn: Any = o.loss_fn
    given = [y for _, y in o.batches] if targets is None else targets
    for (x, _), y in zip(o.batches, given, strict=True):
        with torch.no_grad():
            count = float((y != -100).sum()) if y.ndim == 2 and not y.is_floating_point() else float(len(y))

        def term(point: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            value: Tensor = loss_fn(functional_call(model, point, (x[None],)), y[None])
            return value

        point = {name: p.detach() for name, p in trainable(model).items()}
        found = vmap(grad(term), (None, 0, 0))(point, x, y)
        own = torch.cat([found[name].flatten(1) for name in point], dim=1)
        if y.ndim == 2 and not y.is_floating_point():
            own = own * (y != -100).sum(1, keepdim=True)  # from the mean over a sample's labels to their sum
        rows.append(own)
        total += count
    return torch.cat(rows), total


@pytest.mark.parametrize("name", CASES)
def test_empirical(name: str) -> None:
    o = made(name)
    gradients, total = sample_gradients(o)
    expected = gradients.T @ gradients / total
    operator = o.fisher()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(dense(operator), expected, rtol=1e-10, atol=1e-13)
    v = normal(o.size, seed=7)
    torch.testing.assert_close(operator.matvec(v), expected @ v, rtol=1e-10, atol=1e-13)
    assert operator.settings["matrix"] == "empirical Fisher"


@pytest.mark.parametrize("name", KNOWN)
def test_the_expectation_of_the_sampled_one_is_gauss_newton(name: str) -> None:
    o = made(name)
    expected = dense(o.gauss_newton())
    several = torch.stack([dense(o.fisher(kind="sampled", draws=200, seed=seed)) for seed in range(6)])
    error = several.std(0) / np.sqrt(6)
    off = (several.mean(0) - expected).norm() / expected.norm()
    assert off < 0.05
    assert off < 3 * error.norm() / expected.norm()
    torch.testing.assert_close(several[0].trace(), expected.trace(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("name", ["cross-entropy", "tags"])
def test_sampled_from_given_labels(name: str) -> None:
    """With a drawing function of one's own the matrix is the empirical one of these labels."""
    o = made(name)
    o.examine()
    drawn: dict[int, Tensor] = {}

    def draw(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        new = torch.randint(3, target.shape, generator=generator)
        drawn[len(target)] = torch.where(target == -100, target, new)
        return drawn[len(target)]

    found = dense(o.fisher(kind="sampled", draw=draw))
    gradients, total = sample_gradients(o, [drawn[count] for count in BATCHES])
    torch.testing.assert_close(found, gradients.T @ gradients / total, rtol=1e-10, atol=1e-13)


def test_draws_are_averaged_and_seeded() -> None:
    o = made("cross-entropy")
    one, other = (dense(o.fisher(kind="sampled", seed=seed)) for seed in (0, 1))
    assert torch.equal(one, dense(o.fisher(kind="sampled", seed=0)))
    assert (one - other).norm() > 0.1 * one.norm()
    state = torch.get_rng_state()
    several = o.fisher(kind="sampled", draws=3)
    v = normal(o.size, seed=3)
    assert torch.equal(several @ v, several @ v)
    assert torch.equal(torch.get_rng_state(), state)
    assert several.settings["matrix"] == "sampled Fisher, 3 drawn labels a sample"
    assert torch.linalg.matrix_rank(one) <= sum(BATCHES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_that_half_precision_takes_for_certain(dtype: torch.dtype) -> None:
    """A logit of 6 puts a bit to zero once in 404 times, and bfloat16 has no number between 0.996 and 1."""
    output = torch.full((200_000,), 6.0, dtype=dtype)
    drawn = drawing(nn.BCEWithLogitsLoss())(output, torch.ones_like(output), torch.Generator().manual_seed(0))
    assert drawn.dtype == dtype
    assert float((drawn == 0).double().mean()) == pytest.approx(1 / (1 + np.exp(6)), rel=0.1)


def test_graphs_that_are_rebuilt_draw_the_same_labels() -> None:
    kept, rebuilt = made("tags"), made("tags", graph_bytes=0)
    v = normal(kept.size, seed=3)
    operator = rebuilt.fisher(kind="sampled")
    operator @ v
    torch.testing.assert_close(operator @ v, kept.fisher(kind="sampled") @ v, rtol=1e-12, atol=1e-14)


def test_solvers() -> None:
    o = made("values")
    gradients, total = sample_gradients(o)
    values = torch.linalg.svdvals(gradients).square() / total
    found = ma.top_eigenvalues(o.fisher(), 3)
    torch.testing.assert_close(found.values, values[:3], rtol=1e-8, atol=0.0)
    exact = float(gradients.square().sum() / total)
    trace = ma.trace(o.fisher(), draws=400)
    assert abs(trace.value - exact) < 4 * trace.standard_error
    density = ma.spectral_density(o.fisher(), probes=2, steps=6, extremes=1)
    assert density.settings["matrix"] == "empirical Fisher"


def test_by_differences_of_the_output() -> None:
    o, exact = made("cross-entropy", second_derivatives="central"), made("cross-entropy")
    v = normal(o.size, seed=3)
    torch.testing.assert_close(o.fisher() @ v, exact.fisher() @ v, rtol=1e-6, atol=1e-9)


class RunAgain(nn.Module):
    """A layer that is run again in the backward pass, at the weights that it finds then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(checkpoint(self.inner, x, use_reentrant=False))
        return out


@pytest.mark.parametrize("matrix", ["fisher", "gauss_newton"])
def test_differences_where_a_part_is_run_again(matrix: str) -> None:
    torch.manual_seed(0)
    model, data = RunAgain().double(), [(normal(n, 4, seed=n), labels(n, classes=3, seed=n)) for n in BATCHES]
    exact, rough = (
        getattr(ma.Objective(model, F.cross_entropy, data, second_derivatives=how), matrix)()
        for how in ("auto", "central")
    )
    v = normal(exact.size, seed=3)
    torch.testing.assert_close(rough @ v, exact @ v, rtol=0, atol=1e-9 * float((exact @ v).norm()))


def test_curvlinops_agrees() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    o = made("cross-entropy")
    loss_fn: Any = o.loss_fn
    peer = curvlinops.EFLinearOperator(o.model, loss_fn, list(o.parameters.values()), list(o.batches))
    torch.testing.assert_close(dense(o.fisher()), peer @ torch.eye(o.size).double(), rtol=1e-8, atol=1e-12)


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out.T


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "kind": (lambda: made("values").fisher(kind=OTHER), r"kind must be one of \('empirical', 'sampled'\), got"),
    "draws": (lambda: made("values").fisher(kind="sampled", draws=0), r"draws must be a positive integer, got 0"),
    "empirical draws": (lambda: made("values").fisher(draws=2), "the empirical Fisher matrix draws no labels"),
    "weights": (
        lambda: ma.Objective(
            perceptron(3), nn.CrossEntropyLoss(weight=torch.ones(3)), [(torch.ones(2, 4), torch.tensor([0, 1]))]
        ).fisher(kind="sampled"),
        "it is not known how labels are drawn for CrossEntropyLoss",
    ),
    "criterion": (lambda: made("two outputs").fisher(kind="sampled"), "how labels are drawn for two_losses"),
    "outputs": (
        lambda: dense(made("two outputs").fisher(kind="sampled", draw=lambda output, target, generator: target)),
        r"labels cannot be drawn for this loss: expected batches \(input, target\), a model with one output",
    ),
    "rows": (
        lambda: dense(
            ma.Objective(Shuffled(), lambda m, b: m(b[0]).square().mean(), [(normal(5, 4, seed=1),)]).fisher()
        ),
        r"puts out a tensor of shape \(3, 5\) for a batch of 5 samples: expected one row for each sample",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name: str) -> None:
    ask, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ask()
