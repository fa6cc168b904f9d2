"""Traces, spectral densities, groups of parameters and PyHessian, against dense linear algebra in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis.results import SpectralDensity
from tests.analysis.cases import CASES
from tests.analysis.oracles import symmetric

MLP = next(case for case in CASES if case.name == "mlp")


def objective(**options: Any) -> ma.Objective:
    return ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), **options)


def hessian(part: ma.Objective) -> Tensor:
    """Return the Hessian column by column, by central differences of the gradient: no second derivative is shared."""
    w, h = part.point(), 1e-5
    columns = [(part.gradient(w + h * e) - part.gradient(w - h * e)) / (2 * h) for e in torch.eye(part.size).double()]
    return torch.stack(columns, dim=1)


def outliers(size: int = 120) -> Tensor:
    """Return eigenvalues as a trained network's: a bulk about zero, a few far off on both sides."""
    bulk = torch.linspace(-0.5, 0.5, size - 5, dtype=torch.float64)
    return torch.cat([bulk, torch.tensor([-4.0, 5.0, 7.0, 8.0, 20.0], dtype=torch.float64)])


# --- density


def test_density_is_that_of_the_eigenvalues() -> None:
    spectrum = outliers()
    found = ma.spectral_density(ma.MatrixOperator(symmetric(spectrum)), probes=20, steps=60)
    places = torch.tensor([-4.5, -1.0, 0.1, 1.0, 6.0, 10.0, 30.0], dtype=torch.float64)
    shares = found.cumulative(places)
    expected = (spectrum[:, None] <= places).double().mean(0)
    assert torch.allclose(shares.value, expected, atol=0.04)
    assert bool((shares.low <= expected + 1e-9).all()) or bool(((expected - shares.value).abs() < 0.04).all())
    assert torch.allclose(shares.value[[0, 3, 4, 5, 6]], expected[[0, 3, 4, 5, 6]], atol=1e-9)


def test_ends_are_the_exact_eigenvalues() -> None:
    spectrum = outliers()
    found = ma.spectral_density(ma.MatrixOperator(symmetric(spectrum)), extremes=4)
    ordered = spectrum.sort().values
    assert found.converged
    assert torch.allclose(found.top, ordered.flip(0)[:4], atol=1e-3)
    assert torch.allclose(found.bottom[:1], ordered[:1], atol=1e-3)
    assert float(found.top_residuals.max()) < 1e-2


@pytest.mark.parametrize("extremes", [0, 5])
@pytest.mark.parametrize("order", [1, 2])
def test_moments_are_the_trace_and_the_frobenius_norm(order: int, extremes: int) -> None:
    spectrum = outliers()
    found = ma.spectral_density(ma.MatrixOperator(symmetric(spectrum)), probes=30, extremes=extremes)
    moment = found.moment(order)
    expected = float((spectrum**order).mean())
    assert abs(moment.value - expected) < 4 * moment.standard_error + 1e-6 * abs(expected)
    assert moment.standard_error < (0.05 if extremes else 0.5) * abs(expected)


def test_density_integrates_to_one_and_smooths_anew_without_products() -> None:
    operator = ma.MatrixOperator(symmetric(outliers()))
    found = ma.spectral_density(operator)
    step = float(found.values[1] - found.values[0])
    assert math.isclose(float(found.density.sum()) * step, 1.0, rel_tol=1e-3)
    spent = operator.products
    wide, _ = found.at(found.values, sigma=10 * found.sigma)
    assert operator.products == spent == found.hvps
    assert float(wide.max()) < float(found.density.max())


def test_a_kernel_narrower_than_the_nodes_resolve_is_not_called_converged() -> None:
    operator = ma.MatrixOperator(symmetric(torch.linspace(-1, 1, 200, dtype=torch.float64)))
    found = ma.spectral_density(operator, extremes=0, steps=20)
    assert found.converged
    assert found.sigma == found.resolution
    span = float(found.nodes.max() - found.nodes.min())
    assert math.isclose(found.resolution, span / 20)
    with pytest.warns(ma.results.ApproximationWarning, match="narrower than the .* that 20 steps resolve"):
        narrow = ma.spectral_density(operator, extremes=0, steps=20, sigma=found.resolution / 3)
    assert not narrow.converged


def test_every_eigenvalue_of_a_tiny_operator_is_known() -> None:
    spectrum = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    found = ma.spectral_density(ma.MatrixOperator(symmetric(spectrum)), extremes=3)
    assert torch.allclose(found.nodes.sort().values, spectrum, atol=1e-9)
    assert torch.allclose(found.weights, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_zero_operator_is_one_peak_at_zero() -> None:
    found = ma.spectral_density(ma.MatrixOperator(torch.zeros(20, 20).double()))
    assert float(found.nodes.abs().max()) == 0
    assert math.isclose(float(found.cumulative(0.0).value), 1.0)
    assert float(found.share_above(0.0).value) == 0


def test_seed_makes_the_probes_and_leaves_the_global_generator() -> None:
    operator = ma.MatrixOperator(symmetric(outliers()))
    state = torch.random.get_rng_state()
    first, again, other = (ma.spectral_density(operator, seed=seed, extremes=0) for seed in (0, 0, 1))
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, other.weights)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_band_narrows_with_more_probes() -> None:
    operator = ma.MatrixOperator(symmetric(outliers()))
    few, many = (ma.spectral_density(operator, probes=n, extremes=0).moment(2).standard_error for n in (5, 80))
    assert many < few / 2


# --- traces


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_lies_within_its_error(method: Any) -> None:
    spectrum = outliers()
    matrix = symmetric(spectrum)
    misses = 0
    for seed in range(20):
        found = ma.trace(ma.MatrixOperator(matrix), method=method, draws=60, seed=seed)
        assert found.evaluations == 60
        misses += abs(found.value - float(spectrum.sum())) > 2 * found.standard_error
    assert misses <= 4


def test_the_sketch_pays_where_few_eigenvalues_dominate() -> None:
    matrix = symmetric(torch.cat([torch.full((95,), 0.01), torch.tensor([50.0, 40.0, 30.0, 20.0, 10.0])]).double())
    plain, sketched = (ma.trace(ma.MatrixOperator(matrix), method=m, draws=30) for m in ("hutchinson", "hutch++"))
    assert sketched.standard_error < plain.standard_error / 20
    assert math.isclose(sketched.value, 150.95, rel_tol=1e-3)


def test_trace_goes_on_to_the_precision_asked_for() -> None:
    operator = ma.MatrixOperator(symmetric(torch.linspace(1, 3, 100).double()))
    found = ma.trace(operator, draws=4, target_error=0.005)
    assert found.standard_error <= 0.005 * found.value
    assert found.evaluations > 4
    with pytest.warns(ma.ConvergenceWarning, match="trace"):
        ma.trace(ma.MatrixOperator(symmetric(outliers())), draws=4, target_error=1e-6, max_draws=40)


# --- groups of parameters


def test_layers_are_the_diagonal_blocks() -> None:
    whole = objective()
    dense = hessian(whole)
    found = ma.by_layer(whole, lambda part: ma.top_eigenvalues(part, k=1))
    assert list(found) == list(dict.fromkeys(name.rpartition(".")[0] for name in whole.layout.names))
    start = 0
    for name, pairs in found.items():
        size = whole.with_parameters([f"{name}.*"]).size
        block = dense[start : start + size, start : start + size]
        assert math.isclose(float(pairs.values[0]), float(torch.linalg.eigvalsh(block)[-1]), rel_tol=1e-4)
        start += size
    assert start == whole.size


@pytest.mark.parametrize("groups", ["tensor", "layer", "block"])
def test_traces_of_the_groups_add_up(groups: Any) -> None:
    whole = objective()
    found = ma.by_layer(whole, lambda part: ma.trace(part, draws=400), groups=groups)
    total = sum(estimate.value for estimate in found.values())
    error = math.sqrt(sum(estimate.standard_error**2 for estimate in found.values()))
    assert abs(total - float(hessian(whole).trace())) < 4 * error
    frame = ma.layer_frame(found, name="group")
    assert frame["group"].tolist() == list(found)


# --- PyHessian through the same call


def test_pyhessian_answers_through_the_same_call() -> None:
    whole = objective()
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    state = torch.random.get_rng_state()
    with pytest.warns(ma.ConvergenceWarning, match="residuals"):  # it stops at pauses, and our residuals tell
        found = ma.top_eigenvalues(whole, k=2, backend="pyhessian", tolerance=1e-7, max_hvps=4000)
    expected = torch.linalg.eigvalsh(hessian(whole)).flip(0)[:2]
    assert torch.allclose(found.values.cpu(), expected, rtol=1e-3)
    applied = whole.hessian().matmat(found.vectors) - found.vectors * found.values.to(found.vectors)
    assert torch.allclose(found.residuals, applied.norm(dim=0).double().cpu(), rtol=1e-3, atol=1e-9)
    assert found.hvps > 2
    assert torch.equal(torch.random.get_rng_state(), state)
    assert whole.model.training
    assert all(parameter.grad is None for parameter in whole.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.model.state_dict().items())


def test_trace_by_pyhessian() -> None:
    whole = objective()
    found = ma.trace(whole, backend="pyhessian", draws=200)
    assert abs(found.value - float(hessian(whole).trace())) < 4 * found.standard_error


def test_without_pyhessian_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyhessian", None)
    with pytest.raises(ModuleNotFoundError, match="pip install PyHessian"):
        ma.top_eigenvalues(objective(), k=1, backend="pyhessian")


class Once(torch.autograd.Function):
    """x², with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * gradient


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3).double())

    def forward(self, x: Tensor) -> Tensor:
        squared: Tensor = Once.apply(x * self.weight)  # type: ignore[no-untyped-call]
        return squared


def test_pyhessian_wants_second_derivatives() -> None:
    data = (torch.ones(2, 3).double(), torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="PyHessian needs second derivatives"):
        ma.top_eigenvalues(ma.Objective(Square(), nn.MSELoss(), data), k=1, backend="pyhessian")


# --- memory, robustness


@pytest.mark.parametrize("k", [1, 5])
def test_a_small_memory_finds_the_same(k: int) -> None:
    spectrum = torch.cat([outliers(), torch.full((5,), 20.0).double()])
    operator = ma.MatrixOperator(symmetric(spectrum))
    vectors = 2 * (k + 14)
    found = ma.top_eigenvalues(operator, k=k, memory_bytes=vectors * operator.size * 8, max_hvps=4000)
    assert found.converged
    assert torch.allclose(found.values, torch.full((k,), 20.0).double(), rtol=1e-6)


def test_a_linear_model_has_no_curvature() -> None:
    def output(out: Tensor, _: Tensor) -> Tensor:
        return out.mean()

    data = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(4).double())
    flat = ma.Objective(nn.Linear(3, 1).double(), output, data)
    assert float(ma.top_eigenvalues(flat, k=2).values.abs().max()) == 0
    assert ma.trace(flat).value == 0


def test_one_parameter_and_one_sample() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    single = ma.Objective(model, nn.MSELoss(), (torch.full((1, 1), 3.0).double(), torch.ones(1, 1).double()))
    assert math.isclose(float(ma.top_eigenvalues(single, k=1).values[0]), 18.0)
    assert math.isclose(ma.trace(single).value, 18.0)
    found = ma.spectral_density(single, extremes=1)
    assert math.isclose(float(found.top[0]), 18.0)


# --- mistakes

OPERATOR = ma.MatrixOperator(torch.eye(4).double())
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ma.spectral_density(OPERATOR, probes=1), ValueError, "probes must be an integer of at least 2, got 1"),
    (lambda: ma.spectral_density(OPERATOR, steps=0), ValueError, "steps must be an integer of at least"),
    (lambda: ma.spectral_density(OPERATOR, sigma=-1.0), ValueError, "sigma must be a positive number"),
    (lambda: ma.spectral_density(OPERATOR, points=1), ValueError, "points must be at least 2"),
    (lambda: ma.spectral_density(OPERATOR, tolerance=0.0), ValueError, "tolerance must be a positive number"),
    (lambda: ma.spectral_density(OPERATOR, backend="pyhessian"), ValueError, "expected backend='native'"),
    (lambda: ma.spectral_density(OPERATOR).at(torch.zeros(1), sigma=0.0), ValueError, "sigma must be a positive"),
    (lambda: ma.trace(OPERATOR, method="x"), ValueError, "method must be one of"),  # type: ignore[arg-type]
    (lambda: ma.trace(OPERATOR, draws=1), ValueError, "draws must be at least 2 for hutchinson"),
    (lambda: ma.trace(OPERATOR, draws=3, method="hutch++"), ValueError, "draws must be at least 4"),
    (lambda: ma.trace(OPERATOR, target_error=0.0), ValueError, "target_error must be a positive fraction"),
    (lambda: ma.trace(OPERATOR, target_error=0.1, max_draws=5), ValueError, "max_draws must be at least"),
    (lambda: ma.trace(OPERATOR, backend="pyhessian"), TypeError, "expected an Objective"),
    (lambda: ma.trace(OPERATOR, backend="pyhessian", method="hutch++"), ValueError, "PyHessian has Hutchinson's"),
    (lambda: ma.trace(OPERATOR, backend="x"), ValueError, "backend must be one of"),  # type: ignore[arg-type]
    (lambda: ma.top_eigenvalues(OPERATOR, 1, backend="pyhessian"), TypeError, "expected an Objective"),
    (
        lambda: ma.top_eigenvalues(objective(), 1, backend="pyhessian", which="smallest"),
        ValueError,
        "PyHessian finds the largest values in magnitude",
    ),
    (lambda: ma.top_eigenvalues(OPERATOR, 1, memory_bytes=1), ValueError, "memory_bytes must be at least"),
    (
        lambda: ma.top_eigenvalues(OPERATOR, 1, method="power", which="ends"),
        ValueError,
        "power iteration follows one end",
    ),
    (lambda: ma.top_eigenvalues(OPERATOR, 1, start=torch.full((4,), math.nan)), ValueError, "start must be finite"),
    (lambda: ma.by_layer(objective(), ma.trace, groups={}), ValueError, "groups is empty"),
    (
        lambda: ma.by_layer(objective(), ma.trace, groups="x"),  # type: ignore[arg-type]
        ValueError,
        "groups must be one of",
    ),
    (lambda: ma.by_layer(objective(), lambda part: ma.top_eigenvalues(part, k=9**9)), ValueError, "in the group"),
    (lambda: ma.layer_frame({}), ValueError, "there are no results"),
]


@pytest.mark.parametrize(("call", "kind", "sentence"), MISTAKES, ids=[row[2] for row in MISTAKES])
def test_mistakes_get_a_sentence(call: Callable[[], object], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        call()


def test_round_trip(tmp_path: Any) -> None:
    found = ma.spectral_density(OPERATOR)
    loaded = ma.results.load(found.save(tmp_path / "density.safetensors"))
    assert isinstance(loaded, SpectralDensity)
    assert torch.equal(loaded.density, found.density)
    assert loaded.to_frame().equals(found.to_frame())
