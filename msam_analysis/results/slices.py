"""Results about the loss on a line or a plane."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import pandas as pd
import torch
from scipy.special import stdtrit
from torch import Tensor

from msam_analysis.results.base import Reading, Result, column, table

LARGE_RANGE = 10.0
"""From this ratio of largest to smallest loss on, pictures have a logarithmic scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Points:
    """What is known of the points of a slice, on a line or a plane; :class:`Slice2D` says what each field is."""

    loss: Tensor
    center_loss: float
    metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    center_metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    evaluated: Tensor | None = None
    error: float = 0.0
    metric_errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tolerance: float | None = None
    converged: bool = True
    complete: bool = True
    standard_error: Tensor | None = None
    rise_error: Tensor | None = None
    units: int = 0
    resolution: float = math.nan
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)

    _ranges: ClassVar = {
        **dict.fromkeys(("error", "tolerance", "standard_error", "rise_error", "resolution"), "nonnegative"),
        "evaluated": "flags",
    }

    def _disagreement(self) -> str:
        if not self.loss.numel():
            return "it has no points, expected one or more"
        other = (self.metric_errors.keys() | self.center_metrics.keys()) - self.metrics.keys()
        if other:
            return f"it has errors or a centre of the metric {min(other)[:60]!a}, and not the metric"
        shapes = {name: tuple(values.shape[self.loss.ndim :]) for name, values in self.metrics.items()}
        unlike = [name for name, value in self.center_metrics.items() if tuple(value.shape) != shapes[name]]
        return f"the metric {unlike[0][:60]!a} has another shape at the centre" if unlike else ""

    def readings(self) -> list[Reading]:
        """Return the loss at the centre, and the ends of its range over the finite points."""
        finite = self.loss[self.loss.isfinite()]
        ends = [("smallest loss", finite.min()), ("largest loss", finite.max())] if len(finite) else []
        shape = " × ".join(str(size) for size in self.loss.shape)
        known = [Reading("loss at the centre", self.center_loss), *(Reading(name, float(end)) for name, end in ends)]
        return [*known, Reading("largest interpolation error", self.error), Reading("points", shape)]

    @property
    def evaluations(self) -> int:
        """Number of grid points at which the loss was computed."""
        return self.loss.numel() if self.evaluated is None else int(self.evaluated.sum())

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of the interval, point by point, that covers the loss on all data.

        Student's t with ``units − 1`` degrees of freedom; with no standard error both ends are the loss.

        Parameters
        ----------
        level
            Confidence at each point. Default 0.95.

        Returns
        -------
        tuple of Tensor
            Lower and upper end, each of the shape of ``loss``.

        Raises
        ------
        ValueError
            ``level`` is not between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1 (0.95 for a 95 % interval), got {level!r}")
        if self.standard_error is None:
            return self.loss, self.loss
        half = float(stdtrit(self.units - 1, (1.0 + level) / 2.0)) * self.standard_error
        return self.loss - half, self.loss + half

    def _columns(self) -> dict[str, Tensor]:
        """Return what is known at every point, each of the shape of the loss; absent where there is nothing to say."""
        known = {"evaluated": self.evaluated, "standard_error": self.standard_error, "rise_error": self.rise_error}
        scalars = {name: values for name, values in self.metrics.items() if values.shape == self.loss.shape}
        return {"loss": self.loss, **scalars} | {name: values for name, values in known.items() if values is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice1D(_Points, Result):
    """Loss along a line: ``loss[i] = L(w + coordinates[i] · d)``.

    Attributes
    ----------
    coordinates
        Shape ``(points,)``, increasing; multiples of the direction, so ``coordinates · direction_norm`` are distances.
    loss
        Shape ``(points,)``. NaN and infinity are kept.
    center_loss
        ``L(w)``; equals ``loss`` at coordinate 0 exactly where 0 is on the grid.
    direction, direction_norm
        Its name (with the normalisation) and its L2 norm.
    metrics, center_metrics, evaluated, error, metric_errors, tolerance, converged, complete
        As in :class:`Slice2D`.
    standard_error, rise_error, resolution, units, identity
        As in :class:`Slice2D`.
    """

    coordinates: Tensor
    direction: str
    direction_norm: float

    _asked: ClassVar = ("direction", "direction_norm")
    _shapes: ClassVar = {
        **dict.fromkeys(("coordinates", "loss", "evaluated", "standard_error", "rise_error"), "points"),
        "metrics": "points *",
    }
    _ranges: ClassVar = {**_Points._ranges, "coordinates": "rising", "direction_norm": "nonnegative"}

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``coordinate``, ``distance``, ``loss``, and what else was measured there."""
        coordinates = column(self.coordinates)
        return table({"coordinate": coordinates, "distance": coordinates * self.direction_norm, **self._columns()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice2D(_Points, Result):
    """Loss on a plane: ``loss[i, j] = L(w + x[i] · d1 + y[j] · d2)``.

    Attributes
    ----------
    x, y
        Shapes ``(nx,)`` and ``(ny,)``, increasing.
    loss
        Shape ``(nx, ny)``: the first index belongs to ``x`` and the first direction. NaN and infinity are kept.
    center_loss
        ``L(w)``; equals ``loss`` at (0, 0) exactly where that is on the grid.
    directions, direction_norms
        Names and L2 norms of the two directions, first x, then y.
    cosine
        Cosine between the two directions as applied.
    metrics
        Name to other quantities at the same points, shape ``(nx, ny)``, or ``(nx, ny, n)`` such as each sample's loss.
    center_metrics
        The same quantities at ``w``, shape ``()`` or ``(n,)``.
    evaluated
        Shape ``(nx, ny)``, boolean: where the loss was computed. Elsewhere it was interpolated (``refine``), or is NaN
        because it is still to come (``complete`` is false). ``None``: everywhere.
    error, metric_errors
        Estimate of the largest error of the loss, and of each metric, at the interpolated points, in their own units;
        0 where every point was computed.
    tolerance
        The error that was asked for, as a fraction of the range of the loss; ``None`` where every point was computed.
    converged
        Whether ``error`` is within the tolerance.
    complete
        Whether the measurement was finished: false for the file of one that still runs or was stopped.
    standard_error, rise_error
        Shape ``(nx, ny)``: of ``loss`` as an estimate of the loss on all data, and of ``loss − center_loss``, where
        only some samples were drawn; else ``None``. Near the centre ``rise_error`` is much smaller, since the samples
        are the same.
    resolution
        Size below which a difference of losses near the centre is rounding, ``2 ε |L(w)|``; NaN where it is not known.
    units
        How many samples (or batches, where the loss of a sample cannot be told) the standard errors come from.
    identity
        Content hashes of what was measured: weights, data, directions, settings; empty without a file.
    """

    x: Tensor
    y: Tensor
    directions: tuple[str, str]
    direction_norms: tuple[float, float]
    cosine: float

    _asked: ClassVar = ("directions", "direction_norms", "cosine")
    _shapes: ClassVar = {
        "x": "nx",
        "y": "ny",
        **dict.fromkeys(("loss", "evaluated", "standard_error", "rise_error"), "nx ny"),
        "metrics": "nx ny *",
    }
    _ranges: ClassVar = {**_Points._ranges, "x": "rising", "y": "rising", "direction_norms": "nonnegative"}

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``x``, ``y``, ``loss``, and what else was measured; ``x`` varies slowest."""
        dtype = torch.promote_types(self.x.dtype, self.y.dtype)
        x, y = torch.meshgrid(self.x.to(dtype), self.y.to(dtype), indexing="ij")
        columns = {"x": x, "y": y, **self._columns()}
        return table({name: values.flatten() for name, values in columns.items()})
