"""Lanczos's three-term recurrence: a symmetric operator seen from one start, as a tridiagonal matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal
from torch import Tensor

from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import read
from msam_analysis.spectra.subspace import cleared


class Chain:
    r"""The Krylov space of ``P A P`` from one start, ``P = I − W Wᵀ``; the caller makes the products.

    ``A q_j = β_{j−1} q_{j−1} + α_j q_j + β_j q_{j+1}`` within the complement of ``W``; the ``α`` and ``β`` are the
    diagonals of a symmetric tridiagonal ``T`` with ``T = Qᵀ A Q``.

    Without ``remember`` only the last two vectors are held. Orthogonality to the older ones is then lost once a Ritz
    value has converged, in the direction of its vector (Paige 1980). Extreme Ritz values stay right: the computed ``T``
    is the exact one of a matrix whose eigenvalues lie in tiny clusters about those of ``P A P``, with the start's
    weights (Greenbaum 1989). So the bounds that rest on Chebyshev polynomials over the whole interval hold (Druskin &
    Knizhnerman 1991), and so do the sums for which ``T`` is a quadrature (Knizhnerman 1996).

    Parameters
    ----------
    start
        Start vector, shape ``(size,)``.
    against
        ``W``, shape ``(size, w)`` with orthonormal columns.
    norm
        Estimate of ``‖A‖``: a remainder below its rounding error is no new direction.
    remember
        Vectors to hold; each new one is orthogonalised against all of them. 0: only the last two are held.
    space
        Where the vectors lie; default: every process has whole ones.

    Attributes
    ----------
    current
        ``q_j`` of the next step, shape ``(size,)``.
    exhausted
        Whether the Krylov space is invariant: then ``T`` has every distinct eigenvalue in which the start has a part.
    """

    def __init__(
        self,
        start: Tensor,
        against: Tensor,
        *,
        norm: float = 0.0,
        remember: int = 0,
        space: Space | None = None,
    ) -> None:
        self.space = Space(len(start)) if space is None else space
        self._against = against
        self._norm = norm
        self._diagonal: list[float] = []
        self._off: list[float] = []
        self._kept = start.new_empty(remember, len(start))
        ((outside, left, length),) = cleared(self.space, [start], [self._bases])
        # The part of a start inside span(W) that is left is only rounding.
        self.exhausted = not left > 100 * torch.finfo(start.dtype).eps * length
        self.current = torch.zeros_like(start)
        if not self.exhausted:
            ((self.current, _, _),) = cleared(self.space, [outside / left], [self._bases])
        self._previous = torch.zeros_like(self.current)

    @property
    def steps(self) -> int:
        """Products taken in so far."""
        return len(self._diagonal)

    @property
    def last(self) -> float:
        """``α_j + β_j`` of the last step; NaN or infinite if a product was."""
        return self._diagonal[-1] + self._off[-1]

    def forget(self) -> None:
        """Let go of all vectors; only ``T`` is left."""
        # New tensors: a view would keep the whole memory.
        self.current = self._previous = self.current.new_empty(0)
        self._kept = self._against = self.current.new_empty(0, 0)

    def advance(self, product: Tensor) -> None:
        """Take in ``A @ current`` and move on to the next vector."""
        advance([self], [product])

    def _begin(self, product: Tensor, level: float) -> Tensor:
        """Take in the first coefficient of a step, and return what the product has beyond the last two vectors."""
        rest = product.sub(self.current, alpha=level)
        if self._off:
            rest.sub_(self._previous, alpha=self._off[-1])
        if self._kept.shape[0]:
            self._kept[self.steps] = self.current
        self._diagonal.append(level)
        return rest

    def _end(self, rest: Tensor, length: float) -> None:
        """Take in the next vector times its length, the other coefficient."""
        self._norm = max(self._norm, abs(self._diagonal[-1]) + length)
        # A NaN ends the chain too: it stands in T for the reader to see.
        self.exhausted = not length > 10 * torch.finfo(rest.dtype).eps * self._norm
        self._off.append(length)
        self._previous, self.current = self.current, rest / length if not self.exhausted else torch.zeros_like(rest)

    def christoffel(self, at: float) -> float:
        r"""Return ``Σ_j p_j(at)²`` over the orthonormal polynomials of the recurrence, from degree 0 up to ``steps``.

        No measure with these coefficients has more mass than the inverse in one point (Akhiezer 1965, section 2.5).
        Beyond the Ritz values the sum grows with the distance.
        """
        before, this, total, back = 0.0, 1.0, 1.0, 0.0
        for level, length in zip(self._diagonal, self._off, strict=True):
            if length == 0:  # the space is invariant
                break
            before, this = this, ((at - level) * this - back * before) / length
            total, back = total + this * this, length
        return total

    def ritz_values(self) -> Tensor:
        """Return the eigenvalues of ``T``, increasing; float64 on the CPU."""
        if not self._finite:
            return torch.full((self.steps,), torch.nan).double()
        return torch.from_numpy(eigvalsh_tridiagonal(self._diagonal, self._off[:-1]))

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of ``T``, increasing, and its eigenvectors as columns; float64 on the CPU."""
        if not self._finite:
            return self.ritz_values(), torch.full((self.steps, self.steps), torch.nan).double()
        values, vectors = eigh_tridiagonal(self._diagonal, self._off[:-1])
        return torch.from_numpy(values), torch.from_numpy(vectors)

    @property
    def _finite(self) -> bool:
        return all(map(math.isfinite, (*self._diagonal, *self._off)))

    @property
    def _bases(self) -> list[Tensor]:
        """``W`` and the remembered vectors, as rows."""
        return [basis for basis in (self._against.T, self._kept[: self.steps]) if basis.shape[0]]


def advance(chains: Sequence[Chain], products: Sequence[Tensor]) -> None:
    """Take in ``A @ current`` of every chain and move on to their next vectors; the device is read for all together."""
    space = chains[0].space
    products = [product.to(chain.current) for chain, product in zip(chains, products, strict=True)]
    # The current vectors have no part in W.
    levels = read(*(space.dot(chain.current, product) for chain, product in zip(chains, products, strict=True)))
    steps = zip(chains, products, levels, strict=True)
    rests = [chain._begin(product, level) for chain, product, level in steps]
    parts = cleared(space, rests, [chain._bases for chain in chains])
    for chain, (rest, length, _) in zip(chains, parts, strict=True):
        chain._end(rest, length)
