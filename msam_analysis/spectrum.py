"""Averages over the spectrum of a symmetric operator, and its value along given directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msam_analysis.directions import Direction
from msam_analysis.eigen import HasHessian, as_operator
from msam_analysis.operators import SymmetricOperator
from msam_analysis.results import Estimate


def trace(target: SymmetricOperator | HasHessian, *, draws: int = 30, seed: int = 0) -> Estimate:
    r"""Estimate ``tr(A) ≈ mean(zᵀ A z)`` over random signs ``z`` (Hutchinson 1990).

    Parameters
    ----------
    target
        A symmetric operator, or an objective (its Hessian).
    draws
        Products spent. Default 30.
    seed
        Of the signs; the global generators are untouched.

    Returns
    -------
    Estimate
        With its standard error over draws.

    Raises
    ------
    ValueError
        Fewer than 2 draws.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, so that an error can be given; got {draws}")
    operator = as_operator(target)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.empty(draws, dtype=torch.float64)
    for draw in range(draws):
        signs = (2 * torch.randint(2, (operator.size,), generator=generator) - 1).to(operator.device, operator.dtype)
        sample[draw] = float(signs.dot(operator.matvec(signs)))  # autocast would round signs @ ...
    return Estimate(
        quantity="trace",
        value=float(sample.mean()),
        standard_error=float(sample.std() / math.sqrt(draws)),
        draws=draws,
        evaluations=draws,
        settings=operator.settings,
    )


def curvature_along(target: SymmetricOperator | HasHessian, direction: Direction | Tensor) -> float:
    """Return ``dᵀ A d / dᵀ d``, the curvature per unit length along ``d`` (exhibit A8), at one product.

    Parameters
    ----------
    target
        A symmetric operator, or an objective (its Hessian).
    direction
        Shape ``(size,)``; its length does not matter.

    Returns
    -------
    float
        NaN for a zero direction, which has no curvature.
    """
    operator = as_operator(target)
    vector = direction.vector if isinstance(direction, Direction) else direction
    vector = vector.to(dtype=operator.dtype, device=operator.device)
    length = float(vector.norm())
    if length == 0 or not math.isfinite(length):
        return math.nan
    unit = vector / length
    return float(unit.dot(operator.matvec(unit)))
