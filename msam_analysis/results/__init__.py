"""Frozen results: what was measured, how well, at what cost and under which settings.

Every result knows how to become a :class:`pandas.DataFrame` (:meth:`Result.to_frame`) and how to be written
to and read from one ``.safetensors`` file (:meth:`Result.save`, :func:`load`): tensors as tensors, the rest
as JSON in the header. No pickle is involved, so a file from a stranger is safe to read.
"""

from msam_analysis.results.angles import SamMsamAngle
from msam_analysis.results.balls import BallSharpness, BatchSharpness, Certificate, DirectionalSharpness
from msam_analysis.results.base import ApproximationWarning, ConvergenceWarning, Result, Settings, load
from msam_analysis.results.curvature import Eigenpairs, Estimate, SpectralDensity
from msam_analysis.results.files import atomic_folder, atomic_path
from msam_analysis.results.intervals import DataInterval
from msam_analysis.results.points import load_trajectory
from msam_analysis.results.slices import Slice1D, Slice2D
from msam_analysis.results.trajectories import Projection, Trajectory

__all__ = [
    "ApproximationWarning",
    "BallSharpness",
    "BatchSharpness",
    "Certificate",
    "ConvergenceWarning",
    "DataInterval",
    "DirectionalSharpness",
    "Eigenpairs",
    "Estimate",
    "Projection",
    "Result",
    "SamMsamAngle",
    "Settings",
    "Slice1D",
    "Slice2D",
    "SpectralDensity",
    "Trajectory",
    "atomic_folder",
    "atomic_path",
    "load",
    "load_trajectory",
]
