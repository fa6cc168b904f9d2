"""Probes of trained networks and of running training.

How flat is this minimum, and why did the optimizer go there? An :class:`Objective` is the loss as a function of the
weights. Every measurement is a plain function of one and returns a frozen result with its own error; every picture is a
plain function of a result.
"""

from msam_analysis import checkpoints, directions, plots, probes, results
from msam_analysis.alignment import momentum_gradient_cosine
from msam_analysis.directions import Direction
from msam_analysis.eigen import top_eigenvalues
from msam_analysis.landscape import slice_1d, slice_2d
from msam_analysis.monitor import Monitor
from msam_analysis.objective import Objective
from msam_analysis.operators import MatrixOperator, SymmetricOperator
from msam_analysis.results import ConvergenceWarning
from msam_analysis.sharpness import average_sharpness, ball_sharpness
from msam_analysis.spectrum import curvature_along, trace
from msam_analysis.vectors import normalization_layers

__all__ = [
    "ConvergenceWarning",
    "Direction",
    "MatrixOperator",
    "Monitor",
    "Objective",
    "SymmetricOperator",
    "average_sharpness",
    "ball_sharpness",
    "checkpoints",
    "curvature_along",
    "directions",
    "momentum_gradient_cosine",
    "normalization_layers",
    "plots",
    "probes",
    "results",
    "slice_1d",
    "slice_2d",
    "top_eigenvalues",
    "trace",
]
