"""Results about how much the loss rises around the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import pandas as pd
from torch import Tensor

from msam_analysis.results.base import Reading, Result, row, table

Verdict = Literal["local maximum", "not a local maximum", "undecided"]
Crossing = Literal[
    "one crossing", "several crossings", "no crossing", "rises at once", "rounding", "zero direction", "undefined"
]


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
        The ball: ``‖e‖ ≤ ρ``, or ``‖e / |w|‖ ≤ ρ`` when adaptive; ``"filter"``: in units of every filter's norm.
    starts
        The rise reached from every start after the same three gradients; the ascent then goes on from the best. Where
        parts of the data were climbed, the rise on all data at every start and at the end of every part's ascent,
        named ``"part 1, krylov"`` for the first part, climbed from the Krylov start.
    spread
        ``(best − worst) / best`` of these: how much the start matters.
    stationarity
        How far the displacement is from satisfying the first-order conditions of the constrained maximum; 0: it does.
        On the surface of the ball, the share of the (scaled) gradient ``q = D∇L`` that still points to a higher loss
        within it: for l2 the part tangent to the surface (and any inward part) over ``‖q‖``; for linf the entries not
        held at their bound over ``‖q‖``. Inside the ball, ``‖q‖ ρ / sharpness``: what the slope promises against what
        was found.
    converged
        The ascent from the best start stopped because it no longer rose, not because its budget ended, and nothing
        speaks against a maximum: no NaN in the ball, and a start that could leave a point of zero gradient.
    gradients, hvps
        Gradients and Hessian-vector products spent.
    undefined
        Points of the ball, of those looked at, where the loss or its gradient was NaN.
    resolution
        Size below which a difference of losses is rounding, ``2 ε |L(w)|``; NaN in files of older versions.
    """

    sharpness: float
    one_step: float
    loss: float
    displacement: Tensor
    rho: float
    norm: str
    adaptive: bool | str
    starts: Mapping[str, float]
    spread: float
    stationarity: float
    converged: bool
    gradients: int
    hvps: int
    undefined: int = 0
    resolution: float = math.nan

    _asked: ClassVar = ("rho", "norm", "adaptive")
    _shapes: ClassVar = {"displacement": "entries"}
    _ranges: ClassVar = {"rho": "positive", "resolution": "nonnegative"}

    def readings(self) -> list[Reading]:
        """Return the largest rise found, and that of a single step."""
        return [
            Reading("sharpness", self.sharpness, converged=self.converged),
            Reading("one-step sharpness", self.one_step),
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return one row, without the displacement."""
        names = ("rho", "norm", "adaptive", "sharpness", "one_step", "loss", "spread", "stationarity", "converged")
        return row(self, *names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSharpness(Result):
    """The mean over batches of the largest loss rise that each has in a ball of its own: the m-sharpness.

    Attributes
    ----------
    value
        Mean of the batches' largest rises, each weighing what its batch holds; a lower bound, as each of them is.
    standard_error
        Of the mean over batches, as draws from more data of this kind; NaN for a single batch.
    rises, one_steps
        Shape ``(batches measured,)``: every batch's largest rise, and the rise after SAM's single step on it.
    sizes
        Shape ``(batches measured,)``: samples in each.
    m
        Samples per batch; the last batch of the data may hold fewer.
    rho, norm, adaptive
        The ball; see :class:`BallSharpness`.
    batches
        Batches that there are; ``len(rises)`` of them were measured.
    converged
        Every batch's ball did.
    gradients, hvps
        Gradients and Hessian-vector products of single batches that were spent.
    resolution
        The largest of the batches' resolutions, as in :class:`BallSharpness`.
    """

    value: float
    standard_error: float
    rises: Tensor
    one_steps: Tensor
    sizes: Tensor
    m: int
    rho: float
    norm: str
    adaptive: bool | str
    batches: int
    converged: bool
    gradients: int
    hvps: int
    resolution: float = math.nan

    _asked: ClassVar = ("m", "rho", "norm", "adaptive")
    _shapes: ClassVar = dict.fromkeys(("rises", "one_steps", "sizes"), "n")
    _ranges: ClassVar = {
        **dict.fromkeys(("standard_error", "resolution"), "nonnegative"),
        "sizes": "counts",
        "rho": "positive",
    }

    def _disagreement(self) -> str:
        more = len(self.rises) > self.batches
        return f"it has the rises of {len(self.rises)} batches, where there are {self.batches}" if more else ""

    def readings(self) -> list[Reading]:
        """Return the mean with its standard error."""
        return [Reading("m-sharpness", self.value, self.standard_error, self.converged)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per batch measured: its rise, its one-step rise, its size; the ball and ``m``."""
        measured = {"sharpness": self.rises, "one_step": self.one_steps, "samples": self.sizes}
        return table({**measured, "m": self.m, "rho": self.rho, "norm": self.norm, "adaptive": self.adaptive})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionalSharpness(Result):
    """How much the loss rises at given distances along one direction.

    Attributes
    ----------
    sharpness
        ``L(w + displacement) − L(w)``, at the distance ``rho``; negative where the loss falls.
    largest, at
        The largest of ``rises`` and its coordinate. NaN counts as the largest.
    coordinates, rises
        Shape ``(points,)``: distances along the direction, in the norm that ``rho`` is in, and the rise at each.
    resolution
        ``eps (|L(w)| + |L(w + displacement)|)``: the rounding of the two losses in the data type of the forward pass. A
        rise that is not well above it is noise.
    loss
        ``L(w)``.
    displacement
        Shape ``(size,)``: the displacement at ``rho``.
    direction
        What it is.
    rho
        Distance.
    evaluations
        Losses evaluated; the gradient of a one-step sharpness counts as one.
    """

    sharpness: float
    largest: float
    at: float
    coordinates: Tensor
    rises: Tensor
    resolution: float
    loss: float
    displacement: Tensor
    direction: str
    rho: float
    evaluations: int

    _asked: ClassVar = ("direction", "rho")
    _shapes: ClassVar = {"coordinates": "points", "rises": "points", "displacement": "entries"}
    _ranges: ClassVar = {"coordinates": "finite", "rho": "finite", "resolution": "nonnegative"}

    def readings(self) -> list[Reading]:
        """Return the rise at ``rho`` with its rounding, and the largest."""
        return [Reading("sharpness", self.sharpness, self.resolution), Reading("largest rise", self.largest)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``coordinate`` and ``rise``."""
        measured = {"coordinate": self.coordinates, "rise": self.rises}
        return table({**measured, "direction": self.direction, "resolution": self.resolution})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalSharpness(Result):
    """The critical sharpness ``λ_c = 2/η_c``: ``η_c`` is the smallest step along a direction that raises the loss.

    Attributes
    ----------
    value
        ``2/η_c``, with ``η_c`` from the straight line through the two ends of the bracket of ``rise / step``: exact
        where the loss is quadratic. 0 if no step raised the loss, infinite if every step did, NaN if it is not known.
    bracket
        Two numbers between which ``2/η_c`` lies: ``2/η`` at the first step above ``L(w)``, and at the last one below.
        0 and infinity stand for ends that no step showed; NaN, NaN where there is no direction or no loss.
    status
        ``"one crossing"``. ``"several crossings"``: beyond the first one, which is given, the loss falls below ``L(w)``
        again. ``"no crossing"``: the loss falls up to the largest step tried; the value is 0. ``"rises at once"``: the
        smallest step that changes the loss by more than rounding raises it, so that the direction is none of descent
        or its descent is below rounding; the value is infinite. ``"rounding"``: the loss falls by less than rounding
        before it rises, or does not change at all. ``"zero direction"``: a gradient or direction of 0. ``"undefined"``:
        the loss at ``w`` or the gradient is not finite.
    crossings
        How often the loss crosses ``L(w)`` at the steps tried, after the first of them.
    converged
        The bracket is as narrow as asked for, or it is known that there is no crossing.
    steps, rises
        Shape ``(steps tried,)``, float64: every step ``η`` in increasing order, and ``L(w − η d) − L(w)`` there.
    resolution
        Size below which a rise is rounding, ``2 ε |L(w)|``.
    loss
        ``L(w)``.
    direction, direction_norm
        What ``d`` is, and its length.
    width
        Relative width of the bracket that was asked for.
    evaluations, gradients
        Losses, with that at ``w``, and gradients spent. The loss at ``w`` comes with a gradient of the same objective.
    """

    value: float
    bracket: tuple[float, float]
    status: str
    crossings: int
    converged: bool
    steps: Tensor
    rises: Tensor
    resolution: float
    loss: float
    direction: str
    direction_norm: float
    width: float
    evaluations: int
    gradients: int

    _asked: ClassVar = ("direction", "width", "status", "bracket")
    _shapes: ClassVar = {"steps": "steps", "rises": "steps"}
    _ranges: ClassVar = {"steps": "positive", "resolution": "nonnegative", "width": "positive"}

    def _disagreement(self) -> str:
        known = get_args(Crossing)
        return "" if self.status in known else f"its status is {self.status[:60]!a}, expected one of {known}"

    @property
    def step(self) -> float:
        """The critical step ``η_c``: infinite without a crossing, 0 if every step raised the loss."""
        return 2 / self.value if self.value else math.inf

    @property
    def error(self) -> float:
        """Distance from the value to the farther end of the bracket; NaN where that is infinite or not known."""
        low, high = self.bracket
        return max(self.value - low, high - self.value) if math.isfinite(high) else math.nan

    def readings(self) -> list[Reading]:
        """Return the value with the farther end of its bracket, and what was found."""
        value = Reading("critical sharpness", self.value, self.error, self.converged)
        return [value, Reading("status", self.status)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per step tried: ``step``, ``rise``."""
        measured = {"step": self.steps, "rise": self.rises}
        return table({**measured, "direction": self.direction, "resolution": self.resolution})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate(Result):
    """What is known of a displacement as a local maximum of the loss in its ball.

    In coordinates ``e = D z`` in which the ball is plain, with the slope ``q = D∇L`` and ``A = D∇²L D`` at the
    displacement; see :func:`msam_analysis.measures.certify`.

    Attributes
    ----------
    verdict
        ``"local maximum"``: all curvature left is negative, and the residual can bring no more than the tolerance.
        ``"not a local maximum"``: it may bring more, or some curvature is positive. ``"undecided"``: a curvature of
        zero to the digits known, or one that did not converge.
    multiplier
        ``λ = max(⟨q, z⟩, 0)/ρ²`` on the surface of an l2 ball: how much more ``½ ρ²`` would bring. 0 inside, and for
        l∞, where every held entry has a multiplier of its own.
    residual, relative_residual
        ``‖q − λ z‖``, the slope left within the ball, for l∞ of the entries not held; and the same over ``‖q‖``. Inside
        the ball, where ``q`` vanishes at a maximum, over the larger of ``sharpness/ρ`` and ``ρ |curvature|``.
    curvature, curvature_residual
        Largest eigenvalue of ``A − λ I`` on the directions left, and the residual within which an exact one lies;
        ``−inf`` if no direction is left.
    gain
        Most that the local quadratic model promises beyond the displacement, within the ball: ``residual² / 2
        |curvature|``, and not more than residual and curvature can bring over the width of the ball. Infinite where the
        slope leads from the surface into an l2 ball. In the unit of the loss; compare it with the sharpness.
    on_surface
        The displacement is on the surface of the ball.
    dimensions
        Number of directions left.
    converged
        The curvature did.
    tolerance
        Gain, relative to the sharpness, that counted as none.
    hvps
        Hessian-vector products spent.
    """

    verdict: str
    multiplier: float
    residual: float
    relative_residual: float
    curvature: float
    curvature_residual: float
    gain: float
    on_surface: bool
    dimensions: int
    converged: bool
    tolerance: float
    hvps: int

    _asked: ClassVar = ("tolerance", "on_surface", "dimensions")
    _ranges: ClassVar = dict.fromkeys(
        ("multiplier", "residual", "relative_residual", "curvature_residual", "gain", "tolerance"), "nonnegative"
    )

    def _disagreement(self) -> str:
        known = get_args(Verdict)
        return "" if self.verdict in known else f"its verdict is {self.verdict[:60]!a}, expected one of {known}"

    def readings(self) -> list[Reading]:
        """Return the verdict, and what it goes by."""
        curvature = Reading("curvature", self.curvature, self.curvature_residual, self.converged)
        return [Reading("verdict", self.verdict), Reading("gain", self.gain), curvature]

    def to_frame(self) -> pd.DataFrame:
        """Return one row."""
        names = ("verdict", "multiplier", "residual", "relative_residual", "curvature", "curvature_residual", "gain")
        return row(self, *names, "on_surface", "dimensions", "converged")
