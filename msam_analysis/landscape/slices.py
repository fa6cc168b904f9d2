"""One- and two-dimensional slices of the loss, and of whatever else is asked for at the same points.

The floor is one forward pass a point. Two economies go below it, and each says what it costs: ``refine`` interpolates
between points that are chosen where it was wrong, ``samples`` evaluates a part of the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msam_analysis.landscape import grids
from msam_analysis.landscape.evaluator import ERRORS, Evaluator
from msam_analysis.landscape.identity import identity
from msam_analysis.landscape.journal import Journal
from msam_analysis.landscape.metrics import Metric
from msam_analysis.landscape.ranks import Ranks
from msam_analysis.landscape.refine import Surface, refine_grid
from msam_analysis.landscape.sampling import drawn
from msam_analysis.landscape.sweep import Sweep
from msam_analysis.landscape.together import Together, fastest
from msam_analysis.objective.direction import Direction, as_direction
from msam_analysis.objective.objective import Objective
from msam_analysis.results import Settings, Slice1D, Slice2D
from msam_analysis.results.fingerprint import fingerprint

Path = str | os.PathLike[str]

_TAKEN = ("loss", "x", "y", "coordinate", "distance", "evaluated", *ERRORS)
# The centre of a file and the centre now are the same loss up to what another machine or number of threads rounds.
_SAME = 1e-4


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
        Explicit increasing grid instead of ``radius`` and ``points``; it need not contain 0. A logarithmic one comes
        from :func:`~msam_analysis.landscape.logarithmic`.
    metrics, refine, samples, seed, path, progress, chunk, distributed
        As in :func:`slice_2d`.

    Returns
    -------
    Slice1D
        The coordinates are the displacements applied; the loss at 0 is the centre's, exactly.

    Raises
    ------
    ValueError
        A grid that is even, not finite or not increasing, or a direction that does not fit; otherwise as
        :func:`slice_2d`.
    """
    line = as_direction(direction, objective)
    grid = grids.symmetric(radius, points) if coordinates is None else grids.explicit(coordinates)
    options = _Options(metrics, refine, samples, seed, path, progress, chunk, distributed)
    labels = {"coordinates": grid, "direction": line.name, "direction_norm": line.norm}
    result: Slice1D = _Measurement(objective, [line], {"x": grid}, options, Slice1D, labels).run()
    return result


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
        One for both axes or one each; see :func:`slice_1d`.
    points
        Odd; one for both axes or one each.
    coordinates
        Explicit increasing grids ``(x, y)`` instead.
    metrics
        Name to what is measured at the same points: ``metrics.accuracy``, ``metrics.sample_losses`` or another
        :class:`~msam_analysis.landscape.metrics.OutputMetric`, which share the loss's forward pass;
        ``metrics.top_eigenvalue``, or any function ``f(objective, w)`` that returns a number or a flat tensor.
    refine
        Tolerance, as a fraction of the range of the loss: evaluate only as many points as are needed for the largest
        error of the interpolated surface to be estimated below it; where the loss spans a factor of ten or more, that
        of its logarithm, too, as pictures then have a logarithmic scale. 0.01 usually takes one point in twenty.
        ``result.evaluated`` says which points were computed, ``result.error`` how far off the others may be. Default:
        every point. Metrics of one number are interpolated too, each with its own error in ``result.metric_errors``.
    samples
        Number of samples, drawn at random without replacement, the same at every point; ``result.interval()`` then
        covers the loss on all data. Default: all of them.
    seed
        Of that draw.
    path
        A ``.safetensors`` file that the result is written to while it grows, at most a second or a point behind, so
        that :func:`msam_analysis.results.load` can read it at any time. If it exists, the measurement continues where
        it was stopped and ends in the same bits.
    progress
        Show a progress bar.
    chunk
        Points in one batch, by ``vmap``: for small networks on large devices. Default: measured on a GPU; 1 on a CPU.
        Losses in a batch may differ from single ones by rounding.
    distributed
        Where :mod:`torch.distributed` is initialised, let its processes share the points: all of them must call this
        with the same arguments, and all get the whole result, the same as one process would. ``False``: this process
        measures alone.

    Returns
    -------
    Slice2D
        First index x, second index y.

    Raises
    ------
    ValueError
        A grid that is even, not finite or not increasing; a direction that does not fit; ``refine``, ``samples`` or
        ``chunk`` out of range or not possible here; a metric with a name that is taken or a value that is no number;
        a ``path`` that holds another measurement; processes that measure different things.
    """
    first, second = (as_direction(direction, objective) for direction in grids.two(directions, "directions"))
    if coordinates is None:
        radii, counts = grids.two(radius, "radii"), grids.two(points, "numbers of points")
        x, y = (grids.symmetric(r, n) for r, n in zip(radii, counts, strict=True))
    else:
        x, y = (grids.explicit(axis) for axis in grids.two(coordinates, "coordinates"))
    options = _Options(metrics, refine, samples, seed, path, progress, chunk, distributed)
    product = first.norm * second.norm
    labels = {
        "x": x,
        "y": y,
        "directions": (first.name, second.name),
        "direction_norms": (first.norm, second.norm),
        "cosine": float(first.vector.cpu().double() @ second.vector.cpu().double()) / product
        if product > 0
        else math.nan,
    }
    result: Slice2D = _Measurement(objective, [first, second], {"x": x, "y": y}, options, Slice2D, labels).run()
    return result


@dataclass(frozen=True)
class _Options:
    """How to measure, beside where."""

    metrics: Mapping[str, Metric] | None
    refine: float | None
    samples: int | None
    seed: int
    path: Path | None
    progress: bool
    chunk: int | None
    distributed: bool

    def __post_init__(self) -> None:
        if self.refine is not None and not 0 < self.refine < 1:
            raise ValueError(
                f"refine must be a fraction of the range between 0 and 1, got {self.refine!r}: 0.01 is one per cent"
            )
        if self.chunk is not None and (isinstance(self.chunk, bool) or self.chunk < 1):
            raise ValueError(
                f"chunk must be a positive number of points, got {self.chunk!r}: leave it out to have it chosen"
            )
        for name in self.metrics or {}:
            if name in _TAKEN or "/" in name:
                raise ValueError(f"the name {name!r} of a metric is taken or holds a '/': expected another one")

    @property
    def settings(self) -> Settings:
        """The choices that a result is labelled with."""
        chosen = {"refine": self.refine, "sampling seed": self.seed if self.samples is not None else None}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def identity(self) -> dict[str, object]:
        """The choices that decide the numbers."""
        metrics = {f"metric {name}": fingerprint(metric) for name, metric in (self.metrics or {}).items()}
        return {"metrics": ", ".join(self.metrics or {}), "points at once": self.chunk, **metrics, **self.settings}


class _Measurement:
    """One slice on its way from a grid to a result."""

    def __init__(
        self,
        objective: Objective,
        lines: Sequence[Direction],
        axes: Mapping[str, Tensor],
        options: _Options,
        kind: type[Any],
        labels: Mapping[str, Any],
    ) -> None:
        self.options = options
        self.kind = kind
        self.labels = labels
        self.shape = tuple(len(axis) for axis in axes.values())
        self.ranks = Ranks(together=options.distributed)
        self.part, self.fraction = objective, None
        self.settings = dict(options.settings)
        if options.samples is not None:
            self.part = drawn(objective, options.samples, options.seed)
            self.fraction = options.samples / objective.samples
            self.settings["samples drawn from"] = objective.samples
        self.identity = self._identity(lines, axes)
        self.journal = Journal(options.path if self.ranks.rank == 0 else None)
        self.found = self._found()
        vectors = [line.vector for line in lines]
        self.evaluator = Evaluator(self.part, vectors, options.metrics, self.fraction)
        self.center = float(self.evaluator.center[0])
        self.surfaces: Mapping[str, Surface] = {}
        grid = torch.cartesian_prod(*axes.values()).reshape(-1, len(axes))
        away = grid[(grid != 0).any(1)]
        if len(away):
            self.evaluator.warn_of_rounding(away[away.abs().sum(1).argmin()].tolist())
        self.sweep = self._sweep(grid)
        self._recall(grid)

    def run(self) -> Any:
        """Measure what is missing, and return the result."""
        if self.found is not None and self.found.complete:
            return self.found
        total = None if self.options.refine is not None else len(self.sweep.coordinates)
        try:
            with self.sweep.shown(progress=self.options.progress, total=total):
                if self.options.refine is None:
                    self.sweep.measure(range(len(self.sweep.coordinates)))
                else:
                    self._refine(self.options.refine)
        except BaseException:
            self.journal.write(self._snapshot, now=True)
            raise
        result = self._result(complete=True)
        self.journal.write(lambda: result, now=True)
        return result

    # -------------------------------------------------------------------------------------------------------- beginning

    def _identity(self, lines: Sequence[Direction], axes: Mapping[str, Tensor]) -> dict[str, str]:
        if self.options.path is None and self.ranks.count == 1:
            return {}
        found = identity(self.part, lines, axes, {**self.options.identity, **self.settings})
        self.ranks.check_alike(found)
        return found

    def _found(self) -> Any:
        """Return what the file holds, in every process."""
        found, error = None, ""
        try:
            found = self.journal.resumed(self.kind, self.identity)
        except ValueError as refusal:  # told to the other processes, which would wait for ever
            error = str(refusal)
        found, error = self.ranks.from_first((found, error))
        if error:
            raise ValueError(error)
        return found

    def _sweep(self, grid: Tensor) -> Sweep:
        size = self.options.chunk
        if size is None and self.found is not None:
            size = int(self.found.settings.get("points at once", 1))
        if size is None:
            size = self.ranks.from_first(fastest(self.evaluator, len(grid)) if self.ranks.rank == 0 else 1)
        if size > 1:
            self.settings["points at once"] = size
        source = self.evaluator if size == 1 else Together(self.evaluator, size)
        return Sweep(
            source,
            grid,
            len(self.evaluator.center),
            size=size,
            seconds=self.evaluator.seconds,
            ranks=self.ranks,
            written=lambda: self.journal.write(self._snapshot),
        )

    def _recall(self, grid: Tensor) -> None:
        """Enter what is known already: the centre, and what the file holds."""
        found = self.found
        if found is not None:
            if not math.isclose(found.center_loss, self.center, rel_tol=_SAME) and not (
                math.isnan(found.center_loss) and math.isnan(self.center)
            ):
                raise ValueError(
                    f"{self.options.path} has the loss {found.center_loss:.9g} at the centre, where it is "
                    f"{self.center:.9g} now: expected the same network and loss function; give another path, or move "
                    "the file away"
                )
            self.center = found.center_loss
            done = torch.ones(self.shape, dtype=torch.bool) if found.evaluated is None else found.evaluated
            columns = {"loss": found.loss, **{name: getattr(found, name) for name in ERRORS}, **found.metrics}
            table = torch.cat([columns[name].reshape(len(grid), -1) for name in self.evaluator.widths], dim=1)
            self.sweep.table[done.flatten()] = table[done.flatten()]
            self.sweep.measured |= done.flatten()
        for place in torch.nonzero((grid == 0).all(1)).flatten().tolist():
            if not self.sweep.measured[place]:
                self.sweep.put(place, self.evaluator.center)

    # --------------------------------------------------------------------------------------------------------- refining

    def _refine(self, tolerance: float) -> None:
        """Let the first process choose the points: what rounds differently elsewhere must not part the processes."""
        if self.ranks.rank == 0:
            refine_grid(self._measure, self.shape, tolerance, self._report)
            self.ranks.from_first(None)
        else:
            while (places := self.ranks.from_first([0])) is not None:
                self.sweep.measure(places)
        self.surfaces = self.ranks.from_first(self.surfaces)

    def _measure(self, places: Sequence[int]) -> dict[str, Any]:
        self.ranks.from_first(places)
        self.sweep.measure(places)
        table = self.sweep.table.numpy()
        return {
            name: table[:, column.start] for name, column in self._columns().items() if self.evaluator.widths[name] == 0
        }

    def _report(self, surfaces: Mapping[str, Surface], _done: bool) -> None:
        self.surfaces = surfaces
        loss = surfaces["loss"]
        if self.sweep.bar is not None and loss.range > 0 and math.isfinite(loss.relative):
            wanted = self.options.refine or 0.0
            self.sweep.bar.set_postfix_str(f"error {loss.relative:.2%} of the range, {wanted:.2%} wanted")
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
        measured = self.sweep.measured
        values: dict[str, Tensor] = {}
        for name, column in self._columns().items():
            width = self.evaluator.widths[name]
            found = self.sweep.table[:, column].clone()
            if name in self.surfaces:
                between = torch.from_numpy(np.ascontiguousarray(self.surfaces[name].values))
                found[~measured] = between[~measured, None]
            values[name] = found.reshape(*self.shape, width) if width else found.reshape(self.shape)
        errors = {name: surface.error for name, surface in self.surfaces.items()}
        metrics = {name: values[name] for name in self.options.metrics or {}}
        loss_error = errors.get("loss", 0.0 if complete else math.nan)
        return self.kind(
            loss=values["loss"],
            center_loss=self.center,
            metrics=metrics,
            evaluated=None if bool(measured.all()) else measured.reshape(self.shape).clone(),
            error=loss_error,
            metric_errors={name: errors[name] for name in metrics if name in errors},
            tolerance=self.options.refine,
            converged=complete,
            complete=complete,
            standard_error=values.get(ERRORS[0]),
            rise_error=values.get(ERRORS[1]),
            units=self.evaluator.units,
            identity=self.identity,
            settings={**self.part.settings, **self.settings},
            **self.labels,
        )
