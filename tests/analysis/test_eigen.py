"""Eigenvalues and traces against dense float64 linear algebra, and against PyHessian and curvlinops."""

from __future__ import annotations

import functools
import math
import sys
import warnings
import weakref
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import msam_analysis as ma
from msam_analysis.results import ConvergenceWarning, Eigenpairs
from msam_analysis.spectra.beyond import Inside, look_beyond
from msam_analysis.spectra.chain import Chain
from msam_analysis.spectra.goal import Goal
from msam_analysis.spectra.peers import pyhessian_trace
from msam_analysis.spectra.subspace import Subspace

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
    objective = ma.Objective(model, CONVNET.loss_fn, data)
    pairs = ma.top_eigenvalues(objective, k=2, method=method, which=which, tolerance=1e-3)
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


@settings(max_examples=60, derandomize=True)
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


# --- memory


REPEATED = {
    "five times": [2.0] * 5 + list(np.linspace(1, -1, 115)),
    "twice the largest": [5.0, 5.0, *np.linspace(3, -1, 118)],
    "twice the last": [7.0, 6.5, 6.0, 5.5, 5.0, 5.0, *np.linspace(2, -0.5, 114)],
    "pairs": [7.0, 7.0, 6.0, 6.0, 5.0, 5.0, *np.linspace(1, 0, 114)],
    "all apart": [5.376, 4.218, 4.068, 3.521, 3.194, *np.linspace(2.2, -0.3, 115)],
    "two values": [1.0] * 3 + [0.0] * 117,
}


def least_bytes(k: int, size: int = 120, *, method: str = "lanczos") -> int:
    """float64 vectors for k + 2 columns with their products, the result, and six more."""
    return (3 * k + 10 if method == "lanczos" else 9 * k + 6) * size * 8


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", REPEATED)
def test_the_least_memory_is_enough_for_the_answer_and_the_look_beyond(name: str, k: int, which: Any) -> None:
    sign = -1 if which == "smallest" else 1
    matrix = symmetric(sorted((sign * value for value in REPEATED[name]), reverse=True), seed=3)
    pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=k, which=which, memory_bytes=least_bytes(k))
    assert pairs.converged
    assert pairs.margin < 0.012 * np.ptp(REPEATED[name])
    np.testing.assert_allclose(np.abs(pairs.values.numpy()), np.abs(exact(matrix, k, which)), rtol=1e-6, atol=1e-12)
    check_certificates(pairs, matrix)


@methods
@pytest.mark.parametrize("k", [1, 5])
def test_memory_is_what_the_budget_says(k: int, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    real = Subspace.__post_init__

    def spy(basis: Subspace) -> None:
        held.append(2 * basis.capacity)
        real(basis)

    monkeypatch.setattr(Subspace, "__post_init__", spy)
    operator = ma.MatrixOperator(symmetric(REPEATED["all apart"], seed=3))
    for vectors in (least_bytes(k, method=method) // 960, 60, 100):
        held.clear()
        ma.top_eigenvalues(operator, k=k, method=method, memory_bytes=vectors * 960)
        assert max(held) <= vectors - k - 6


def test_a_large_budget_spends_no_more_products_than_a_small_one() -> None:
    operator = ma.MatrixOperator(symmetric([3.0, *np.linspace(2, -1, 299)], seed=4))
    small = ma.top_eigenvalues(operator, k=1, memory_bytes=13 * 300 * 8)
    large = ma.top_eigenvalues(operator, k=1)
    assert large.hvps <= small.hvps < 1.5 * large.hvps


def test_restarts_keep_the_pace() -> None:
    """With three columns: 125 products, and 170 where the vector worked on a step before is not kept."""
    operator = ma.MatrixOperator(symmetric([3.0, 2.9, *np.linspace(2, -1, 298)], seed=4))
    runs = (ma.top_eigenvalues(operator, 1, memory_bytes=13 * 300 * 8, confirm=False, seed=seed) for seed in range(3))
    assert sum(run.hvps for run in runs) < 150


@pytest.mark.parametrize(
    ("method", "k", "said"),
    [("lanczos", 1, r"at least 12480 \(1.25e-05 GB\).*13 vectors"), ("power", 2, r"at least 23040.*24 vectors")],
)
def test_too_little_memory_is_an_error_that_says_what_is_needed(method: Any, k: int, said: str) -> None:
    operator = ma.MatrixOperator(symmetric(REPEATED["all apart"], seed=3))
    needed = least_bytes(k, method=method)
    with pytest.raises(ValueError, match=rf"memory_bytes must be {said} of 120 entries; got {needed - 1}: raise it"):
        ma.top_eigenvalues(operator, k=k, method=method, memory_bytes=needed - 1)
    assert ma.top_eigenvalues(operator, k=k, method=method, memory_bytes=needed).converged


def test_without_a_budget_of_its_own_a_huge_model_gets_the_smallest_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msam_analysis.objective.operators.VECTOR_BYTES", 1)
    matrix = symmetric(REPEATED["twice the last"], seed=3)
    for method in METHODS:
        pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=5, method=method)  # type: ignore[arg-type]
        np.testing.assert_allclose(pairs.values.numpy(), exact(matrix, 5), rtol=1e-6)


def test_a_krylov_space_has_every_residual_in_one_vector() -> None:
    basis = Subspace(ma.MatrixOperator(symmetric([3.0, *np.linspace(1, -1, 39)], seed=5)), 8)
    basis.expand(normal(40, seed=1)[:, None])
    while basis.columns < 8:
        values, coefficients = basis.pairs("largest")
        ahead = basis.remainder()
        residuals = basis.residuals(values, coefficients)
        torch.testing.assert_close(residuals, torch.outer(ahead, coefficients[-1]), rtol=0, atol=1e-12)
        torch.testing.assert_close(residuals.norm(dim=0), basis.residual_norms(values, coefficients))
        basis.expand(ahead[:, None])


def test_residuals_are_those_of_the_products_and_not_of_a_recurrence() -> None:
    """An operator that is not symmetric: the recurrence, which takes it for one, ends long before its residuals do."""
    twist = 1e-3 * normal(400, seed=2).reshape(20, 20)
    operator = ma.MatrixOperator(symmetric([5.0, 3.0, *np.linspace(1, 0, 18)], seed=9))
    operator.matrix = operator.matrix + twist - twist.T
    with pytest.warns(ConvergenceWarning):
        pairs = ma.top_eigenvalues(operator, k=2, confirm=False, max_hvps=19)
    actual = (operator.matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert not pairs.converged
    torch.testing.assert_close(pairs.residuals, actual, rtol=1e-9, atol=0)


class Watched(torch.nn.Module):
    """Says how many graphs of earlier calls are in memory, to all of its copies."""

    graphs: ClassVar[list[weakref.ref[Any]]] = []
    alive: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.alive.append(sum(graph() is not None for graph in self.graphs))
        out = torch.tanh(x)
        if out.grad_fn is not None:
            mark = torch.nn.Module()  # anything that a weak reference can be made to
            metadata: Any = out.grad_fn.metadata
            metadata["mark"] = mark
            self.graphs.append(weakref.ref(mark))
        return out


def test_a_graph_that_is_not_kept_is_gone_before_the_next() -> None:
    data = [(normal(12, seed=i).reshape(4, 3), normal(8, seed=i).reshape(4, 2)) for i in range(4)]
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), Watched()).double()
    for graph_bytes, most in ((0, 0), (2**20, 3)):
        hessian = ma.Objective(model, torch.nn.MSELoss(), data, graph_bytes=graph_bytes).hessian()
        Watched.graphs.clear()
        Watched.alive.clear()
        hessian.matvec(normal(8, seed=1))
        hessian.matmat(normal(40, seed=1).reshape(8, 5))
        assert max(Watched.alive) == most


# --- the look beyond


def test_lost_orthogonality_excludes_nothing_that_is_there() -> None:
    """A chain of 61 steps in single precision, far past the convergence of its own ends, still meets the value."""
    values = [*np.linspace(10, 9, 3), *np.linspace(1, 0, 300), -30.0]
    for seed in range(5):
        operator = ma.MatrixOperator(symmetric(values, seed=seed).float())
        pairs = ma.top_eigenvalues(operator, k=3, memory_bytes=19 * 304 * 4, seed=seed)
        np.testing.assert_allclose(pairs.values.numpy(), values[:3], rtol=1e-5)


def test_the_margin_says_what_is_not_excluded() -> None:
    apart = ma.top_eigenvalues(ma.MatrixOperator(symmetric([3.0, *np.linspace(1, -1, 199)], seed=1)), k=1)
    assert apart.margin == 0.0
    close = ma.top_eigenvalues(ma.MatrixOperator(symmetric(np.linspace(1, -1, 400), seed=1)), k=1)
    assert 0.0 < close.margin < 0.04  # 1 % of the spread for what is near, and as much for what was set aside
    whole = ma.top_eigenvalues(ma.MatrixOperator(symmetric([3.0, 2.0, 1.0], seed=1)), k=3)
    assert whole.margin == 0.0
    unchecked = ma.top_eigenvalues(ma.MatrixOperator(symmetric([3.0, *np.linspace(1, -1, 199)], seed=1)), confirm=False)
    assert unchecked.margin == math.inf
    assert unchecked.converged


@settings(max_examples=40, derandomize=True)
@given(
    spectrum=st.lists(st.integers(-100, 100), min_size=2, max_size=9, unique=True),
    shares=st.lists(st.floats(0.01, 1), min_size=9, max_size=9),
)
def test_no_mass_is_hidden_by_a_recurrence(spectrum: list[int], shares: list[float]) -> None:
    """At every eigenvalue the sum bounds the start's share in its vector, and once all is seen it is that share."""
    values = torch.tensor(spectrum).double()
    start = torch.tensor(shares[: len(spectrum)]).double()
    masses = ((start / start.norm()) ** 2).tolist()
    chain = Chain(start, start[:, None][:, :0], remember=len(spectrum))
    while chain.steps + 1 < len(spectrum):
        chain.advance(values * chain.current)
        for value, mass in zip(spectrum, masses, strict=True):
            assert mass * chain.christoffel(value) <= 1 + 1e-6
    for value, mass in zip(spectrum, masses, strict=True):
        assert mass * chain.christoffel(value) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("hidden", [2.1, -2.1])
def test_a_look_beyond_fails_as_seldom_as_it_says(hidden: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set to one chance in four, it misses a value by those starts alone that have too little of its vector."""
    monkeypatch.setattr("msam_analysis.spectra.beyond._FAILURE", 0.25)
    size = 60
    operator = ma.MatrixOperator(torch.diag(torch.tensor([2.0, hidden, *np.linspace(1, -1, size - 2)]).double()))
    goal = Goal(1, "magnitude", 1e-4, 1e-14)
    none = torch.zeros(0).double()
    inside = Inside(torch.eye(size, 1).double(), torch.tensor([2.0]).double(), torch.zeros(1).double(), none, 2.0)
    false = 0
    for seed in range(200):
        margin, vector = look_beyond(operator, inside, goal, normal(size, seed=seed), operator.products + size)
        assert (margin == math.inf) == (vector is not None)
        false += 2 + margin < abs(hidden)
    assert 0.1 * 200 < false < 0.25 * 200


@methods
def test_without_the_look_beyond_a_start_is_believed(method: Any) -> None:
    """What `confirm` is for, and what it costs to leave it out."""
    matrix = symmetric([1.0, 0.9, *np.linspace(0.5, -0.2, 60)], seed=21)
    second = torch.linalg.eigh(matrix)[1][:, -2]
    believed = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=1, method="lanczos", start=second, confirm=False)
    assert float(believed.values[0]) == pytest.approx(0.9)
    assert (believed.converged, believed.margin, believed.hvps) == (True, math.inf, 1)
    looked = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=1, method=method, start=second)
    assert float(looked.values[0]) == pytest.approx(1.0)
    assert looked.margin < math.inf


# --- following an eigenvalue through training


def test_following_the_largest_eigenvalue_is_cheap() -> None:
    """A convolutional network, twenty-four steps of training: the last vector is a start for the next."""
    model, data = CONVNET.model(), CONVNET.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    previous: Tensor | None = None
    cold, warm = 0, 0
    for step in range(24):
        for x, y in data:
            optimizer.zero_grad()
            CONVNET.loss_fn(model(x), y).backward()
            optimizer.step()
        if step % 4 == 0:
            hessian = ma.Objective(model, CONVNET.loss_fn, data).hessian()
            scratch = ma.top_eigenvalues(hessian, 1)
            followed = ma.top_eigenvalues(hessian, 1, start=previous, tolerance=1e-3, confirm=previous is None)
            assert float(followed.values[0]) == pytest.approx(float(scratch.values[0]), rel=1e-4)
            assert (followed.margin == math.inf) == (previous is not None)
            if previous is not None:
                cold, warm = cold + scratch.hvps, warm + followed.hvps
            previous = followed.vectors
    assert warm < cold / 2


def test_nothing_changed_costs_one_product_a_pair() -> None:
    operator = ma.MatrixOperator(symmetric([3.0, 2.5, *np.linspace(1, -0.2, 200)], seed=22))
    first = ma.top_eigenvalues(operator, k=2)
    again = ma.top_eigenvalues(operator, k=2, start=first.vectors, confirm=False)
    assert again.hvps == 2
    torch.testing.assert_close(again.values, first.values)


@methods
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_start_that_is_not_finite(value: float, method: Any) -> None:
    start = torch.ones(5).double()
    start[2] = value
    with pytest.raises(ValueError, match="start must be finite, got NaN or infinity in it: leave it out"):
        ma.top_eigenvalues(ma.MatrixOperator(torch.eye(5).double()), k=1, method=method, start=start)


@methods
def test_a_start_of_zeros_is_no_start(method: Any) -> None:
    operator = ma.MatrixOperator(symmetric([3.0, 2.0, 1.0, 0.0], seed=2))
    pairs = ma.top_eigenvalues(operator, k=2, method=method, start=torch.zeros(4, 3).double())
    np.testing.assert_allclose(pairs.values.numpy(), [3.0, 2.0])


# --- both ends


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_both_ends_come_from_one_search(k: int) -> None:
    values = [9.0, 7.0, 5.0, 3.0, 1.0, *np.linspace(0.5, -0.5, 50), -2.0, -4.0, -4.0, -6.0]
    matrix = symmetric(values, seed=6)
    pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=k, which="ends")
    expected = [*exact(matrix, (k + 1) // 2), *exact(matrix, k // 2, "smallest")]
    np.testing.assert_allclose(pairs.values.numpy(), expected, rtol=1e-6)
    check_certificates(pairs, matrix)


def test_power_iteration_follows_one_end() -> None:
    with pytest.raises(ValueError, match="one end at a time: for both expected method='lanczos', got 'power'"):
        ma.top_eigenvalues(ma.MatrixOperator(torch.eye(5)), k=2, which="ends", method="power")


# --- precision of the caller


@methods
def test_autocast_of_the_caller_reaches_no_eigenvalue(method: Any) -> None:
    operator = ma.MatrixOperator(symmetric([4.0, 2.0, *np.linspace(0.5, 0.1, 20)], seed=24).float())
    plain = ma.top_eigenvalues(operator, k=2, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ma.top_eigenvalues(operator, k=2, method=method)
    assert torch.equal(cast.values, plain.values)
    assert torch.equal(cast.vectors, plain.vectors)


# --- other people's tools on the same objective


def theirs(objective: ma.Objective, k: int, **options: Any) -> Eigenpairs:
    """PyHessian's answer, which as a rule does not reach the residuals that are asked for, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ma.top_eigenvalues(objective, k, backend="pyhessian", **options)


# Every network once, either precision three times.
BY_PEER = tuple(zip(CASES, [torch.float32, torch.float64] * 3, strict=True))


@pytest.mark.parametrize(("case", "dtype"), BY_PEER, ids=lambda value: getattr(value, "name", str(value)))
def test_the_backend_is_pyhessian_on_any_objective(case: Case, dtype: torch.dtype) -> None:
    """Dicts, token counts, tied, frozen and unused parameters, fused attention: all of which it does not know."""
    pytest.importorskip("pyhessian")
    objective = ma.Objective(case.model(dtype), case.loss_fn, case.data(dtype))
    hessian = network_hessian(case)
    pairs = theirs(objective, 2, which="magnitude", tolerance=1e-5, max_hvps=600)
    np.testing.assert_allclose(pairs.values.numpy(), exact(hessian, 2, "magnitude"), rtol=1e-3)
    assert (np.diff(np.abs(pairs.values.numpy())) <= 0).all()
    vectors = pairs.vectors.double()
    torch.testing.assert_close(vectors.norm(dim=0), torch.ones(2).double(), rtol=1e-5, atol=0)
    residuals = (hessian @ vectors - vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-2, atol=1e-5)
    assert (pairs.method, pairs.which, pairs.margin) == ("pyhessian", "magnitude", math.inf)
    assert dict(objective.settings).items() <= dict(pairs.settings).items()


@policies
def test_the_backend_keeps_the_batchnorm_policy(case: Case, policy: Any) -> None:
    pytest.importorskip("pyhessian")
    objective = ma.Objective(case.model(), case.loss_fn, case.data(), batchnorm=policy)
    pairs = theirs(objective, 1, which="magnitude", tolerance=1e-6, max_hvps=500)
    expected = exact(network_hessian(case, policy), 1, "magnitude")
    np.testing.assert_allclose(pairs.values.numpy(), expected, rtol=1e-3)


def test_the_backend_is_the_peer_itself() -> None:
    """The same numbers as PyHessian on the model by hand, from the same draws."""
    hessian_class = pytest.importorskip("pyhessian").hessian
    model, data = MLP.model(torch.float32), MLP.data(torch.float32)
    pairs = theirs(ma.Objective(model, MLP.loss_fn, data), 2, seed=5, max_hvps=8)
    peer_model = MLP.model(torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True", category=UserWarning)
        torch.manual_seed(5)
        peer = hessian_class(peer_model, MLP.loss_fn, dataloader=data, cuda=False)
        values, _ = peer.eigenvalues(maxIter=4, tol=1e-4, top_n=2)  # so few that the draws still matter
        for parameter in peer_model.parameters():
            parameter.grad = None
    np.testing.assert_allclose(pairs.values.numpy(), sorted(values, reverse=True), rtol=1e-4)


def test_the_backend_counts_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    pyhessian = pytest.importorskip("pyhessian")
    made: list[int] = []
    real = pyhessian.hessian.dataloader_hv_product

    def counted(self: Any, v: Any) -> Any:
        made.append(1)
        return real(self, v)

    monkeypatch.setattr(pyhessian.hessian, "dataloader_hv_product", counted)
    pairs = theirs(ma.Objective(MLP.model(), MLP.loss_fn, MLP.data()), 3)
    assert pairs.hvps == len(made) + 3


def test_the_backends_answer_is_judged_by_its_residuals() -> None:
    pytest.importorskip("pyhessian")
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    with pytest.warns(ConvergenceWarning, match=r"expected residual/\|value\| <= 0.0001: raise") as caught:
        pairs = ma.top_eigenvalues(objective, 5, backend="pyhessian", max_hvps=25)
    assert caught[0].filename == __file__
    assert not pairs.converged
    assert pairs.hvps <= 30
    apart = ma.Objective(quadratic([10.0, 0.1, 0.05]), cases.mean_output, cases.ONE_SAMPLE)
    good = ma.top_eigenvalues(apart, 1, backend="pyhessian", tolerance=1e-2)
    assert good.converged
    assert good.residuals[0] <= 1e-2 * good.values[0]


def test_the_largest_in_magnitude_are_not_always_the_largest() -> None:
    pytest.importorskip("pyhessian")
    objective = ma.Objective(quadratic([-5.0, 3.0, 1.0]), cases.mean_output, cases.ONE_SAMPLE)
    with pytest.warns(ConvergenceWarning):
        pairs = ma.top_eigenvalues(objective, 2, backend="pyhessian", tolerance=1e-2)
    assert not pairs.converged
    np.testing.assert_allclose(pairs.values.numpy(), [3.0, -5.0], rtol=1e-2)
    alone = ma.Objective(quadratic([-50.0, 0.3, 0.1]), cases.mean_output, cases.ONE_SAMPLE)
    assert ma.top_eigenvalues(alone, 1, backend="pyhessian", which="magnitude", tolerance=1e-2).converged


def test_the_backend_on_a_linear_model() -> None:
    pytest.importorskip("pyhessian")
    objective = ma.Objective(quadratic([0.0, 0.0, 0.0]), cases.mean_output, cases.ONE_SAMPLE)
    pairs = theirs(objective, 1)
    assert float(pairs.values[0]) == 0.0


def quadratic(values: list[float]) -> cases.Quadratic:
    return cases.Quadratic(symmetric(values, seed=2), torch.ones(len(values)).double())


REFUSED: dict[str, tuple[Any, Any]] = {
    "backend": (lambda o: {"backend": "scipy"}, r"backend must be one of .*native.*pyhessian.*got 'scipy'"),
    "smallest": (lambda o: {"which": "smallest"}, r"expected which='magnitude' or 'largest' .*got which='smallest'"),
    "ends": (lambda o: {"which": "ends"}, r"expected which='magnitude' or 'largest' .*got which='ends'"),
    "start": (lambda o: {"start": torch.ones(o.size)}, r"without start, got which='largest' and a start"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_backend_cannot_do(name: str) -> None:
    pytest.importorskip("pyhessian")
    options, said = REFUSED[name]
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    with pytest.raises(ValueError, match=said):
        ma.top_eigenvalues(objective, 2, **({"backend": "pyhessian"} | options(objective)))


def test_the_backend_takes_no_bare_operator() -> None:
    with pytest.raises(TypeError, match=r"expected an Objective, got MatrixOperator: .*backend='native'"):
        ma.top_eigenvalues(ma.MatrixOperator(torch.eye(3)), 1, backend="pyhessian")


def test_the_backend_on_another_device() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    objective.loss()  # examined where it is
    objective.evaluation.device = torch.device("meta")
    with pytest.raises(ValueError, match=r"CPU or on CUDA, got an objective on meta: make it with device='cpu'"):
        pyhessian_trace(objective, 3, seed=0)


def test_without_the_package_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs PyHessian: install it with pip install PyHessian"):
        ma.top_eigenvalues(ma.Objective(MLP.model(), MLP.loss_fn, MLP.data()), 1, backend="pyhessian")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def cubed(output: Tensor, target: Tensor) -> Tensor:
    value: Tensor = Once.apply(output).mean()  # type: ignore[no-untyped-call]
    return value


def test_the_backend_needs_second_derivatives() -> None:
    pytest.importorskip("pyhessian")
    objective = ma.Objective(MLP.model(), cubed, MLP.data())
    with pytest.raises(ValueError, match=r"PyHessian needs second derivatives, and .*Once.*use backend='native'"):
        ma.top_eigenvalues(objective, 1, backend="pyhessian")


@pytest.mark.parametrize("fails", [False, True])
def test_the_backend_touches_nothing(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pyhessian = pytest.importorskip("pyhessian")
    model, outside = MLP.model(torch.float32), torch.ones((), requires_grad=True)
    objective = ma.Objective(model, lambda o, t: outside * MLP.loss_fn(o, t), MLP.data(torch.float32))
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    if fails:
        monkeypatch.setattr(pyhessian.hessian, "dataloader_hv_product", raising)
    state = torch.get_rng_state()
    before = [(p.detach().clone(), p._version) for p in model.parameters()]
    if fails:
        with pytest.raises(ArithmeticError):
            theirs(objective, 1)
    else:
        theirs(objective, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert outside.grad is None
    assert bool((model[0].weight.grad == 7.0).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(p, old) and p._version == n for p, (old, n) in zip(model.parameters(), before, strict=True))


def raising(*_: object) -> None:
    torch.randn(3)
    raise ArithmeticError("the peer fails")


def test_the_backends_seed() -> None:
    pytest.importorskip("pyhessian")
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    first, again, other = (theirs(objective, 1, seed=seed, max_hvps=3) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)


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
