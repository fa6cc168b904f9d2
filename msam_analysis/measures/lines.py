"""The rise of the loss along one direction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from msam_analysis.measures.geometry import Adaptive, Ball, Norm, check_norm, check_radius
from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.direction import Direction, as_direction
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.rounding import warn_if_below
from msam_analysis.objective.vectors import read
from msam_analysis.results import DirectionalSharpness


@numbers
def one_step_sharpness(
    objective: Objective, rho: float, *, norm: Norm = "l2", adaptive: Adaptive = False
) -> DirectionalSharpness:
    r"""Return the loss rise after the single ascent step of SAM, ``L(w + e) − L(w)``, with the gradient on all data.

    ========= ============ ===================== ===============================================================
    ``norm``  ``adaptive`` ``e``                 source
    ========= ============ ===================== ===============================================================
    l2        False        ``ρ g / ‖g‖``         SAM, Foret et al. (2021), equation 2
    l2        True         ``ρ T² g / ‖T g‖``    ASAM, Kwon et al. (2021), ``T = |w|`` elementwise
    l2        "filter"     ``ρ T² g / ‖T g‖``    ASAM, ``T`` the norm of each entry's filter
    linf      any          ``ρ T sign(g)``       the maximum of the linearised loss in an l∞ ball
    ========= ============ ===================== ===============================================================

    It is a lower bound of :func:`ball_sharpness` in the same ball, and often several times smaller.

    Memory: five vectors, and the graph of one batch.

    Parameters
    ----------
    objective
        The loss.
    rho
        Radius of the ball.
    norm, adaptive
        Norm and scale of the ball, as for :func:`ball_sharpness`.

    Returns
    -------
    DirectionalSharpness
        The rise at the one coordinate ``rho``; 0 for a gradient of 0.

    Raises
    ------
    ValueError
        ``rho``, ``norm`` or ``adaptive`` is out of range.
    """
    check_radius(rho)
    check_norm(norm)
    ball = Ball.around(objective, rho, norm, adaptive)
    center = objective.point()
    loss, gradient = objective.loss_and_gradient(center)
    step = ball.displacement(ball.ascend(ball.displacement(gradient)))
    name = "gradient" if adaptive is False else f"gradient, adaptive ({'elements' if adaptive is True else 'filters'})"
    coordinates = torch.tensor([float(rho)], dtype=torch.float64)
    return _along(objective, loss, [center + step], coordinates, step, f"{name}, {norm}", float(rho))


@numbers
def directional_sharpness(
    objective: Objective, direction: Direction | Tensor, rho: float, *, points: int = 11
) -> DirectionalSharpness:
    r"""Return the loss rise along a given direction, ``L(w + ρ d/‖d‖) − L(w)``, and the largest in ``[−ρ, ρ]``.

    Source: Becker, Altrock and Risse (arXiv 2401.12033), figure 4, for gradient, momentum and random directions. The
    perturbations of their appendix A.7 are the direction ``|w| ⊙ d``.

    Memory: five vectors, whatever the number of points, and no graph.

    Parameters
    ----------
    objective
        The loss.
    direction
        ``d``, a direction or a flat tensor of shape ``(size,)``; its length does not matter.
    rho
        Distance, in the unit of the weights.
    points
        Number of equidistant points in ``[−ρ, ρ]``, with both ends and 0 among them: odd. Default 11. The largest rise
        is that at the highest of these points.

    Returns
    -------
    DirectionalSharpness
        The rise at every point; NaN or infinite where the loss is.

    Raises
    ------
    ValueError
        ``rho`` or ``points`` is out of range, or ``d`` is zero or has another shape.
    """
    check_radius(rho)
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, so that 0 and both ends are among them; got {points}")
    line = as_direction(direction, objective)
    unit = line.normalized(objective, "l2").vector
    center = objective.point()
    half = torch.linspace(0, 1, (points + 1) // 2, dtype=torch.float64)[1:]
    coordinates = float(rho) * torch.cat([-half.flip(0), torch.zeros(1, dtype=torch.float64), half])
    at = (center + float(coordinate) * unit if coordinate else None for coordinate in coordinates)
    base = objective.loss(center)
    return _along(objective, base, at, coordinates, float(rho) * unit, line.name, float(rho))


def _along(
    objective: Objective,
    at_center: Tensor,
    points: Iterable[Tensor | None],
    coordinates: Tensor,
    displacement: Tensor,
    direction: str,
    rho: float,
) -> DirectionalSharpness:
    """Return the rise at every point; ``None`` is the centre."""
    found = [(point is not None, at_center if point is None else objective.loss(point)) for point in points]
    base, *values = read(at_center, *(loss for _, loss in found))
    losses = torch.tensor(values, dtype=torch.float64)
    rises = losses - base
    highest = int(rises.argmax())  # NaN counts as the largest
    resolution = torch.finfo(objective.dtype).eps * (abs(base) + abs(float(losses[-1])))
    warn_if_below("sharpness along a direction", float(rises.abs().max()), resolution, stacklevel=4)
    return DirectionalSharpness(
        sharpness=float(rises[-1]),
        largest=float(rises[highest]),
        at=float(coordinates[highest]),
        coordinates=coordinates,
        rises=rises,
        resolution=resolution,
        loss=base,
        displacement=displacement,
        direction=direction,
        rho=rho,
        evaluations=1 + sum(evaluated for evaluated, _ in found),
        settings=objective.settings,
    )
