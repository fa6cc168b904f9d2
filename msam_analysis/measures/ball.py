"""The largest loss rise in a ball."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from msam_analysis.measures.ascent import Ascent
from msam_analysis.measures.ball_loss import BallLoss, Point
from msam_analysis.measures.geometry import Adaptive, Ball, Norm, check_norm, check_radius
from msam_analysis.measures.parts import from_parts
from msam_analysis.measures.starts import Start, starting_points
from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.rounding import resolution, warn_if_below
from msam_analysis.results import BallSharpness, ConvergenceWarning

# Steps from every start, and the number of starts that get as many again; chosen by benchmarks/sharpness.py.
_STEPS = 2
_FINALISTS = 3
# The same two numbers where parts of the data were climbed, and little of the budget is left.
_SHORT = 1, 2


@numbers
def ball_sharpness(
    objective: Objective,
    rho: float,
    *,
    norm: Norm = "l2",
    adaptive: Adaptive = False,
    starts: Sequence[Start | Tensor] = ("gradient", "krylov", "eigenvector", "parts"),
    iterations: int = 40,
    krylov_hvps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> BallSharpness:
    r"""Return the largest loss rise found in a ball, ``max_{‖e‖ ≤ ρ} L(w + e) − L(w)``.

    Sources: Keskar et al. (2017) for ``l∞``, Foret et al. (2021) for ``l2``, Kwon et al. (2021) and Andriushchenko et
    al. (2023) for the adaptive balls ``‖D⁻¹ e‖ ≤ ρ``.

    Each ascent iterates the maximum of the linearised loss, ``z ← argmax_{z in ball} ⟨D∇L(w + D z), z⟩`` with
    ``e = D z``; for ``l2`` this is ``z ← ρ D∇L / ‖D∇L‖``. It is extrapolated where it is slow, and damped where the
    loss does not rise. The search makes two steps from every start and two more from the three that promise most. From
    the best of these it goes on to the end, then from the others as long as they may overtake. The starts are:

    - ``"gradient"``: ``0``, whose first step is SAM's;
    - ``"krylov"``: the maximum of the quadratic model at ``w`` over a subspace. The subspace grows by the residuals of
      this maximum and of its top Ritz vector, until both are small. In double precision it is exact for a quadratic
      loss in an l2 ball, also for an indefinite one;
    - ``"eigenvector"``: ``± ρ`` times the first and the second of these Ritz vectors;
    - ``"random"``: one Gaussian vector on the sphere;
    - ``"parts"``: where ascents on parts of the data end. It serves large balls only: where the rise at one of the
      other starts (the gradient's, if there is none) differs from ``½ ⟨∇L(w) + ∇L(w + e), e⟩``, which a quadratic loss
      has, by more than 8 % of the highest of these rises. There each of up to 16 disjoint parts, a sixteenth of the
      samples each, is climbed once with 20 gradients, in turn from one of the other starts and from a random point.
      The search then goes on from the best on all data, and makes no first steps from every start unless the budget
      has room for them. Without it, or where parts cannot be taken, the search is the one above. That is so for fewer
      than 128 samples, samples that cannot be taken apart, data that no cache holds, a BatchNorm policy other than
      ``"eval"``, or fewer than 15 of the ``iterations`` left after the starts;
    - a tensor of shape ``(size,)``: a displacement, such as that of a smaller ball; it is scaled to ``ρ``.

    Memory: ``2 c`` vectors for a subspace of ``c`` columns, at most ``krylov_hvps`` and as many as the objective's
    ``memory_bytes`` has room for, and four for each start; and the graphs that the Hessian keeps.

    Parameters
    ----------
    objective
        The loss; the centre of the ball is its current weights.
    rho
        Radius of the ball, in the unit of the weights; if adaptive, as a fraction of ``D``. 0 gives a sharpness of 0.
    norm
        Norm of the ball: ``"l2"`` (default) or ``"linf"``.
    adaptive
        Scale ``D`` of the ball: 1 for ``False`` (default), ``|w|`` elementwise for ``True``, the norm of every filter
        for ``"filter"``; see :func:`~msam_analysis.measures.geometry.adaptive_scale`. Where ``D = 0`` nothing moves.
    starts
        Points from which the search climbs, as above.
    iterations
        Largest number of gradients, one for every evaluated point; on a part of the data, its share of the samples.
        Default 40; trained networks need 30 to 40.
    krylov_hvps
        Largest number of Hessian-vector products for the Krylov and eigenvector starts. Default 100; trained networks
        need about 12 in float32, 25 in float64.
    tolerance
        Fraction of the sharpness: an ascent ends when two steps each raise it by less. Default 1e-4.
    seed
        Seed of random starts and of the parts of the data; the global generators are untouched.

    Returns
    -------
    BallSharpness
        The rise, computed at the displacement that is returned; SAM's one-step value; how far the starts differ.
        :func:`~msam_analysis.measures.certify` tells whether the displacement is a local maximum.

    Raises
    ------
    ValueError
        ``rho``, ``norm``, ``adaptive``, ``starts``, ``iterations``, ``krylov_hvps`` or ``tolerance`` is out of range,
        or the loss at the centre is not finite.

    Warns
    -----
    ConvergenceWarning
        The budget ended before a maximum was reached, the loss is NaN somewhere in the ball, or the gradient was the
        only start and is zero.
    ApproximationWarning
        The value is below its resolution: it is rounding.
    """
    _check(objective, rho, norm, starts, iterations, krylov_hvps, tolerance)
    ball_loss = BallLoss(objective, Ball.around(objective, rho, norm, adaptive), iterations)
    one_step = ball_loss.evaluate(ball_loss.ball.ascend(ball_loss.slope))
    ascents = [Ascent(ball_loss, "gradient", one_step)] if "gradient" in starts else []
    ascents += [
        Ascent(ball_loss, name, ball_loss.evaluate(z))
        for name, z in starting_points(ball_loss, starts, krylov_hvps, seed)
    ]
    climbed = []
    if "parts" in starts:
        ascents = ascents or [Ascent(ball_loss, "gradient", one_step)]
        climbed = from_parts(ball_loss, ascents, tolerance, seed)
    best, reached = _climb(ascents, climbed, tolerance)
    at = best.at if best.at.rise > 0 else ball_loss.origin
    stationarity = ball_loss.stationarity(at) if at.rise > 0 else 0.0
    doubt = _doubt(ball_loss, best, at, stationarity, len(ascents))
    if doubt:
        warnings.warn(
            f"ball_sharpness: rho = {rho:g}, sharpness {at.rise:.4g} from the start {best.name!r}: {doubt}",
            ConvergenceWarning,
            stacklevel=3,
        )
    limit = resolution(objective, ball_loss.base)
    # Where no rise was seen, the slope says whether rounding hides one.
    promised = float(objective.space.dot(ball_loss.slope, ball_loss.ball.ascend(ball_loss.slope)))
    warn_if_below("ball_sharpness", at.rise or promised, limit)
    highest, lowest = max(reached.values()), min(reached.values())
    return BallSharpness(
        sharpness=at.rise,
        one_step=one_step.rise,
        loss=ball_loss.base,
        displacement=ball_loss.ball.displacement(at.z),
        rho=float(rho),
        norm=norm,
        adaptive=adaptive,
        starts=reached,
        spread=(highest - lowest) / highest if highest > 0 and math.isfinite(highest) else 0.0,
        stationarity=stationarity,
        converged=not doubt,
        gradients=ball_loss.gradients,
        hvps=ball_loss.hvps,
        undefined=ball_loss.undefined,
        resolution=limit,
        settings=objective.settings,
    )


def _climb(ascents: list[Ascent], climbed: list[Ascent], tolerance: float) -> tuple[Ascent, dict[str, float]]:
    """Run all ascents a little, the best further, and one to its end; those already climbed on parts come beside them.

    Returns the best ascent, and the rise that each start had reached after the same few steps.
    """
    ball_loss = ascents[0].ball_loss
    ascents = ascents + climbed
    steps, finalists = _STEPS, _FINALISTS
    if climbed and ball_loss.left < 2 * _STEPS * len(ascents):
        steps, finalists = _SHORT
    else:
        for ascent in ascents:
            ascent.run(_STEPS, tolerance)
    reached = {ascent.name: ascent.at.rise for ascent in ascents}
    leading = sorted(ascents, key=lambda ascent: ascent.promised(1), reverse=True)[:finalists]
    for ascent in leading:
        ascent.run(steps, tolerance)
    max(leading, key=lambda ascent: ascent.promised(1)).run(ball_loss.left, tolerance)
    while True:
        best = max(ascents, key=lambda ascent: ascent.at.rise)
        # An ascent that is behind may still overtake with the gradients left; the best one must come to its end.
        climbing = [other for other in leading if other.promised(ball_loss.left) > best.at.rise]
        candidates = [ascent for ascent in ([best] if not best.finished else climbing) if not ascent.finished]
        if not candidates or not ball_loss.left:
            return best, reached
        max(candidates, key=lambda ascent: ascent.promised(ball_loss.left)).run(1, tolerance)


def _doubt(ball_loss: BallLoss, best: Ascent, at: Point, stationarity: float, starts: int) -> str:
    """Return why the answer may not be a maximum and what to do, as half a sentence; empty if there is no doubt."""
    if ball_loss.ball.radius == 0:
        return ""
    if ball_loss.undefined:
        return (
            f"at {ball_loss.undefined} of {ball_loss.gradients} points the loss or its gradient is NaN, so that this "
            "is the largest rise among the others only; measure a smaller ball, or in float64"
        )
    if at.rise == 0 and starts == 1 and not ball_loss.ball.space.any(ball_loss.slope != 0):
        return "the gradient is zero at the weights, and was the only start; add 'eigenvector' to starts"
    # Inside the ball the ascent may stop rising long before the top of a flat ridge.
    if best.finished and (stationarity <= 1e-3 or ball_loss.ball.holds_back(at.z)):
        return ""
    return (
        f"no maximum was reached (stationarity {stationarity:.1e}): the loss was still rising after "
        f"{ball_loss.gradients} gradients; raise iterations, or krylov_hvps, or tolerance"
    )


def _check(
    objective: Objective,
    rho: float,
    norm: str,
    starts: Sequence[object],
    iterations: int,
    krylov_hvps: int,
    tolerance: float,
) -> None:
    check_radius(rho)
    check_norm(norm)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if krylov_hvps < 2:
        raise ValueError(f"krylov_hvps must be at least 2, got {krylov_hvps}: or leave the Krylov starts out of starts")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a number >= 0, got {tolerance!r}: 1e-4 is the default")
    if isinstance(starts, str) or len(starts) == 0:
        raise ValueError(f"starts must be a non-empty sequence, got {starts!r}: for example ('gradient', 'krylov')")
    for start in starts:
        if isinstance(start, Tensor):
            objective.layout.check(start, "starting displacement")
        elif start not in get_args(Start):
            raise ValueError(f"a start must be one of {get_args(Start)} or a displacement, got {start!r}")
