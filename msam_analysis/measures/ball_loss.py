"""The rise of the loss over a ball, with a count of the gradients it took."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msam_analysis.measures.geometry import Ball, euclidean
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import told


@dataclass(frozen=True, eq=False)
class Point:
    """A point ``z`` of the ball, with the rise of the loss and the slope ``D∇L`` there."""

    z: Tensor
    rise: float
    slope: Tensor


class BallLoss:
    """The rise ``L(w + D z) − L(w)`` over a ball.

    Parameters
    ----------
    objective
        The loss.
    ball
        The ball around its current weights.
    budget
        Largest number of gradients; the first is spent here.

    Attributes
    ----------
    center, base, slope
        ``w``, ``L(w)`` and ``D∇L(w)``.
    gradients, hvps
        Numbers of gradients and of Hessian-vector products so far.
    undefined
        Number of points where the loss or its gradient was NaN.

    Raises
    ------
    ValueError
        The loss or its gradient at the centre is not finite.
    """

    def __init__(self, objective: Objective, ball: Ball, budget: int) -> None:
        self.objective = objective
        self.ball = ball
        self.budget = budget
        self.gradients = self.hvps = self.undefined = 0
        self.center = objective.point()
        self.base = 0.0
        at_center = self.evaluate(torch.zeros_like(self.center))
        self.base, self.slope = at_center.rise, at_center.slope
        if not math.isfinite(self.base) or not bool(torch.isfinite(self.slope).all()):
            raise ValueError(
                f"the loss at the weights is {self.base}, its gradient norm {float(self.slope.norm())}: expected "
                "finite values at the centre of the ball; check the checkpoint and the data"
            )

    @property
    def left(self) -> int:
        """Gradients that may still be spent."""
        return max(self.budget - self.gradients, 0)

    def evaluate(self, z: Tensor) -> Point:
        """Return the rise and the slope at a point, at one gradient."""
        loss, gradient = self.objective.loss_and_gradient(self.center + self.ball.displacement(z))
        self.gradients += 1
        if told("gradients", self.gradients, self.budget):
            self.budget = self.gradients
        rise, slope = float(loss) - self.base, self.ball.displacement(gradient)
        # Where the loss is infinite the gradient does not matter.
        if math.isnan(rise) or (math.isfinite(rise) and not bool(torch.isfinite(slope).all())):
            self.undefined += 1
        return Point(z, rise, slope)

    def stationarity(self, at: Point) -> float:
        """Return how much of the slope still points uphill inside the ball, as in :class:`BallSharpness`."""
        length = euclidean(at.slope)
        uphill = euclidean(self.ball.uphill(at.z, at.slope))
        if not self.ball.holds_back(at.z):
            return uphill * self.ball.radius / at.rise
        return uphill / length if length > 0 else 0.0
