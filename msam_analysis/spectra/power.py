"""Power iteration on a block, with locking and deflation."""

from __future__ import annotations

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.spectra.beyond import Inside, require_finite
from msam_analysis.spectra.goal import Draw, Found, Goal, ordering
from msam_analysis.spectra.subspace import Subspace


class PowerSearch:
    """Simultaneous iteration (Rutishauser 1970): one step multiplies every vector that has not converged.

    Converged vectors are locked and the others kept orthogonal to them (deflation); guard vectors beyond ``k`` make
    close eigenvalues separate. Where values of the other sign would dominate, the operator is shifted by the most
    distant of them that was seen, and the values are shifted back.

    Parameters
    ----------
    operator, goal, start, draw
        As for :class:`~msam_analysis.spectra.lanczos.LanczosSearch`.
    width
        Vectors in the block, at least ``k``.
    """

    def __init__(self, operator: SymmetricOperator, goal: Goal, width: int, start: Tensor, draw: Draw) -> None:
        self.operator = operator
        self.goal = goal
        self.width = width
        self.draw = draw
        self.norm = self.shift = 0.0
        self._begin(start)

    def _begin(self, start: Tensor) -> None:
        self.locked = start[:, :0]
        self.locked_values = self.locked_norms = torch.zeros(0, dtype=torch.float64)
        self._fill(self.operator.space.orthonormalize(start)[:, : self.width])

    def _fill(self, block: Tensor) -> None:
        """Take ``block`` as the next block; random vectors replace those that the operator sent to zero."""
        missing = self.width - self.locked.shape[1] - block.shape[1]
        if missing > 0:
            fresh = self.operator.space.orthonormalize(self.draw(missing), torch.cat([self.locked, block], dim=1))
            block = torch.cat([block, fresh], dim=1)
        self.block = block

    def run(self, stop: int) -> Found:
        """Iterate until the wanted pairs have converged or ``operator.products`` would pass ``stop``."""
        which, sign = self.goal.which, -1.0 if self.goal.which == "smallest" else 1.0
        while True:
            basis = Subspace(self.operator, self.block.shape[1])
            basis.expand(self.block)
            require_finite(basis.projection)
            wanted = self.goal.k - self.locked.shape[1]
            values, coefficients = basis.pairs(which)
            norms = basis.residual_norms(values, coefficients)
            self.norm = max(self.norm, float(values.abs().max()))
            limits = self.goal.limits(values, self.norm)[:wanted]
            vectors = basis.q @ coefficients.to(basis.q)
            ready = int((norms[:wanted] <= limits).long().cumprod(0).sum())
            done = ready == wanted
            if done or self.operator.products + basis.columns - ready > stop:
                return self._finish(values, vectors, norms, done)
            self.locked = torch.cat([self.locked, vectors[:, :ready]], dim=1)
            self.locked_values = torch.cat([self.locked_values, values[:ready]])
            self.locked_norms = torch.cat([self.locked_norms, norms[:ready]])
            if which != "magnitude":
                self.shift = max(self.shift, float((-sign * values).max()))
            products = sign * (basis.aq @ coefficients.to(basis.q)) + self.shift * vectors
            self._fill(self.operator.space.orthonormalize(products[:, ready:], self.locked))

    def _finish(self, values: Tensor, vectors: Tensor, norms: Tensor, done: bool) -> Found:
        k = self.goal.k
        every = torch.cat([self.locked_values, values])
        order = torch.cat([ordering(every[:k], self.goal.which), torch.arange(k, len(every))])
        self._values, self._norms = every[order], torch.cat([self.locked_norms, norms])[order]
        self._vectors = torch.cat([self.locked, vectors], dim=1)[:, order.to(vectors.device)]
        return Found(self._values[:k], self._norms[:k], done, len(every) == self.operator.size)

    def vectors(self) -> Tensor:
        """Return the wanted vectors in the order of the goal, shape ``(size, k)``."""
        return self._vectors[:, : self.goal.k]

    def inside(self) -> Inside:
        """Return the pairs that were found, for a look beyond; the guard vectors, not converged, are not among them."""
        k = self.goal.k
        return Inside(self.vectors(), self._values[:k], self._norms[:k], self._values[k:], self.norm)

    def include(self, vector: Tensor) -> None:
        """Start a new block from the pairs that were found and a vector with a Rayleigh quotient beyond them."""
        # The new vector comes first, so that a narrow block keeps it.
        self._begin(torch.cat([vector[:, None], self.vectors()], dim=1))
