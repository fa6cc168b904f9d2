"""Pictures of tables with several optimizers and seeds: a study draws them, and so may anybody with such a table.

What the functions share:

A table has the columns ``optimizer`` (whatever the curves compare), ``seed`` and those that the function names, and one
row for each of their combinations. Drawn is the mean over the seeds. A mean over a NaN or an infinite value is a hole.

``ax``, ``axes``
    Axes to draw on, one for each panel; by default a new figure, 3.3 in wide for one panel and 6.8 in for several.
``level``
    Confidence of the Student-t intervals of the means, which are drawn as bands or bars. Default 0.68, as in the paper.
    One seed has no interval.
``legend``
    Whether the curves are named. Default: they are.

They return the axes, those of several panels as an array of shape ``(panels,)``. They raise ``ValueError`` where a
table has no rows or lacks a column, where a seed has two rows for one point, where ``level`` does not lie between 0 and
1, and where there are fewer axes than panels.
"""

from msam_analysis.studies.pictures.comparison import accuracy, ball_sharpness, eigenvalues
from msam_analysis.studies.pictures.mechanisms import along_momentum, by_group, one_step, zero_angle
from msam_analysis.studies.pictures.sweeps import Sweep, both_signs, sweep
from msam_analysis.studies.pictures.training import over_training, perturbation_rise

__all__ = [
    "Sweep", "accuracy", "along_momentum", "ball_sharpness", "both_signs", "by_group", "eigenvalues", "one_step",
    "over_training", "perturbation_rise", "sweep", "zero_angle",
]  # fmt: skip
