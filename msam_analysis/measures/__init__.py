"""Measures: functions that ask an objective one question and return a frozen result.

One file for each question: the rise of the loss around the weights by every definition in use, curvature along
directions, angles between momentum and gradients, features, robustness; ``summary`` asks them all. The page
``docs/sharpness.md`` has the formulas side by side. This room may import ``spectra``, ``objective`` and ``results``.
"""

from msam_analysis.measures.alignment import momentum_gradient_cosine, sam_msam_angle
from msam_analysis.measures.along import curvature_along
from msam_analysis.measures.average import average_sharpness
from msam_analysis.measures.ball import ball_sharpness
from msam_analysis.measures.certificate import certify
from msam_analysis.measures.critical import critical_sharpness
from msam_analysis.measures.features import feature_rank
from msam_analysis.measures.invariant import fisher_rao_norm, relative_flatness
from msam_analysis.measures.layers import by_layer
from msam_analysis.measures.lines import directional_sharpness, one_step_sharpness
from msam_analysis.measures.minibatch import m_sharpness
from msam_analysis.measures.resampling import data_interval
from msam_analysis.measures.robustness import robust_accuracy
from msam_analysis.measures.summary import measure
from msam_analysis.results import layer_frame

__all__ = [
    "average_sharpness",
    "ball_sharpness",
    "by_layer",
    "certify",
    "critical_sharpness",
    "curvature_along",
    "data_interval",
    "directional_sharpness",
    "feature_rank",
    "fisher_rao_norm",
    "layer_frame",
    "m_sharpness",
    "measure",
    "momentum_gradient_cosine",
    "one_step_sharpness",
    "relative_flatness",
    "robust_accuracy",
    "sam_msam_angle",
]
