"""Whether an eigenvalue was missed: one Lanczos chain from a random start on all that was not found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.spectra.chain import Chain
from msam_analysis.spectra.goal import Goal

# What the chain must exclude where it comes close: a value beyond the wanted ones by this fraction of the spread of
# what is left of the spectrum; and how surely, over its random start.
_SPREAD = 0.01
_FAILURE = 1e-3
# Further Ritz vectors may be set aside with the wanted ones while the norm of all residuals stays below this fraction
# of the spread.
_SLACK = 0.01
# Of the wanted pairs' residuals: a Ritz value this much beyond the last of them counts as one that was missed.
_BARELY = 0.1


@dataclass(frozen=True)
class Inside:
    """What the chain leaves out, and what is known beside it.

    Attributes
    ----------
    vectors, values, norms
        ``W``, shape ``(size, w)``, orthonormal columns; their Ritz values ``Θ`` and the norms of their residuals. First
        the wanted ones, in the order of the goal.
    rest
        Ritz values seen outside of ``W``.
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
        """``‖A W − W Θ‖``: by no more the eigenvalues of ``A`` differ from those of ``W Θ Wᵀ + P A P``."""
        return float(self.norms.norm())


def set_aside(values: Tensor, norms: Tensor, goal: Goal) -> Tensor:
    """Return which Ritz pairs the chain should leave out: the first ``k``, and converged ones well inside of them.

    The fewer eigenvalues close to the wanted ones are left, the sooner a chain can tell that none lies beyond.
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

    A Lanczos run on ``P A P``, ``P = I − W Wᵀ``, from a random start. Its ``T`` is what is known of the measure whose
    mass at an eigenvalue of ``P A P`` is the square of the start's component along its vector. Outside of the Ritz
    values, at or beyond an ``x``, no such measure has more mass than ``1 / Σ_j p_j(x)²`` (:meth:`Chain.christoffel`);
    and in ``N`` dimensions the mass of a given vector is below ``s`` with a probability of at most ``√(2 N s / π)``. So
    the run goes on until ``s = 1 / Σ_j p_j(x)²`` makes this 0.001, for an ``x`` that is the last wanted value, or,
    where the Ritz values come closer to that, 1 % of the spread beyond them. (van Dorsselaer, Hochstenbach & van der
    Vorst 2000 bound the largest eigenvalue in this way by the last of the polynomials alone.)

    Which step is the last does not matter: a vector with more mass than that rules out a false claim at all of them.
    Nor does orthogonality (:class:`Chain`), without which a value is a cluster, with its mass: a few vectors of memory
    are enough. The sum and the best Ritz value never fall from one step to the next, since each ``T`` contains the one
    before.

    Parameters
    ----------
    operator
        ``A``.
    inside
        What was found.
    goal
        What was asked for.
    start
        A random vector, shape ``(size,)``, independent of everything before.
    stop
        Value of ``operator.products`` at which the budget ends.

    Returns
    -------
    margin, vector
        Values beyond the last wanted one by more than ``margin`` are excluded, but for that probability; infinite where
        the budget ended or one was found, and then ``vector`` has a Rayleigh quotient beyond the wanted values.
    """
    wanted = inside.values[: goal.k]
    bounds = goal.bounds(wanted)
    # Less is within the error that the wanted values have anyway; as a copy of one of them seems to be beyond it.
    limit = max(_BARELY * float(inside.norms[: goal.k].max()), goal.floor * inside.norm)
    # A mass below 1 / enough has a probability below _FAILURE.
    enough = 2 * (operator.size - len(inside.values)) / math.pi / _FAILURE**2
    chain = Chain(start, inside.vectors, norm=inside.norm)
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
            # By no more than the slack do the eigenvalues of A differ from those of P A P and the wanted ones.
            safe = bound - inside.slack
            reach = max(safe, level + _SPREAD * max(bound - floor, 0.0))
            excluded = chain.christoffel(sign * reach) >= enough
            margins.append(reach - safe if excluded else math.inf)
        if max(margins) < math.inf:
            return max(margins), None
    return inside.slack, None


def require_finite(values: Tensor) -> None:
    """Raise ``ValueError`` for what an operator with NaN or infinity in it leads to."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "the operator returned NaN or infinity: expected a finite Hessian at these weights; "
            "check that the loss and its gradient are finite there"
        )


def _ritz_vector(
    operator: SymmetricOperator, start: Tensor, inside: Inside, seen: Chain, sign: int, stop: int
) -> Tensor | None:
    """Return the outermost Ritz vector by running the chain once more: its vectors were not kept."""
    coefficients = seen.ritz()[1][:, -1 if sign > 0 else 0]
    chain = Chain(start, inside.vectors, norm=inside.norm)
    vector = torch.zeros_like(chain.current)
    for index, share in enumerate(coefficients.tolist()):
        vector += share * chain.current
        if index + 1 < len(coefficients):
            if operator.products >= stop:
                return None
            chain.advance(operator.matvec(chain.current))
    return vector
