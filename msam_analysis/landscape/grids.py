"""Axes of a slice: the coordinates of its points, in multiples of a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def symmetric(radius: float, points: int) -> Tensor:
    """Return ``points`` equidistant coordinates on ``[−radius, radius]``, with an exact 0 in the middle.

    Raises
    ------
    ValueError
        ``radius`` is not positive, or ``points`` is even.
    """
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be a positive number, got {radius!r}: 1.0 is the default")
    if not isinstance(points, int) or points < 1 or points % 2 == 0:
        raise ValueError(f"points must be odd, so that the centre is a grid point; got {points!r}: use 51, for example")
    half = points // 2
    positive = torch.arange(1, half + 1, dtype=torch.float64) * radius / max(half, 1)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def logarithmic(smallest: float, largest: float, points: int = 25, *, both_sides: bool = False) -> Tensor:
    """Return coordinates that grow by a constant factor, for the axis of a plot against ρ (exhibits F4A to F4C).

    Parameters
    ----------
    smallest, largest
        First and last coordinate, both positive.
    points
        Number of coordinates from ``smallest`` to ``largest``. Default 25.
    both_sides
        Add 0 and the same coordinates with a minus sign, ``2 · points + 1`` in all.

    Returns
    -------
    Tensor
        Coordinates for the argument ``coordinates`` of a slice, shape ``(points,)`` or ``(2 · points + 1,)``, float64,
        increasing.

    Raises
    ------
    ValueError
        The ends are not positive, finite and in order, or there are fewer than two points.

    Examples
    --------
    >>> logarithmic(0.01, 10.0, 4).tolist()
    [0.01, 0.1, 1.0, 10.0]
    """
    if not 0 < smallest < largest < math.inf:
        raise ValueError(f"expected 0 < smallest < largest, got {smallest!r} and {largest!r}: use 1e-3 and 10.0")
    if not isinstance(points, int) or points < 2:
        raise ValueError(f"points must be an integer of at least 2, got {points!r}: use 25, for example")
    growth = math.log10(largest / smallest) / (points - 1)
    inner = [smallest * 10 ** (growth * index) for index in range(1, points - 1)]
    positive = torch.tensor([smallest, *inner, largest], dtype=torch.float64)
    if not both_sides:
        return positive
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def between(points: int = 51, margin: float = 0.25) -> Tensor:
    """Return equidistant coordinates from one point to another and a little beyond, with an exact 0 and an exact 1.

    Parameters
    ----------
    points
        Number of coordinates, at least 2. Default 51.
    margin
        Approximate distance beyond 0 and beyond 1. Default 0.25.

    Returns
    -------
    Tensor
        Coordinates for the argument ``coordinates`` of a slice along
        :func:`msam_analysis.landscape.directions.interpolation`, shape ``(points,)``, float64.

    Raises
    ------
    ValueError
        There are fewer than two points, or the margin is negative or not finite.

    Examples
    --------
    >>> between(7).tolist()
    [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    """
    if not isinstance(points, int) or points < 2 or not 0 <= margin < math.inf:
        raise ValueError(
            f"expected at least 2 points and a margin of at least 0, got {points!r} and {margin!r}: use 51 and 0.25"
        )
    beyond = min(round((points - 1) * margin / (1 + 2 * margin)), (points - 2) // 2)
    return (torch.arange(points, dtype=torch.float64) - beyond) / (points - 1 - 2 * beyond)


def explicit(coordinates: Tensor | Sequence[float]) -> Tensor:
    """Return the given coordinates as a checked tensor.

    Raises
    ------
    ValueError
        They are not finite, not increasing or not one-dimensional.
    """
    grid = torch.as_tensor(coordinates, dtype=torch.float64).cpu()
    increasing = grid.ndim == 1 and len(grid) > 0 and bool((grid[1:] > grid[:-1]).all())
    if not increasing or not bool(torch.isfinite(grid).all()):
        raise ValueError(f"coordinates must be finite and increasing, shape (points,); got {coordinates!r}")
    return grid


def two(value: Any, name: str) -> tuple[Any, Any]:
    """Return a pair as it was given, or a single number twice.

    Raises
    ------
    ValueError
        The value is neither a pair nor a number.
    """
    if isinstance(value, int | float):
        return value, value
    if not isinstance(value, tuple | list) or len(value) != 2:
        came = f"{len(value)} of them" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
        raise ValueError(f"expected two {name}, one for x and one for y; got {came}")
    return value[0], value[1]
