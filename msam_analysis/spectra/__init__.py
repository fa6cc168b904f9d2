"""Eigenvalues, traces and densities of a symmetric operator, each with a bound or an estimate of its error.

The solvers see a :class:`~msam_analysis.SymmetricOperator` and never a model. They keep the products ``A Q`` beside
their basis ``Q``, so that every residual ``‖A v − λ v‖`` is computed from products with the operator itself.
This room may import ``objective`` and ``results``.
"""

from msam_analysis.spectra.density import spectral_density
from msam_analysis.spectra.top import as_operator, top_eigenvalues
from msam_analysis.spectra.traces import trace

__all__ = ["as_operator", "spectral_density", "top_eigenvalues", "trace"]
