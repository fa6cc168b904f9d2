"""Results about the largest loss in a ball."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from msam_analysis.results.base import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class BallSharpness(Result):
    """The largest loss rise found in a ball around the weights, with the displacement that shows it.

    Attributes
    ----------
    sharpness
        ``L(w + displacement) − L(w)``, recomputed at the displacement returned; never negative, since 0 is in the ball.
        It is a lower bound of the true maximum.
    one_step
        ``L(w + ρ g/‖g‖) − L(w)``, what SAM's single ascent step finds (for other norms: its counterpart).
    loss
        ``L(w)``.
    displacement
        Shape ``(size,)``, inside the ball.
    rho, norm, adaptive
        The ball: ``‖e‖ ≤ ρ``, or ``‖e / |w|‖ ≤ ρ`` when adaptive.
    starts
        The rise reached from every start after the same few gradients; the ascent then goes on from the best.
    spread
        ``(best − worst) / best`` of these: how much the start matters.
    stationarity
        How far the displacement is from satisfying the first-order conditions of the constrained maximum; 0: it does.
        On the surface of the ball, the share of the (scaled) gradient ``q = D∇L`` that still points to a higher loss
        within it: for l2 the part tangent to the surface (and any inward part) over ``‖q‖``; for linf the entries not
        held at their bound over ``‖q‖``. Inside the ball, ``‖q‖ ρ / sharpness``: what the slope promises against what
        was found.
    converged
        The ascent from the best start stopped because it no longer rose, not because its budget ended.
    gradients, hvps
        Gradients and Hessian-vector products spent.
    """

    sharpness: float
    one_step: float
    loss: float
    displacement: Tensor
    rho: float
    norm: str
    adaptive: bool
    starts: Mapping[str, float]
    spread: float
    stationarity: float
    converged: bool
    gradients: int
    hvps: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row, without the displacement."""
        names = ("rho", "norm", "adaptive", "sharpness", "one_step", "loss", "spread", "stationarity", "converged")
        frame: pd.DataFrame = pd.DataFrame([{name: getattr(self, name) for name in names}])
        return frame
