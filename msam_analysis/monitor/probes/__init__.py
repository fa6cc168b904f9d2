"""Probes of a training step, which a :class:`~msam_analysis.monitor.Monitor` records.

A probe is called with the optimizer and the step number, at the moment when the step's gradient is in ``.grad``, the
momentum is still that of the last step and no weight has moved. It returns named numbers and changes nothing. A probe
that also measures the effect of the step has a method ``across``, see :class:`StepProbe`. The column for a layer is
named by the quantity, ``/`` and the layer.

=============================== ========================================== ============================================
probe                           columns                                    costs
=============================== ========================================== ============================================
:class:`MomentumGradientCosine` ``cosine``, ``cosine_after``               nothing but inner products
:class:`Norms`                  ``weights_norm``, ``gradient_norm``,       nothing but inner products
                                ``momentum_norm``, ``step_norm``
:class:`PerturbationRise`       ``loss_before``, ``loss_after``, ``rise``, 2 losses
                                ``epsilon_norm``
:class:`LossAlongMomentum`      ``loss_along/<offset>``                    a loss for each offset
:class:`CriticalSharpness`      ``critical_sharpness_<direction>``,        8 to 11 losses
                                ``..._low``, ``..._high``,
                                ``..._crossings``
:class:`HeldOutCosine`          ``held_out_cosine``                        1 gradient
:class:`SamAngle`               ``sam_angle/<rho>``, ``rho_0``, ...        2 gradients, and 1 for each rho
:class:`Curvature`              ``curvature_momentum``, ``_gradient``,     3 Hessian-vector products
                                ``_random``
:class:`TopEigenvalues`         ``lambda_1``, ..., ``lambda_residual``     about 20 Hessian-vector products, tracked 3
=============================== ========================================== ============================================
"""

from msam_analysis.monitor.probes.base import By, Every, Finish, Probe, StepProbe
from msam_analysis.monitor.probes.gradients import HeldOutCosine, SamAngle
from msam_analysis.monitor.probes.hessian import Curvature, TopEigenvalues
from msam_analysis.monitor.probes.losses import CriticalSharpness, LossAlongMomentum, PerturbationRise
from msam_analysis.monitor.probes.vectors import MomentumGradientCosine, Norms

__all__ = [
    "By",
    "CriticalSharpness",
    "Curvature",
    "Every",
    "Finish",
    "HeldOutCosine",
    "LossAlongMomentum",
    "MomentumGradientCosine",
    "Norms",
    "PerturbationRise",
    "Probe",
    "SamAngle",
    "StepProbe",
    "TopEigenvalues",
]


def __dir__() -> list[str]:
    return list(__all__)
