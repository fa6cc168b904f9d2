"""One- and two-dimensional slices of the loss and of metrics at the same points.

A slice costs at least one forward pass for each point. Two options save more, and each reports its error: ``refine``
interpolates between points that are chosen where it was wrong, ``samples`` evaluates a part of the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msam_analysis.landscape import grids
from msam_analysis.landscape.evaluator import ERRORS, Evaluator
from msam_analysis.landscape.identity import identity
from msam_analysis.landscape.journal import Journal
from msam_analysis.landscape.metrics import Metric
from msam_analysis.landscape.point_table import PointTable
from msam_analysis.landscape.refine import Surface, refine_grid
from msam_analysis.landscape.sampling import drawn
from msam_analysis.landscape.together import Together, fastest
from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.direction import Direction, as_direction
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.ranks import Ranks
from msam_analysis.objective.rounding import resolution, warn_if_below
from msam_analysis.objective.statistics import warn_of_statistics
from msam_analysis.objective.vectors import read, widest
from msam_analysis.results import Slice1D, Slice2D
from msam_analysis.results.fingerprint import fingerprint

Path = str | os.PathLike[str]

_TAKEN = ("loss", "x", "y", "coordinate", "distance", "evaluated", *ERRORS)
# Relative difference of the losses at the centre, then and now, that rounding on another machine may cause.
_SAME = 1e-4


@numbers
def slice_1d(
    objective: Objective,
    direction: Direction | Tensor,
    radius: float = 1.0,
    points: int = 51,
    *,
    coordinates: Tensor | Sequence[float] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    refine: float | None = None,
    samples: int | None = None,
    seed: int = 0,
    path: Path | None = None,
    progress: bool = False,
    chunk: int | None = None,
    distributed: bool = True,
) -> Slice1D:
    """Return ``L(w + α d)`` on a grid of ``α``.

    Memory: the line, the weights and a point, or ``chunk`` points where several are evaluated at once; no graph.

    Parameters
    ----------
    objective
        The loss; its current weights are the centre.
    direction
        ``d``, a direction or a flat tensor of shape ``(size,)``; it is applied as it is, never rescaled.
    radius
        Half the length of the grid ``[−radius, radius]``, in multiples of ``d``. Default 1, as in Li et al. (2018).
    points
        Number of grid points, odd, so that the centre is one of them. Default 51.
    coordinates
        Increasing grid instead of ``radius`` and ``points``, in multiples of ``d``; it need not contain 0.
        :func:`~msam_analysis.landscape.logarithmic` makes a logarithmic one.
    metrics, refine, samples, seed, path, progress, chunk, distributed
        Options, as in :func:`slice_2d`.

    Returns
    -------
    Slice1D
        The losses at the coordinates; the loss at coordinate 0 is exactly that of the centre.

    Raises
    ------
    ValueError
        The grid is even, not finite or not increasing, or the direction does not fit; otherwise as :func:`slice_2d`.
    """
    (line,) = _checked(objective, direction)
    grid = grids.symmetric(radius, points) if coordinates is None else grids.explicit(coordinates)
    labels = {"coordinates": grid, "direction": line.name, "direction_norm": line.norm}
    options = metrics, refine, samples, seed, path, progress, chunk, distributed
    result: Slice1D = _Measurement(objective, [line], {"x": grid}, Slice1D, labels, *options).run()
    return result


@numbers
def slice_2d(
    objective: Objective,
    directions: tuple[Direction | Tensor, Direction | Tensor],
    radius: float | tuple[float, float] = 1.0,
    points: int | tuple[int, int] = 51,
    *,
    coordinates: tuple[Tensor | Sequence[float], Tensor | Sequence[float]] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    refine: float | None = None,
    samples: int | None = None,
    seed: int = 0,
    path: Path | None = None,
    progress: bool = False,
    chunk: int | None = None,
    distributed: bool = True,
) -> Slice2D:
    """Return ``loss[i, j] = L(w + x[i] d1 + y[j] d2)`` on a grid (exhibit A13).

    Parameters
    ----------
    objective
        The loss; its current weights are the centre.
    directions
        ``(d1, d2)``, each applied as it is: the cosine between them is reported, not removed; see
        :func:`msam_analysis.landscape.directions.orthogonalized`.
    radius
        Half the length of the axes, in multiples of the directions; one number, or one for each axis. Default 1.
    points
        Number of grid points along an axis, odd; one number, or one for each axis. Default 51.
    coordinates
        Increasing grids ``(x, y)`` instead of ``radius`` and ``points``, in multiples of the directions.
    metrics
        Names and metrics to measure at the same points: ``metrics.accuracy``, ``metrics.sample_losses`` or another
        :class:`~msam_analysis.landscape.metrics.OutputMetric`, which share the loss's forward pass;
        ``metrics.top_eigenvalue``, or any function ``f(objective, w)`` that returns a number or a flat tensor.
    refine
        Tolerance for interpolation, as a fraction of the range of the loss. Only as many points are evaluated as are
        needed until the largest error of the interpolated surface is estimated to be smaller. Where the loss spans a
        factor of ten or more, this holds for its logarithm too, as pictures then have a logarithmic scale. 0.01 usually
        takes one point in twenty. ``result.evaluated`` says which points were computed, ``result.error`` how large the
        error of the others may be. Metrics of one number are interpolated too, each with its own error in
        ``result.metric_errors``. Default: every point is evaluated.
    samples
        Number of samples, drawn at random without replacement, the same at every point; ``result.interval()`` then
        covers the loss on all data. Default: all samples.
    seed
        Seed of the draw of ``samples``.
    path
        A ``.safetensors`` file to which the result is written while it grows, at most a second or a point behind;
        :func:`msam_analysis.results.load` can read it at any time. If it exists, the measurement continues where it was
        stopped and ends in the same bits.
    progress
        Show a progress bar.
    chunk
        Number of points in one batch, by ``vmap``: for small networks on large devices. Losses in a batch may differ
        from single ones by rounding. Default: measured on a GPU; 1 on a CPU.
    distributed
        Whether the processes of :mod:`torch.distributed`, if it is initialised, share the points (default). All of them
        must call this function with the same arguments, and all get the same result as one process alone. ``False``:
        this process measures alone. Processes that share the batches of the objective (its ``ranks``) evaluate every
        point together, whatever is said here.

    Returns
    -------
    Slice2D
        The losses, with x as the first index and y as the second.

    Raises
    ------
    ValueError
        A grid is even, not finite or not increasing; a direction does not fit; ``refine``, ``samples`` or ``chunk`` is
        out of range or not possible here; the name of a metric is taken, or its value is not a number; ``path`` holds
        another measurement; the processes measure different things.
    """
    first, second = _checked(objective, *grids.two(directions, "directions"))
    if coordinates is None:
        radii, counts = grids.two(radius, "radii"), grids.two(points, "numbers of points")
        x, y = (grids.symmetric(r, n) for r, n in zip(radii, counts, strict=True))
    else:
        x, y = (grids.explicit(axis) for axis in grids.two(coordinates, "coordinates"))
    space = objective.space
    one, two = (direction.vector.to(widest(objective.device)) for direction in (first, second))
    length, height, inner = read(space.norm(one), space.norm(two), space.dot(one, two))
    product = length * height
    labels = {
        "x": x,
        "y": y,
        "directions": (first.name, second.name),
        "direction_norms": (length, height),
        "cosine": inner / product if product > 0 else math.nan,
    }
    options = metrics, refine, samples, seed, path, progress, chunk, distributed
    result: Slice2D = _Measurement(objective, [first, second], {"x": x, "y": y}, Slice2D, labels, *options).run()
    return result


def _checked(objective: Objective, *directions: Direction | Tensor) -> list[Direction]:
    """Return checked directions; a bare tensor may lead to another network, which a :class:`Direction` would say."""
    found = [as_direction(direction, objective) for direction in directions]
    if any(isinstance(direction, Tensor) for direction in directions):
        warn_of_statistics(
            objective,
            "along a bare tensor, which may lead to another network (a Direction(tensor, name) is taken not to)",
            stacklevel=4,
        )
    return found


@dataclass(eq=False)
class _Measurement:
    """One slice on its way from a grid to a result: where it goes, how it is labelled, and the caller's options."""

    objective: Objective
    lines: Sequence[Direction]
    axes: Mapping[str, Tensor]
    kind: type[Any]
    labels: Mapping[str, Any]
    metrics: Mapping[str, Metric] | None
    refine: float | None
    samples: int | None
    seed: int
    path: Path | None
    progress: bool
    chunk: int | None
    distributed: bool

    def __post_init__(self) -> None:
        """Check the options, open the file, measure the centre, and recall what is already known."""
        self._check()
        self.shape = tuple(len(axis) for axis in self.axes.values())
        # Processes that share the batches evaluate every point together; others share the points.
        self.ranks = self.objective.batches.ranks
        self.together = self.ranks.count > 1
        if not self.together:
            self.ranks = Ranks(together=self.distributed)
        self.part, self.fraction = self.objective, None
        chosen = {"refine": self.refine, "sampling seed": None if self.samples is None else self.seed}
        self.settings: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        if self.samples is not None:
            self.part = drawn(self.objective, self.samples, self.seed)
            self.fraction = self.samples / self.objective.samples
            self.settings["samples drawn from"] = self.objective.samples
        self.identity = self._identity()
        self.journal = Journal(self.path if self.ranks.rank == 0 else None)
        self.found = self._found()
        with self.ranks.apart("the centre of a slice"):
            lines = [line.vector for line in self.lines]
            self.evaluator = Evaluator(self.part, lines, self.metrics, self.fraction)
        self.center = float(self.evaluator.center[0])
        row, widths = self.evaluator.center, self.evaluator.widths
        self.center_metrics: Mapping[str, Tensor] = {
            name: row[column] if widths[name] else row[column.start]
            for name, column in self._columns().items()
            if name in (self.metrics or {})
        }
        self.surfaces: Mapping[str, Surface] = {}
        grid = torch.cartesian_prod(*self.axes.values()).reshape(-1, len(self.axes))
        away = grid[(grid != 0).any(1)]
        if len(away):
            self.evaluator.warn_of_rounding(away[away.abs().sum(1).argmin()].tolist())
        self.table = self._table(grid)
        self._recall(grid)

    def run(self) -> Any:
        """Measure the missing points, and return the result."""
        if self.found is not None and self.found.complete:
            return self.found
        total = None if self.refine is not None else len(self.table.coordinates)
        try:
            with self.ranks.apart("measuring a slice"), self.table.shown(progress=self.progress, total=total):
                if self.refine is None:
                    self.table.measure(range(len(self.table.coordinates)))
                else:
                    self._refine(self.refine)
        except BaseException:
            self.journal.write(self._snapshot, now=True)
            raise
        result = self._result(complete=True)
        finite = result.loss[result.loss.isfinite()]
        if len(finite):
            warn_if_below("range of the loss on the slice", float(finite.max() - finite.min()), result.resolution)
        self.journal.write(lambda: result, now=True)
        return result

    # -------------------------------------------------------------------------------------------------------- beginning

    def _check(self) -> None:
        if self.refine is not None and not 0 < self.refine < 1:
            raise ValueError(
                f"refine must be a fraction of the range between 0 and 1, got {self.refine!r}: 0.01 is one per cent"
            )
        if self.chunk is not None and (isinstance(self.chunk, bool) or self.chunk < 1):
            raise ValueError(
                f"chunk must be a positive number of points, got {self.chunk!r}: leave it out to have it chosen"
            )
        if not all(isinstance(name, str) for name in self.metrics or {}):
            raise TypeError("metrics must be names to functions, got no names: pass {'accuracy': metrics.accuracy}")
        for name in self.metrics or {}:
            if name in _TAKEN or "/" in name:
                raise ValueError(f"the name {name!r} of a metric is taken or holds a '/': expected another one")

    def _identity(self) -> dict[str, str]:
        if self.path is None and self.ranks.count == 1:
            return {}
        codes = {f"metric {name}": fingerprint(metric) for name, metric in (self.metrics or {}).items()}
        options = {"metrics": ", ".join(self.metrics or {}), "points at once": self.chunk, **codes, **self.settings}
        found = identity(self.part, self.lines, self.axes, options)
        self.ranks.check_alike(found)
        return found

    def _found(self) -> Any:
        """Return the slice in the file, in every process."""
        found, error = None, ""
        try:
            found = self.journal.resumed(self.kind, self.identity)
        except ValueError as refusal:  # the other processes must hear of it: they would wait for ever
            error = str(refusal)
        found, error = self.ranks.from_first((found, error))
        if error:
            raise ValueError(error)
        return found

    def _table(self, grid: Tensor) -> PointTable:
        size = self.chunk
        if size is None and self.found is not None:
            size = int(self.found.settings.get("points at once", 1))
        if size is None:
            alone = self.ranks.rank == 0 and not self.together
            size = self.ranks.from_first(fastest(self.evaluator, len(grid)) if alone else 1)
        if size > 1 and self.part.evaluation.shards is not None:
            raise ValueError(
                f"expected points one after the other where processes share the weights, got chunk={size}: leave it out"
            )
        if size > 1:
            self.settings["points at once"] = size
        source = self.evaluator if size == 1 else Together(self.evaluator, size)
        width, seconds = len(self.evaluator.center), self.evaluator.seconds
        written = partial(self.journal.write, self._snapshot)
        how: dict[str, Any] = {"ranks": self.ranks, "together": self.together, "written": written}
        return PointTable(source.rows, grid, width, size=size, seconds=seconds, **how)

    def _recall(self, grid: Tensor) -> None:
        """Enter the known points: the centre, and those in the file."""
        found, table = self.found, self.table
        if found is not None:
            self._compare(found)
            self.center, self.center_metrics = found.center_loss, found.center_metrics or self.center_metrics
            done = torch.ones(self.shape, dtype=torch.bool) if found.evaluated is None else found.evaluated
            columns = {"loss": found.loss, **{name: getattr(found, name) for name in ERRORS}, **found.metrics}
            self._check_columns(columns)
            known = torch.cat([columns[name].reshape(len(grid), -1) for name in self.evaluator.widths], dim=1)
            table.rows[done.flatten()] = known[done.flatten()]
            table.measured |= done.flatten()
        center = (grid == 0).all(1) & ~table.measured
        table.rows[center] = self.evaluator.center
        table.measured |= center

    def _check_columns(self, columns: Mapping[str, Tensor | None]) -> None:
        """Refuse a file whose grid or columns are not those that its identity tells of."""
        for name, width in self.evaluator.widths.items():
            wanted = (*self.shape, width) if width else self.shape
            values = columns.get(name)
            if values is None or tuple(values.shape) != wanted:
                there = "none" if values is None else f"the shape {tuple(values.shape)}"
                raise ValueError(
                    f"{self.path} is damaged: expected values of {name!r} of the shape {wanted}, got {there}; move the "
                    "file away"
                )

    def _compare(self, found: Any) -> None:
        """Refuse a file whose loss or metrics at the centre are not those measured now."""
        stored = {"loss": torch.tensor(found.center_loss, dtype=torch.float64), **found.center_metrics}
        for name, now in {"loss": self.evaluator.center[0], **self.center_metrics}.items():
            if name not in stored:  # a file of an earlier version
                continue
            then = stored[name].double()
            if then.shape != now.shape:
                raise ValueError(
                    f"{self.path} holds {then.numel()} numbers of the metric {name!r} at a point, where it returns "
                    f"{now.numel()} now: expected the same function; give another path, or move the file away"
                )
            same = torch.isclose(then, now, rtol=_SAME, atol=0.0, equal_nan=True).reshape(-1)
            if bool(same.all()):
                continue
            there, here = (float(values.reshape(-1)[same.int().argmin()]) for values in (then, now))
            what = "loss" if name == "loss" else f"metric {name!r}"
            raise ValueError(
                f"{self.path} has the {what} {there:.9g} at the centre, where it is {here:.9g} now: expected the same "
                "network, functions and data; give another path, or move the file away"
            )

    # --------------------------------------------------------------------------------------------------------- refining

    def _refine(self, tolerance: float) -> None:
        """Let the first process choose the points: rounding in another process must not lead to other points."""
        if self.ranks.rank == 0:
            refine_grid(self._measure, self.shape, tolerance, self._report)
            self.ranks.from_first(None)
        else:
            while (points := self.ranks.from_first([0])) is not None:
                self.table.measure(points)
        self.surfaces = self.ranks.from_first(self.surfaces)

    def _measure(self, points: Sequence[int]) -> dict[str, Any]:
        self.ranks.from_first(points)
        self.table.measure(points)
        rows, widths = self.table.rows.numpy(), self.evaluator.widths
        return {name: rows[:, column.start] for name, column in self._columns().items() if widths[name] == 0}

    def _report(self, surfaces: Mapping[str, Surface]) -> None:
        self.surfaces = surfaces
        loss = surfaces["loss"]
        if self.table.bar is not None and loss.range > 0 and math.isfinite(loss.relative):
            wanted = self.refine or 0.0
            self.table.bar.say("loss slice", f"error {loss.relative:.2%} of the range, {wanted:.2%} wanted")
        self.journal.write(self._snapshot)

    # ---------------------------------------------------------------------------------------------------------- results

    def _columns(self) -> dict[str, slice]:
        columns, start = {}, 0
        for name, width in self.evaluator.widths.items():
            columns[name] = slice(start, start + max(width, 1))
            start += max(width, 1)
        return columns

    def _snapshot(self) -> Any:
        return self._result(complete=False)

    def _result(self, *, complete: bool) -> Any:
        measured = self.table.measured
        values: dict[str, Tensor] = {}
        for name, column in self._columns().items():
            width = self.evaluator.widths[name]
            found = self.table.rows[:, column].clone()
            if name in self.surfaces:
                between = torch.from_numpy(np.ascontiguousarray(self.surfaces[name].values))
                found[~measured] = between[~measured, None]
            values[name] = found.reshape(*self.shape, width) if width else found.reshape(self.shape)
        errors = {name: surface.error for name, surface in self.surfaces.items()}
        metrics = {name: values[name] for name in self.metrics or {}}
        return self.kind(
            loss=values["loss"],
            center_loss=self.center,
            metrics=metrics,
            center_metrics=self.center_metrics,
            evaluated=None if bool(measured.all()) else measured.reshape(self.shape).clone(),
            error=errors.get("loss", 0.0 if complete else math.nan),
            metric_errors={name: errors[name] for name in metrics if name in errors},
            tolerance=self.refine,
            converged=complete,
            complete=complete,
            standard_error=values.get(ERRORS[0]),
            rise_error=values.get(ERRORS[1]),
            units=self.evaluator.units,
            resolution=resolution(self.part, self.center),
            identity=self.identity,
            settings={**self.part.settings, **self.settings},
            **self.labels,
        )
