"""How much the loss rises around the weights: at worst in a ball, and on average under noise.

Written in coordinates ``z`` with the displacement ``e = D z``: ``D = 1`` for a plain ball, ``D = |w|`` elementwise
for an adaptive one (Kwon et al. 2021). An entry with ``w = 0`` then never moves, and the ball is plain in ``z``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from msam_analysis.eigen import Subspace
from msam_analysis.objective import Objective
from msam_analysis.operators import ScaledOperator
from msam_analysis.results import BallSharpness, ConvergenceWarning, Estimate
from msam_analysis.trust_region import maximize_quadratic
from msam_analysis.vectors import gaussian

Norm = Literal["l2", "linf"]
Start = Literal["gradient", "krylov", "eigenvector", "random"]

_WARMUP = 4


def ball_sharpness(
    objective: Objective,
    rho: float,
    *,
    norm: Norm = "l2",
    adaptive: bool = False,
    starts: Sequence[Start | Tensor] = ("gradient", "krylov", "eigenvector"),
    iterations: int = 100,
    krylov_hvps: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> BallSharpness:
    r"""Return the largest loss rise found in a ball, ``max_{‖e‖ ≤ ρ} L(w + e) − L(w)``.

    Sources: Keskar et al. (2017) for ``l∞``, Foret et al. (2021) for ``l2``, Kwon et al. (2021) and Andriushchenko et
    al. (2023) for the adaptive balls ``‖e / |w|‖ ≤ ρ``.

    The ascent is the fixed point of the linearised problem, ``z ← argmax_{z in ball} ⟨D∇L(w + D z), z⟩``, for ``l2``
    ``z ← ρ D∇L / ‖D∇L‖``. Where that does not rise, the step is damped to a projected gradient step that does. It runs
    from several starts for a few iterations, and to the end from the best:

    - ``"gradient"``: ``0``, whose first step is SAM's;
    - ``"krylov"``: the exact maximum of the quadratic model at ``w`` over a subspace that grows by the residuals of
      its own answer and of its top Ritz vector, until both are small: exact for a quadratic loss, also an indefinite
      one;
    - ``"eigenvector"``: ``± ρ`` times that Ritz vector;
    - ``"random"``: one Gaussian vector on the sphere;
    - a tensor of shape ``(size,)``: a displacement, such as that of a smaller ball; it is scaled to ``ρ``.

    Parameters
    ----------
    objective
        The loss; the centre is its current weights.
    rho
        Radius, in the unit of the weights (adaptive: relative to each weight). 0 gives 0.
    norm
        ``"l2"`` (default) or ``"linf"``.
    adaptive
        Measure the ball in units of ``|w|``.
    starts
        See above.
    iterations
        Most gradients of the final ascent; every start also gets 4. Default 100; 20 to 60 are usual.
    krylov_hvps
        Most Hessian-vector products for the Krylov starts, which on trained networks need about 20. Default 100.
    tolerance
        The ascent ends when a step raises the sharpness by less than this fraction, twice. Default 1e-5.
    seed
        Of random starts; the global generators are untouched.

    Returns
    -------
    BallSharpness
        The rise recomputed at the displacement returned, SAM's one-step value, and how far the starts differ.

    Raises
    ------
    ValueError
        ``rho``, ``norm`` or ``starts`` out of range, or the loss at the centre is not finite.

    Warns
    -----
    ConvergenceWarning
        The budget ended before a maximum was reached.
    """
    _check(objective, rho, norm, starts, iterations, krylov_hvps)
    problem = _Problem(objective, float(rho), norm, adaptive)
    base, slope = problem.base, problem.slope
    one_step = problem.evaluate(problem.linear_maximizer(slope))
    ascents = [_Ascent(problem, "gradient", one_step)] if "gradient" in starts else []
    for name, z in _starting_points(problem, starts, krylov_hvps, seed):
        ascents.append(_Ascent(problem, name, problem.evaluate(problem.project(z))))
    for ascent in ascents:
        ascent.run(_WARMUP, tolerance)
    reached = {ascent.name: ascent.at.rise for ascent in ascents}
    best = max(ascents, key=lambda ascent: ascent.at.rise)
    best.run(iterations, tolerance)
    displacement = problem.displacement(best.at.z)
    # 0 lies in the ball: the largest rise is never below 0.
    sharpness = best.at.rise if best.at.rise > 0 else 0.0
    if sharpness == 0.0:
        displacement = torch.zeros_like(displacement)
    stationarity = problem.stationarity(best.at) if sharpness > 0 else 0.0
    # Inside the ball the ascent may stop rising long before the top of a flat ridge.
    converged = rho == 0 or (best.finished and (stationarity <= 1e-3 or problem.on_surface(best.at)))
    if not converged:
        warnings.warn(
            f"ball_sharpness: no maximum was reached from the start {best.name!r} (rho = {rho:g}, sharpness "
            f"{sharpness:.4g}, stationarity {stationarity:.1e}): the loss was still rising after {iterations} "
            "gradients; raise iterations, or krylov_hvps, or tolerance",
            ConvergenceWarning,
            stacklevel=2,
        )
    highest, lowest = max(reached.values()), min(reached.values())
    return BallSharpness(
        sharpness=sharpness,
        one_step=one_step.rise,
        loss=base,
        displacement=displacement,
        rho=float(rho),
        norm=norm,
        adaptive=adaptive,
        starts=reached,
        spread=(highest - lowest) / highest if highest > 0 and math.isfinite(highest) else 0.0,
        stationarity=stationarity,
        converged=converged,
        gradients=problem.gradients,
        hvps=problem.hvps,
        settings=objective.settings,
    )


def average_sharpness(
    objective: Objective, sigma: float, *, adaptive: bool = False, draws: int = 50, seed: int = 0
) -> Estimate:
    r"""Return the mean loss rise under Gaussian noise, ``E[L(w + σ D ε)] − L(w)`` with ``ε ~ N(0, I)``.

    Each draw is antithetic (``±ε``), which cancels the gradient term; to second order the mean is ``σ²/2 tr(D H D)``.
    ``D = 1``, or ``|w|`` elementwise when adaptive. Source: Andriushchenko et al., *A Modern Look at the Relationship
    between Sharpness and Generalization* (2023), average-case sharpness.

    Parameters
    ----------
    objective
        The loss.
    sigma
        Standard deviation of the noise per entry, in the unit of the weights (adaptive: relative).
    adaptive
        Scale the noise by ``|w|``.
    draws
        Pairs of evaluations. Default 50.
    seed
        Of the noise.

    Returns
    -------
    Estimate
        Mean and standard error over pairs; NaN or infinite if the loss is.

    Raises
    ------
    ValueError
        ``sigma`` negative or not finite, or fewer than 2 draws.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a number >= 0, got {sigma!r}")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, so that an error can be given; got {draws}")
    center = objective.point()
    scale = sigma * center.abs() if adaptive else torch.full_like(center, sigma)
    base = float(objective.loss(center))
    rises = []
    for draw in range(draws):
        step = scale * gaussian(objective.size, 1, seed=seed, like=center, use=f"noise {draw}")[:, 0]
        rises.append((float(objective.loss(center + step)) + float(objective.loss(center - step))) / 2 - base)
    sample = torch.tensor(rises, dtype=torch.float64)
    return Estimate(
        quantity="average sharpness (adaptive)" if adaptive else "average sharpness",
        value=float(sample.mean()),
        standard_error=float(sample.std() / math.sqrt(draws)),
        draws=draws,
        evaluations=2 * draws + 1,
        settings={**objective.settings, "sigma": float(sigma)},
    )


@dataclass
class _Point:
    """A point of the ball, the rise there and ``D∇L`` there."""

    z: Tensor
    rise: float
    slope: Tensor


@dataclass
class _Problem:
    """The loss over the ball in coordinates ``z``, counting what it costs."""

    objective: Objective
    rho: float
    norm: Norm
    adaptive: bool
    gradients: int = 0
    hvps: int = 0

    def __post_init__(self) -> None:
        self.center = self.objective.point()
        self.scale = self.center.abs() if self.adaptive else None
        self.base = 0.0
        at_center = self.evaluate(torch.zeros_like(self.center))
        self.base, self.slope = at_center.rise, at_center.slope
        if not math.isfinite(self.base) or not bool(torch.isfinite(self.slope).all()):
            raise ValueError(
                f"the loss at the weights is {self.base}, its gradient norm {float(self.slope.norm())}: expected "
                "finite values at the centre of the ball; check the checkpoint and the data"
            )

    def displacement(self, z: Tensor) -> Tensor:
        return z if self.scale is None else self.scale * z

    def evaluate(self, z: Tensor) -> _Point:
        loss, gradient = self.objective.loss_and_gradient(self.center + self.displacement(z))
        self.gradients += 1
        return _Point(z, float(loss) - self.base, self.displacement(gradient))

    def project(self, z: Tensor) -> Tensor:
        if self.norm == "linf":
            return z.clamp(-self.rho, self.rho)
        length = float(torch.linalg.vector_norm(z))
        return z * (self.rho / length) if length > self.rho else z

    def linear_maximizer(self, slope: Tensor) -> Tensor:
        if self.norm == "linf":
            return self.rho * slope.sign()
        length = float(torch.linalg.vector_norm(slope))
        return slope * (self.rho / length) if length > 0 else torch.zeros_like(slope)

    def stretched(self, z: Tensor) -> Tensor:
        """Return the point of the ball's surface in the direction of ``z``."""
        if self.norm == "linf":
            return self.rho * z.sign()
        length = float(torch.linalg.vector_norm(z))
        return z * (self.rho / length) if length > 0 else z

    def on_surface(self, at: _Point) -> bool:
        """Tell whether the ball holds the point back."""
        order = math.inf if self.norm == "linf" else 2
        return float(torch.linalg.vector_norm(at.z, ord=order)) >= self.rho * (1 - 1e-6)

    def stationarity(self, at: _Point) -> float:
        """Return how much of the slope still points uphill inside the ball; see :class:`BallSharpness`."""
        if not self.on_surface(at):
            return float(at.slope.norm()) * self.rho / at.rise
        if self.norm == "linf":
            held = (at.z.abs() >= self.rho * (1 - 1e-6)) & (at.z.sign() == at.slope.sign())
            free = at.slope.masked_fill(held, 0.0)
        else:
            outward = max(float(at.slope @ at.z), 0.0) / float(at.z @ at.z)
            free = at.slope - at.z * outward
        scale = float(at.slope.norm())
        return float(free.norm()) / scale if scale > 0 else 0.0


class _Ascent:
    """A monotone ascent from one start."""

    def __init__(self, problem: _Problem, name: str, start: _Point) -> None:
        self.problem = problem
        self.name = name
        # 0 is in the ball: nothing below it is worth climbing from.
        self.at = start if not math.isnan(start.rise) else _Point(torch.zeros_like(start.z), 0.0, problem.slope)
        self.damping = 0.0
        self.finished = False

    def run(self, iterations: int, tolerance: float) -> None:
        quiet = 0
        for _ in range(iterations):
            if self.finished or math.isinf(self.at.rise):
                self.finished = True
                return
            length = float(self.at.slope.norm())
            if length == 0 or not math.isfinite(length):
                self.finished = True
                return
            candidate = self._candidate()
            if torch.equal(candidate, self.at.z):
                self.finished = True
                return
            new = self.problem.evaluate(candidate)
            if new.rise > self.at.rise:
                gain = new.rise - self.at.rise
                moved, bent = new.z - self.at.z, new.slope - self.at.slope
                quiet = quiet + 1 if gain <= tolerance * abs(new.rise) else 0
                self.at = new
                self.damping = self._relaxed(moved, bent, length)
                self.finished = quiet >= 2
            else:
                self.damping = max(4 * self.damping, length / self.problem.rho)
                self.finished = self.damping > 1e7 * length / self.problem.rho

    def _relaxed(self, moved: Tensor, bent: Tensor, length: float) -> float:
        """Return the damping of the next step: the negative curvature just met (Barzilai & Borwein 1988), else less."""
        curvature = float(moved @ bent) / float(moved @ moved)
        if self.damping > 0 and curvature < 0:
            return -curvature
        return self.damping / 4 if self.damping > 1e-3 * length / self.problem.rho else 0.0

    def _candidate(self) -> Tensor:
        if self.damping == 0.0:
            return self.problem.linear_maximizer(self.at.slope)
        return self.problem.project(self.at.z + self.at.slope / self.damping)


def _starting_points(
    problem: _Problem, starts: Sequence[Start | Tensor], krylov_hvps: int, seed: int
) -> list[tuple[str, Tensor]]:
    points: list[tuple[str, Tensor]] = []
    if problem.rho == 0:
        return [("center", torch.zeros_like(problem.center))]
    names = [start for start in starts if isinstance(start, str)]
    if "krylov" in names or "eigenvector" in names:
        step, vector = _krylov(problem, krylov_hvps, seed)
        if "krylov" in names:
            points.append(("krylov", step))
        if "eigenvector" in names:
            points += [("+eigenvector", problem.stretched(vector)), ("-eigenvector", problem.stretched(-vector))]
    if "random" in names:
        draw = gaussian(problem.objective.size, 1, seed=seed, like=problem.center, use="ball start")[:, 0]
        points.append(("random", problem.stretched(draw)))
    given = [start for start in starts if isinstance(start, Tensor)]
    for index, displacement in enumerate(given):
        z = displacement.to(problem.center)
        if problem.scale is not None:
            z = torch.where(problem.scale > 0, z / problem.scale, torch.zeros_like(z))
        points.append((f"given {index}", problem.stretched(z)))
    return points


def _krylov(problem: _Problem, budget: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the maximum of the quadratic model over a growing subspace, and its top Ritz vector (in ``z``)."""
    operator = problem.objective.hessian(problem.center)
    if problem.scale is not None:
        operator = ScaledOperator(operator, problem.scale)  # type: ignore[assignment]  # both are symmetric operators
    draw = gaussian(operator.size, 1, seed=seed, like=problem.center, use="ball subspace")
    basis = Subspace(operator, min(operator.size, budget))
    basis.expand(torch.cat([problem.slope[:, None], draw], dim=1))
    while True:
        linear = (basis.q.T @ problem.slope.to(basis.q)).cpu().double()
        if not bool(torch.isfinite(basis.projection).all()):
            # The curvature is not finite: the other starts decide.
            problem.hvps += operator.products
            return torch.zeros_like(problem.center), torch.zeros_like(problem.center)
        y, multiplier = maximize_quadratic(basis.projection, linear, problem.rho)
        values, coefficients, top_residual = basis.ritz("largest", 1)
        small = y.to(basis.q)
        step = basis.q @ small
        residual = basis.aq @ small + problem.slope.to(basis.q) - multiplier * step
        level = max(multiplier * problem.rho, float(problem.slope.norm()))
        # Double precision is for those who want the digits. An interior maximum may lie far along directions that
        # hardly bend: it takes a far smaller residual.
        fine = 1e-2 if basis.q.dtype == torch.float64 else 1.0
        enough = 1e-4 * fine if multiplier > 0 else 1e-9
        settled = float(residual.norm()) <= enough * level
        settled = settled and float(top_residual.norm()) <= 1e-3 * fine * float(values.abs().max())
        grown = 0 if settled else basis.expand(torch.cat([residual[:, None], top_residual], dim=1))
        if grown == 0:
            problem.hvps += operator.products
            return step, basis.q @ coefficients[:, 0].to(basis.q)


def _check(
    objective: Objective, rho: float, norm: str, starts: Sequence[object], iterations: int, krylov_hvps: int
) -> None:
    if not (isinstance(rho, int | float) and math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho must be a number >= 0, got {rho!r}: it is the radius of the ball, e.g. 0.05")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if krylov_hvps < 2:
        raise ValueError(f"krylov_hvps must be at least 2, got {krylov_hvps}: or leave the Krylov starts out of starts")
    if isinstance(starts, str) or len(starts) == 0:
        raise ValueError(f"starts must be a non-empty sequence, got {starts!r}: for example ('gradient', 'krylov')")
    for start in starts:
        if isinstance(start, Tensor):
            objective.layout.check(start, "starting displacement")
        elif start not in get_args(Start):
            raise ValueError(f"a start must be one of {get_args(Start)} or a displacement, got {start!r}")


__all__ = ["average_sharpness", "ball_sharpness"]
