"""Results about the spectrum of a symmetric operator."""

from __future__ import annotations

import dataclasses

import pandas as pd
from torch import Tensor

from msam_analysis.results.base import Result, column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eigenpairs(Result):
    """Eigenvalues of a symmetric operator, each certified by its residual.

    Attributes
    ----------
    values
        Shape ``(k,)``, in the order asked for (largest first by default), in the unit of the operator.
    vectors
        Shape ``(size, k)``, orthonormal columns.
    residuals
        Shape ``(k,)``: ``‖A v − λ v‖₂`` against the original operator. For a symmetric operator an exact eigenvalue
        lies within this distance of the value.
    converged
        Every residual is at most ``tolerance · |λ|``, or at the level of rounding, ``30 eps ‖A‖``.
    hvps
        Products with the operator that were spent, certificates included.
    method, which, tolerance
        What was asked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    hvps: int
    method: str
    which: str
    tolerance: float

    def to_frame(self) -> pd.DataFrame:
        """Return one row per eigenvalue: ``index`` (from 1), ``value``, ``residual``, ``method``, ``converged``."""
        frame: pd.DataFrame = pd.DataFrame(
            {
                "index": range(1, len(self.values) + 1),
                "value": column(self.values),
                "residual": column(self.residuals),
                "method": self.method,
                "converged": self.converged,
            }
        )
        return frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """A Monte Carlo mean with its standard error.

    Attributes
    ----------
    quantity
        What is estimated.
    value, standard_error
        Mean over the draws and its standard error ``s / sqrt(draws)``.
    draws
        Independent draws used.
    evaluations
        Loss evaluations or Hessian-vector products spent.
    """

    quantity: str
    value: float
    standard_error: float
    draws: int
    evaluations: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row."""
        frame: pd.DataFrame = pd.DataFrame(
            [{key: getattr(self, key) for key in ("quantity", "value", "standard_error", "draws")}]
        )
        return frame
