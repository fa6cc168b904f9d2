"""The critical sharpness: the curvature that a single step along a direction meets, from losses alone."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import torch
from torch import Tensor

from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.direction import Direction, as_direction
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.rounding import resolution
from msam_analysis.objective.vectors import widest
from msam_analysis.results import ApproximationWarning, CriticalSharpness
from msam_analysis.results.balls import Crossing

WIDTH = 1 / 16  # of the paper

_BRACKETED = ("one crossing", "several crossings")
_BEGIN = 2.0**-10  # length of the first step over that of the weights
_BEFORE = 2.0**-4  # first step over the one that is expected
_MOST, _LEAST = 24, -64  # powers of two between which steps are tried
_STRIDE, _FARTHEST = 4, 6  # powers by which steps become larger, without a parabola and with one
_GUESSES = 5  # by parabolas, while steps become larger: along a loss that levels off each would only double the step


@numbers
def critical_sharpness(
    objective: Objective,
    direction: Direction | Tensor | Objective | None = None,
    *,
    w: Tensor | None = None,
    start: float | None = None,
    width: float = WIDTH,
) -> CriticalSharpness:
    r"""Return ``λ_c = 2/η_c``, where ``η_c`` is the smallest step ``η`` with ``L(w − η d) > L(w)``.

    ``d`` points as an optimizer's update does, which is subtracted. Where the loss is quadratic along ``d``, ``η_c = 2
    gᵀd / dᵀHd`` and ``λ_c = dᵀHd / gᵀd``: along the gradient this is the Rayleigh quotient ``gᵀHg / gᵀg``, which is at
    most ``λ₁``, and along ``(gᵀu) u`` with an eigenvector ``u`` it is its eigenvalue. Twice the direction has half the
    ``η_c``. Source: Kalra et al., *A Scalable Measure of Loss Landscape Curvature for Analyzing the Training Dynamics
    of LLMs* (arXiv 2601.16979), definitions 2.1 and 4.1.

    The search goes over powers of two times a small first step: by factors of 16, or to where a parabola through two
    losses comes back, until one power is above ``L(w)`` and the one before it is not. Bisection then halves this
    bracket. The smallest crossing is the smallest that the powers tried show: a rise that begins and ends between two
    of them, or before the first, is not seen. One power beyond the crossing is tried as well.

    Parameters
    ----------
    objective
        The loss ``L``.
    direction
        ``d``, a direction or a flat tensor of shape ``(size,)``, such as ``directions.momentum(optimizer)`` or
        ``directions.update(optimizer)``. Another objective stands for its gradient at ``w``: the result is then the
        relative critical sharpness ``λ_c^{1→2}`` of ``objective`` (1) while ``direction`` (2) is trained. Default: the
        gradient of the objective.
    w
        The weights, shape ``(size,)``; default: the current ones.
    start
        Where ``η_c`` is expected, such as the learning rate or the ``step`` of a result before: the first step tried is
        1/16 of it. Default: the first step has the length ``‖w‖/1024`` (1/1024 at ``w = 0``).
    width
        Bisection ends at ``1 − low/high ≤ width`` for the bracket of ``η_c``. Default 1/16, as in the paper.

    Returns
    -------
    CriticalSharpness
        The value with its bracket, what was found (``status``), and every step that was tried with its rise. Infinite
        and NaN losses count as above ``L(w)``.

    Raises
    ------
    TypeError
        ``direction`` is of another kind.
    ValueError
        ``width`` is not between 0 and 1, ``start`` is not positive, a vector has another shape or is not finite, or
        the other objective has other parameters.

    Warns
    -----
    ApproximationWarning
        Rounding hides the crossing, or keeps its bracket wider than asked for.

    Notes
    -----
    It costs 8 to 13 forward passes over the data for most networks; the default direction, or another objective, costs
    one gradient. Memory: the weights, the direction, a copy of unit length, and a point. With
    ``batchnorm="recalibrate"`` every loss reads the data once more.
    """
    _check(width, start)
    if w is not None:
        objective.layout.check(w, "point w")
    center = objective.point() if w is None else w.detach().to(device=objective.device, dtype=objective.dtype)
    vector, name, base, slope, gradients = _directed(objective, direction, center)
    length = _length(objective, vector)
    search = _Search(objective, center, vector / length, length, base, slope)
    if not math.isfinite(search.base) or not math.isfinite(length):
        status: Crossing = "undefined"
    elif length == 0:
        status = "zero direction"
    else:
        far = _length(objective, center)
        search.unit = _BEGIN * (far or 1.0) / length if start is None else _BEFORE * float(start)
        status = search.run(width)
    value, bracket = _value(search, status)
    (low, high), steps = search.bracket(), sorted(search.rises)
    found = CriticalSharpness(
        value=value,
        bracket=bracket,
        status=status,
        crossings=search.crossings(),
        converged=1 - low / high <= width if status in _BRACKETED else status in ("no crossing", "rises at once"),
        steps=torch.tensor(steps, dtype=torch.float64),
        rises=torch.tensor([search.rises[step] for step in steps], dtype=torch.float64),
        resolution=search.resolution,
        loss=search.base,
        direction=name,
        direction_norm=length,
        width=float(width),
        evaluations=1 + len(steps),
        gradients=gradients,
        settings=objective.settings,
    )
    if not found.converged and status in (*_BRACKETED, "rounding"):
        _warn(found)
    return found


def _length(objective: Objective, vector: Tensor) -> float:
    """Return the norm of a vector, of which processes may have parts."""
    return float(objective.space.norm(vector.to(widest(vector.device))))


def _directed(
    objective: Objective, direction: Direction | Tensor | Objective | None, center: Tensor
) -> tuple[Tensor, str, float, float, int]:
    """Return the direction, what it is, the loss at the centre, the slope or NaN, and the gradients spent."""
    if direction is None or direction is objective:
        loss, vector = objective.loss_and_gradient(center)
        slope = _length(objective, vector) ** 2
        return vector, "gradient", float(loss), slope, 1
    if isinstance(direction, Objective):
        if direction.layout != objective.layout:
            raise ValueError(
                "the other objective has other parameters: expected the same names and shapes; choose them with "
                "with_parameters"
            )
        vector = direction.gradient(center).to(center)
        return vector, "gradient of another objective", float(objective.loss(center)), math.nan, 1
    line = as_direction(direction, objective)
    return line.vector, line.name, float(objective.loss(center)), math.nan, 0


def _value(search: _Search, status: Crossing) -> tuple[float, tuple[float, float]]:
    """Return the critical sharpness and its bracket."""
    low, high = search.bracket()
    if status == "no crossing":
        return 0.0, (0.0, 2 / max(search.rises))
    if status in ("undefined", "zero direction"):
        return math.nan, (math.nan, math.nan)
    bracket = 2 / high, 2 / low if low else math.inf
    if status not in _BRACKETED:
        return math.inf if status == "rises at once" else math.nan, bracket
    a, b = search.rises[low] / low, search.rises[high] / high
    # Along a parabola the rise over the step is a straight line.
    step = low - a * (high - low) / (b - a) if math.isfinite(b) else (low + high) / 2
    return 2 / step, bracket


class _Search:
    """The rises of the loss at the steps along a direction that were tried, and what they say about the crossing."""

    def __init__(
        self, objective: Objective, center: Tensor, ahead: Tensor, length: float, base: float, slope: float
    ) -> None:
        self._objective, self._center = objective, center
        self._ahead, self._length = ahead, length  # of length 1, as a step may be too large a number for its data type
        self._slope = slope  # gᵀd; NaN where no gradient is known
        self.base, self.resolution = base, resolution(objective, base)
        self.unit = math.nan  # the step whose powers of two are tried
        self.rises: dict[float, float] = {}  # by step
        self._powers: dict[int, int] = {}  # the side of every power tried

    def run(self, width: float) -> Crossing:
        """Try steps until the crossing is bracketed as narrowly as asked for; return what was found."""
        self._try(0)
        self._bracket_powers()
        above = self._lowest_above()
        if above is None:
            return "no crossing" if -1 in self._powers.values() else "rounding"
        low, high = self.bracket()
        if low == 0:  # the step before may be the critical one itself, which rounding hides
            self._try(above - 2)
            low, high = self.bracket()
        if low == 0:
            return "rounding" if self._slope > 0 else "rises at once"
        self._bisect(low, high, width)
        if above == max(self._powers):
            self._try(above + 1)
        dips = any(side < 0 for power, side in self._powers.items() if power > above)
        return "several crossings" if dips else "one crossing"

    def bracket(self) -> tuple[float, float]:
        """Return the steps around the first crossing: the last one below or 0, the first one above or infinity."""
        high = min((step for step in self.rises if self._side(step) > 0), default=math.inf)
        low = max((step for step in self.rises if self._side(step) < 0 and step < high), default=0.0)
        return low, high

    def crossings(self) -> int:
        """Return how often the loss crosses that at the start, at the steps tried."""
        sides = [side for step in sorted(self.rises) if (side := self._side(step))]
        return sum(side != other for side, other in pairwise(sides))

    def _side(self, step: float) -> int:
        """Return 1 if the loss at a step is above that at the start, -1 if it is below, 0 within rounding."""
        if step not in self.rises:
            point = torch.add(self._center, self._ahead, alpha=-step * self._length)
            self.rises[step] = float(self._objective.loss(point)) - self.base
        rise = self.rises[step]
        return -1 if rise < -self.resolution else 0 if rise <= self.resolution else 1  # NaN is above

    def _try(self, power: int) -> None:
        self._powers[power] = self._side(math.ldexp(self.unit, power))

    def _lowest_above(self) -> int | None:
        return min((power for power, side in self._powers.items() if side > 0), default=None)

    def _bracket_powers(self) -> None:
        """Try powers of two until one is above and the one before it is not, or there are no more."""
        fall, rising, parabola = 1, 0, True
        while True:
            above = self._lowest_above()
            low = max((power for power in self._powers if above is None or power < above), default=None)
            if above is None:
                first, last = max(self._powers) + 1, min(max(self._powers) + _FARTHEST, _MOST)
                power = first - 1 + _STRIDE
            elif low is None:
                first, last, power = _LEAST, above - 1, above - fall
            else:
                first, last, power = low + 1, above - 1, (low + above) // 2
            if first > last:
                return
            guess = self._guess() if parabola else None
            rising += above is None
            # Between two powers every other try halves the gap, whatever the loss is like.
            parabola = guess is None or (above is None and rising < _GUESSES)
            if guess is not None:
                power = guess
            elif low is None:
                fall *= 2
            self._try(min(max(power, first), last))

    def _guess(self) -> int | None:
        """Return the power of two below the crossing of the parabola through two losses; None where it has none."""
        # Along a parabola the rise over the step is a straight line; the crossing is its zero.
        high = self.bracket()[1]
        below = [(0.0, -self._slope)] if self._slope > 0 else []
        below += [
            (step, self.rises[step] / step) for step in sorted(self.rises) if self._side(step) < 0 and step < high
        ]
        ends = below[-2:] if math.isinf(high) else [*below[-1:], (high, self.rises[high] / high)]
        if len(ends) < 2 or not math.isfinite(ends[1][1]):
            return None
        (a, low), (b, end) = ends
        rounding = self.resolution / b + (self.resolution / a if a else 0.0)
        if end - low <= rounding:
            return None
        return math.floor(math.log2((a - low * (b - a) / (end - low)) / self.unit))

    def _bisect(self, low: float, high: float, width: float) -> None:
        """Halve the bracket until it is narrow enough, or rounding hides on which side its middle is."""
        while 1 - low / high > width:
            middle = (low + high) / 2
            side = self._side(middle)
            if side == 0:  # look at once how far rounding reaches
                self._side(max(low, middle * (1 - width / 2)))
                self._side(min(high, middle * (1 + width / 2)))
                return
            low, high = (low, middle) if side > 0 else (middle, high)


def _check(width: float, start: float | None) -> None:
    """Raise ``ValueError`` unless width and start are in range."""
    if not 0 < width < 1:
        raise ValueError(f"width must be between 0 and 1, got {width!r}: 1/16 is that of the paper")
    if start is not None and not 0 < start < math.inf:
        raise ValueError(
            f"start must be a positive number, got {start!r}: pass e.g. the learning rate, or leave it out"
        )


def _warn(found: CriticalSharpness) -> None:
    low, high = found.bracket
    warnings.warn(
        f"critical_sharpness: the loss changes by less than its resolution {found.resolution:.2g} around the crossing, "
        f"which lies between {low:.3g} and {high:.3g}; measure with Objective(..., dtype=torch.float64)",
        ApproximationWarning,
        stacklevel=4,
    )
