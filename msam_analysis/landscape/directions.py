"""Directions in weight space, for slices and for curvatures along a line.

A :class:`Direction` is a flat vector with a name that says how it was made and normalised. Filter normalisation follows
Li et al., *Visualizing the Loss Landscape of Neural Nets* (2018), section 4. Every direction covers exactly the
parameters that its objective selects, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msam_analysis.measures.momentum import coming_updates, momentum_buffers
from msam_analysis.objective.direction import Direction, Normalization, as_direction, label, normalized
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.space import Space
from msam_analysis.objective.statistics import warn_of_statistics
from msam_analysis.objective.vectors import Layout, widest
from msam_analysis.spectra.top import top_eigenvalues

__all__ = [
    "Direction",
    "Normalization",
    "Plane",
    "as_direction",
    "eigenvector",
    "gradient",
    "interpolation",
    "last_update",
    "momentum",
    "normalized",
    "orthogonalized",
    "plane_through",
    "random",
    "restricted",
    "update",
]


def __dir__() -> list[str]:
    return list(__all__)


def random(
    objective: Objective, seed: int = 0, normalize: Normalization = "filter", *, one_d: bool = False
) -> Direction:
    """Return a standard Gaussian direction, filter-normalised by default (exhibits F4C and A13).

    Parameters
    ----------
    objective
        The loss, whose weights give the shapes and the norms.
    seed
        Seed of the random draw; the global generators are untouched.
    normalize, one_d
        Normalisation, and whether it moves biases and norms; see :func:`normalized`.
    """
    weights, space = objective.point(), objective.space
    draw = space.gaussian(1, seed=seed, like=weights)[:, 0]
    vector = normalized(draw, objective.layout, weights, normalize, one_d=one_d, space=space)
    return Direction(vector, f"random {seed}, {label(normalize, one_d, objective.layout)}", space)


def gradient(objective: Objective, normalize: Normalization = "none") -> Direction:
    """Return ``∇L(w)`` on all data of the objective, which points uphill (exhibit F4A)."""
    return _finish(objective, objective.gradient(), "gradient", normalize)


def momentum(
    optimizer: torch.optim.Optimizer, objective: Objective | None = None, normalize: Normalization = "none"
) -> Direction:
    """Return the momentum buffer ``v`` (exhibit F4B); the last step went along ``−v``.

    Parameters
    ----------
    optimizer
        Any optimizer with ``momentum_buffer`` or ``exp_avg`` in its state.
    objective
        The loss, which gives the order and the selection of the parameters. Default: the order of the optimizer's
        parameters; it is the same if both were made from ``model.parameters()`` with nothing frozen.
    normalize
        Normalisation, see :func:`normalized`; without an objective only ``"none"`` and ``"l2"``.

    Raises
    ------
    RuntimeError
        The optimizer keeps no momentum, or has not taken a step.
    """
    buffers = momentum_buffers(optimizer)
    if not buffers:
        raise RuntimeError("the optimizer has no momentum yet: take at least one step before asking for its direction")
    if objective is not None:
        return _finish(objective, objective.vector(buffers), "momentum", normalize)
    if normalize not in ("none", "l2"):
        raise ValueError(f"normalize={normalize!r} needs the weights: pass objective=..., or use 'none' or 'l2'")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pieces = [buffers.get(parameter, torch.zeros_like(parameter)).detach() for parameter in parameters]
    layout = Layout(tuple(map(str, range(len(pieces)))), tuple(piece.shape for piece in pieces))
    vector = layout.flatten(pieces)
    vector = normalized(vector, layout, vector, normalize)
    return Direction(vector, "momentum" if normalize == "none" else f"momentum, {label(normalize, False, layout)}")


def update(optimizer: torch.optim.Optimizer, objective: Objective, normalize: Normalization = "none") -> Direction:
    """Return the ``d`` of the optimizer's coming step ``w ← w − lr d``, such as AdamW's preconditioned momentum.

    Call it after ``loss.backward()`` and before ``optimizer.step()``. For SGD, NAG and MSAM it is the momentum with the
    new gradient in it; weight decay is part of it. The optimizer and the model do not move: a copy of the optimizer
    takes the step, so that any one will do. Where its groups have several learning rates, ``lr`` is that of the first.

    Parameters
    ----------
    optimizer
        Any optimizer whose step needs no closure, with gradients in ``.grad``; loss scales have been removed.
    objective
        The loss, which gives the order and the selection of the parameters.
    normalize
        Normalisation, see :func:`normalized`.

    Raises
    ------
    RuntimeError
        There is no gradient, the learning rate is 0, or the step needs a closure, as SAM's does.

    Notes
    -----
    ``d`` has the rounding of the step that it is the quotient of: about ``ε ‖w‖ / ‖lr d‖``.
    """
    return _finish(objective, objective.vector(coming_updates(optimizer)), "update", normalize)


def last_update(objective: Objective, before: Tensor, normalize: Normalization = "none") -> Direction:
    """Return ``w − before``, the last step of any optimizer, forward in time (exhibit A2 goes along ``−v``).

    Parameters
    ----------
    objective
        The loss at the weights after the step.
    before
        The objective's ``point()`` before the step, shape ``(size,)``.
    normalize
        Normalisation, see :func:`normalized`.

    Raises
    ------
    ValueError
        ``before`` has another shape, or the weights have not moved.
    """
    objective.layout.check(before, "point before the step")
    step = objective.point() - before.to(objective.point())
    if not objective.space.any(step != 0):
        raise ValueError("the weights are where they were: expected the point before the step; take it before step()")
    return _finish(objective, step, "last update", normalize)


def eigenvector(objective: Objective, index: int = 0, *, seed: int = 0) -> Direction:
    """Return the unit eigenvector for the Hessian's eigenvalue number ``index`` from the top (0: the largest).

    Its sign is arbitrary; it is chosen so that the entry of largest magnitude is positive.

    Raises
    ------
    ValueError
        ``index`` is negative or not below ``objective.size``.
    """
    if not 0 <= index < objective.size:
        raise ValueError(f"index must be from 0 (the largest) to {objective.size - 1}, got {index}")
    pairs = top_eigenvalues(objective, index + 1, seed=seed)
    vector, space = pairs.vectors[:, index], objective.space
    return Direction(vector * space.sign(vector), f"eigenvector {index + 1}", space)


def interpolation(objective: Objective, other: Tensor) -> Direction:
    """Return ``other − w``: coordinate 0 is the current weights, coordinate 1 the point ``other`` (shape ``(size,)``).

    Buffers do not move along: between checkpoints of a network with BatchNorm, use the policy ``"recalibrate"`` or
    ``"batch"``.

    Warns
    -----
    ApproximationWarning
        Running statistics belong to the current weights alone: with the policy ``"eval"`` those of BatchNorm.
    """
    found = _towards(objective, other)
    if objective.space.any(found.vector != 0):
        warn_of_statistics(objective, "along an interpolation")
    return found


def _towards(objective: Objective, other: Tensor) -> Direction:
    objective.layout.check(other, "point")
    return Direction(other.to(objective.point()) - objective.point(), "interpolation", objective.space)


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane through the current weights and two other points.

    Attributes
    ----------
    directions
        The two directions that span the plane, for :func:`~msam_analysis.slice_2d`.
    points
        Coordinates of the current weights, ``a`` and ``b`` along the two directions, shape ``(3, 2)``, float64.
    """

    directions: tuple[Direction, Direction]
    points: Tensor

    def coordinates(self, points: int = 51, margin: float = 0.25) -> tuple[Tensor, Tensor]:
        """Return axes around the three points, for the argument ``coordinates`` of a slice; both contain 0.

        Parameters
        ----------
        points
            Number of grid points along each axis, at least 2. Default 51.
        margin
            Margin on either side, as a fraction of the extent. Default 0.25.

        Raises
        ------
        ValueError
            There are fewer than two points, or the margin is negative.
        """
        if points < 2 or not margin >= 0:
            raise ValueError(f"expected at least 2 points and a margin of at least 0, got {points!r} and {margin!r}")
        low, high = self.points.min(0).values, self.points.max(0).values
        low, high = low - margin * (high - low), high + margin * (high - low)
        steps = (high - low) / (points - 1)
        origins = torch.round(-low / steps)  # 0 is a multiple of the step away from every coordinate
        x, y = (
            (torch.arange(points, dtype=torch.float64) - origin) * s for origin, s in zip(origins, steps, strict=True)
        )
        return x, y


def plane_through(objective: Objective, a: Tensor, b: Tensor, *, orthonormal: bool = True) -> Plane:
    """Return the plane through the current weights ``w`` and two other points.

    Parameters
    ----------
    objective
        The loss at the weights ``w``.
    a, b
        Two points, such as checkpoints, shape ``(size,)``.
    orthonormal
        Whether orthonormal vectors span the plane (default): ``u = (a − w)/‖a − w‖``, and ``b − w`` without its part
        along ``u``, with unit length. Distances on the plane are then distances between weights (Garipov et al. 2018,
        section 4). ``False``: ``a − w`` and ``b − w`` span it, so that ``a`` lies at (1, 0) and ``b`` at (0, 1).

    Raises
    ------
    ValueError
        The three points lie on one line, or a point has another shape.

    Warns
    -----
    ApproximationWarning
        As by :func:`interpolation`: buffers do not move along.
    """
    first, second = (_towards(objective, other) for other in (a, b))
    u, v, space = _double(first.vector), _double(second.vector), objective.space
    moved = space.any(u != 0)
    along = float(space.dot(u, v) / space.dot(u, u)) if moved else 0.0
    rest = v - along * u
    if not float(space.norm(rest)) > _parallel(first.vector) * float(space.norm(v)) or not moved:
        raise ValueError(
            "the three points lie on one line: expected three that span a plane; use interpolation instead"
        )
    warn_of_statistics(objective, "on a plane through other networks")
    if not orthonormal:
        spanning = (replace(first, name="to the first point"), replace(second, name="to the second point"))
        return Plane(spanning, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    length, height = float(space.norm(u)), float(space.norm(rest))
    unit = Direction((u / length).to(first.vector), "to the first point, unit length", space)
    # Rounding to the objective's precision may leave a part along the first direction.
    other = orthogonalized(Direction((rest / height).to(first.vector), "", space), unit)
    other = replace(other, name="to the second point, orthogonal to the first, unit length")
    points = torch.tensor([[0.0, 0.0], [length, 0.0], [along * length, height]], dtype=torch.float64)
    return Plane((unit, other), points)


def orthogonalized(direction: Direction, against: Direction | Sequence[Direction]) -> Direction:
    """Return a direction without its parts along others; it is not rescaled.

    It is computed in float64 by two passes of Gram-Schmidt, so that the remainder of nearly parallel directions is
    orthogonal too.

    Parameters
    ----------
    direction
        The direction that is changed.
    against
        One or several other directions, of any lengths and angles.

    Raises
    ------
    ValueError
        Nothing is left: the direction lies in the span of the others.
    """
    others = [against] if isinstance(against, Direction) else list(against)
    vector = _double(direction.vector)
    space = direction.space or Space(len(vector))
    basis = space.orthonormalize(torch.stack([_double(other.vector) for other in others], dim=1))
    rest = vector
    for _ in range(2):
        rest = rest - basis @ space.product(basis.T, rest)
    if not float(space.norm(rest)) > _parallel(direction.vector) * float(space.norm(vector)):
        raise ValueError(
            f"the direction {direction.name!r} lies in the span of {', '.join(repr(other.name) for other in others)}: "
            "expected one that leads out of it; choose another seed or another direction"
        )
    name = f"{direction.name}, orthogonal to {' and '.join(other.name for other in others)}"
    return Direction(rest.to(direction.vector), name, direction.space)


def restricted(direction: Direction, objective: Objective, part: Objective) -> Direction:
    """Return the entries of a direction that belong to the parameters of another objective of the same model.

    Parameters
    ----------
    direction
        A direction that was made with ``objective``.
    objective
        The loss as a function of more parameters.
    part
        The loss as a function of some of them, as from :meth:`Objective.with_parameters`.

    Raises
    ------
    ValueError
        ``part`` has a parameter that ``objective`` does not have.
    """
    views = objective.layout.views(direction.vector)
    missing = [name for name in part.layout.names if name not in views]
    if missing:
        raise ValueError(
            f"the direction has no entries for {missing[0]!r}: expected a part of its objective's parameters"
        )
    return Direction(part.layout.flatten(views[name] for name in part.layout.names), direction.name, part.space)


def _finish(objective: Objective, vector: Tensor, name: str, normalize: Normalization) -> Direction:
    direction = Direction(vector, name, objective.space)
    return direction if normalize == "none" else direction.normalized(objective, normalize)


def _double(vector: Tensor) -> Tensor:
    return vector.detach().to(widest(vector.device))


def _parallel(vector: Tensor) -> float:
    """Return the sine of an angle that rounding alone may cause."""
    return 100 * torch.finfo(vector.dtype).eps
