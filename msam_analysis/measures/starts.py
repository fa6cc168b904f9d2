"""Where the ascents begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from msam_analysis.measures.geometry import euclidean
from msam_analysis.measures.problem import Problem
from msam_analysis.measures.trust_region import maximize_quadratic
from msam_analysis.objective.operators import ScaledOperator, SymmetricOperator
from msam_analysis.objective.vectors import gaussian
from msam_analysis.spectra.subspace import Subspace

Start = Literal["gradient", "krylov", "eigenvector", "random"]

_EIGENVECTORS = 2
# Two starts whose cosine is beyond this end in the same place.
_SAME = 0.9
# Of an eigenvector no more than the direction is wanted.
_ROUGH = 1e-5


def starting_points(
    problem: Problem, starts: Sequence[Start | Tensor], krylov_hvps: int, seed: int
) -> list[tuple[str, Tensor]]:
    """Return names and points (in ``z``) of all starts but ``"gradient"``; see :func:`ball_sharpness`."""
    ball = problem.ball
    points: list[tuple[str, Tensor]] = []
    if ball.radius == 0:
        return [("center", torch.zeros_like(problem.center))]
    names = [start for start in starts if isinstance(start, str)]
    if "krylov" in names or "eigenvector" in names:
        found = _krylov(problem, krylov_hvps, seed)
        step = found.step
        if "krylov" in names:
            points.append(("krylov", ball.project(step)))
        if "eigenvector" in names:
            # Cut to size by an l∞ ball, the Krylov step no longer is where an eigenvector's corner is.
            points += _both_ways(found, problem, beside="krylov" in names and ball.norm == "l2")
    if "random" in names:
        draw = gaussian(problem.center.numel(), 1, seed=seed, like=problem.center, use="ball start")[:, 0]
        points.append(("random", ball.stretch(draw)))
    for index, displacement in enumerate(start for start in starts if isinstance(start, Tensor)):
        points.append((f"given {index}", ball.stretch(ball.coordinates(displacement.to(problem.center)))))
    return points


@dataclass(frozen=True, eq=False)
class _Quadratic:
    """What a Krylov space knows of the quadratic model, in ``z``: its maximum in the ball, and its top directions."""

    step: Tensor
    vectors: Tensor


def _both_ways(found: _Quadratic, problem: Problem, *, beside: bool) -> list[tuple[str, Tensor]]:
    """Return ``±`` every top direction, but for what lies beside the Krylov step, which is a start already."""
    points = []
    length = euclidean(found.step)
    for number, vector in enumerate(found.vectors.unbind(1), 1):
        cosine = float(found.step.dot(vector)) / length if length > 0 else 0.0
        side = vector if cosine >= 0 else -vector
        if not (beside and abs(cosine) > _SAME):
            points.append((f"+eigenvector {number}", problem.ball.stretch(side)))
        points.append((f"-eigenvector {number}", problem.ball.stretch(-side)))
    return points


def _krylov(problem: Problem, budget: int, seed: int) -> _Quadratic:
    """Maximise the quadratic model over a subspace that grows by the residuals of its own answers."""
    operator: SymmetricOperator = problem.objective.hessian(problem.center)
    if problem.ball.scale is not None:
        operator = ScaledOperator(operator, problem.ball.scale)
    basis = Subspace(operator, min(operator.size, budget))
    draw = gaussian(operator.size, 1, seed=seed, like=problem.center, use="ball subspace")
    basis.expand(torch.cat([problem.slope[:, None], draw], dim=1))
    # The l2 ball around an l∞ ball: its answer is cut to size.
    radius = problem.ball.radius * (math.sqrt(operator.size) if problem.ball.norm == "linf" else 1.0)
    slope = problem.slope.to(basis.q)
    try:
        while True:
            if not bool(torch.isfinite(basis.projection).all()):
                # The curvature is not finite: the other starts decide.
                return _Quadratic(torch.zeros_like(problem.center), torch.zeros_like(problem.center)[:, None])
            linear = (basis.q.T @ slope).cpu().double()
            y, multiplier = maximize_quadratic(basis.projection, linear, radius)
            values, coefficients, top_residual = basis.ritz("largest", 1)
            small = y.to(basis.q)
            step = basis.q @ small
            residual = basis.aq @ small + slope - multiplier * step
            level = max(multiplier * radius, euclidean(slope))
            enough = _enough(basis, interior=multiplier == 0)
            settled = float(residual.norm()) <= enough * level
            settled = settled and float(top_residual.norm()) <= max(enough, _ROUGH) * float(values.abs().max())
            if settled or not basis.expand(torch.cat([residual[:, None], top_residual], dim=1)):
                return _Quadratic(step, basis.q @ coefficients[:, :_EIGENVECTORS].to(basis.q))
    finally:
        problem.hvps += operator.products


def _enough(basis: Subspace, *, interior: bool) -> float:
    """Return the relative residual at which the answer will do.

    An ascent that starts at 1 % forgets where it came from (measured: benchmarks/sharpness.py). Double precision is for
    those who want the digits. An interior maximum may lie far along directions that hardly bend.
    """
    double = basis.q.dtype == torch.float64
    if interior:
        return 1e-11 if double else 1e-9
    return 1e-6 if double else 1e-2
