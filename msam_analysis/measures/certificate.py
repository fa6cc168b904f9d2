"""Whether the displacement of a ball sharpness is a local maximum, by first and second order conditions."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from msam_analysis.measures.geometry import Ball, euclidean
from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.operators import ScaledOperator, SymmetricOperator
from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import read
from msam_analysis.results import BallSharpness, Certificate, ConvergenceWarning
from msam_analysis.results.balls import Verdict
from msam_analysis.spectra.top import top_eigenvalues


@numbers
def certify(
    ball: BallSharpness,
    objective: Objective,
    *,
    tolerance: float = 1e-3,
    max_hvps: int = 300,
    seed: int = 0,
) -> Certificate:
    r"""Examine whether the displacement of a :func:`ball_sharpness` is a local maximum of the loss in its ball.

    The coordinates of the ball are ``e = D z``, with the slope ``q = D∇L(w + e)`` and the curvature
    ``A = D∇²L(w + e)D``. A maximum on the surface of an ``l2`` ball satisfies two conditions:

    - ``q = λ z`` with ``λ ≥ 0`` (Karush-Kuhn-Tucker); the multiplier is ``λ = ⟨q, z⟩/ρ²``, and the residual is
      ``q − λ z``;
    - ``A − λ I`` has no positive curvature along the surface, the tangent space ``v ⟂ z``. Lanczos finds its largest
      eigenvalue on that space of ``size − 1`` dimensions, which one Householder reflection makes explicit.

    Inside the ball ``λ = 0``, and the space is the whole one. On the surface of an ``l∞`` ball the entries that the
    slope pushes against their bounds are held, each by a multiplier of its own; residual and curvature are those of the
    other entries. Sources: Nocedal and Wright (2006), theorems 12.1, 12.5 and 12.6.

    A residual of 0 and no positive curvature are necessary for a maximum; with a negative curvature they are
    sufficient. No search ends with a residual of exactly 0. That of a ReLU network, which is not smooth where a unit
    switches, stays at about 1e-2 of the slope. ``gain`` says how much rise such a residual can hide, and decides the
    verdict.

    Memory: that of :func:`~msam_analysis.top_eigenvalues` for one pair, and six vectors.

    Parameters
    ----------
    ball
        The result whose displacement is examined.
    objective
        The loss that the result was measured on.
    tolerance
        Largest ``gain`` of a local maximum, as a fraction of the sharpness. Default 1e-3.
    max_hvps
        Largest number of Hessian-vector products. Default 300; about 15 to 60 are usual.
    seed
        Seed of the start vector of Lanczos.

    Returns
    -------
    Certificate
        Residual, multiplier, curvature with its own residual, and a verdict.

    Raises
    ------
    ValueError
        The displacement does not fit the objective, or ``tolerance`` or ``max_hvps`` is out of range.

    Warns
    -----
    ConvergenceWarning
        The curvature did not converge; the verdict is then "undecided", unless it is already known to be positive.
    """
    objective.layout.check(ball.displacement, "displacement of the ball")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}: 1e-3 is the default")
    if ball.rho == 0:
        raise ValueError("the ball has radius 0, and its centre is all there is: expected a positive radius")
    region = Ball.around(objective, ball.rho, "linf" if ball.norm == "linf" else "l2", ball.adaptive)
    displacement = ball.displacement.to(objective.point())
    point, z = objective.point() + displacement, region.coordinates(displacement)
    slope = region.displacement(objective.gradient(point))
    uphill, on_surface = region.uphill(z, slope), region.holds_back(z)
    lengths = [euclidean(vector, region.space) for vector in (slope, uphill)]
    length, residual, multiplier = read(*lengths, region.multiplier(z, slope))
    if not math.isfinite(length):
        raise ValueError(
            f"the gradient at the displacement has norm {length}: expected a finite one; where the loss is infinite "
            "there is nothing to certify"
        )
    surface = _Surface(objective.hessian(point), region, z, slope, multiplier, on_surface=on_surface)
    curvature = _largest_curvature(surface, max_hvps, seed)
    # Inside the ball the slope vanishes at a maximum: compare it with slopes elsewhere.
    level = length if on_surface else max(ball.sharpness / ball.rho, abs(curvature.value) * ball.rho)
    relative = residual / level if level > 0 else (0.0 if residual == 0 else math.inf)
    # Where the slope points into an l2 ball, no curvature is known along it.
    inward = region.norm == "l2" and on_surface and multiplier == 0 and residual > 0
    gain = _gain(region, z, uphill, residual, math.inf if inward else curvature.value + curvature.residual)
    if not curvature.converged:
        warnings.warn(
            f"certify: after {curvature.hvps} Hessian-vector products the largest curvature is {curvature.value:.3g} "
            f"with a residual of {curvature.residual:.1e}: expected a smaller one; raise max_hvps",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Certificate(
        verdict=_verdict(curvature, multiplier, gain <= tolerance * ball.sharpness, torch.finfo(objective.dtype).eps),
        multiplier=multiplier,
        residual=residual,
        relative_residual=relative,
        curvature=curvature.value,
        curvature_residual=curvature.residual,
        gain=gain,
        on_surface=on_surface,
        dimensions=curvature.dimensions,
        converged=curvature.converged,
        tolerance=tolerance,
        hvps=curvature.hvps,
        settings=objective.settings,
    )


class _Surface(SymmetricOperator):
    """``A − λ I`` on the directions that do not lead out of the ball, to first order.

    They are the entries that can move and are not held, without the normal ``z`` of an l2 surface. One Householder
    reflection maps the first axis to the normal, and the other axes to an orthonormal basis of the tangent space.
    """

    def __init__(
        self, hessian: SymmetricOperator, region: Ball, z: Tensor, slope: Tensor, multiplier: float, *, on_surface: bool
    ) -> None:
        self.hessian = hessian if region.scale is None else ScaledOperator(hessian, region.scale)
        free = torch.ones_like(z, dtype=torch.bool) if region.scale is None else region.scale > 0
        if on_surface and region.norm == "linf":
            free = free & ~region.held(z, slope)
        # Indices, not a mask, whose entries would be counted at every product.
        self.free = free.nonzero()[:, 0]
        self.around = region.space.restricted(self.free)
        self.multiplier = multiplier
        self.mirror = _mirror(z[self.free], self.around) if on_surface and region.norm == "l2" else None
        # The process that has the first axis of the mirror leaves it out.
        self.out = int(self.mirror is not None and self.around.first())
        space = self.around if self.mirror is None else self.around.restricted(self.free[self.out :])
        super().__init__(space, dtype=hessian.dtype, device=hessian.device, settings=hessian.settings)

    def _apply(self, vector: Tensor) -> Tensor:
        whole = vector.new_zeros(self.hessian.space.here)
        whole[self.free] = self._reflected(torch.cat([vector.new_zeros(self.out), vector]))
        back = self._reflected(self.hessian.matvec(whole)[self.free])[self.out :]
        return back - self.multiplier * vector

    def _reflected(self, vector: Tensor) -> Tensor:
        if self.mirror is None:
            return vector
        return vector - 2 * self.mirror * self.around.dot(self.mirror, vector)


def _mirror(normal: Tensor, space: Space) -> Tensor:
    """Return the unit vector ``u`` for which ``I − 2 u uᵀ`` exchanges the first axis and ``± normal``."""
    axis = normal / euclidean(normal, space)
    if space.first():
        axis[0] += torch.where(axis[0] >= 0, 1.0, -1.0)
    return axis / euclidean(axis, space)


class _Curvature(NamedTuple):
    value: float
    residual: float
    converged: bool
    dimensions: int
    hvps: int


def _largest_curvature(surface: _Surface, max_hvps: int, seed: int) -> _Curvature:
    if surface.size == 0:
        return _Curvature(-math.inf, 0.0, converged=True, dimensions=0, hvps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Rough: only the sign matters.
        pairs = top_eigenvalues(surface, 1, tolerance=0.05, max_hvps=max_hvps, seed=seed)
    return _Curvature(float(pairs.values[0]), float(pairs.residuals[0]), pairs.converged, surface.size, pairs.hvps)


def _gain(region: Ball, z: Tensor, uphill: Tensor, residual: float, curvature: float) -> float:
    """Return a bound on ``⟨uphill, s⟩ + ½ curvature ‖s‖²`` over the steps ``s`` that stay in the ball."""
    if region.norm == "linf":
        reach = (region.radius + z.abs()).masked_fill(uphill == 0, 0.0)
        first, length = read(region.space.dot(uphill.abs(), reach), euclidean(reach, region.space))
        second = length**2
    else:
        first, second = 2 * region.radius * residual, (2 * region.radius) ** 2
    if curvature >= 0:
        return first + curvature * second / 2
    return min(first, residual**2 / (-2 * curvature))


def _verdict(curvature: _Curvature, multiplier: float, small: bool, eps: float) -> Verdict:
    slack = 30 * eps * max(multiplier, abs(curvature.value)) if curvature.dimensions else 0.0
    # A Ritz value is never above the largest eigenvalue: a positive one is proof, converged or not.
    if curvature.value > slack:
        return "not a local maximum"
    if not curvature.converged:
        return "undecided"
    if curvature.value + curvature.residual < -slack or not small:
        return "local maximum" if small else "not a local maximum"
    return "undecided"
