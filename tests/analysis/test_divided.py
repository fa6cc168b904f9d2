"""Vectors that are divided among processes: the same spectra as in one process.

One process has most of the rows, the second a few in two places, the third none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import msam_analysis as ma
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.space import DividedSpace, Space
from tests.programs import together

from .cases import normal
from .oracles import symmetric

PIECES = [[slice(3, 30)], [slice(0, 3), slice(30, 40)], []]
SPECTRUM = np.concatenate([[9.0, 7.0, 7.0, 5.0], np.linspace(1, -1, 34), [-3.0, -8.0]])
MEASURES: dict[str, Callable[[Any], Any]] = {
    "lanczos": lambda a: ma.top_eigenvalues(a, 4),
    "restarted": lambda a: ma.top_eigenvalues(a, 2, memory_bytes=20 * 8 * a.space.most),
    "power": lambda a: ma.top_eigenvalues(a, 3, method="power"),
    "ends": lambda a: ma.top_eigenvalues(a, 4, which="ends"),
    "trace": lambda a: ma.trace(a, draws=8),
    "hutch++": lambda a: ma.trace(a, method="hutch++", draws=12),
    "density": lambda a: ma.spectral_density(a, probes=3, steps=8, extremes=2),
    "density alone": lambda a: ma.spectral_density(a, probes=3, steps=8, extremes=0),
}


class Rows(SymmetricOperator):
    """A matrix of which every process has some rows."""

    def __init__(self, matrix: Tensor, space: Space) -> None:
        super().__init__(space, dtype=matrix.dtype, device=matrix.device)
        self.rows, self.columns = space.part(matrix), space.part(matrix.T)

    def _apply(self, vector: Tensor) -> Tensor:
        return self.space.part(self.space.sum(self.columns.T @ vector))


def numbers(result: Any) -> list[float]:
    if isinstance(result, ma.results.Eigenpairs):
        return [*result.values.tolist(), result.margin, float(result.hvps)]
    if isinstance(result, ma.results.Estimate):
        return [result.value, result.standard_error]
    return [*result.density.tolist(), *result.nodes.tolist(), float(result.hvps)]


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=len(PIECES))
    matrix = symmetric(SPECTRUM, seed=1)
    space = DividedSpace(len(matrix), PIECES[rank], most=27)
    operator = Rows(matrix, space)
    for name, measure in MEASURES.items():
        found, alone = measure(operator), measure(ma.MatrixOperator(matrix))
        np.testing.assert_allclose(numbers(found), numbers(alone), rtol=1e-9, atol=1e-11, err_msg=name)
        if isinstance(found, ma.results.Eigenpairs):
            assert found.vectors.shape == (space.here, len(found.values))
            gram = space.product(found.vectors.T, found.vectors)
            np.testing.assert_allclose(gram, torch.eye(len(gram)), atol=1e-10)
    check(space)
    dist.destroy_process_group()


def check(space: DividedSpace) -> None:
    """The sums of a space, against those of the whole vectors."""
    a, b = normal(40, seed=1), normal(40, seed=2)
    mine = space.part(a)
    assert len(mine) == space.here
    torch.testing.assert_close(space.dot(mine, space.part(b)), a.dot(b))
    torch.testing.assert_close(space.norm(1e-200 * mine), 1e-200 * a.norm())
    torch.testing.assert_close(space.norm(1e18 * mine.float()), 1e18 * a.norm().float())
    assert space.any(mine == a[1])
    assert not space.any(mine == 99)
    draw = Space(40).gaussian(2, seed=3, like=a, use="x")
    assert torch.equal(space.gaussian(2, seed=3, like=a, use="x"), space.part(draw))
    columns = torch.stack([a, b, a + b], dim=1)
    basis = space.orthonormalize(space.part(columns))
    assert basis.shape == (space.here, 2)
    known = space.orthonormalize(space.part(normal(40, 2, seed=5)), basis)
    torch.testing.assert_close(space.product(known.T, basis), torch.zeros(2, 2).double(), atol=1e-12, rtol=0)
    assert space.orthonormalize(0 * known).shape == (space.here, 0)


def test_spectra_of_divided_vectors() -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(work, folder, count=len(PIECES))
