"""The loss, and whatever else, on lines and planes through the weights.

>>> from msam_analysis.landscape import metrics, slice_2d
>>> plane = slice_2d(objective, (d1, d2), metrics={"accuracy": metrics.accuracy}, refine=0.01)  # doctest: +SKIP
"""

from msam_analysis.landscape import metrics
from msam_analysis.landscape.grids import between, logarithmic
from msam_analysis.landscape.slices import slice_1d, slice_2d

__all__ = ["between", "logarithmic", "metrics", "slice_1d", "slice_2d"]
