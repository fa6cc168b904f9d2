"""The rise of the loss over a ball, with a count of the gradients it took."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msam_analysis.measures.geometry import Ball, euclidean
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import told
from msam_analysis.objective.vectors import read


@dataclass(frozen=True, eq=False)
class Point:
    """A point ``z`` of the ball, with the rise of the loss and the slope ``D∇L`` there.

    Attributes
    ----------
    length
        Norm of the slope.
    finite
        Whether all entries of the slope are finite.
    bent, moved
        ``⟨z − z₋, slope − slope₋⟩`` and ``‖z − z₋‖²`` from the point before; 0 without one.
    """

    z: Tensor
    rise: float
    slope: Tensor
    length: float
    finite: bool = True
    bent: float = 0.0
    moved: float = 0.0


class BallLoss:
    """The rise ``L(w + D z) − L(w)`` over a ball.

    Parameters
    ----------
    objective
        The loss.
    ball
        The ball around its current weights.
    budget
        Largest number of gradients on all data; the first is spent here.

    Attributes
    ----------
    center, base, slope, origin
        ``w``, ``L(w)``, ``D∇L(w)``, and the centre as a point, with a rise of 0.
    gradients, hvps
        Numbers of gradients and of Hessian-vector products so far; gradients on parts of the data count by their
        samples, and their sum is rounded up.
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
        self.hvps = self.undefined = 0
        self._seen = 0  # samples, over all gradients
        self._whole: BallLoss | None = None
        self.center = objective.point()
        self.base = 0.0
        at_center = self.evaluate(torch.zeros_like(self.center))
        self.base, self.slope = at_center.rise, at_center.slope
        self.origin = replace(at_center, rise=0.0)
        if not math.isfinite(self.base) or not at_center.finite:
            raise ValueError(
                f"the loss at the weights is {self.base}, its gradient norm {at_center.length}: expected "
                "finite values at the centre of the ball; check the checkpoint and the data"
            )

    @property
    def gradients(self) -> int:
        """Gradients so far, in those on all data."""
        return -(-self._seen // self.objective.samples)

    @property
    def left(self) -> int:
        """Gradients on all data that may still be spent."""
        whole = self._whole or self
        return max(whole.budget - whole.gradients, 0)

    def on(self, part: Objective) -> BallLoss:
        """Return the rise on a part of the data, in the same ball and within the same budget.

        It is measured from the loss on all data: what it is measured from does not change where an ascent goes.
        """
        other = copy.copy(self)
        other.objective, other._whole = part, self
        return other

    def _spend(self, samples: int) -> None:
        before = self.gradients
        self._seen += samples
        if self.gradients > before and told("gradients", self.gradients, self.budget):
            self.budget = self.gradients

    def evaluate(self, z: Tensor, before: Point | None = None) -> Point:
        """Return the rise and the slope at a point, at one gradient; ``before``: the point that it is compared with."""
        loss, gradient = self.objective.loss_and_gradient(self.center + self.ball.displacement(z))
        (self._whole or self)._spend(self.objective.samples)
        slope, space = self.ball.displacement(gradient), self.ball.space
        numbers = [loss, euclidean(slope, space), space.sum((~torch.isfinite(slope)).any().to(loss.dtype))]
        if before is not None:
            moved = z - before.z
            numbers += [space.dot(moved, slope - before.slope), space.dot(moved, moved)]
        value, length, undefined, *compared = read(*numbers)
        rise = value - self.base
        # Where the loss is infinite the gradient does not matter.
        if math.isnan(rise) or (math.isfinite(rise) and undefined):
            self.undefined += 1
        return Point(z, rise, slope, length, not undefined, *compared)

    def stationarity(self, at: Point) -> float:
        """Return how much of the slope still points uphill inside the ball, as in :class:`BallSharpness`."""
        uphill = float(euclidean(self.ball.uphill(at.z, at.slope), self.ball.space))
        if not self.ball.holds_back(at.z):
            return uphill * self.ball.radius / at.rise
        return uphill / at.length if at.length > 0 else 0.0
