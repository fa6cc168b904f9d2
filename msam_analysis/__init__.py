"""Measures of trained networks, and probes of running training.

How flat is this minimum, and why did the optimizer go there? An :class:`Objective` is the loss as a function of the
weights. Every measurement is a plain function of one and returns a frozen result with its own error; every picture is a
plain function of a result.
"""

from msam import normalization_layers
from msam_analysis import checkpoints, plots, results
from msam_analysis.checkpoints import compare
from msam_analysis.landscape import (
    TrajectoryRecorder,
    directions,
    pca_plane,
    project,
    slice_1d,
    slice_2d,
    trajectory,
)
from msam_analysis.measures import (
    average_sharpness,
    ball_sharpness,
    by_layer,
    certify,
    critical_sharpness,
    curvature_along,
    data_interval,
    directional_sharpness,
    feature_rank,
    fisher_rao_norm,
    layer_frame,
    m_sharpness,
    measure,
    momentum_gradient_cosine,
    one_step_sharpness,
    relative_flatness,
    robust_accuracy,
    sam_msam_angle,
)
from msam_analysis.monitor import Monitor, loggers, probes
from msam_analysis.objective import Examination, ExaminationError, MatrixOperator, Objective, SymmetricOperator
from msam_analysis.objective.direction import Direction
from msam_analysis.results import ApproximationWarning, ConvergenceWarning, export
from msam_analysis.spectra import spectral_density, top_eigenvalues, trace

__all__ = [
    "ApproximationWarning",
    "ConvergenceWarning",
    "Direction",
    "Examination",
    "ExaminationError",
    "MatrixOperator",
    "Monitor",
    "Objective",
    "SymmetricOperator",
    "TrajectoryRecorder",
    "average_sharpness",
    "ball_sharpness",
    "by_layer",
    "certify",
    "checkpoints",
    "compare",
    "critical_sharpness",
    "curvature_along",
    "data_interval",
    "directional_sharpness",
    "directions",
    "export",
    "feature_rank",
    "fisher_rao_norm",
    "layer_frame",
    "loggers",
    "m_sharpness",
    "measure",
    "momentum_gradient_cosine",
    "normalization_layers",
    "one_step_sharpness",
    "pca_plane",
    "plots",
    "probes",
    "project",
    "relative_flatness",
    "results",
    "robust_accuracy",
    "sam_msam_angle",
    "slice_1d",
    "slice_2d",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "trajectory",
]


def __dir__() -> list[str]:
    return list(__all__)
