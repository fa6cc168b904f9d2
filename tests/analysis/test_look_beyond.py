"""What an eigensolver says of the values that it did not return, against dense eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import msam_analysis as ma

from .oracles import symmetric


def coupled(inner: float, part: float) -> np.ndarray:
    """Return a matrix with 1 and -1 on the diagonal, each coupled by ``part`` to a value within ``inner`` of zero."""
    matrix = np.diag([1.0, -1.0, inner, -inner, *np.linspace(0.8, -0.8, 60)])
    matrix[0, 3] = matrix[3, 0] = matrix[1, 2] = matrix[2, 1] = part
    return matrix


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("which", ["magnitude", "ends"])
def test_rough_pairs_exclude_no_more_than_their_residuals_allow(which: Any, seed: int) -> None:
    """Pairs with a residual of 0.297 hide values of 1.03 and -1.03 beside those of 1.04 and -1.04 that they stand for.

    Outside of the two vectors there is nothing beyond 0.99, so that a look at the rest alone would exclude whatever is
    beyond 1.01.
    """
    matrix = coupled(inner=0.99, part=0.297)
    start = torch.eye(len(matrix), 2).double()
    operator = ma.MatrixOperator(torch.from_numpy(matrix))
    pairs = ma.top_eigenvalues(operator, k=2, which=which, tolerance=0.3, start=start, seed=seed)
    np.testing.assert_allclose(pairs.values.abs().numpy(), 1.0)
    np.testing.assert_allclose(pairs.residuals.numpy(), 0.297)
    exact = np.linalg.eigvalsh(matrix)
    assert pairs.converged
    third = np.sort(np.abs(exact))[-3]
    assert third > 1.03
    assert 1.0 + pairs.margin >= third


ONE_SIDED = [3.0, *np.linspace(1.0, -2.9, 120)]
UNLIKE: dict[str, tuple[int, Any, list[float], list[float]]] = {
    "magnitude": (1, "magnitude", ONE_SIDED, [3.0]),
    "magnitude, below": (1, "magnitude", [-value for value in ONE_SIDED], [-3.0]),
    "ends": (2, "ends", [3.0, *np.linspace(1.0, -2.9, 120), -3.0], [3.0, -3.0]),
    "ends, the other way": (2, "ends", [3.0, *np.linspace(2.9, -1.0, 120), -3.0], [3.0, -3.0]),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_both_ends_are_looked_at_until_both_are_excluded(case: str) -> None:
    """One of them is far from all else, the other so close to what is left that it takes longer."""
    k, which, spectrum, wanted = UNLIKE[case]
    pairs = ma.top_eigenvalues(ma.MatrixOperator(symmetric(spectrum, seed=8)), k=k, which=which)
    assert pairs.converged
    np.testing.assert_allclose(pairs.values.numpy(), wanted, rtol=1e-6)
    assert pairs.margin < 0.04 * 6


@pytest.mark.parametrize(("k", "which"), [(2, "ends"), (1, "magnitude")])
def test_the_margin_is_that_of_the_end_with_the_larger_one(k: int, which: Any) -> None:
    """Right behind the lowest value the spectrum goes on; at the other end there is nothing near."""
    spectrum = [*([3.0] if which == "ends" else []), *np.linspace(0.3, -1.0, 400)]
    pairs = ma.top_eigenvalues(ma.MatrixOperator(symmetric(spectrum, seed=1)), k=k, which=which)
    assert pairs.converged
    assert 0.0 < pairs.margin < 0.04 * 4


@pytest.mark.parametrize(("inner", "missed"), [(1.02, False), (1.04, True)])
@pytest.mark.parametrize("which", ["magnitude", "ends"])
def test_a_value_beyond_rough_pairs_counts_from_a_tenth_of_their_residuals(
    which: Any, inner: float, missed: bool
) -> None:
    """Less is within the error of the pairs themselves: they stay, and the margin says what may be there."""
    matrix = coupled(inner=inner, part=0.297)
    start = torch.eye(len(matrix), 2).double()
    pairs = ma.top_eigenvalues(
        ma.MatrixOperator(torch.from_numpy(matrix)), k=2, which=which, tolerance=0.3, start=start
    )
    assert pairs.converged
    lowest = float(pairs.values.abs().min())
    assert lowest > 1.03 if missed else lowest == pytest.approx(1.0)
    assert lowest + pairs.margin >= np.sort(np.abs(np.linalg.eigvalsh(matrix)))[-3]
