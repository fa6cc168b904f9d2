"""Averages over the spectrum of a symmetric operator, its density, and its value along given directions."""

from msam_analysis.spectrum.along import curvature_along
from msam_analysis.spectrum.density import spectral_density
from msam_analysis.spectrum.traces import trace

__all__ = ["curvature_along", "spectral_density", "trace"]
