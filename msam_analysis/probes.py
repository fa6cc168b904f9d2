"""Probes of a training step: what a :class:`~msam_analysis.monitor.Monitor` records.

A probe is called with the optimizer and the step number at the one moment when the step's gradient is in ``.grad``, the
momentum is still the last step's and no weight has moved. It returns named numbers and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from msam_analysis.alignment import momentum_gradient_cosine
from msam_analysis.momentum import gradients, momentum_buffers, true_weights
from msam_analysis.objective import Objective
from msam_analysis.spectrum import curvature_along
from msam_analysis.vectors import gaussian


class Probe(Protocol):
    """Named numbers about one training step."""

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return the numbers; ``step`` counts optimizer steps from 0."""
        ...


@dataclass(frozen=True)
class MomentumGradientCosine:
    """``cosine``: :func:`~msam_analysis.alignment.momentum_gradient_cosine` (exhibit F2C); no extra gradient."""

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``cosine``; NaN at the first step."""
        return {"cosine": momentum_gradient_cosine(optimizer)}


@dataclass(frozen=True)
class PerturbationRise:
    """``loss_before`` and ``loss_after`` the optimizer's own perturbation: ``L(w)`` and ``L(w + ε)`` (exhibit A12).

    ``w`` are the true weights and ``ε`` the displacement at which this step's training gradient is evaluated; 0, and
    so no rise, for optimizers that do not perturb. Two forward passes over the objective's data.

    Parameters
    ----------
    objective
        The loss, or a function that returns it (for example one over the batch now being trained on).
    """

    objective: Objective | Callable[[], Objective]

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``loss_before``, ``loss_after``, ``rise`` and the perturbation's length ``epsilon_norm``."""
        objective = self.objective if isinstance(self.objective, Objective) else self.objective()
        weights = objective.vector(true_weights(optimizer))
        displacements: Mapping[Tensor, Tensor] = getattr(optimizer, "displacement", dict)()
        displacement = objective.vector(displacements)
        before = float(objective.loss(weights))
        length = float(displacement.norm())
        after = float(objective.loss(weights + displacement)) if length > 0 else before
        return {"loss_before": before, "loss_after": after, "rise": after - before, "epsilon_norm": length}


@dataclass(frozen=True)
class Curvature:
    """Curvature ``dᵀHd / dᵀd`` at the true weights along momentum, gradient and a random direction (exhibit A8).

    Three Hessian-vector products over the objective's data.

    Parameters
    ----------
    objective
        The loss whose Hessian is meant.
    seed
        Of the random directions; a new one at every recorded step.
    """

    objective: Objective
    seed: int = 0

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``curvature_momentum`` (NaN at the first step), ``curvature_gradient`` and ``curvature_random``."""
        objective = self.objective
        hessian = objective.hessian(objective.vector(true_weights(optimizer)))
        seed = self.seed * 1_000_003 + step
        draw = gaussian(objective.size, 1, seed=seed, like=objective.point(), use="curvature")[:, 0]
        along = {
            "momentum": objective.vector(momentum_buffers(optimizer)),
            "gradient": objective.vector(gradients(optimizer)),
            "random": draw,
        }
        return {f"curvature_{name}": curvature_along(hessian, vector) for name, vector in along.items()}


__all__ = ["Curvature", "MomentumGradientCosine", "PerturbationRise", "Probe"]
