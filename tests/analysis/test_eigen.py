"""Eigenvalues and traces against dense float64 linear algebra, and against PyHessian and curvlinops."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import msam_analysis as ma
from msam_analysis.results import ConvergenceWarning, Eigenpairs

from . import cases
from .cases import CASES, CONVNET, MLP, WITH_POLICY, Case, concatenate, normal
from .oracles import dense_hessian, flatten, reference_loss, symmetric

METHODS = ("lanczos", "power")
methods = pytest.mark.parametrize("method", METHODS)
policies = pytest.mark.parametrize(("case", "policy"), WITH_POLICY, ids=lambda value: getattr(value, "name", value))


def check_certificates(pairs: Eigenpairs, matrix: Tensor) -> None:
    """Residuals are what they say, vectors are orthonormal, values belong to their vectors."""
    vectors, values = pairs.vectors.double(), pairs.values.double()
    size, k = vectors.shape
    assert values.shape == pairs.residuals.shape == (k,)
    assert size == len(matrix)
    eps = float(torch.finfo(pairs.vectors.dtype).eps)
    scale = float(torch.linalg.matrix_norm(matrix, 2)) + np.finfo(float).tiny
    gram = vectors.T @ vectors
    torch.testing.assert_close(gram, torch.eye(k).double(), rtol=0, atol=100 * eps)
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals.double(), residuals, rtol=1e-3, atol=100 * eps * scale)
    quotients = ((matrix @ vectors) * vectors).sum(0)
    torch.testing.assert_close(values, quotients, rtol=1e-6, atol=100 * eps * scale)
    assert pairs.hvps >= k


def exact(matrix: Tensor, k: int, which: str = "largest") -> np.ndarray:
    values = scipy.linalg.eigvalsh(matrix.numpy())
    if which == "largest":
        return values[::-1][:k]
    if which == "smallest":
        return values[:k]
    return values[np.argsort(-np.abs(values), kind="stable")][:k]


# --- networks


@functools.cache
def network_hessian(case: Case, policy: str = "eval", dtype: torch.dtype = torch.float64) -> Tensor:
    """The dense float64 Hessian at the case's weights, rounded to ``dtype`` first."""
    model, data = case.model(dtype), case.data(dtype)
    return dense_hessian(reference_loss(case, model, data, policy), flatten(model))


@methods
@policies
def test_top_five_of_a_network(case: Case, policy: Any, method: Any) -> None:
    model, data = case.model(), case.data()
    objective = ma.Objective(model, case.loss_fn, data, batchnorm=policy)
    hessian = network_hessian(case, policy)
    pairs = ma.top_eigenvalues(objective, k=5, method=method)
    assert pairs.converged
    assert pairs.method == method
    np.testing.assert_allclose(pairs.values.numpy(), exact(hessian, 5), rtol=1e-4)
    check_certificates(pairs, hessian)


@methods
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_top_five_in_float32(case: Case, method: Any) -> None:
    """Float32 arithmetic, compared with the float64 Hessian of the same rounded weights."""
    model, data = case.model(torch.float32), case.data(torch.float32)
    objective = ma.Objective(model, case.loss_fn, data)
    hessian = network_hessian(case, dtype=torch.float32)
    pairs = ma.top_eigenvalues(objective, k=5, method=method)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.converged
    np.testing.assert_allclose(pairs.values.double().numpy(), exact(hessian, 5), rtol=1e-4)


@methods
def test_a_ragged_last_batch_does_not_move_the_value(method: Any) -> None:
    """Equal weights for unequal batches would: the test shows that it can tell."""
    model, data = MLP.model(), MLP.data()
    point = flatten(model)
    right = exact(dense_hessian(reference_loss(MLP, model, data), point), 1)[0]
    halves = [dense_hessian(reference_loss(MLP, model, [batch]), point) for batch in data]
    unweighted = exact(torch.stack(halves).mean(0), 1)[0]
    assert abs(unweighted / right - 1) > 1e-3
    pairs = ma.top_eigenvalues(ma.Objective(model, MLP.loss_fn, data), k=1, method=method)
    assert float(pairs.values[0]) == pytest.approx(right, rel=1e-6)


def test_subset_gives_the_block_of_the_hessian() -> None:
    model, data = CONVNET.model(), CONVNET.data()
    names = ["0.weight", "3.weight", "8.weight"]
    objective = ma.Objective(model, CONVNET.loss_fn, data, parameters="*.weight")
    names = list(objective.layout.names)
    point = torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in names])
    hessian = dense_hessian(reference_loss(CONVNET, model, data, "eval", names), point)
    pairs = ma.top_eigenvalues(objective, k=3)
    np.testing.assert_allclose(pairs.values.numpy(), exact(hessian, 3), rtol=1e-6)
    check_certificates(pairs, hessian)


@pytest.mark.parametrize("which", ["smallest", "magnitude"])
@methods
def test_other_ends_of_a_network_spectrum(which: Any, method: Any) -> None:
    model, data = CONVNET.model(), CONVNET.data()
    hessian = network_hessian(CONVNET)
    expected = exact(hessian, 2, which)
    assert which != "smallest" or expected[0] < 0
    pairs = ma.top_eigenvalues(ma.Objective(model, CONVNET.loss_fn, data), k=2, method=method, which=which)
    np.testing.assert_allclose(sorted(pairs.values.numpy()), sorted(expected), rtol=1e-4)
    check_certificates(pairs, hessian)


# --- matrices


SPECTRA = {
    "separate": [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1, 0.0],
    "twice the largest": [5.0, 5.0, 3.0, 2.0, 1.0, 0.5, -0.5],
    "all five alike": [2.0] * 5 + list(np.linspace(1, -1, 45)),
    "pairs": sorted([7.0, 7.0, 6.0, 6.0, 5.0, 5.0] + [0.1] * 30, reverse=True),
    "identity": [1.0] * 12,
    "minus identity": [-1.0] * 12,
    "zero": [0.0] * 12,
    "rank one": [3.0] + [0.0] * 19,
    "dominating negative": [3.0, 2.0, 1.5, 1.0, 0.5, 0.25, -50.0],
    "negative definite": [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -70.0],
    "plus and minus": [4.0, -4.0, 3.0, -3.0, 2.0, -2.0, 1.0, -1.0, 0.5, 0.0],
    "outliers over a bulk": [5.376, 4.218, 4.068, 3.521, 3.194, *np.linspace(2.2, -0.3, 195)],
    "close": [1.0, 0.999, 0.998, 0.997, 0.996, *np.linspace(0.5, 0, 40)],
    "tiny": list(1e-12 * np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])),
    "huge": list(1e12 * np.array([5.0, 4.0, 3.0, 2.0, 1.0, -0.5])),
    "wide": [1e6, 1e3, 1.0, 1e-2, 1e-3, 1e-4, -1e-4],
}


@methods
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra(name: str, which: Any, method: Any) -> None:
    matrix = symmetric(sorted(SPECTRA[name], reverse=True), seed=3)
    k = 5
    pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=k, which=which, method=method)
    got, expected = pairs.values.double().numpy(), exact(matrix, k, which)
    scale = np.abs(SPECTRA[name]).max()
    check_certificates(pairs, matrix)
    assert pairs.converged
    rounding = 100 * np.finfo(float).eps * scale
    assert (pairs.residuals.numpy() <= np.maximum(1e-4 * np.abs(got), rounding)).all()
    if which == "magnitude":
        np.testing.assert_allclose(np.abs(got), np.abs(expected), rtol=1e-4, atol=1e-13 * scale)
    else:
        np.testing.assert_allclose(np.sort(got), np.sort(expected), rtol=1e-4, atol=1e-13 * scale)
    if which == "largest":
        assert (np.diff(got) <= 1e-13 * scale).all(), "descending"
    assert pairs.which == which
    assert pairs.tolerance == 1e-4


def test_nothing_missed_among_many() -> None:
    """Five outliers close together over a bulk of 395, several starts: none is skipped."""
    values = [5.376, 4.218, 4.068, 3.521, 3.194, *np.linspace(2.5, -0.4, 395)]
    matrix = symmetric(values, seed=5)
    for seed in range(5):
        pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=5, seed=seed)
        np.testing.assert_allclose(pairs.values.numpy(), values[:5], rtol=1e-4)
        assert pairs.hvps < 200


@methods
@pytest.mark.parametrize("gap", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("size", [12, 60, 200])
def test_no_copy_of_a_multiple_eigenvalue_is_missed(size: int, gap: float, method: Any) -> None:
    """In exact arithmetic one Krylov space sees one copy; the next value must not pass for the second."""
    values = [1.0, 1.0, 1 - gap, *np.linspace(0.5, -0.1, size - 3)]
    for seed in range(3):
        operator = ma.MatrixOperator(symmetric(values, seed=seed))
        pairs = ma.top_eigenvalues(operator, k=2, method=method, seed=seed)
        np.testing.assert_allclose(pairs.values.numpy(), [1.0, 1.0], rtol=1e-4)


@methods
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8])
def test_every_k(k: int, method: Any) -> None:
    matrix = symmetric([9.0, 7.0, 5.0, 3.0, 1.0, -2.0, -4.0, -6.0], seed=6)
    pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=k, method=method)
    np.testing.assert_allclose(pairs.values.numpy(), exact(matrix, k), rtol=1e-4)
    assert pairs.vectors.shape == (8, k)


@methods
def test_size_one(method: Any) -> None:
    for value in (2.5, -2.5, 0.0):
        pairs = ma.top_eigenvalues(ma.MatrixOperator(torch.full((1, 1), value).double()), k=1, method=method)
        assert float(pairs.values[0]) == pytest.approx(value, abs=1e-15)
        assert abs(float(pairs.vectors[0, 0])) == pytest.approx(1.0)
        assert pairs.converged


@settings(max_examples=60, deadline=None, derandomize=True)
@example(spectrum=[0.392, 0.393, *[0.0] * 7, 0.086, 0.086, 0.393], k=2, seed=0)
@example(spectrum=[0.0, -1.0], k=1, seed=0)
@given(
    spectrum=st.lists(st.integers(-10000, 10000).map(lambda n: n / 1000), min_size=1, max_size=12),
    k=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_any_spectrum_by_lanczos(spectrum: list[float], k: int, seed: int) -> None:
    matrix = symmetric(spectrum, seed=seed)
    k = min(k, len(spectrum))
    pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=k, seed=seed)
    scale = max(1e-30, np.abs(spectrum).max())
    np.testing.assert_allclose(pairs.values.numpy(), exact(matrix, k), rtol=1e-4, atol=1e-12 * scale)
    check_certificates(pairs, matrix)


@methods
def test_linear_model_has_no_curvature(method: Any) -> None:
    model = cases.Quadratic(torch.zeros(4, 4).double(), torch.ones(4).double())
    objective = ma.Objective(model, cases.mean_output, cases.ONE_SAMPLE)
    pairs = ma.top_eigenvalues(objective, k=2, method=method)
    assert pairs.values.abs().max() == 0
    assert pairs.converged


# --- what is said about it


@methods
def test_not_converging_is_said(method: Any) -> None:
    matrix = symmetric(np.linspace(1, 0, 80), seed=7)
    with pytest.warns(ConvergenceWarning, match=r"(?i)converge|tolerance|residual"):
        pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=5, method=method, max_hvps=12)
    assert not pairs.converged
    assert pairs.hvps <= 12
    check_certificates(pairs, matrix)


@methods
def test_the_warning_is_about_the_callers_line(method: Any) -> None:
    matrix = symmetric(np.linspace(1, 0, 80), seed=7)
    with pytest.warns(ConvergenceWarning) as caught:
        ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method=method, max_hvps=6)
    assert caught[0].filename == __file__


class Counting(ma.MatrixOperator):
    """Counts the products, column by column."""

    products = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return super().matvec(v)

    def matmat(self, v: Tensor) -> Tensor:
        before = self.products
        out = super().matmat(v)
        self.products = before + v.shape[1]
        return out

    def __matmul__(self, v: Tensor) -> Tensor:
        before = self.products
        out = super().__matmul__(v)
        self.products = before + (1 if v.ndim == 1 else v.shape[1])
        return out


@methods
def test_products_are_counted(method: Any) -> None:
    operator = Counting(symmetric(np.linspace(3, -1, 30) ** 3, seed=8))
    pairs = ma.top_eigenvalues(operator, k=2, method=method)
    assert pairs.hvps == operator.products


@methods
def test_tolerance_is_obeyed(method: Any) -> None:
    matrix = symmetric([5.0, 4.0, 3.0, 2.0, *np.linspace(1, -1, 40)], seed=9)
    loose = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method=method, tolerance=1e-2)
    tight = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method=method, tolerance=1e-10)
    assert loose.hvps < tight.hvps
    assert (tight.residuals <= 1.01e-10 * tight.values.abs()).all()
    np.testing.assert_allclose(tight.values.numpy(), [5, 4], rtol=1e-12)


@methods
def test_seeds(method: Any) -> None:
    matrix = symmetric(np.linspace(1, 0, 60), seed=10)

    def run(seed: int) -> Eigenpairs:
        with pytest.warns(ConvergenceWarning):
            return ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method=method, seed=seed, max_hvps=8)

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.values, other.values)


@methods
def test_global_seed_does_not_matter(method: Any) -> None:
    matrix = symmetric(np.linspace(1, 0, 20) ** 4, seed=10)
    runs = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            runs.append(ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method=method).vectors)
    assert torch.equal(*runs)


def test_objective_and_its_operator_agree() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    ours = ma.top_eigenvalues(objective, k=3)
    operator = ma.top_eigenvalues(objective.hessian(), k=3)
    assert torch.equal(ours.values, operator.values)


def test_settings_travel_with_the_result() -> None:
    objective = ma.Objective(CONVNET.model(), CONVNET.loss_fn, CONVNET.data(), batchnorm="batch")
    assert dict(objective.settings).items() <= dict(ma.top_eigenvalues(objective, k=1).settings).items()


def test_eigenvalues_elsewhere_through_the_operator() -> None:
    model, data = MLP.model(), MLP.data()
    objective = ma.Objective(model, MLP.loss_fn, data)
    w = flatten(model) + 0.3 * normal(objective.size, seed=60)
    hessian = dense_hessian(reference_loss(MLP, model, data), w)
    pairs = ma.top_eigenvalues(objective.hessian(w), k=3)
    np.testing.assert_allclose(pairs.values.numpy(), exact(hessian, 3), rtol=1e-6)


# --- traces


def test_trace_is_within_its_error() -> None:
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data)
    expected = float(network_hessian(CONVNET).trace())
    few = ma.trace(objective, draws=25, seed=1)
    many = ma.trace(objective, draws=400, seed=1)
    for estimate in (few, many):
        assert 0 < estimate.standard_error < abs(expected)
        assert abs(estimate.value - expected) < 4 * estimate.standard_error
    assert few.draws == 25
    assert many.draws == 400
    assert many.evaluations >= 400
    assert many.standard_error == pytest.approx(few.standard_error / 4, rel=0.4)


def test_trace_standard_error_is_honest() -> None:
    """Over 60 seeds the truth lies within two standard errors about 95 % of the time."""
    matrix = symmetric([*np.linspace(5, -1, 30)], seed=11)
    expected = float(matrix.trace())
    estimates = [ma.trace(ma.MatrixOperator(matrix), draws=40, seed=seed) for seed in range(60)]
    errors = np.array([(estimate.value - expected) / estimate.standard_error for estimate in estimates])
    assert (np.abs(errors) < 2).sum() >= 50
    assert 0.7 < errors.std() < 1.4


def test_trace_seeds() -> None:
    operator = ma.MatrixOperator(symmetric(np.linspace(5, -1, 30), seed=11))
    assert ma.trace(operator, draws=5, seed=3).value == ma.trace(operator, draws=5, seed=3).value
    assert ma.trace(operator, draws=5, seed=3).value != ma.trace(operator, draws=5, seed=4).value


# --- what a start or a budget must not do


@pytest.mark.parametrize("method", METHODS)
def test_a_start_at_another_eigenvector_hides_nothing(method: Any) -> None:
    values = [1.0, 0.9, *np.linspace(0.5, -0.2, 60)]
    matrix = symmetric(values, seed=21)
    second = torch.linalg.eigh(matrix)[1][:, -2]
    result = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=1, method=method, start=second)
    assert result.converged
    assert float(result.values[0]) == pytest.approx(1.0, rel=1e-6)


def test_a_good_start_saves_products() -> None:
    matrix = symmetric([3.0, 2.5, *np.linspace(1, -0.2, 200)], seed=22)
    cold = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method="power")
    warm = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method="power", start=cold.vectors, tolerance=1e-6)
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-5, atol=0)


def test_a_budget_that_ends_before_the_check_is_not_convergence() -> None:
    """Residuals are small long before a second copy of an eigenvalue can be excluded."""
    matrix = symmetric([3.0, 3.0, 2.0, *np.linspace(0.5, -1, 197)], seed=23)
    with pytest.warns(ma.ConvergenceWarning, match="no value was missed"):
        result = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, max_hvps=12)
    assert not result.converged
    assert result.hvps <= 12
    assert ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2).values.tolist() == pytest.approx([3.0, 3.0], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_operators(method: Any) -> None:
    matrix = symmetric([4.0, 2.0, *np.linspace(0.5, 0.1, 20)], seed=24).to(torch.bfloat16)
    matrix = torch.triu(matrix) + torch.triu(matrix, 1).T
    result = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=2, method=method, tolerance=0.05)
    expected = torch.linalg.eigvalsh(matrix.double()).flip(0)[:2]
    # Products in bfloat16 carry two to three digits, and so do the values.
    torch.testing.assert_close(result.values, expected, rtol=0.1, atol=0)


# --- other people's tools on the same objective


def test_pyhessian_agrees() -> None:
    hessian_class = pytest.importorskip("pyhessian").hessian
    model, data = MLP.model(torch.float32), MLP.data(torch.float32)
    value = float(ma.top_eigenvalues(ma.Objective(model, MLP.loss_fn, data), k=1).values[0])
    peer_model = MLP.model(torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PyHessian takes gradients by backward(create_graph=True), which torch warns about.
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True", category=UserWarning)
        torch.manual_seed(0)
        peer = hessian_class(peer_model, MLP.loss_fn, data=concatenate(data), cuda=False)
        theirs, _ = peer.eigenvalues(maxIter=1000, tol=1e-6, top_n=1)
        for parameter in peer_model.parameters():
            parameter.grad = None
    assert value == pytest.approx(theirs[0], rel=1e-3)


def test_curvlinops_agrees() -> None:
    with warnings.catch_warnings():
        # Its import decorates functions with torch.jit.script, which torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)
        curvlinops = pytest.importorskip("curvlinops")
        model, data = MLP.model().eval(), MLP.data()
        peer: Any = curvlinops.HessianLinearOperator(
            model, torch.nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False
        )
        objective = ma.Objective(model, MLP.loss_fn, data)
        v = normal(objective.size, seed=61)
        theirs = peer @ v
    torch.testing.assert_close(objective.hvp(v), theirs, rtol=1e-9, atol=1e-11)
