"""A dense surface from few points: interpolate, find where it is wrong, measure there, until it is right.

There are several interpolants: radial basis functions of four kinds, of the values and of their logarithm. The one that
predicted the newest points best is used. Its error at a measured point, if that point is left out, says how rough the
surface is there; in between the error falls with the distance to the next measured point. New points go where it is
largest, and some into the widest gaps, so that unexpected features are found as well. Every new point was predicted,
its value and its error: the largest errors that were found, over the largest that were expected, correct the estimate.

An error is a fraction of the range of the values. Where a picture would have a logarithmic scale, it is also a fraction
of the range of their logarithms, as such a scale shows the floor of a steep valley as plainly as its rims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree

from msam_analysis.results.slices import LARGE_RANGE

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Kernel = Literal["cubic", "quintic", "thin_plate_spline", "linear"]
Candidate = tuple[Kernel, bool]  # the kernel, and whether it interpolates the logarithm

_KERNELS: tuple[Kernel, ...] = get_args(Kernel)
_START = {1: 9, 2: 7}  # points along an axis to begin with, by dimension
_GROWTH = 0.12  # new points in a round, as a fraction of the points so far
_FEWEST = {1: 2, 2: 6}  # new points in a round, by dimension
_GAPS = 0.3  # fraction of the new points that fill gaps
_HELD = 0.25  # the newest predictions rank the interpolants: this fraction of the points, and at least so many
_HELD_AT_LEAST = 24
_POWER = 1.5  # the error grows with this power of the distance to the next measured point: kinks have 1, smooth parts 2
_NEIGHBOURS = 6  # measured points that tell the roughness of a place
_MEAN = 4  # by the mean of this power: 2 has let single kinks escape
_ROUNDS = 3  # rounds whose errors, over the expected ones, correct the estimate
_LEAST = 1.0  # and by this factor at least: the errors that were found may have been small by chance
# Factor from the corrected estimate to the one that is given: it is _SAFETY (1 + sqrt(_FEW / points)). Few points have
# little to judge by. Chosen on 126 planes of 14 networks and on the tests; benchmarks/refinement.py has others.
_SAFETY = 1.5
_FEW = {1: 40, 2: 150}
_PAYS = 0.7  # beyond this fraction of the grid interpolation does not pay: measure the rest
_NEAREST = 5  # neighbours that are checked for values that are not finite


@dataclass(frozen=True)
class Surface:
    """A quantity on the whole grid, with an estimate of its error.

    Attributes
    ----------
    values
        Measured values, and interpolated ones at the other points, shape ``(points,)``.
    error
        Estimate of the largest error of the interpolated values; 0 if there are none.
    range
        Largest minus smallest finite value that was measured.
    relative
        The error as a fraction of the range, for the values or for their logarithms, whichever is larger.
    """

    values: Array
    error: float
    range: float
    relative: float


class _Round(NamedTuple):
    """What a round found at its new points, on both scales: errors of every interpolant, and the expected ones."""

    misses: dict[Candidate, Array]
    used: Candidate
    expected: Array


def _units(known: Array, *, logarithm: bool) -> Array:
    """Return the range of some finite values and that of their logarithms, infinite if these do not count."""
    if len(known) == 0:
        return np.full(2, math.inf)
    low, high = float(known.min()), float(known.max())
    counts = logarithm and low > 0 and high >= LARGE_RANGE * low
    rounding = 1e-10 * max(abs(low), abs(high)) or 1.0
    return np.array([high - low + rounding, math.log(high / low) if counts else math.inf])


def _fractions(errors: Array, units: Array) -> Array:
    """Return errors, shape ``(..., 2)``, as fractions of the range on each scale, at most 1; 0 where it does not count.

    The logarithm of a value that is not positive has an error beyond any range.
    """
    counts = np.isfinite(units)
    found: Array = np.where(counts, np.minimum(errors / np.where(counts, units, 1.0), 1.0), 0.0)
    return found


class Interpolation:
    """Interpolants of one quantity, with the error of each at points that it had not seen.

    Parameters
    ----------
    positions
        Positions of the grid points, each axis from 0 to 1, shape ``(points, dimensions)``.
    logarithm
        Whether the logarithm counts as well if the values would be drawn on a logarithmic scale.
    """

    def __init__(self, positions: Array, *, logarithm: bool) -> None:
        self.positions = positions
        self.logarithm = logarithm
        self.units = _units(np.zeros(0), logarithm=False)
        self.predictions: dict[Candidate, Array] = {}
        self.ranking: list[Candidate] = []
        self.rounds: list[_Round] = []
        self.expected: Array = np.ones((len(positions), 2))

    def learn(self, values: Array, measured: Mask, new: Sequence[int] = ()) -> Surface:
        """Judge the present interpolants by new points, and fit them again.

        Parameters
        ----------
        values
            Values at all points, shape ``(points,)``; only measured ones count.
        measured
            Whether each point was measured, shape ``(points,)``.
        new
            Points measured since the last call.

        Returns
        -------
        Surface
            The surface of the best interpolant; the error is infinite while too little is known.
        """
        known = int(measured.sum())
        finite = measured & np.isfinite(values)
        judging = [point for point in new if finite[point]]
        if judging and self.ranking:
            misses = {name: _distances(found[judging], values[judging]) for name, found in self.predictions.items()}
            self.rounds.append(_Round(misses, self.ranking[0], self.expected[judging].max(axis=0)))
        spread = float(np.ptp(values[finite])) if finite.any() else 0.0
        self.units = _units(values[finite], logarithm=self.logarithm)
        if known == len(measured):
            return Surface(values.copy(), 0.0, spread, 0.0)
        self.predictions = self._fit(values, finite, spread)
        self.ranking = sorted(self.predictions, key=self._mean_error)
        self.expected = self._expect(values, measured)
        if not self.ranking:
            return Surface(np.where(measured, values, math.nan), math.inf, spread, math.inf)
        few = math.sqrt(_FEW[self.positions.shape[1]] / known)
        errors: Array = np.full(2, math.inf)
        if len(self.rounds) > 1 and not self.unsafe(values, measured).any():
            errors = _SAFETY * (1 + few) * self._correction() * self.expected[~measured].max(axis=0)
        surface = np.where(measured, values, self.predictions[self.ranking[0]])
        return Surface(surface, float(errors[0]) * spread, spread, float(errors.max()))

    def _mean_error(self, name: Candidate) -> float:
        """Return the mean error of an interpolant at the newest points, on the scale where it is larger."""
        errors: list[float] = []
        total = sum(len(round_.misses[round_.used]) for round_ in self.rounds)
        for latest in reversed(self.rounds):
            if len(errors) >= max(_HELD_AT_LEAST, _HELD * total):
                break
            if name in latest.misses:
                errors += _fractions(latest.misses[name], self.units).max(axis=1).tolist()
        return float(np.mean(errors)) if errors else 1.0

    def _expect(self, values: Array, measured: Mask) -> Array:
        """Return the error that is expected at every point, as a fraction on both scales, shape ``(points, 2)``."""
        if not self.ranking:
            return np.ones((len(self.positions), 2))
        kernel, logarithm = self.ranking[0]
        finite = measured & np.isfinite(values)
        places, found = self.positions[finite], values[finite]
        tree = cKDTree(places)
        # How rough it is at every measured point: its error if it is left out, over a power of the gap that is left.
        rest = _left_out(places, np.log(found) if logarithm else found, kernel)
        predicted = found * np.exp(np.minimum(-rest, 700.0)) if logarithm else found - rest
        gaps: Array = np.asarray(tree.query(places, k=2)[0])[:, 1:]
        rough = _fractions(_distances(predicted, found), self.units) / gaps**_POWER
        # How rough it is at every point of the grid: a mean over the nearest measured ones, nearly their largest.
        away, nearest = tree.query(self.positions, k=range(1, min(_NEIGHBOURS, len(places)) + 1))
        half_a_step = 0.5 * len(self.positions) ** (-1 / self.positions.shape[1])
        weights = 1.0 / (away**2 + half_a_step**2)
        powers = (weights[:, :, None] * rough[nearest] ** _MEAN).sum(axis=1) / weights.sum(axis=1, keepdims=True)
        distance: Array = np.asarray(cKDTree(self.positions[measured]).query(self.positions)[0])
        expected: Array = np.maximum(powers ** (1 / _MEAN) * distance[:, None] ** _POWER, 0.5 * self._apart())
        return expected

    def _apart(self) -> Array:
        """Return the distance of the best interpolant from the next best of its kind, as fractions on both scales."""
        # An interpolant of the logarithm differs from one of the values nearly everywhere.
        relatives = [name for name in self.ranking if name[1] == self.ranking[0][1]]
        if len(relatives) < 2:
            return np.zeros((len(self.positions), 2))
        return _fractions(_distances(self.predictions[relatives[0]], self.predictions[relatives[1]]), self.units)

    def _correction(self) -> Array:
        """Return the factor on both scales from the expected errors to those that the last rounds found."""
        factors = [
            _fractions(latest.misses[latest.used], self.units).max(axis=0) / np.maximum(latest.expected, 1e-12)
            for latest in self.rounds[-_ROUNDS:]
        ]
        worst: Array = np.maximum(np.max(factors, axis=0), _LEAST)
        return worst

    def unsafe(self, values: Array, measured: Mask) -> Mask:
        """Return the unmeasured points with a neighbour that is not finite: no interpolation tells their values."""
        broken = measured & ~np.isfinite(values)
        if not broken.any():
            return np.zeros_like(measured)
        known = np.flatnonzero(measured)
        _, nearest = cKDTree(self.positions[known]).query(self.positions, k=min(_NEAREST, len(known)))
        near: Mask = broken[known][nearest.reshape(len(self.positions), -1)].any(axis=1) & ~measured
        return near

    def _fit(self, values: Array, finite: Mask, spread: float) -> dict[Candidate, Array]:
        known = values[finite]
        if len(known) == 0:
            return {}
        positive = known.min() > 0
        columns: Array = np.stack([known, np.log(known)], 1) if positive else known[:, None]
        found: dict[Candidate, Array] = {}
        for kernel in _KERNELS:
            try:
                fitted = RBFInterpolator(self.positions[finite], columns, kernel=kernel)(self.positions)
            except (ValueError, np.linalg.LinAlgError):  # too few points for this kernel, or all on one line
                continue
            found[kernel, False] = fitted[:, 0]
            if positive:
                # An interpolant that overshoots is wrong anyway: keep it from overflowing.
                found[kernel, True] = np.exp(np.minimum(fitted[:, 1], np.log(known.max() + 10 * spread)))
        return found


def _distances(a: Array, b: Array) -> Array:
    """Return the distances of values, and of their logarithms, shape ``(points, 2)``; infinite where unknown."""
    positive = (a > 0) & (b > 0)
    logarithms = np.log(a, where=positive, out=np.zeros_like(a)) - np.log(b, where=positive, out=np.zeros_like(b))
    found: Array = np.stack([np.abs(a - b), np.where(positive, np.abs(logarithms), math.inf)], axis=-1)
    return np.where(np.isnan(found), math.inf, found)


def _left_out(places: Array, values: Array, kernel: Kernel) -> Array:
    """Return each value less its prediction from all others, shape ``(points,)``; infinite where that is not known.

    With the inverse of the interpolant's matrix it is ``(A⁻¹ y)_i / (A⁻¹)_ii`` (Rippa 1999): nothing is fitted anew.
    """
    away = np.linalg.norm(places[:, None] - places[None], axis=2)
    if kernel == "thin_plate_spline":
        radial = away**2 * np.log(np.where(away > 0, away, 1.0))
    else:
        radial = away ** {"linear": 1, "cubic": 3, "quintic": 5}[kernel]
    degree = {"linear": 0, "thin_plate_spline": 1, "cubic": 1, "quintic": 2}[kernel]
    axes = [2 * axis - 1 for axis in places.T]
    terms = [np.ones(len(places)), *(axes if degree > 0 else [])]
    if degree > 1:
        terms += [axes[i] * axes[j] for i in range(len(axes)) for j in range(i + 1)]
    plain = np.stack(terms, axis=1)
    matrix = np.block([[radial, plain], [plain.T, np.zeros((plain.shape[1], plain.shape[1]))]])
    try:
        inverse = np.linalg.inv(matrix)[: len(places), : len(places)]
    except np.linalg.LinAlgError:  # all on one line
        return np.full(len(places), math.inf)
    diagonal = np.diag(inverse)
    rest: Array = np.where(diagonal != 0, inverse @ values / np.where(diagonal != 0, diagonal, 1.0), math.inf)
    return rest


def refine_grid(
    measure: Callable[[Sequence[int]], Mapping[str, Array]],
    shape: Sequence[int],
    tolerance: float,
    report: Callable[[Mapping[str, Surface]], None],
) -> None:
    """Measure points of a grid until the first quantity is known everywhere to the tolerance.

    The same values lead to the same points, so that a measurement that was stopped continues in the same way from the
    points it has.

    Parameters
    ----------
    measure
        ``measure(points)`` measures grid points, given by their index in row-major order. It returns every quantity on
        the whole grid, shape ``(points,)``, with any value where nothing was measured.
    shape
        Shape of the grid, one or two axes.
    tolerance
        Largest error of the first quantity, as a fraction of its range. If the quantity is positive and its largest
        value is ten times its smallest or more, the same holds for its logarithm.
    report
        Called after every round with the surfaces.

    Raises
    ------
    ValueError
        ``tolerance`` is not between 0 and 1.
    """
    positions = _positions(shape)
    start = _coarse(shape)
    measured = np.zeros(len(positions), dtype=bool)
    measured[start] = True
    quantities = measure(start)
    interpolations = {name: Interpolation(positions, logarithm=number == 0) for number, name in enumerate(quantities)}
    new: list[int] = []
    while True:
        surfaces = {name: interpolations[name].learn(values, measured, new) for name, values in quantities.items()}
        name, loss = next(iter(surfaces.items()))
        report(surfaces)
        if loss.relative <= tolerance or measured.all():
            return
        new = _next(interpolations[name], quantities[name], measured)
        measured[new] = True
        quantities = measure(new)


def _positions(shape: Sequence[int]) -> Array:
    axes = [np.linspace(0.0, 1.0, count) for count in shape if count > 1] or [np.zeros(1)]
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], 1)


def _coarse(shape: Sequence[int]) -> list[int]:
    """Return the points of a coarse grid, with corners, edges and the middle."""
    axes = [np.unique(np.linspace(0, count - 1, min(_START[len(shape)], count)).round().astype(int)) for count in shape]
    return sorted(np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), tuple(shape)).ravel().tolist())


def _next(interpolation: Interpolation, values: Array, measured: Mask) -> list[int]:
    """Return the points to measure next."""
    left = int((~measured).sum())
    unsafe = np.flatnonzero(interpolation.unsafe(values, measured))
    wanted = max(_FEWEST[interpolation.positions.shape[1]], math.ceil(_GROWTH * measured.sum()), len(unsafe))
    if measured.sum() + wanted > _PAYS * len(measured) or wanted >= left:
        return [int(point) for point in np.flatnonzero(~measured)]
    chosen = [int(point) for point in unsafe]
    taken = measured.copy()
    taken[chosen] = True
    distance: Array = np.asarray(cKDTree(interpolation.positions[taken]).query(interpolation.positions)[0])
    gap = np.maximum(distance, 1e-9)
    expected = interpolation.expected.max(axis=1)
    for number in range(wanted - len(chosen)):
        # A point close to one that is about to be measured will be known better.
        score = distance if number < _GAPS * wanted else expected * np.minimum(1.0, distance / gap) ** _POWER
        point = int(np.argmax(np.where(taken, -1.0, score)))
        chosen.append(point)
        taken[point] = True
        away = np.linalg.norm(interpolation.positions - interpolation.positions[point], axis=1)
        distance = np.minimum(distance, away)
    return sorted(chosen)
