"""The parts of an eigensolver one by one: which pairs it sets aside, when it stops, what it forgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import msam_analysis as ma
from msam_analysis.spectra.beyond import set_aside
from msam_analysis.spectra.chain import Chain
from msam_analysis.spectra.goal import Goal
from msam_analysis.spectra.power import PowerSearch
from msam_analysis.spectra.subspace import Subspace
from msam_analysis.spectra.top import search_for

from .cases import normal
from .oracles import rotation, symmetric

SMALL = [1e-6] * 6

# What is wanted of which Ritz values with which residuals, and the pairs that the look beyond should leave out. Values
# within 2 % of the spread of the wanted ones stay in its way, and all residuals together must stay below 1 %.
ASIDE: dict[str, tuple[int, Any, list[float], list[float], list[int]]] = {
    "all that lie well inside": (1, "largest", [10.0, 9.9, 9.7, 5.0, 1.0, 0.0], SMALL, [0, 2, 3, 4, 5]),
    "the smallest residuals first": (
        1, "largest", [10.0, 9.9, 9.0, 5.0, 1.0, 0.0], [0.01, 0.001, 0.06, 0.07, 0.001, 0.5], [0, 2, 3, 4],
    ),
    "none where the wanted ones have used it up": (
        1, "largest", [10.0, 9.9, 9.0, 5.0, 1.0, 0.0], [0.11, *SMALL[1:]], [0],
    ),
    "inside of the last wanted one": (2, "largest", [10.0, 6.0, 5.9, 5.7, 1.0, 0.0], SMALL, [0, 1, 3, 4, 5]),
    "at the lower end": (1, "smallest", [0.0, 0.1, 0.3, 5.0, 9.0, 10.0], SMALL, [0, 2, 3, 4, 5]),
    "between both": (2, "magnitude", [10.0, -8.0, 7.7, -7.7, 7.0, -7.0], SMALL, [0, 1, 4, 5]),
    "between two ends": (2, "ends", [10.0, -10.0, 9.7, -9.7, 9.5, -9.5], SMALL, [0, 1, 4, 5]),
}  # fmt: skip


@pytest.mark.parametrize("case", ASIDE)
def test_what_is_set_aside(case: str) -> None:
    k, which, values, norms, expected = ASIDE[case]
    chosen = set_aside(torch.tensor(values).double(), torch.tensor(norms).double(), Goal(k, which, 1e-4, 1e-14))
    assert chosen.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize(("method", "most"), [("lanczos", 100), ("power", 600)])
def test_an_eigenvalue_of_zero_converges(method: Any, most: int) -> None:
    """No residual is small beside it; it is small beside the norm of the matrix."""
    matrix = symmetric([0.0, *np.linspace(1, 2, 199)], seed=3)
    pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=1, method=method, which="smallest")
    assert pairs.converged
    assert abs(float(pairs.values[0])) < 1e-12
    assert pairs.margin == 0.0
    assert pairs.hvps < most


def test_more_memory_saves_products() -> None:
    """Of a spectrum without gaps, which a short basis has to look at again after each restart."""
    operator = ma.MatrixOperator(symmetric(np.linspace(1, -1, 300), seed=5))
    long, short = (ma.top_eigenvalues(operator, k=2, memory_bytes=n * 300 * 8) for n in (200, 16))
    default = ma.top_eigenvalues(operator, k=2)
    assert default.hvps == long.hvps < 0.8 * short.hvps
    torch.testing.assert_close(long.values, short.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("method", "k", "size", "least"),
    [("lanczos", 1, 2, 12), ("lanczos", 1, 30, 13), ("lanczos", 3, 30, 19), ("power", 1, 2, 12), ("power", 3, 30, 33)],
)
def test_the_least_memory_is_what_the_error_says(method: Any, k: int, size: int, least: int) -> None:
    """``3 k + 10`` vectors for Lanczos, ``9 k + 6`` for power iteration, and no more than a small space takes."""
    operator = ma.MatrixOperator(symmetric(np.linspace(2, 1, size), seed=6))
    pairs = ma.top_eigenvalues(operator, k=k, method=method, memory_bytes=least * size * 8)
    np.testing.assert_allclose(pairs.values.numpy(), np.linspace(2, 1, size)[:k], rtol=1e-6)
    with pytest.raises(ValueError, match=rf"memory_bytes must be at least .*got {least * size * 8 - 1}: raise it"):
        ma.top_eigenvalues(operator, k=k, method=method, memory_bytes=least * size * 8 - 1)


def test_a_basis_takes_no_more_than_it_has_room_for() -> None:
    basis = Subspace(ma.MatrixOperator(symmetric(np.linspace(2, 1, 9), seed=7)), 3)
    assert [basis.expand(normal(18, seed=seed).reshape(9, 2)) for seed in range(3)] == [2, 1, 0]
    assert basis.expand(normal(9, seed=4)[:, None]) == 0
    assert basis.columns == 3
    torch.testing.assert_close(basis.q.T @ basis.q, torch.eye(3).double(), rtol=0, atol=1e-14)


def test_a_chain_forgets_its_vectors_and_keeps_what_it_saw() -> None:
    matrix = symmetric(np.linspace(1, 2, 12), seed=4)
    chain = Chain(normal(12, seed=1), torch.zeros(12, 0).double(), remember=12)
    while not chain.exhausted and chain.steps < 12:
        chain.advance(matrix @ chain.current)
    chain.forget()
    held = [value for value in vars(chain).values() if isinstance(value, torch.Tensor)]
    assert held
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 0
    np.testing.assert_allclose(chain.ritz_values().numpy(), np.linspace(1, 2, 12), rtol=1e-10)


@pytest.mark.parametrize("length", [1e-150, 1e-20, 1.0, 1e20, 1e150])
def test_a_chain_does_not_mind_how_long_its_start_is(length: float) -> None:
    """It sees the complement of what it is kept out of, and nothing where its start lies inside of that."""
    matrix, inside = torch.diag(torch.arange(1.0, 7.0).double()), torch.eye(6, 2).double()
    chain = Chain(length * normal(6, seed=1), inside, remember=6)
    while not chain.exhausted:
        chain.advance(matrix @ chain.current)
    np.testing.assert_allclose(chain.ritz_values().numpy(), [3, 4, 5, 6], rtol=1e-10)
    assert Chain(length * (inside @ normal(2, seed=2)), inside).exhausted


def test_a_chain_stays_outside_of_what_the_operator_mixes_in() -> None:
    """Each product lies almost wholly inside of ``W``, so that one pass of Gram-Schmidt leaves rounding of its size."""
    q = torch.from_numpy(rotation(12, 9))
    inside, outside = q[:, :4].contiguous(), q[:, 4:]
    within = torch.diag(torch.arange(1.0, 9.0).double())
    mixed = 1e8 * inside @ normal(32, seed=3).reshape(4, 8) @ outside.T
    matrix = outside @ within @ outside.T + mixed + mixed.T
    chain = Chain(normal(12, seed=1), inside, norm=1e8, remember=8)
    while not chain.exhausted and chain.steps < 8:
        chain.advance(matrix @ chain.current)
    np.testing.assert_allclose(chain.ritz_values().numpy(), range(1, 9), rtol=1e-5)


def test_a_full_basis_makes_room_for_what_was_missed() -> None:
    """All that the least memory holds has converged, and the largest value is not among it."""
    spectrum = [5.0, 3.0, 1.0, 0.5, *np.linspace(0.4, -1.0, 40)]
    matrix = symmetric(spectrum, seed=10)
    start = torch.linalg.eigh(matrix)[1].flip(1)[:, 1:4]
    pairs = ma.top_eigenvalues(ma.MatrixOperator(matrix), k=1, start=start, memory_bytes=13 * len(spectrum) * 8)
    assert float(pairs.values[0]) == pytest.approx(5.0, rel=1e-6)
    assert pairs.converged


@pytest.mark.parametrize("vectors", range(51, 100, 6))
def test_a_block_is_as_wide_as_its_memory_allows(vectors: int) -> None:
    """Eight vectors for each of its columns, beside ``k + 6``; at least ``k`` columns, and no more than ``2 k``."""
    operator = ma.MatrixOperator(symmetric(np.linspace(2, 1, 30), seed=11))
    goal = Goal(5, "largest", 1e-4, 1e-14)
    search, found, _ = search_for(operator, goal, method="power", memory_bytes=vectors * 30 * 8)
    assert isinstance(search, PowerSearch)
    assert found.done
    assert 8 * search.width + 5 + 6 <= vectors
    assert search.width == 10 or 8 * (search.width + 1) + 5 + 6 > vectors
