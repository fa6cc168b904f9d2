"""A basis in half precision: half of the memory, and residuals that say what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import msam_analysis as ma
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.spectra.goal import Goal
from msam_analysis.spectra.lanczos import LanczosSearch
from msam_analysis.spectra.rows import ROUNDED, Rows
from msam_analysis.spectra.top import search_for

from .cases import normal
from .oracles import symmetric

HALF = torch.float16


class Diagonal(SymmetricOperator):
    def __init__(self, values: Tensor) -> None:
        super().__init__(len(values), dtype=values.dtype, device=values.device)
        self.values = values

    def _apply(self, vector: Tensor) -> Tensor:
        return self.values * vector


def rows(capacity: int, size: int) -> Rows:
    return Rows(capacity, size, dtype=torch.float32, device=torch.device("cpu"), half=True)


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_rows_are_rounded_and_nothing_worse(length: float) -> None:
    size = 3 * 2**18 + 5  # entries of a unit vector would be in the gap below the format's smallest numbers
    vectors = normal(3, size, seed=1).float()
    vectors = length * vectors / vectors.norm(dim=1, keepdim=True)
    stored = rows(4, size)
    kept = stored.write(1, vectors)
    assert torch.equal(kept, stored.piece(1, 4))
    assert float((kept - vectors).norm() / vectors.norm()) < ROUNDED
    stored.write(0, vectors[:1])
    whole = stored.piece(0, 4)
    v, c = normal(size, seed=2).float(), normal(2, 4, seed=3).float()
    torch.testing.assert_close(stored.times(4, v), whole @ v, rtol=1e-4, atol=1e-5 * length)
    torch.testing.assert_close(
        stored.times(3, torch.stack([v, -v], 1)), whole[:3] @ torch.stack([v, -v], 1), rtol=1e-4, atol=0.0
    )
    torch.testing.assert_close(stored.combined(c), c @ whole, rtol=1e-4, atol=1e-6 * length)
    torch.testing.assert_close(stored.squared_lengths(4), whole.square().sum(1), rtol=1e-2, atol=0.0)
    stored.replace(c)
    torch.testing.assert_close(stored.piece(0, 2), c @ whole, rtol=1e-3, atol=1e-4 * length)


def test_a_row_of_zeros_stays_one() -> None:
    assert not rows(1, 7).write(0, torch.zeros(1, 7)).any()


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 3}, {"k": 2, "which": "ends"}, {"k": 2, "memory_bytes": 2**17}])
def test_values_and_residuals(options: Any) -> None:
    values = np.concatenate([[9.0, 7.0, 5.0], np.linspace(2, -1, 996), [-6.0]])
    matrix = symmetric(values, seed=1)
    operator = ma.MatrixOperator(matrix.float())
    full = ma.top_eigenvalues(operator, tolerance=2e-3, **options)
    half = ma.top_eigenvalues(operator, tolerance=2e-3, basis_dtype=HALF, **options)
    assert half.converged
    torch.testing.assert_close(half.values, full.values, rtol=1e-4, atol=1e-5)
    assert not torch.equal(half.values, full.values)
    vectors = half.vectors.double()
    true = (matrix @ vectors - vectors * half.values).norm(dim=0) / vectors.norm(dim=0)
    assert bool((true <= 1.05 * half.residuals).all())
    assert bool((half.residuals >= 2e-4 * half.values.abs()).all())


@pytest.mark.parametrize("size", [60, 1000])
@pytest.mark.parametrize("kind", ["ten", "cubes", "powers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore::msam_analysis.ConvergenceWarning")
def test_a_tolerance_that_cannot_be_reached_spoils_no_value(size: int, kind: str, dtype: torch.dtype) -> None:
    """What is left of a residual is then the basis's own rounding, which must not enter it again and again."""
    steps = np.arange(size)
    values = {"ten": np.maximum(10.0 - steps, 0.0), "cubes": np.linspace(1, -1, size) ** 3, "powers": 0.9**steps}[kind]
    operator = ma.MatrixOperator(symmetric(values, seed=size).to(dtype))
    found = ma.top_eigenvalues(operator, 3, basis_dtype=HALF)
    assert not found.converged
    torch.testing.assert_close(found.values, torch.tensor(values[:3]), rtol=0, atol=4e-4 * values[0])
    assert bool((found.residuals < 2e-3 * values[0]).all())


def test_what_cannot_be_reached_is_not_claimed() -> None:
    operator = ma.MatrixOperator(symmetric(np.linspace(1, 5, 50), seed=1).float())
    with pytest.warns(ma.ConvergenceWarning, match=r"expected residual/\|value\| <= 0.0001"):
        found = ma.top_eigenvalues(operator, 1, tolerance=1e-4, basis_dtype=HALF, max_hvps=60)
    assert not found.converged


def test_the_same_memory_holds_twice_as_many_columns() -> None:
    operator = Diagonal(torch.linspace(0, 1, 20_000))
    goal = Goal(1, "largest", 1e-2, 1e-6)
    found = []
    for half in (False, True):
        search, _, _ = search_for(operator, goal, max_hvps=2, confirm=False, memory_bytes=67 * 80_000, half=half)
        assert isinstance(search, LanczosSearch)
        found.append((search.basis.capacity, search.basis._q._stored.nbytes))
    assert found == [(30, 30 * 80_000), (60, 60 * 40_000)]


def test_entries_below_the_smallest_numbers() -> None:
    values = torch.linspace(0, 1, 300_000)
    values[7] = 3.0
    found = ma.top_eigenvalues(Diagonal(values), 1, tolerance=1e-3, basis_dtype=HALF)
    assert abs(float(found.values[0]) - 3.0) <= float(found.residuals[0]) < 3e-3
    assert abs(float(found.vectors[7, 0])) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis_dtype": torch.bfloat16}, r"basis_dtype must be torch.float16, for the basis of Lanczos, got torch.bf"),
        ({"basis_dtype": HALF, "method": "power"}, "with method='power', backend='native': leave it out"),
        ({"basis_dtype": HALF, "backend": "pyhessian"}, "backend='pyhessian'"),
    ],
)
def test_mistakes(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ma.top_eigenvalues(ma.MatrixOperator(torch.eye(3)), 1, **options)


def test_its_own_precision_changes_nothing() -> None:
    operator = ma.MatrixOperator(symmetric(np.linspace(1, 5, 50), seed=1).float())
    own = ma.top_eigenvalues(operator, 2, basis_dtype=torch.float32)
    assert torch.equal(own.values, ma.top_eigenvalues(operator, 2).values)
