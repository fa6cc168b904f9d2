"""Lanczos with full re-orthogonalisation, and thick restarts where memory is short."""

from __future__ import annotations

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.vectors import orthonormalize
from msam_analysis.spectra.beyond import Inside, require_finite, set_aside
from msam_analysis.spectra.goal import Goal
from msam_analysis.spectra.search import Found, Probes, Search
from msam_analysis.spectra.subspace import Subspace


class LanczosSearch(Search):
    r"""A Krylov space grown by the largest residual, with Rayleigh-Ritz extraction over all of it.

    From one start every Ritz residual points along the next Lanczos vector, and this is Lanczos with full
    re-orthogonalisation: their norms are known without them, and are computed from the products only once they seem to
    be small. When the basis is full it is cut to the leading Ritz vectors and the one that was worked on a step before,
    which keeps the pace of a longer recurrence (thick restarts: Wu & Simon 2000; the further vector: Stathopoulos &
    Saad 1998, section 4).

    Parameters
    ----------
    operator, goal
        Of what, and which pairs.
    capacity
        Columns of the basis, at least ``k + 2`` unless there are fewer parameters.
    start
        Shape ``(size, p)``.
    probes
        Where fresh random vectors come from.
    """

    def __init__(self, operator: SymmetricOperator, goal: Goal, capacity: int, start: Tensor, probes: Probes) -> None:
        self.goal = goal
        self.probes = probes
        self.basis = Subspace(operator, capacity)
        self.norm = 0.0
        self._lead = torch.zeros(0, 0, dtype=torch.float64)  # coefficients of the wanted vectors
        self._krylov = self.basis.expand(start[:, :capacity]) == 1  # whether `remainder` is all there is to know
        if not self.basis.columns:
            self._krylov = self.basis.expand(probes.next()) == 1

    def run(self, stop: int) -> Found:
        """Grow the space until the wanted pairs have converged or ``operator.products`` reaches ``stop``."""
        basis, k = self.basis, self.goal.k
        before: Tensor | None = None
        while True:
            require_finite(basis.projection)
            values, coefficients = basis.pairs(self.goal.which)
            wanted, lead = values[:k], coefficients[:, :k]
            self.norm = max(self.norm, float(values.abs().max()))
            limits = self.goal.limits(wanted, self.norm)
            whole = basis.columns == basis.operator.size
            over = whole or basis.operator.products >= stop
            self._lead = lead
            ahead = basis.remainder() if self._krylov and not over else None
            norms = basis.residual_norms(wanted, lead) if ahead is None else float(ahead.norm()) * lead[-1].abs()
            if ahead is not None and bool((norms <= limits).all()):
                # A recurrence is not believed: what it says has to be seen.
                ahead, norms = None, basis.residual_norms(wanted, lead)
            self._krylov = ahead is not None
            done = ahead is None and len(wanted) == k and bool((norms <= limits).all())
            if done or over:
                return Found(wanted, norms, done or whole, whole)
            worst = int((norms - limits).argmax())
            target = lead[:, worst : worst + 1]
            if ahead is not None:
                direction = ahead[:, None]
            elif norms[worst] > limits[worst]:
                direction = basis.residuals(wanted[worst], target)
            else:  # an invariant subspace of fewer than k dimensions, which is left at random
                direction = self.probes.next()
            if basis.columns == basis.capacity:
                self._restart(coefficients, before)
                before = None
            else:
                before = target
            if not basis.expand(direction):
                basis.expand(self.probes.next())

    def vectors(self) -> Tensor:
        """Return the wanted vectors, shape ``(size, k)``."""
        return self.basis.q @ self._lead.to(self.basis.q)

    def inside(self) -> Inside:
        """Cut the basis to what was found, and return that."""
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
            kept = torch.cat([kept, orthonormalize(padded, kept)], dim=1)
        self.basis.compress(kept)
        self._krylov = False
