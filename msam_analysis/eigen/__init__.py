"""Extreme eigenpairs of a symmetric operator, each with the residual that certifies it.

The solvers see a :class:`~msam_analysis.operators.SymmetricOperator` and nothing else. Both keep the products ``A Q``
beside their basis ``Q``, so that every Rayleigh-Ritz residual ``‖A v − λ v‖`` is computed from products with the
operator itself: no recurrence has to be believed and no product is spent on the certificate.
"""

from msam_analysis.eigen.beyond import require_finite
from msam_analysis.eigen.chain import Chain
from msam_analysis.eigen.goal import Goal, Which
from msam_analysis.eigen.subspace import Subspace, wide
from msam_analysis.eigen.top import (
    MEMORY_BYTES,
    HasHessian,
    Method,
    as_operator,
    rounding,
    search_for,
    top_eigenvalues,
)

__all__ = [
    "MEMORY_BYTES",
    "Chain",
    "Goal",
    "HasHessian",
    "Method",
    "Subspace",
    "Which",
    "as_operator",
    "require_finite",
    "rounding",
    "search_for",
    "top_eigenvalues",
    "wide",
]
