"""Probes of the loss at the optimizer's perturbation, along its momentum, and of the step at which the loss rises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from msam_analysis.measures.critical import critical_sharpness
from msam_analysis.measures.momentum import loss_scale, momentum_buffers, present_gradients, true_weights
from msam_analysis.monitor.probes.base import Finish, ObjectiveSource, current
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.vectors import read

Along = Literal["gradient", "momentum", "update"]


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


@dataclass(eq=False)
class CriticalSharpness:
    """``critical_sharpness_<direction>``: ``2/η_c``, where ``η_c`` is the smallest step that raises the loss.

    See :func:`~msam_analysis.critical_sharpness`. It is taken at the true weights before the step. Beside it stand the
    ends of its bracket, ``..._low`` and ``..._high``, and ``..._crossings``: 1 for one crossing, more for several, and
    0 for none. Without a crossing the value is 0 if the loss falls up to the largest step tried, and infinite if it
    rises at once. It is NaN where the direction is zero or rounding hides the answer. Each search begins at the step
    that the one before found. It costs 8 to 11 forward passes, and no gradient.

    Parameters
    ----------
    objective
        The loss, or a function that returns it, for example a loss over the current training batch. Another loss than
        that of the training gives the relative critical sharpness.
    direction
        ``"update"`` (default): the step that the optimizer takes, over the learning rate of its first group, whatever
        the optimizer is; ``η_c`` is a learning rate. ``"gradient"``: the gradient of the step, for SAM the first one.
        ``"momentum"``: the buffer ``v_{t−1}``; the last step went along ``−v``.

    Raises
    ------
    ValueError
        ``direction`` is unknown.
    RuntimeError
        At the first record: the optimizer keeps no momentum, and it is the direction.

    Warns
    -----
    ApproximationWarning
        Rounding hides the crossing, or keeps its bracket wide.
    """

    objective: ObjectiveSource
    direction: Along = "update"
    _start: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the direction."""
        if self.direction not in get_args(Along):
            raise ValueError(f"direction must be one of {get_args(Along)}, got {self.direction!r}: choose one of them")

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return the columns for gradient or momentum; at the first step, without momentum, they are NaN."""
        if self.direction == "update":
            return {}
        objective = current(self.objective)
        if self.direction == "momentum":
            vector = objective.vector(momentum_buffers(optimizer))
        else:
            vector = objective.vector(present_gradients(optimizer)) / loss_scale(optimizer)
        return self._searched(objective, vector, objective.vector(true_weights(optimizer)))

    def across(self, optimizer: torch.optim.Optimizer, step: int) -> Finish | None:
        """Return the function for the columns of the update, if that is the direction."""
        if self.direction != "update":
            return None
        objective = current(self.objective)
        before = objective.vector(true_weights(optimizer))
        rate = float(optimizer.param_groups[0]["lr"])

        def finish(_: Mapping[Tensor, Tensor]) -> Mapping[str, float]:
            moved = before - objective.vector(true_weights(optimizer))
            return self._searched(objective, moved / rate if rate else torch.zeros_like(moved), before)

        return finish

    def state_dict(self) -> dict[str, Any]:
        """Return the first step of the next search."""
        return {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the first step of the next search."""
        self._start = state["start"]

    def _searched(self, objective: Objective, vector: Tensor, weights: Tensor) -> Mapping[str, float]:
        found = critical_sharpness(objective, vector, w=weights, start=self._start)
        if 0 < found.step < math.inf:
            self._start = found.step
        name = f"critical_sharpness_{self.direction}"
        low, high = found.bracket
        return {name: found.value, f"{name}_low": low, f"{name}_high": high, f"{name}_crossings": found.crossings}
