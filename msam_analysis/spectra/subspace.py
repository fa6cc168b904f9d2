"""An orthonormal basis with its products, in which a symmetric operator becomes a small matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.space import Space
from msam_analysis.spectra.goal import Which, ordering

_BLOCK_ROWS = 2**20  # rows in which tall matrices are combined, so that results need no second copy
_NEW = 100  # times eps: below this length the part of a unit vector outside of the basis is no new direction
_CLEAN = 0.5  # a pass of Gram-Schmidt that leaves more than this of a vector need not be repeated


@dataclass(frozen=True, eq=False)
class Look:
    """A vector beside a basis.

    Attributes
    ----------
    vector, length
        The vector, shape ``(size,)``, and its length.
    part, left
        The part of the unit vector outside of the basis, and the length of this part.
    """

    vector: Tensor
    length: float
    part: Tensor
    left: float


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
        self.space = self.operator.space
        shape = (self.capacity, self.space.here)
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

    def look(self, vector: Tensor) -> Look:
        """Look at a vector, which costs one read of the device."""
        basis = [self._q[: self.columns]] if self.columns else []
        ((part, left, length),) = cleared(self.space, [vector], [basis], unit=True)
        return Look(vector, length, part, left)

    def expand(self, vectors: Tensor | Look) -> int:
        """Add the new parts of ``vectors``, at one product each; return how many there were."""
        room = self.capacity - self.columns
        if isinstance(vectors, Tensor) and vectors.shape[1] == 1:
            vectors = self.look(vectors[:, 0])
        fresh = _unit(vectors) if isinstance(vectors, Look) else self.space.orthonormalize(vectors, self.q)
        fresh = fresh[:, :room]
        count, old = fresh.shape[1], self.columns
        if count == 0:
            return 0
        self._q[old : old + count] = fresh.T
        self._aq[old : old + count] = self.operator.matmat(fresh).T
        grown = torch.zeros(old + count, old + count, dtype=torch.float64)
        grown[:old, :old] = self.projection
        block = self.space.product(self._q[: old + count], self._aq[old : old + count].T).cpu().double()
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
        return self.space.norm(torch.stack(pieces), dim=0).cpu().double()

    def _blocks(self) -> Iterator[slice]:
        return (slice(first, first + _BLOCK_ROWS) for first in range(0, max(self.space.here, 1), _BLOCK_ROWS))


def _unit(look: Look) -> Tensor:
    """Return the part outside of the basis as a unit vector, one column, or none where only rounding is left."""
    new = look.length > 0 and not look.left <= _NEW * torch.finfo(look.part.dtype).eps
    return (look.part / look.left)[:, None] if new else look.part[:0].reshape(len(look.part), 0)


def cleared(
    space: Space, vectors: Sequence[Tensor], bases: Sequence[Sequence[Tensor]], *, unit: bool = False
) -> list[tuple[Tensor, float, float]]:
    """Return the parts of vectors outside of some bases, their lengths, and the lengths of the vectors.

    Gram-Schmidt is repeated while it takes away most of a vector (Daniel, Gragg, Kaufman & Stewart 1976). All lengths
    are read from the device together, those of the vectors with those after the first pass.

    Parameters
    ----------
    space
        Where the vectors lie.
    vectors
        Shape ``(size,)`` each.
    bases
        For each vector orthonormal vectors as rows, shape ``(p, size)`` each.
    unit
        Whether the vectors are made unit vectors first.
    """
    lengths = [space.norm(vector) for vector in vectors]
    if unit:
        vectors = [vector / length for vector, length in zip(vectors, lengths, strict=True)]
    parts = [_outside(space, vector, own) for vector, own in zip(vectors, bases, strict=True)]
    lefts = [space.norm(part) if own else length for part, own, length in zip(parts, bases, lengths, strict=True)]
    read = torch.stack([*lengths, *lefts]).tolist()
    known, after = read[: len(vectors)], read[len(vectors) :]
    before = [1.0] * len(vectors) if unit else list(known)
    after = [left if own else start for left, own, start in zip(after, bases, before, strict=True)]
    again = [index for index, own in enumerate(bases) if own]
    for _ in range(2):
        again = [index for index in again if not after[index] > _CLEAN * before[index]]
        if not again:
            break
        for index in again:
            parts[index] = _outside(space, parts[index], bases[index])
            before[index] = after[index]
        for index, left in zip(again, torch.stack([space.norm(parts[i]) for i in again]).tolist(), strict=True):
            after[index] = left
    return list(zip(parts, after, known, strict=True))


def _outside(space: Space, vector: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Return a vector after one pass of Gram-Schmidt against the rows of each basis."""
    for basis in bases:
        vector = vector - space.product(basis, vector) @ basis
    return vector


def wide(operator: SymmetricOperator) -> torch.dtype:
    """Return the precision of a basis, at least float32: half precision loses orthogonality and has no QR."""
    return torch.promote_types(operator.dtype, torch.float32)
