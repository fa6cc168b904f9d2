"""One- and two-dimensional slices of the loss.

The floor is one forward pass a point; the point itself is computed in place in one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from msam_analysis.directions import Direction, as_direction
from msam_analysis.objective import Objective
from msam_analysis.results import Slice1D, Slice2D


def slice_1d(
    objective: Objective,
    direction: Direction | Tensor,
    radius: float = 1.0,
    points: int = 51,
    *,
    coordinates: Tensor | Sequence[float] | None = None,
    progress: bool = False,
) -> Slice1D:
    """Return ``L(w + α d)`` on a grid of ``α``.

    Parameters
    ----------
    objective
        The loss; its current weights are the centre.
    direction
        ``d``, a direction or a flat tensor of shape ``(size,)``; it is applied as it is, never rescaled.
    radius
        The grid covers ``[−radius, radius]``, in multiples of ``d``. Default 1, as in Li et al. (2018).
    points
        Odd, so that the centre is a grid point. Default 51.
    coordinates
        Explicit increasing grid instead of ``radius`` and ``points``; it need not contain 0.
    progress
        Show a progress bar.

    Returns
    -------
    Slice1D
        The coordinates are the displacements applied; the loss at 0 is the centre's, exactly.

    Raises
    ------
    ValueError
        A grid that is even, not finite or not increasing, or a direction that does not fit.
    """
    line = as_direction(direction, objective)
    grid = _grid(radius, points) if coordinates is None else _explicit(coordinates)
    losses = _sweep(objective, [line.vector], grid[:, None], progress)
    return Slice1D(
        coordinates=grid,
        loss=losses,
        center_loss=_center(losses, (grid == 0), objective),
        direction=line.name,
        direction_norm=line.norm,
        settings=objective.settings,
    )


def slice_2d(
    objective: Objective,
    directions: tuple[Direction | Tensor, Direction | Tensor],
    radius: float | tuple[float, float] = 1.0,
    points: int | tuple[int, int] = 51,
    *,
    coordinates: tuple[Tensor | Sequence[float], Tensor | Sequence[float]] | None = None,
    progress: bool = False,
) -> Slice2D:
    """Return ``loss[i, j] = L(w + x[i] d1 + y[j] d2)`` on a grid (exhibit A13).

    Parameters
    ----------
    objective
        The loss; its current weights are the centre.
    directions
        ``(d1, d2)``, each applied as it is: the cosine between them is reported, not removed.
    radius
        One for both axes or one each; see :func:`slice_1d`.
    points
        Odd; one for both axes or one each.
    coordinates
        Explicit increasing grids ``(x, y)`` instead.
    progress
        Show a progress bar.

    Returns
    -------
    Slice2D
        First index x, second index y.

    Raises
    ------
    ValueError
        As for :func:`slice_1d`.
    """
    first, second = (as_direction(direction, objective) for direction in _two(directions, "directions"))
    if coordinates is None:
        radii, counts = _two(radius, "radii"), _two(points, "numbers of points")
        x, y = (_grid(r, n) for r, n in zip(radii, counts, strict=True))
    else:
        x, y = (_explicit(axis) for axis in _two(coordinates, "coordinates"))
    pairs = torch.cartesian_prod(x, y).reshape(-1, 2)
    losses = _sweep(objective, [first.vector, second.vector], pairs, progress).reshape(len(x), len(y))
    product = first.norm * second.norm
    return Slice2D(
        x=x,
        y=y,
        loss=losses,
        center_loss=_center(losses, (x == 0)[:, None] & (y == 0), objective),
        directions=(first.name, second.name),
        direction_norms=(first.norm, second.norm),
        cosine=float(first.vector.cpu().double() @ second.vector.cpu().double()) / product if product > 0 else math.nan,
        settings=objective.settings,
    )


def _sweep(objective: Objective, directions: list[Tensor], coordinates: Tensor, progress: bool) -> Tensor:
    center = objective.point()
    at = torch.empty_like(center)
    losses = torch.empty(len(coordinates), dtype=torch.float64)
    rows: Iterable[list[float]] = coordinates.tolist()
    if progress:
        # Imported where it is used: in a notebook without widgets the import alone warns.
        from tqdm.auto import tqdm

        rows = tqdm(rows, total=len(coordinates), desc="loss slice", unit="point")
    for index, row in enumerate(rows):
        at.copy_(center)
        for alpha, direction in zip(row, directions, strict=True):
            if alpha:
                at.add_(direction, alpha=alpha)
        losses[index] = objective.loss(at)
    return losses


def _center(losses: Tensor, at_center: Tensor, objective: Objective) -> float:
    return float(losses[at_center][0]) if bool(at_center.any()) else float(objective.loss())


def _two(value: Any, name: str) -> tuple[Any, Any]:
    """Return a pair: as given, or a single number twice."""
    if isinstance(value, int | float):
        return value, value
    if not isinstance(value, tuple | list) or len(value) != 2:
        came = f"{len(value)} of them" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
        raise ValueError(f"expected two {name}, one for x and one for y; got {came}")
    return value[0], value[1]


def _grid(radius: float, points: int) -> Tensor:
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be a positive number, got {radius!r}: 1.0 is the default")
    if not isinstance(points, int) or points < 1 or points % 2 == 0:
        raise ValueError(f"points must be odd, so that the centre is a grid point; got {points!r}: use 51, for example")
    half = points // 2
    # Symmetric by construction, with an exact 0 in the middle.
    positive = torch.arange(1, half + 1, dtype=torch.float64) * radius / max(half, 1)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def _explicit(coordinates: Tensor | Sequence[float]) -> Tensor:
    grid = torch.as_tensor(coordinates, dtype=torch.float64).cpu()
    increasing = grid.ndim == 1 and len(grid) > 0 and bool((grid[1:] > grid[:-1]).all())
    if not increasing or not bool(torch.isfinite(grid).all()):
        raise ValueError(f"coordinates must be finite and increasing, shape (points,); got {coordinates!r}")
    return grid
