"""Monotone ascents inside a ball."""

from __future__ import annotations

import math

from msam_analysis.measures.ball_loss import BallLoss, Point
from msam_analysis.objective.vectors import read

_DELAY = 3  # steps before the first extrapolated one: a path bends most at its beginning
_HOPELESS = 1e7  # damping, relative to ‖slope‖/ρ, beyond which no step is left


class Ascent:
    r"""The fixed-point iteration ``z ← argmax_{z in ball} ⟨D∇L(w + D z), z⟩`` from one start, made monotone.

    For ``l2`` it is ``z ← ρ q/‖q‖`` with the slope ``q``. This is steepest ascent with an infinite step: it has no step
    size to choose, and never descends on a convex loss. Where it converges slowly, the next point is extrapolated,
    ``z + β (z − z₋)`` with ``β = k/(k + 3)`` (Nesterov), and ``k`` starts anew as soon as the loss does not rise
    (O'Donoghue & Candès 2015). Where the plain step does not raise the loss either, it is damped to a projected
    gradient step that does.

    Parameters
    ----------
    ball_loss
        The loss over the ball.
    name
        Name of the start.
    start
        The first point, already evaluated.

    Attributes
    ----------
    at
        The highest point so far.
    finished
        Whether no further rise is expected.
    gain
        Rise by the last step.
    """

    def __init__(self, ball_loss: BallLoss, name: str, start: Point) -> None:
        self.ball_loss = ball_loss
        self.name = name
        # A start without a value gives way to the centre, which is in the ball.
        self.at = start if not math.isnan(start.rise) else ball_loss.origin
        self.finished = False
        self.gain = 0.0
        self._previous = self.at
        self._damping = 0.0
        self._momentum = -_DELAY
        self._quiet = 0

    def promised(self, steps: int) -> float:
        """Return the rise after ``steps`` more steps, if each gains as much as the last one."""
        return self.at.rise + steps * self.gain

    def run(self, steps: int, tolerance: float) -> None:
        """Make at most ``steps`` steps within the budget of gradients; for ``tolerance`` see :func:`ball_sharpness`."""
        for _ in range(min(steps, self.ball_loss.left)):
            length = self.at.length
            if math.isinf(self.at.rise) or length == 0 or not math.isfinite(length):
                self.finished = True
            if self.finished:
                return
            self._step(length, tolerance)

    def _step(self, length: float, tolerance: float) -> None:
        ball, at = self.ball_loss.ball, self.at
        damped = self._damping > 0
        candidate = ball.project(at.z + at.slope / self._damping) if damped else ball.ascend(at.slope)
        space = ball.space
        promised, moves = read(space.dot(at.slope, candidate - at.z), space.sum((candidate != at.z).any().float()))
        if not moves:
            self.finished = True
            return
        extrapolate = not damped and self._momentum > 0
        if extrapolate:
            ahead = candidate + self._momentum / (self._momentum + 3) * (at.z - self._previous.z)
            candidate = ball.stretch(ahead) if ball.norm == "l2" else ball.project(ahead)
        new = self.ball_loss.evaluate(candidate, at)
        self.gain = new.rise - at.rise if new.rise > at.rise else 0.0
        if new.rise > at.rise:
            self._accept(new, length, tolerance)
        elif extrapolate:
            self._momentum = 0
        else:
            # Where the slope promises next to nothing, only rounding is left.
            done = promised <= tolerance * abs(at.rise)
            self._damping = max(4 * self._damping, length / ball.radius)
            self._momentum = 0
            self.finished = done or self._damping > _HOPELESS * length / ball.radius

    def _accept(self, new: Point, length: float, tolerance: float) -> None:
        old, self.at = self.at, new
        self._quiet = self._quiet + 1 if self.gain <= tolerance * abs(new.rise) else 0
        self.finished = self._quiet >= 2
        self._momentum += 1
        self._previous = old
        self._damping = self._relaxed(new.bent / new.moved, length)

    def _relaxed(self, curvature: float, length: float) -> float:
        """Return the next damping: the negative curvature just met (Barzilai & Borwein 1988), or a smaller one."""
        if self._damping > 0 and curvature < 0:
            return -curvature
        return self._damping / 4 if self._damping > 1e-3 * length / self.ball_loss.ball.radius else 0.0
