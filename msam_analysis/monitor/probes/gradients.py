"""Probes that cost gradients of their own: on other data, and at other points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from msam_analysis.measures.alignment import sam_msam_angle
from msam_analysis.measures.momentum import momentum_buffers, true_weights
from msam_analysis.monitor.probes.base import ObjectiveSource, current
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.vectors import read, widest


@dataclass(eq=False)
class HeldOutCosine:
    """``held_out_cosine``: cosine between momentum and the gradient on other data (exhibits A3 and A4).

    It is ``cos(v_{t−1}, ∇L(w_t))`` with the true weights ``w_t``. It costs one gradient over the objective's data, or
    over one batch of it.

    Parameters
    ----------
    objective
        The loss on held-out data, or a function that returns it. An objective over one fixed batch uses that batch
        every time.
    in_turn
        Whether to use one batch of the objective's data at a time: the next one at every record, and the first again
        after the last. With as many batches as records every record has a fresh batch. Default ``False``: all data.

    Raises
    ------
    TypeError
        ``in_turn`` is true, and ``objective`` is a function.

    Notes
    -----
    With ``batchnorm="batch"`` the statistics are those of the batch in use. The number of the next batch is part of the
    state that :meth:`Monitor.state_dict() <msam_analysis.monitor.Monitor.state_dict>` saves.
    """

    objective: ObjectiveSource
    in_turn: bool = False
    _turn: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that there are batches to take in turn."""
        if self.in_turn and not isinstance(self.objective, Objective):
            raise TypeError(
                f"in_turn takes the batches of an Objective in turn, got {type(self.objective).__name__}: pass the "
                "objective itself, or let the function choose"
            )

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``held_out_cosine``; NaN at the first step, when there is no momentum."""
        objective = self._next() if self.in_turn else current(self.objective)
        wide = widest(objective.device)
        momentum = objective.vector(momentum_buffers(optimizer)).to(wide)
        gradient = objective.gradient(objective.vector(true_weights(optimizer))).to(wide)
        space = objective.space
        length, other, product = read(space.norm(momentum), space.norm(gradient), space.dot(momentum, gradient))
        norms = length * other
        known = 0 < norms < math.inf
        return {"held_out_cosine": max(-1.0, min(1.0, product / norms)) if known else math.nan}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next batch."""
        return {"turn": self._turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch that was next."""
        self._turn = int(state["turn"])

    def _next(self) -> Objective:
        """Return the objective over the next batch."""
        whole = current(self.objective)
        sizes = whole.batches.sizes
        index = self._turn % len(sizes)
        self._turn += 1
        stop = list(accumulate(sizes))[index]
        return whole.with_samples(torch.arange(stop - sizes[index], stop))


@dataclass(frozen=True)
class SamAngle:
    """Angle between MSAM's gradient and SAM's, over the strength of MSAM's perturbation, and ``rho_0`` (exhibit F3).

    See :func:`~msam_analysis.sam_msam_angle`, at the true weights and with ``v_{t−1}``. The optimizer need not be MSAM:
    any optimizer with momentum will do. It costs two gradients, and one for each ρ.

    Parameters
    ----------
    objective
        The loss, or a function that returns it: for the paper's exhibit a loss over the current training batch.
    rhos
        Strengths of MSAM's perturbation; 0, the plain gradient, is added. ``rho_0`` is searched between them.
    rho_sam
        Radius of SAM's displacement.

    Raises
    ------
    ValueError
        At the first record: ``rho_sam`` is not positive, or ``rhos`` is empty or not finite.
    """

    objective: ObjectiveSource
    rhos: Sequence[float]
    rho_sam: float

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``sam_angle/<rho>`` in degrees, ``rho_0``, and its bracket ``rho_0_low`` and ``rho_0_high``.

        NaN at the first step, when there is no momentum, except for ``sam_angle/0``, which needs none.
        """
        objective = current(self.objective)
        weights = objective.vector(true_weights(optimizer))
        momentum = objective.vector(momentum_buffers(optimizer))
        found = sam_msam_angle(objective, momentum, self.rhos, rho_sam=self.rho_sam, w=weights)
        angles = {
            f"sam_angle/{rho:g}": angle for rho, angle in zip(found.rhos.tolist(), found.angles.tolist(), strict=True)
        }
        low, high = found.bracket
        return {**angles, "rho_0": found.rho_0, "rho_0_low": low, "rho_0_high": high}
