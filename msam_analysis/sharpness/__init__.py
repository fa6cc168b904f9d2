"""How much the loss rises around the weights: every definition in use.

At worst in a ball (:func:`ball_sharpness`, certified by :func:`certify`; batch by batch :func:`m_sharpness`), after one
step (:func:`one_step_sharpness`), along a direction (:func:`directional_sharpness`), on average under noise
(:func:`average_sharpness`), and in units that rescaled weights do not change (:func:`relative_flatness`,
:func:`fisher_rao_norm`). The page ``docs/sharpness.md`` has the formulas side by side.
"""

from msam_analysis.sharpness.average import average_sharpness
from msam_analysis.sharpness.ball import ball_sharpness
from msam_analysis.sharpness.certificate import certify
from msam_analysis.sharpness.invariant import fisher_rao_norm, relative_flatness
from msam_analysis.sharpness.lines import directional_sharpness, one_step_sharpness
from msam_analysis.sharpness.minibatch import m_sharpness

__all__ = [
    "average_sharpness",
    "ball_sharpness",
    "certify",
    "directional_sharpness",
    "fisher_rao_norm",
    "m_sharpness",
    "one_step_sharpness",
    "relative_flatness",
]
