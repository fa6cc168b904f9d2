"""An orthonormal basis with its products, in which a symmetric operator becomes a small matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import read
from msam_analysis.spectra.goal import Which, ordering
from msam_analysis.spectra.rows import ROUNDED, Rows

_NEW = 100  # times eps: below this length the part of a unit vector outside of the basis is no new direction
_NEW_HALF = 16 * ROUNDED  # the same beside a basis in float16, whose own rounding such a part is
_CLEAN = 0.5  # a pass of Gram-Schmidt that leaves more than this of a vector need not be repeated


class Basis(NamedTuple):
    """The first of some stored rows."""

    rows: Rows
    columns: int


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
    half
        Whether they are stored in float16. What this takes from ``A Q`` is part of the residuals.
    """

    operator: SymmetricOperator
    capacity: int
    half: bool = False

    def __post_init__(self) -> None:
        """Reserve the memory once, one row for each vector, since vectors are read as a whole."""
        self.space = self.operator.space
        dtype, device = wide(self.operator), self.operator.device
        self._q, self._aq = (
            Rows(self.capacity, self.space.here, dtype=dtype, device=device, half=self.half) for _ in range(2)
        )
        self.projection: Tensor = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def columns(self) -> int:
        """Number of columns held."""
        return self.projection.shape[0]

    @property
    def q(self) -> Tensor:
        """``Q``, shape ``(size, columns)``."""
        return self._q.piece(0, self.columns).T

    @property
    def aq(self) -> Tensor:
        """``A Q``, shape ``(size, columns)``."""
        return self._aq.piece(0, self.columns).T

    def look(self, vector: Tensor) -> Look:
        """Look at a vector, which costs one read of the device."""
        basis = [Basis(self._q, self.columns)] if self.columns else []
        # A rounded basis is not quite orthonormal: a single pass would leave what the next vectors amplify.
        clean = math.inf if self.half else _CLEAN
        ((part, left, length),) = cleared(self.space, [vector], [basis], unit=True, clean=clean)
        return Look(vector, length, part, left)

    def expand(self, vectors: Tensor | Look) -> int:
        """Add the new parts of ``vectors``, at one product each; return how many there were."""
        room = self.capacity - self.columns
        if isinstance(vectors, Tensor) and vectors.shape[1] == 1:
            vectors = self.look(vectors[:, 0])
        fresh = self._unit(vectors) if isinstance(vectors, Look) else self.space.orthonormalize(vectors, self.q)
        fresh = fresh[:, :room]
        count, old = fresh.shape[1], self.columns
        if count == 0:
            return 0
        stored = self._q.write(old, fresh.T)
        products = self._aq.write(old, self.operator.matmat(stored.T if self.half else fresh).T.to(self._q.dtype))
        grown = torch.zeros(old + count, old + count, dtype=torch.float64)
        grown[:old, :old] = self.projection
        block = self.space.sum(self._q.times(old + count, products.T)).cpu().double()
        grown[:, old:] = block
        grown[old:, :old] = block[:old].T
        self.projection = (grown + grown.T) / 2
        return count

    def _unit(self, look: Look) -> Tensor:
        """Return the part outside of the basis as a unit vector, one column, or none where only rounding is left."""
        least = _NEW_HALF if self.half else _NEW * torch.finfo(look.part.dtype).eps
        new = look.length > 0 and not look.left <= least
        return (look.part / look.left)[:, None] if new else look.part[:0].reshape(len(look.part), 0)

    def remainder(self) -> Tensor:
        """Return the part of the last product outside of the span, shape ``(size,)``.

        In a Krylov space every Ritz residual is this vector times the last of the Ritz vector's coefficients.
        """
        return self._aq.piece(self.columns - 1, self.columns)[0] - self._q.combined(self._small(self.projection[:, -1]))

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return ``Q S`` for coefficients ``S`` of shape ``(columns, p)``."""
        if not self.half:
            return self.q @ self._small(coefficients)
        return self._q.combined(self._small(coefficients.T)).T

    def _small(self, coefficients: Tensor) -> Tensor:
        return coefficients.to(dtype=self._q.dtype, device=self.operator.device)

    def compress(self, coefficients: Tensor) -> None:
        """Keep only the span of ``Q S`` for orthonormal coefficients ``S`` of shape ``(columns, p)``."""
        small = self._small(coefficients.T)
        for rows in (self._q, self._aq):
            rows.replace(small)
        self.projection = coefficients.T @ self.projection @ coefficients

    def pairs(self, which: Which) -> tuple[Tensor, Tensor]:
        """Return the Ritz values, shape ``(columns,)``, the wanted end first, and their coefficients as columns."""
        values, coefficients = torch.linalg.eigh(self.projection)
        order = ordering(values, which)
        return values[order], coefficients[:, order]

    def residuals(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return ``A v − θ v`` for Ritz pairs ``θ``, ``v = Q s``; shape ``(size, p)`` for ``p`` columns ``s``."""
        if not self.half:
            small = self._small(coefficients)
            return self.aq @ small - (self.q @ small) * self._small(values)
        turned = self._small(coefficients.T)
        return (self._aq.combined(turned) - self._q.combined(turned) * self._small(values).reshape(-1, 1)).T

    def residual_norms(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return the norms of :meth:`residuals`, float64 on the CPU, without memory for the vectors."""
        small, levels = self._small(coefficients.T), self._small(values)[:, None]
        pieces = []
        for rows in self._q.blocks():
            q, aq = (whole.piece(0, self.columns, rows) for whole in (self._q, self._aq))
            pieces.append((small @ aq - levels * (small @ q)).norm(dim=1))
        norms = self.space.norm(torch.stack(pieces), dim=0)
        if self.half:
            lost = small.square() @ self.space.sum(self._aq.squared_lengths(self.columns))
            norms = torch.hypot(norms, ROUNDED * lost.sqrt())
        return norms.cpu().double()


def cleared(
    space: Space,
    vectors: Sequence[Tensor],
    bases: Sequence[Sequence[Tensor | Basis]],
    *,
    unit: bool = False,
    clean: float = _CLEAN,
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
    clean
        A pass that leaves more than this of a vector is the last one; there are three at most.
    """
    lengths = [space.norm(vector) for vector in vectors]
    if unit:
        vectors = [vector / length for vector, length in zip(vectors, lengths, strict=True)]
    parts = [_outside(space, vector, own) for vector, own in zip(vectors, bases, strict=True)]
    lefts = [space.norm(part) if own else length for part, own, length in zip(parts, bases, lengths, strict=True)]
    found = read(*lengths, *lefts)
    known, after = found[: len(vectors)], found[len(vectors) :]
    before = [1.0] * len(vectors) if unit else list(known)
    after = [left if own else start for left, own, start in zip(after, bases, before, strict=True)]
    again = [index for index, own in enumerate(bases) if own]
    for _ in range(2):
        again = [index for index in again if not after[index] > clean * before[index]]
        if not again:
            break
        for index in again:
            parts[index] = _outside(space, parts[index], bases[index])
            before[index] = after[index]
        for index, left in zip(again, read(*(space.norm(parts[i]) for i in again)), strict=True):
            after[index] = left
    return list(zip(parts, after, known, strict=True))


def _outside(space: Space, vector: Tensor, bases: Sequence[Tensor | Basis]) -> Tensor:
    """Return a vector after one pass of Gram-Schmidt against the rows of each basis."""
    for basis in bases:
        if isinstance(basis, Tensor):
            vector = vector - space.product(basis, vector) @ basis
        else:
            vector = vector - basis.rows.combined(space.sum(basis.rows.times(basis.columns, vector)))
    return vector


def wide(operator: SymmetricOperator) -> torch.dtype:
    """Return the precision of a basis, at least float32: half precision loses orthogonality and has no QR."""
    return torch.promote_types(operator.dtype, torch.float32)
