"""Lanczos with full re-orthogonalisation, and thick restarts where memory is short."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.progress import told
from msam_analysis.objective.space import Space
from msam_analysis.spectra.beyond import Inside, require_finite, set_aside
from msam_analysis.spectra.goal import Draw, Found, Goal
from msam_analysis.spectra.subspace import Look, Subspace


class LanczosSearch:
    r"""A Krylov space that grows by the largest residual, with Rayleigh-Ritz extraction over all of it.

    From a single start vector every Ritz residual points along the next Lanczos vector, so this is Lanczos with full
    re-orthogonalisation. The residual norms are then known without the residuals, and are computed from the products
    only once they seem to be small. A full basis is cut to the leading Ritz vectors and the vector that was worked on
    one step before, which keeps the pace of a longer recurrence (thick restarts: Wu & Simon 2000; the further vector:
    Stathopoulos & Saad 1998, section 4).

    Parameters
    ----------
    operator
        The symmetric operator ``A``.
    goal
        The pairs that are wanted.
    capacity
        Columns of the basis, at least ``k + 2`` unless there are fewer parameters.
    start
        Start vectors, shape ``(size, p)``.
    draw
        Draws fresh random vectors.
    half
        Whether the basis is stored in float16.
    """

    def __init__(
        self, operator: SymmetricOperator, goal: Goal, capacity: int, start: Tensor, draw: Draw, *, half: bool = False
    ) -> None:
        self.goal = goal
        self.draw = draw
        self.basis = Subspace(operator, capacity, half)
        self.norm = 0.0
        self._lead = torch.zeros(0, 0, dtype=torch.float64)  # coefficients of the wanted vectors
        self._krylov = self.basis.expand(start[:, :capacity]) == 1  # whether `remainder` gives every residual
        if not self.basis.columns:
            self._krylov = self.basis.expand(draw(1)) == 1

    def run(self, stop: int) -> Found:
        """Grow the space until the wanted pairs have converged or ``operator.products`` reaches ``stop``."""
        basis, k = self.basis, self.goal.k
        before: Tensor | None = None
        residual = math.nan
        while True:
            require_finite(basis.projection)
            values, coefficients = basis.pairs(self.goal.which)
            wanted, lead = values[:k], coefficients[:, :k]
            self.norm = max(self.norm, float(values.abs().max()))
            limits = self.goal.limits(wanted, self.norm)
            whole = basis.columns == basis.operator.size
            ended = told("products", basis.operator.products, stop, residual) and basis.columns >= k
            over = whole or ended or basis.operator.products >= stop
            self._lead = lead
            ahead = basis.look(basis.remainder()) if self._krylov and not over else None
            norms = basis.residual_norms(wanted, lead) if ahead is None else ahead.length * lead[-1].abs()
            if ahead is not None and bool((norms <= limits).all()):
                # The recurrence only predicts these norms: compute them before they count.
                ahead, norms = None, basis.residual_norms(wanted, lead)
            self._krylov = ahead is not None
            residual = float((norms / wanted.abs()).max())
            done = ahead is None and len(wanted) == k and bool((norms <= limits).all())
            if done or over:
                return Found(wanted, norms, done or (whole and not basis.half), whole)
            worst = int((norms - limits).argmax())
            target = lead[:, worst : worst + 1]
            direction: Tensor | Look
            if ahead is not None:
                full = basis.columns == basis.capacity
                direction = ahead.vector[:, None] if full else ahead  # it is looked at anew beside another basis
            elif norms[worst] > limits[worst]:
                direction = basis.residuals(wanted[worst], target)
            else:  # an invariant subspace of fewer than k dimensions: leave it in a random direction
                direction = self.draw(1)
            if basis.columns == basis.capacity:
                self._restart(coefficients, before)
                before = None
            else:
                before = target
            if not basis.expand(direction):
                if basis.half:  # what is left of the residual is the rounding of the basis, which no product takes away
                    self._lead = basis.pairs(self.goal.which)[1][:, :k]
                    return Found(wanted, norms, False, False)
                basis.expand(self.draw(1))

    def vectors(self) -> Tensor:
        """Return the wanted vectors in the order of the goal, shape ``(size, k)``."""
        return self.basis.combined(self._lead)

    def inside(self) -> Inside:
        """Cut the basis to the pairs that were found, and return them for a look beyond."""
        values, coefficients = self.basis.pairs(self.goal.which)
        norms = self.basis.residual_norms(values, coefficients)
        whole = self.basis.columns == self.basis.operator.size
        chosen = torch.ones_like(values, dtype=torch.bool) if whole else set_aside(values, norms, self.goal)
        self.basis.compress(coefficients[:, chosen])
        # Not extracted anew: equal values would get other vectors than those whose residuals are known.
        self._lead = torch.eye(self.basis.columns, self.goal.k, dtype=torch.float64)
        return Inside(self.basis.q, values[chosen], norms[chosen], values[~chosen], self.norm)

    def include(self, vector: Tensor) -> None:
        """Add a vector with a Rayleigh quotient beyond the wanted values."""
        if self.basis.columns == self.basis.capacity:
            self._restart(self.basis.pairs(self.goal.which)[1], None)
        self.basis.expand(vector[:, None])

    def _restart(self, coefficients: Tensor, before: Tensor | None) -> None:
        kept = coefficients[:, : min(self.basis.capacity - 2, self.goal.k + 8)]
        if before is not None:
            padded = torch.cat([before, before.new_zeros(len(coefficients) - len(before), 1)])
            kept = torch.cat([kept, Space(len(padded)).orthonormalize(padded, kept)], dim=1)
        self.basis.compress(kept)
        self._krylov = False
