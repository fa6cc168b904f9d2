"""Probes of trained networks and of running training.

How flat is this minimum, and why did the optimizer go there? An :class:`Objective` is the loss as a function of the
weights. Every measurement is a plain function of one and returns a frozen result with its own error; every picture is a
plain function of a result.
"""

from msam_analysis import checkpoints, directions, export, plots, probes, results, trajectory
from msam_analysis.alignment import momentum_gradient_cosine, sam_msam_angle
from msam_analysis.directions import Direction
from msam_analysis.eigen import top_eigenvalues
from msam_analysis.features import feature_rank
from msam_analysis.landscape import slice_1d, slice_2d
from msam_analysis.layers import by_layer, layer_frame
from msam_analysis.monitor import Monitor
from msam_analysis.objective import Objective
from msam_analysis.operators import MatrixOperator, SymmetricOperator
from msam_analysis.resampling import data_interval
from msam_analysis.results import ApproximationWarning, ConvergenceWarning
from msam_analysis.robustness import robust_accuracy
from msam_analysis.sharpness import (
    average_sharpness,
    ball_sharpness,
    certify,
    directional_sharpness,
    fisher_rao_norm,
    m_sharpness,
    one_step_sharpness,
    relative_flatness,
)
from msam_analysis.spectrum import curvature_along, spectral_density, trace
from msam_analysis.trajectory import TrajectoryRecorder, pca_plane, project
from msam_analysis.vectors import normalization_layers

__all__ = [
    "ApproximationWarning",
    "ConvergenceWarning",
    "Direction",
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
    "curvature_along",
    "data_interval",
    "directional_sharpness",
    "directions",
    "export",
    "feature_rank",
    "fisher_rao_norm",
    "layer_frame",
    "m_sharpness",
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
