"""An orthonormal basis with its products, in which a symmetric operator becomes a small matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.vectors import orthonormalize
from msam_analysis.spectra.goal import Which, ordering

_BLOCK_ROWS = 2**20  # rows in which tall matrices are combined, so that results need no second copy
_NEW = 100  # times eps: below this length the part of a unit vector outside of the basis is no new direction
_CLEAN = 0.5  # a pass of Gram-Schmidt that leaves more than this of a vector need not be repeated


@dataclass
class Subspace:
    """An orthonormal basis ``Q`` with its products ``A Q`` and the projection ``T = Qᵀ A Q``.

    Parameters
    ----------
    operator
        The symmetric operator ``A``.
    capacity
        Largest number of columns that is held.
    """

    operator: SymmetricOperator
    capacity: int

    def __post_init__(self) -> None:
        """Reserve the memory once, one row for each vector, since vectors are read as a whole."""
        shape = (self.capacity, self.operator.size)
        self._q = torch.empty(shape, dtype=wide(self.operator), device=self.operator.device)
        self._aq = torch.empty_like(self._q)
        self.projection: Tensor = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def columns(self) -> int:
        """Number of columns held."""
        return self.projection.shape[0]

    @property
    def q(self) -> Tensor:
        """``Q``, shape ``(size, columns)``."""
        return self._q[: self.columns].T

    @property
    def aq(self) -> Tensor:
        """``A Q``, shape ``(size, columns)``."""
        return self._aq[: self.columns].T

    def expand(self, vectors: Tensor) -> int:
        """Add the new parts of ``vectors``, at one product each; return how many there were."""
        room = self.capacity - self.columns
        fresh = (self._direction(vectors) if vectors.shape[1] == 1 else orthonormalize(vectors, self.q))[:, :room]
        count, old = fresh.shape[1], self.columns
        if count == 0:
            return 0
        self._q[old : old + count] = fresh.T
        self._aq[old : old + count] = self.operator.matmat(fresh).T
        grown = torch.zeros(old + count, old + count, dtype=torch.float64)
        grown[:old, :old] = self.projection
        block = (self._q[: old + count] @ self._aq[old : old + count].T).cpu().double()
        grown[:, old:] = block
        grown[old:, :old] = block[:old].T
        self.projection = (grown + grown.T) / 2
        return count

    def remainder(self) -> Tensor:
        """Return the part of the last product outside of the span, shape ``(size,)``.

        In a Krylov space every Ritz residual is this vector times the last of the Ritz vector's coefficients.
        """
        known = self.projection[:, -1].to(self._q)
        return self._aq[self.columns - 1] - known @ self._q[: self.columns]

    def _direction(self, vectors: Tensor) -> Tensor:
        """Return the new part of one vector as a unit vector: :func:`orthonormalize` without the QR."""
        length = float(vectors.norm())
        if not length > 0:
            return vectors[:, :0]
        vector, left = cleared(vectors[:, 0] / length, [self._q[: self.columns]] if self.columns else [], 1.0)
        new = not left <= _NEW * torch.finfo(vector.dtype).eps
        return (vector / left)[:, None] if new else vectors[:, :0]

    def compress(self, coefficients: Tensor) -> None:
        """Keep only the span of ``Q S`` for orthonormal coefficients ``S`` of shape ``(columns, p)``."""
        small, count = coefficients.T.to(self._q), coefficients.shape[1]
        for rows in self._blocks():
            self._q[:count, rows] = small @ self._q[: self.columns, rows]
            self._aq[:count, rows] = small @ self._aq[: self.columns, rows]
        self.projection = coefficients.T @ self.projection @ coefficients

    def pairs(self, which: Which) -> tuple[Tensor, Tensor]:
        """Return the Ritz values, shape ``(columns,)``, the wanted end first, and their coefficients as columns."""
        values, coefficients = torch.linalg.eigh(self.projection)
        order = ordering(values, which)
        return values[order], coefficients[:, order]

    def residuals(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return ``A v − θ v`` for Ritz pairs ``θ``, ``v = Q s``; shape ``(size, p)`` for ``p`` columns ``s``."""
        small = coefficients.to(self._q)
        return self.aq @ small - (self.q @ small) * values.to(self._q)

    def residual_norms(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return the norms of :meth:`residuals`, float64 on the CPU, without memory for the vectors."""
        small, levels = coefficients.T.to(self._q), values.to(self._q)[:, None]
        q, aq = self._q[: self.columns], self._aq[: self.columns]
        pieces = [(small @ aq[:, rows] - levels * (small @ q[:, rows])).norm(dim=1) for rows in self._blocks()]
        norms: Tensor = torch.stack(pieces).norm(dim=0)
        return norms.cpu().double()

    def _blocks(self) -> Iterator[slice]:
        return (slice(first, first + _BLOCK_ROWS) for first in range(0, self.operator.size, _BLOCK_ROWS))


def cleared(vector: Tensor, bases: Sequence[Tensor], length: float) -> tuple[Tensor, float]:
    """Return the part of a vector outside of some bases, and its length.

    Gram-Schmidt is repeated while it takes away most of the vector (Daniel, Gragg, Kaufman & Stewart 1976).

    Parameters
    ----------
    vector
        Shape ``(size,)``.
    bases
        Orthonormal vectors as rows, shape ``(p, size)`` each.
    length
        Length of the vector.
    """
    for _ in range(3 if bases else 0):
        for basis in bases:
            vector = vector - (basis @ vector) @ basis
        before, length = length, float(vector.norm())
        if length > _CLEAN * before:
            break
    return vector, length


def wide(operator: SymmetricOperator) -> torch.dtype:
    """Return the precision of a basis, at least float32: half precision loses orthogonality and has no QR."""
    return torch.promote_types(operator.dtype, torch.float32)
