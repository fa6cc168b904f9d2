"""Whether an eigenvalue was missed: one Lanczos chain from a random start outside of the vectors that were found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.spectra.chain import Chain
from msam_analysis.spectra.goal import Goal

# The chain must exclude values beyond the wanted ones by this fraction of the spread of the remaining spectrum, with
# this probability of failure over its random start.
_SPREAD = 0.01
_FAILURE = 1e-3
# Further Ritz vectors may be set aside while the norm of all residuals stays below this fraction of the spread.
_SLACK = 0.01
# A Ritz value counts as missed if it lies beyond the last wanted one by this fraction of the wanted pairs' residual.
_BARELY = 0.1


@dataclass(frozen=True)
class Inside:
    """The Ritz pairs that the chain leaves out, and Ritz values outside of them.

    Attributes
    ----------
    vectors, values, norms
        ``W``, shape ``(size, w)``, orthonormal columns; their Ritz values ``Θ``; the norms of their residuals. The
        wanted ones come first, in the order of the goal.
    rest
        Ritz values that were seen outside of ``W``.
    norm
        Estimate of ``‖A‖``.
    """

    vectors: Tensor
    values: Tensor
    norms: Tensor
    rest: Tensor
    norm: float

    @property
    def slack(self) -> float:
        """``‖A W − W Θ‖``, which bounds how far the eigenvalues of ``A`` are from those of ``W Θ Wᵀ + P A P``."""
        return float(self.norms.norm())


def set_aside(values: Tensor, norms: Tensor, goal: Goal) -> Tensor:
    """Return which Ritz pairs the chain leaves out: the first ``k``, and converged ones well inside of them.

    The fewer eigenvalues are left close to the wanted ones, the sooner a chain can tell that none lies beyond.
    """
    wanted = values[: goal.k]
    span = float(values.max() - values.min())
    chosen = torch.arange(len(values)) < goal.k
    inside = torch.ones_like(chosen)
    for sign, bound in goal.bounds(wanted).items():
        inside &= sign * values < bound - 2 * _SLACK * span
    room = (_SLACK * span) ** 2 - float((norms[chosen] ** 2).sum())
    for index in norms.argsort().tolist():
        if inside[index] and not chosen[index]:
            room -= float(norms[index]) ** 2
            if room < 0:
                break
            chosen[index] = True
    return chosen


def look_beyond(
    operator: SymmetricOperator, inside: Inside, goal: Goal, start: Tensor, stop: int
) -> tuple[float, Tensor | None]:
    r"""Look for an eigenvalue beyond the wanted ones outside of ``W``.

    This is a Lanczos run on ``P A P``, ``P = I − W Wᵀ``, from a random start. Its ``T`` describes the spectral measure
    whose mass at an eigenvalue of ``P A P`` is the square of the start's component along the eigenvector. Outside of
    the Ritz values, at or beyond an ``x``, no such measure has more mass than ``1 / Σ_j p_j(x)²``
    (:meth:`Chain.christoffel`). In ``N`` dimensions the mass of a given vector is below ``s`` with a probability of at
    most ``√(2 N s / π)``. So the run goes on until ``s = 1 / Σ_j p_j(x)²`` makes this probability 0.001. The ``x`` is
    the last wanted value, or 1 % of the spread beyond the Ritz values where these come closer. (van Dorsselaer,
    Hochstenbach & van der Vorst 2000 bound the largest eigenvalue in this way by the last of the polynomials alone.)

    It does not matter which step is the last: a vector with more mass than that rules out a false claim at every step.
    Nor does a loss of orthogonality (:class:`Chain`): an eigenvalue then becomes a cluster with the same mass. So a few
    vectors of memory are enough. The sum and the best Ritz value never fall from one step to the next, since each ``T``
    contains the one before.

    Parameters
    ----------
    operator
        The symmetric operator ``A``.
    inside
        The pairs that were found.
    goal
        The pairs that are wanted.
    start
        A random vector, shape ``(size,)``, independent of everything before.
    stop
        Value of ``operator.products`` at which the budget ends.

    Returns
    -------
    margin, vector
        Values beyond the last wanted one by more than ``margin`` are excluded, with that probability of failure. Where
        a further value was found, ``margin`` is infinite and ``vector`` has a Rayleigh quotient beyond the wanted
        values; where the budget ended, ``margin`` is infinite and ``vector`` is ``None``.
    """
    wanted = inside.values[: goal.k]
    bounds = goal.bounds(wanted)
    # A smaller excess is within the error of the wanted values: a copy of one of them may seem to lie beyond it.
    limit = max(_BARELY * float(inside.norms[: goal.k].max()), goal.floor * inside.norm)
    # A mass below 1 / enough has a probability below _FAILURE.
    enough = 2 * (operator.size - len(inside.values)) / math.pi / _FAILURE**2
    chain = Chain(start, inside.vectors, norm=inside.norm, space=operator.space)
    while not chain.exhausted:
        if operator.products >= stop:
            return math.inf, None
        chain.advance(operator.matvec(chain.current))
        levels = chain.ritz_values()
        require_finite(levels)
        margins = []
        for sign, bound in bounds.items():
            level = float((sign * levels).max())
            if level > bound + limit:
                return math.inf, _ritz_vector(operator, start, inside, chain, sign, stop)
            floor = min(float((sign * part).min()) for part in (levels, inside.rest) if len(part))
            # The eigenvalues of A differ from the wanted ones and those of P A P by no more than the slack.
            safe = bound - inside.slack
            reach = max(safe, level + _SPREAD * max(bound - floor, 0.0))
            excluded = chain.christoffel(sign * reach) >= enough
            margins.append(reach - safe if excluded else math.inf)
        if max(margins) < math.inf:
            return max(margins), None
    return inside.slack, None


def require_finite(values: Tensor) -> None:
    """Raise ``ValueError`` if values are not finite, as those of an operator that returned NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "the operator returned NaN or infinity: expected a finite Hessian at these weights; "
            "check that the loss and its gradient are finite there"
        )


def _ritz_vector(
    operator: SymmetricOperator, start: Tensor, inside: Inside, seen: Chain, sign: int, stop: int
) -> Tensor | None:
    """Return the outermost Ritz vector by running the chain once more, as its vectors were not kept."""
    coefficients = seen.ritz()[1][:, -1 if sign > 0 else 0]
    chain = Chain(start, inside.vectors, norm=inside.norm, space=operator.space)
    vector = torch.zeros_like(chain.current)
    for index, share in enumerate(coefficients.tolist()):
        vector += share * chain.current
        if index + 1 < len(coefficients):
            if operator.products >= stop:
                return None
            chain.advance(operator.matvec(chain.current))
    return vector
