"""Optimizers that take their gradient at perturbed weights: MSAM, SAM, NAG and everything between."""

from .adamw import AdamWMSAM, AdamWSAM, PerturbedAdamW
from .batchnorm import frozen_batchnorm_statistics, update_batchnorm_statistics
from .filters import NamedSubset, ParameterFilter, normalization_layers
from .optimizers import PerturbedOptimizer
from .perturbation import Perturbation
from .presets import PRESETS, Preset
from .schedules import Constant, Cosine, FollowLR, Jump, Product, Ramp, Schedule
from .sgd import MSAM, NAG, SAM, PerturbedSGD

__all__ = [
    "MSAM",
    "NAG",
    "PRESETS",
    "SAM",
    "AdamWMSAM",
    "AdamWSAM",
    "Constant",
    "Cosine",
    "FollowLR",
    "Jump",
    "NamedSubset",
    "ParameterFilter",
    "Perturbation",
    "PerturbedAdamW",
    "PerturbedOptimizer",
    "PerturbedSGD",
    "Preset",
    "Product",
    "Ramp",
    "Schedule",
    "frozen_batchnorm_statistics",
    "normalization_layers",
    "update_batchnorm_statistics",
]
