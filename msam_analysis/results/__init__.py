"""Frozen results: what was measured, how well, at what cost and under which settings.

Every result shows itself in one line and, in a notebook, as a small table; becomes a :class:`pandas.DataFrame`
(:meth:`Result.to_frame`); and is written to and read from one ``.safetensors`` file (:meth:`Result.save`,
:func:`load`): tensors as tensors, the rest as JSON in the header. No pickle is involved, so a file from a stranger is
safe to read. Fingerprints, files that are never half written, and statistics over seeds live here too. This room
imports no other one.
"""

from msam_analysis.results.balls import (
    BallSharpness,
    BatchSharpness,
    Certificate,
    CriticalSharpness,
    DirectionalSharpness,
)
from msam_analysis.results.base import ApproximationWarning, ConvergenceWarning, Reading, Result, Settings, load
from msam_analysis.results.comparison import Comparison
from msam_analysis.results.curvature import Eigenpairs, Estimate, SpectralDensity
from msam_analysis.results.files import atomic_folder, atomic_path
from msam_analysis.results.intervals import DataInterval
from msam_analysis.results.networks import FeatureRank, RobustAccuracy
from msam_analysis.results.points import load_trajectory
from msam_analysis.results.scalars import Curvatures, SamMsamAngle, Scalar
from msam_analysis.results.slices import Slice1D, Slice2D
from msam_analysis.results.together import ByLayer, Measurement, layer_frame
from msam_analysis.results.trajectories import Projection, Trajectory

__all__ = [
    "ApproximationWarning", "BallSharpness", "BatchSharpness", "ByLayer", "Certificate", "Comparison",
    "ConvergenceWarning", "CriticalSharpness", "Curvatures", "DataInterval", "DirectionalSharpness", "Eigenpairs",
    "Estimate", "FeatureRank", "Measurement", "Projection", "Reading", "Result", "RobustAccuracy", "SamMsamAngle",
    "Scalar", "Settings", "Slice1D", "Slice2D", "SpectralDensity", "Trajectory", "atomic_folder", "atomic_path",
    "layer_frame", "load", "load_trajectory",
]  # fmt: skip


def __dir__() -> list[str]:
    return list(__all__)
