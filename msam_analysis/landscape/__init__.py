"""The loss and metrics on lines and planes through the weights; directions, and trajectories of optimizers.

>>> from msam_analysis.landscape import metrics, slice_2d
>>> plane = slice_2d(objective, (d1, d2), metrics={"accuracy": metrics.accuracy}, refine=0.01)  # doctest: +SKIP

This room may import ``measures``, ``spectra``, ``objective`` and ``results``.
"""

from msam_analysis.landscape import directions, metrics, trajectory
from msam_analysis.landscape.grids import between, logarithmic
from msam_analysis.landscape.slices import slice_1d, slice_2d
from msam_analysis.landscape.trajectory import TrajectoryRecorder, pca_plane, project

__all__ = [
    "TrajectoryRecorder",
    "between",
    "directions",
    "logarithmic",
    "metrics",
    "pca_plane",
    "project",
    "slice_1d",
    "slice_2d",
    "trajectory",
]
