"""The plane that shows most of a trajectory, and how far the trajectory is from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor

from msam_analysis.objective.direction import Direction
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import counted
from msam_analysis.objective.statistics import warn_of_statistics
from msam_analysis.objective.vectors import read
from msam_analysis.results import Projection, Reading, Result, Settings, Trajectory
from msam_analysis.results.base import table

_CHUNK_BYTES = 128 * 2**20  # bytes of all points together, in float64, that are read at a time

Trajectories = Trajectory | Sequence[Trajectory] | Mapping[str, Trajectory]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrincipalPlane(Result):
    """The plane through ``center`` that is closest to the recorded points.

    Attributes
    ----------
    center
        The point with coordinates (0, 0), shape ``(size,)``.
    vectors
        Orthonormal vectors that span the plane, the more important one first, shape ``(size, 2)``. The entry of largest
        magnitude is positive.
    singular_values
        All singular values of the matrix with rows ``w_t − center``, largest first, in the unit of the weights, shape
        ``(n,)``. Those below ``1e-8`` of the first are rounding.
    through
        Name of the point ``center``.
    labels
        Names of the trajectories.
    """

    center: Tensor
    vectors: Tensor
    singular_values: Tensor
    through: str
    labels: tuple[str, ...]

    _shapes: ClassVar = {"center": "size", "vectors": "size 2", "singular_values": "n"}
    _ranges: ClassVar = {"singular_values": "nonnegative"}

    def _disagreement(self) -> str:
        return "" if len(self.singular_values) > 1 else "it has fewer than two singular values"

    @property
    def shares(self) -> Tensor:
        """The share of each component in ``Σ_t ‖w_t − center‖²``, shape ``(n,)``; the sum is 1."""
        squares = self.singular_values**2
        return squares / squares.sum()

    @property
    def directions(self) -> tuple[Direction, Direction]:
        """The two directions of length 1, named by their share, for :func:`~msam_analysis.landscape.slice_2d`."""
        first, second = (
            Direction(self.vectors[:, index], f"PCA {index + 1} ({100 * float(self.shares[index]):.1f} %)")
            for index in range(2)
        )
        return first, second

    def readings(self) -> list[Reading]:
        """Return the shares of the two components, and of both together."""
        first, second = self.shares[:2].tolist()
        shares = {"share of component 1": first, "share of component 2": second, "share of both": first + second}
        return [*(Reading(name, share) for name, share in shares.items()), Reading("through", self.through)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per component: ``component`` (from 1), ``singular_value``, ``share``, ``cumulative``."""
        components, shares = range(1, len(self.shares) + 1), self.shares
        columns = {"component": components, "singular_value": self.singular_values, "share": shares}
        return table({**columns, "cumulative": shares.cumsum(0)})


def pca_plane(trajectories: Trajectories, center: Literal["final", "mean"] | Tensor | None = None) -> PrincipalPlane:
    r"""Return the plane through a point that is closest to one or several trajectories.

    The two leading right singular vectors of the matrix ``M`` with rows ``w_t − center`` span the plane with the least
    ``Σ_t ‖off-plane‖²`` among all planes through the centre (Eckart and Young). They are found from the eigenvectors of
    ``M Mᵀ``, of shape ``(n, n)`` in float64, in two passes over pieces of all points, so that trajectories on disk need
    not fit into memory.

    Parameters
    ----------
    trajectories
        One or several trajectories of the same model. Every point counts once: record or ``select`` the same number of
        points of each, so that the trajectories have the same weight.
    center
        Point on the plane: ``"final"``, the last point (Li et al.), or the mean of the last points of several
        trajectories; ``"mean"``, the mean of all points; or a point of shape ``(size,)``. Default: ``"final"`` for one
        trajectory, ``"mean"`` for several, so that no optimizer is nearer to the plane by construction.

    Returns
    -------
    PrincipalPlane
        The plane, for :func:`project`. A slice of the surface needs its ``directions`` and an objective at its
        ``center``: ``objective.with_weights(plane.center)``.

    Raises
    ------
    ValueError
        There is no trajectory, the models differ, a point is NaN or infinite, or the points lie on one line with the
        centre.

    Notes
    -----
    Source: Li et al., arXiv 1712.09913, section 7.2. A large share is not by itself a sign of order: the first two
    components of a random walk in many dimensions have 6/π² = 61 % and 15 % of its variance about the mean, and draw a
    smooth curve (Antognini and Sohl-Dickstein, arXiv 1806.08805).
    """
    several = _several(trajectories)
    through = center if isinstance(center, str) else None
    if center is None:
        through = "final" if len(several) == 1 else "mean"
    origin = _center(several, through, center)
    gram = sum(rows @ rows.T for _, rows in _differences(several, origin))
    values, vectors = torch.linalg.eigh(torch.as_tensor(gram))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if len(values) < 2 or not float(values[1]) > 1e-14 * float(values[0]):
        raise ValueError(
            f"the {len(values)} points lie on one line with the centre, so that no plane is closest to them: "
            "record more points, or project them onto a direction of your choice"
        )
    basis = torch.cat([rows.T @ vectors[:, :2] for _, rows in _differences(several, origin)]) / values[:2].sqrt()
    basis = torch.linalg.qr(basis)[0]
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return PrincipalPlane(
        center=origin,
        vectors=basis.to(origin.dtype),
        singular_values=values.sqrt(),
        through=through or "a given point",
        labels=tuple(trajectory.label for trajectory in several),
        settings={**several[0].settings, "points": len(values)},
    )


def _several(trajectories: Trajectories) -> list[Trajectory]:
    if isinstance(trajectories, Trajectory):
        several = [trajectories]
    elif isinstance(trajectories, Mapping):
        several = [dataclasses.replace(item, label=name) for name, item in trajectories.items()]
    else:
        several = list(trajectories)
    if not several or not all(len(item) for item in several):
        raise ValueError("expected at least one trajectory with at least one point: record some first")
    for item in several[1:]:
        if (item.names, item.shapes) != (several[0].names, several[0].shapes):
            raise ValueError(
                f"the trajectories {several[0].label!r} and {item.label!r} are of different parameters: "
                "expected one model; record the same parameters of both"
            )
    return several


def _center(several: Sequence[Trajectory], through: str | None, given: object) -> Tensor:
    dtype = several[0].points[0].dtype
    if through == "final":
        return torch.stack([item.points[-1].double() for item in several]).mean(0).to(dtype)
    if through == "mean":
        count = sum(len(item) for item in several)
        pieces = [sum(_columns(item, a, b).sum(0) for item in several) for a, b in _chunks(several)]
        return torch.cat([torch.as_tensor(piece) / count for piece in pieces]).to(dtype)
    if not isinstance(given, Tensor) or given.shape != (several[0].size,):
        came = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"center must be 'final', 'mean' or a point of shape ({several[0].size},), got {came}: choose")
    return given.detach().cpu()


def _chunks(several: Sequence[Trajectory]) -> Iterator[tuple[int, int]]:
    size, count = several[0].size, sum(len(item) for item in several)
    width = max(_CHUNK_BYTES // (8 * count), 1)
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _columns(trajectory: Trajectory, start: int, stop: int) -> Tensor:
    """Return the entries from ``start`` to ``stop`` of every point, in float64."""
    points = trajectory.points
    found = points[:, start:stop] if isinstance(points, Tensor) else points.columns(start, stop)
    if not bool(torch.isfinite(found).all()):
        bad = trajectory.steps[~torch.isfinite(found).all(1)]
        raise ValueError(
            f"the point of step {int(bad[0])} of {trajectory.label!r} holds NaN or infinity: expected finite weights; "
            f"leave it out with trajectory.select(trajectory.steps < {int(bad[0])})"
        )
    return found.double()


def _differences(several: Sequence[Trajectory], origin: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield ``M`` in pieces of its columns: the first column, and the piece of shape ``(n, width)``."""
    for start, stop in _chunks(several):
        rows = torch.cat([_columns(item, start, stop) for item in several])
        yield start, rows.sub_(origin[start:stop])


# ----------------------------------------------------------------------------------------------------------- projection


def project(
    trajectory: Trajectory,
    plane: PrincipalPlane | Sequence[Direction | Tensor],
    center: Tensor | None = None,
    *,
    objective: Objective | None = None,
    progress: bool = False,
) -> Projection:
    r"""Project a trajectory onto a plane, and measure how far every point is from the plane.

    Parameters
    ----------
    trajectory
        The trajectory; its points are read one at a time.
    plane
        The plane from :func:`pca_plane`, or one or more directions. These need not have length 1 or be orthogonal: the
        coordinates are multiples of them, as on the axes of a slice along the same directions.
    center
        Point on the plane with coordinates 0, shape ``(size,)``. Default: that of the plane, or, for directions, the
        objective's current weights, which are the centre of a slice.
    objective
        Loss to measure at every point and at its projection, at two forward passes over the data for each. For a
        network with BatchNorm it should have ``batchnorm="recalibrate"`` or ``"batch"``: the current running statistics
        belong to none of the points.
    progress
        Show a progress bar.

    Returns
    -------
    Projection
        Coordinates, distances and losses of every point; NaN where a point is NaN.

    Raises
    ------
    ValueError
        Directions do not fit, are not finite or are dependent; there is no centre; the objective has other parameters.

    Warns
    -----
    ApproximationWarning
        There is an objective, and running statistics belong to its current weights alone: with the policy ``"eval"``
        those of BatchNorm.
    """
    if isinstance(plane, PrincipalPlane):
        directions: list[Direction] = list(plane.directions)
        center = plane.center if center is None else center
    else:
        directions = [item if isinstance(item, Direction) else Direction(item, "direction") for item in plane]
    settings = trajectory.settings if objective is None else _check_objective(objective, trajectory)
    if center is None:
        if objective is None:
            raise ValueError("expected a centre or an objective, got neither: pass center=..., the slice's centre")
        center = objective.point()
    origin = _checked(center, trajectory, "center").double()
    basis, triangle = _basis(directions, trajectory)
    rows = [_project_one(point, origin, basis, triangle, objective) for point in _each(trajectory, progress)]
    measured = objective is not None
    table = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
    return Projection(
        label=trajectory.label,
        steps=trajectory.steps,
        coordinates=torch.stack([row[0] for row in rows]),
        distance=table[:, 0],
        off_plane=table[:, 1],
        rounding=trajectory.rounding,
        directions=tuple(direction.name for direction in directions),
        direction_norms=tuple(direction.norm for direction in directions),
        loss=table[:, 2] if measured else None,
        projected_loss=table[:, 3] if measured else None,
        center_loss=float(objective.loss(_at(origin, objective))) if objective is not None else None,
        settings=settings,
    )


def _project_one(
    point: Tensor, origin: Tensor, basis: Tensor, triangle: Tensor, objective: Objective | None
) -> tuple[Tensor, float, float, float, float]:
    """Return coordinates, distance, off-plane distance, loss, and loss of the projection; NaN without objective."""
    difference = point.double() - origin
    inside = basis.T @ difference
    seen = basis @ inside
    coordinates = torch.linalg.solve_triangular(triangle, inside[:, None], upper=True)[:, 0]
    distance, off_plane = float(difference.norm()), float((difference - seen).norm())
    if objective is None:
        return coordinates, distance, off_plane, math.nan, math.nan
    losses = read(*(objective.loss(_at(w, objective)) for w in (point, origin + seen)))
    return coordinates, distance, off_plane, *losses


def _each(trajectory: Trajectory, progress: bool) -> Iterator[Tensor]:
    for index in counted(range(len(trajectory)), f"projecting {trajectory.label}", "point", shown=progress):
        yield trajectory.points[index]


def _at(point: Tensor, objective: Objective) -> Tensor:
    return point.to(device=objective.device, dtype=objective.dtype)


def _checked(vector: Tensor, trajectory: Trajectory, what: str) -> Tensor:
    if vector.shape != (trajectory.size,) or not bool(torch.isfinite(vector).all()):
        raise ValueError(
            f"the {what} must be finite and of shape ({trajectory.size},), got shape {tuple(vector.shape)}: "
            "pass one for the trajectory's parameters"
        )
    return vector.detach().cpu()


def _basis(directions: Sequence[Direction], trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Return ``Q`` and ``R`` with ``Q R = D``."""
    if not directions:
        raise ValueError("expected at least one direction to project onto, got none: pass two for a plane")
    columns = torch.stack(
        [_checked(item.vector, trajectory, f"direction {item.name!r}").double() for item in directions], 1
    )
    basis, triangle = torch.linalg.qr(columns)
    diagonal, norms = triangle.diagonal().abs(), columns.norm(dim=0)
    if not bool((diagonal > 1e-7 * norms).all()):  # also for NaN
        raise ValueError(
            f"the directions {[item.name for item in directions]} are dependent, or one is zero: expected directions "
            "that span a plane; choose others"
        )
    return basis, triangle


def _check_objective(objective: Objective, trajectory: Trajectory) -> Settings:
    """Return the settings of the losses along a trajectory."""
    shapes = tuple(tuple(shape) for shape in objective.layout.shapes)
    if (objective.layout.names, shapes) != (trajectory.names, trajectory.shapes):
        raise ValueError(
            f"the objective's parameters are not those of the trajectory {trajectory.label!r}: expected the same "
            "model and selection; pass parameters=list(trajectory.names) to the objective"
        )
    foreign = warn_of_statistics(objective, "along a trajectory", stacklevel=4)
    return {**objective.settings, "statistics": "of other weights"} if foreign else objective.settings


def grid(
    projections: Projection | Iterable[Projection] | Mapping[str, Projection],
    points: int = 25,
    *,
    margin: float = 0.15,
    square: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the grid of a slice that shows whole trajectories, for ``slice_2d(..., coordinates=grid(...))``.

    Parameters
    ----------
    projections
        One or several projections on one plane.
    points
        Number of grid points along each axis, at least 3. Default 25.
    margin
        Margin beyond the outermost points on each side, as a fraction of their extent. Default 0.15.
    square
        Whether both axes have the same length in weight space (default), so that an equal aspect makes a square.

    Returns
    -------
    tuple of Tensor
        The axes ``(x, y)``, each of shape ``(points,)`` and with 0 among them, so that the slice shows the centre.

    Raises
    ------
    ValueError
        No point is finite, a projection is not on a plane, there are fewer than 3 points, or the margin is negative.
    """
    if isinstance(projections, Projection):
        projections = [projections]
    several = list(projections.values() if isinstance(projections, Mapping) else projections)
    if points < 3 or margin < 0:
        raise ValueError(f"expected 3 points or more and a margin of 0 or more, got {points} and {margin}: leave them")
    if not several or any(item.coordinates.shape[1] != 2 for item in several):
        raise ValueError("expected projections onto a plane, two coordinates each: project onto two directions")
    coordinates = torch.cat([item.coordinates for item in several])
    coordinates = coordinates[torch.isfinite(coordinates).all(1)]
    if not len(coordinates):
        raise ValueError("no projected point is finite: expected one at least; look at the trajectory's weights")
    low, high = coordinates.amin(0).clamp_max(0), coordinates.amax(0).clamp_min(0)
    norms = torch.tensor(several[0].direction_norms, dtype=torch.float64)
    extent = (high - low) * norms
    extent = extent.max().expand(2) if square else extent
    extent = torch.where(extent > 0, extent, float(extent.max()) or 1.0) / norms
    half = extent * (0.5 + margin)
    middle = (low + high) / 2
    x, y = (_axis(float(m - h), float(m + h), points) for m, h in zip(middle, half, strict=True))
    return x, y


def _axis(low: float, high: float, points: int) -> Tensor:
    """Return equally spaced values, 0 among them, that reach at least from ``low`` to ``high``."""
    step = (high - low) / (points - 2)
    return (torch.arange(points, dtype=torch.float64) + math.floor(low / step)) * step
