"""The points from which the ascents start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from msam_analysis.measures.ball_loss import BallLoss
from msam_analysis.measures.geometry import euclidean
from msam_analysis.measures.trust_region import maximize_quadratic
from msam_analysis.objective.memory import vectors_in
from msam_analysis.objective.operators import ScaledOperator, SymmetricOperator
from msam_analysis.objective.progress import told
from msam_analysis.objective.vectors import read
from msam_analysis.spectra.subspace import Subspace

Start = Literal["gradient", "krylov", "eigenvector", "random", "parts"]

_EIGENVECTORS = 2
_FEWEST = 8  # columns of the subspace, however little memory there is
# Two starts with a larger cosine lead to the same maximum.
_SAME = 0.9
# Relative residual of the eigenvectors: only their direction matters.
_ROUGH = 1e-5


def starting_points(
    ball_loss: BallLoss, starts: Sequence[Start | Tensor], krylov_hvps: int, seed: int
) -> list[tuple[str, Tensor]]:
    """Return names and points ``z`` of all starts but ``"gradient"`` and ``"parts"``; see :func:`ball_sharpness`."""
    ball = ball_loss.ball
    points: list[tuple[str, Tensor]] = []
    if ball.radius == 0:
        return [("center", torch.zeros_like(ball_loss.center))]
    names = [start for start in starts if isinstance(start, str)]
    if "krylov" in names or "eigenvector" in names:
        step, vectors = _krylov(ball_loss, krylov_hvps, seed)
        if "krylov" in names:
            points.append(("krylov", ball.project(step)))
        if "eigenvector" in names:
            # An l∞ ball cuts the Krylov step to size: it is then far from an eigenvector's corner.
            points += _both_ways(step, vectors, ball_loss, beside="krylov" in names and ball.norm == "l2")
    if "random" in names:
        draw = ball.space.gaussian(1, seed=seed, like=ball_loss.center, use="ball start")[:, 0]
        points.append(("random", ball.stretch(draw)))
    for index, displacement in enumerate(start for start in starts if isinstance(start, Tensor)):
        points.append((f"given {index}", ball.stretch(ball.coordinates(displacement.to(ball_loss.center)))))
    return points


def _both_ways(step: Tensor, vectors: Tensor, ball_loss: BallLoss, *, beside: bool) -> list[tuple[str, Tensor]]:
    """Return ``±`` every vector, without those close to the Krylov step if this is a start already (``beside``)."""
    points = []
    space = ball_loss.ball.space
    length, *products = read(euclidean(step, space), *(space.dot(step, vector) for vector in vectors.unbind(1)))
    for number, (vector, product) in enumerate(zip(vectors.unbind(1), products, strict=True), 1):
        cosine = product / length if length > 0 else 0.0
        side = vector if cosine >= 0 else -vector
        if not (beside and abs(cosine) > _SAME):
            points.append((f"+eigenvector {number}", ball_loss.ball.stretch(side)))
        points.append((f"-eigenvector {number}", ball_loss.ball.stretch(-side)))
    return points


def _krylov(ball_loss: BallLoss, budget: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the maximum of the quadratic model in the ball and its top Ritz vectors, in ``z``.

    The model is maximised over a subspace that grows by the residuals of the answers.
    """
    operator: SymmetricOperator = ball_loss.objective.hessian(ball_loss.center)
    if ball_loss.ball.scale is not None:
        operator = ScaledOperator(operator, ball_loss.ball.scale)
    # A full basis ends the search: what it has found is a start like others.
    room = vectors_in(operator.memory_bytes, ball_loss.center, operator.space.most) // 2 - 3
    basis = Subspace(operator, min(operator.size, budget, max(room, _FEWEST)))
    space = ball_loss.ball.space
    draw = space.gaussian(1, seed=seed, like=ball_loss.center, use="ball subspace")
    basis.expand(torch.cat([ball_loss.slope[:, None], draw], dim=1))
    # For an l∞ ball the l2 ball around it serves, and its answer is cut to size.
    radius = ball_loss.ball.radius * (math.sqrt(operator.size) if ball_loss.ball.norm == "linf" else 1.0)
    slope, length = ball_loss.slope.to(basis.q), ball_loss.origin.length
    try:
        while True:
            if not bool(torch.isfinite(basis.projection).all()):
                # The curvature is not finite: the other starts decide.
                return torch.zeros_like(ball_loss.center), torch.zeros_like(ball_loss.center)[:, None]
            linear = space.product(basis.q.T, slope).cpu().double()
            y, multiplier = maximize_quadratic(basis.projection, linear, radius)
            values, coefficients = basis.pairs("largest")
            top_residual = basis.residuals(values[:1], coefficients[:, :1])
            small = y.to(basis.q)
            step = basis.q @ small
            residual = basis.aq @ small + slope - multiplier * step
            level = max(multiplier * radius, length)
            enough = _enough(basis, interior=multiplier == 0)
            left, top_left = read(space.norm(residual), space.norm(top_residual[:, 0]))
            settled = left <= enough * level and top_left <= max(enough, _ROUGH) * float(values.abs().max())
            ended = told("products", operator.products, basis.capacity, left / level if level else math.nan)
            if settled or ended or not basis.expand(torch.cat([residual[:, None], top_residual], dim=1)):
                return step, basis.q @ coefficients[:, :_EIGENVECTORS].to(basis.q)
    finally:
        ball_loss.hvps += operator.products


def _enough(basis: Subspace, *, interior: bool) -> float:
    """Return the relative residual at which the answer is good enough.

    A residual of 1 % does not change where the ascent ends (measured in benchmarks/sharpness.py). Double precision is
    for users who want the digits. An interior maximum may lie far along directions with little curvature.
    """
    double = basis.q.dtype == torch.float64
    if interior:
        return 1e-11 if double else 1e-9
    return 1e-6 if double else 1e-2
