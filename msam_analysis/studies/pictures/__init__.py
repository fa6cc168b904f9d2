"""Pictures of tables with several optimizers and seeds: a study draws them, and so may anybody with such a table."""

from msam_analysis.studies.pictures.comparison import accuracy, ball_sharpness, eigenvalues
from msam_analysis.studies.pictures.mechanisms import along_momentum, by_group, one_step, zero_angle
from msam_analysis.studies.pictures.sweeps import Sweep, both_signs, sweep
from msam_analysis.studies.pictures.training import over_training, perturbation_rise

__all__ = [
    "Sweep",
    "accuracy",
    "along_momentum",
    "ball_sharpness",
    "both_signs",
    "by_group",
    "eigenvalues",
    "one_step",
    "over_training",
    "perturbation_rise",
    "sweep",
    "zero_angle",
]
