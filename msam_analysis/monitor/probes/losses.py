"""Probes of the loss at the optimizer's perturbation and along its momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msam_analysis.measures.momentum import momentum_buffers, true_weights
from msam_analysis.monitor.probes.base import ObjectiveSource, current
from msam_analysis.objective.vectors import read


@dataclass(frozen=True)
class PerturbationRise:
    """``loss_before`` and ``loss_after`` the optimizer's own perturbation, ``L(w)`` and ``L(w + ε)`` (exhibit A12).

    ``w`` are the true weights, and ``ε`` is the displacement at which this step's training gradient is evaluated. For
    optimizers that do not perturb it is 0, and so is the rise. It costs two forward passes over the objective's data.

    Parameters
    ----------
    objective
        The loss, or a function that returns it, for example a loss over the current training batch.
    """

    objective: ObjectiveSource

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``loss_before``, ``loss_after``, ``rise`` and the perturbation's length ``epsilon_norm``."""
        objective = current(self.objective)
        weights = objective.vector(true_weights(optimizer))
        displacements: Mapping[Tensor, Tensor] = getattr(optimizer, "displacement", dict)()
        displacement = objective.vector(displacements)
        before, length = read(objective.loss(weights), objective.space.norm(displacement))
        after = float(objective.loss(weights + displacement)) if length > 0 else before
        return {"loss_before": before, "loss_after": after, "rise": after - before, "epsilon_norm": length}


@dataclass(frozen=True)
class LossAlongMomentum:
    """``loss_along/<a>``: the loss at ``w + a v_{t−1}/‖v_{t−1}‖`` for every offset ``a`` (exhibit A2).

    ``w`` are the true weights. The last step went along ``−v``, so a minimum at ``a > 0`` says that it overshot. With
    an objective over the current training batch, this is the last step as the next batch sees it. It costs one forward
    pass for each offset.

    Parameters
    ----------
    objective
        The loss, or a function that returns it, for example a loss over the current training batch.
    offsets
        Distances ``a``, in the unit of the weights; 0, the true weights, is added.

    Raises
    ------
    ValueError
        An offset is not finite.
    """

    objective: ObjectiveSource
    offsets: Sequence[float]

    def __post_init__(self) -> None:
        """Check the offsets, and put them in order."""
        if not all(math.isfinite(offset) for offset in self.offsets):
            raise ValueError(f"offsets must be finite, got {list(self.offsets)}: pass e.g. [-0.5, 0.5]")
        object.__setattr__(self, "offsets", tuple(sorted({0.0, *map(float, self.offsets)})))

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return the losses; at the first step, without momentum, all except ``loss_along/0`` are NaN."""
        objective = current(self.objective)
        weights = objective.vector(true_weights(optimizer))
        momentum = objective.vector(momentum_buffers(optimizer))
        length = objective.space.norm(momentum)
        known = self.offsets if length > 0 else [0.0]
        moved = (weights if offset == 0 else weights + offset * (momentum / length) for offset in known)
        losses = dict(zip(known, read(*(objective.loss(w) for w in moved)), strict=True))
        return {f"loss_along/{offset:g}": losses.get(offset, math.nan) for offset in self.offsets}
