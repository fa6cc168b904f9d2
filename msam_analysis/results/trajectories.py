"""Results about the way an optimizer took: the weights along it, and its projection onto a line or plane."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch
from torch import Tensor

from msam_analysis.results.base import Reading, Result, table

if TYPE_CHECKING:
    from msam_analysis.results.points import StoredPoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory(Result):
    """True weights recorded along a training run.

    Attributes
    ----------
    label
        Whose trajectory it is, such as the optimizer's name; ends up in legends.
    steps
        Shape ``(n,)``, integers, increasing.
    points
        ``points[i]`` is the flat vector of shape ``(size,)`` at ``steps[i]``: a tensor of shape ``(n, size)``, or files
        that are read when asked for.
    rounding
        Shape ``(n,)``: ``‖points[i] − w‖₂``, how far the point lies from the weights ``w`` that were recorded, because
        it was stored with fewer digits; 0 where it was stored exactly.
    metrics
        Numbers recorded with the points: name to shape ``(n,)``, NaN where one was not given.
    names, shapes
        What the flat vector is made of, in order.
    buffers
        The model's buffers (running statistics) at the same moments: name to shape ``(n, *shape)``; empty where they
        were not recorded.
    """

    label: str
    steps: Tensor
    points: Tensor | StoredPoints
    rounding: Tensor
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    buffers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    _shapes: ClassVar = {
        **dict.fromkeys(("steps", "rounding", "metrics"), "n"),
        **dict.fromkeys(("names", "shapes"), "parameters"),
        "points": "n size",
        "buffers": "n *",
    }
    _ranges: ClassVar = {"steps": "steps", "rounding": "nonnegative"}

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def size(self) -> int:
        """Length of a point."""
        return sum(math.prod(shape) for shape in self.shapes)

    def select(self, indices: slice | Sequence[int] | Tensor) -> Trajectory:
        """Return some of the points, such as ``select(slice(None, None, 10))``.

        Parameters
        ----------
        indices
            A slice, positions, or a boolean tensor of shape ``(n,)``, such as ``trajectory.steps < 1000``.

        Returns
        -------
        Trajectory
            Of the same kind; points on disk stay there.
        """
        kept = torch.arange(len(self))[indices]
        return dataclasses.replace(
            self,
            steps=self.steps[kept],
            points=self.points[kept] if isinstance(self.points, Tensor) else self.points.select(kept.tolist()),
            rounding=self.rounding[kept],
            metrics={name: values[kept] for name, values in self.metrics.items()},
            buffers={name: values[kept] for name, values in self.buffers.items()},
        )

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Return one point under the model's names, for ``model.load_state_dict(..., strict=False)``.

        Parameters
        ----------
        index
            Which point; −1 is the last.

        Returns
        -------
        dict
            The recorded parameters, and the buffers as they were then. What was not recorded, such as frozen
            parameters, is absent.
        """
        sizes = [math.prod(shape) for shape in self.shapes]
        pieces = zip(self.names, self.points[index].split(sizes), self.shapes, strict=True)
        parameters = {name: piece.view(shape) for name, piece, shape in pieces}
        return parameters | {name: values[index] for name, values in self.buffers.items()}

    def readings(self) -> list[Reading]:
        """Return whose trajectory it is, and how many points and weights it has."""
        return [Reading("label", self.label), Reading("points", len(self)), Reading("weights", self.size)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``step``, ``rounding`` and the metrics; not the weights."""
        return table({"step": self.steps, "rounding": self.rounding, **self.metrics})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one file, as :meth:`Result.save` does; all points are held in memory for it."""
        if isinstance(self.points, Tensor):
            return super().save(path)
        points = torch.stack([self.points[index] for index in range(len(self))])
        return dataclasses.replace(self, points=points).save(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection(Result):
    r"""A trajectory seen on a line or plane through ``center``, and what that leaves out.

    With ``D`` the matrix of the directions, ``r_t = w_t − center`` and ``P`` the orthogonal projection onto their span,

    .. math:: a_t = \arg\min_a \|r_t − D a\|, \qquad P r_t = D a_t.

    Attributes
    ----------
    label
        Of the trajectory.
    steps
        Shape ``(n,)``.
    coordinates
        Shape ``(n, k)``: ``a_t``, multiples of the ``k`` directions, as on the axes of a slice along them.
    distance
        Shape ``(n,)``: ``‖r_t‖₂``, how far the point is from the centre.
    off_plane
        Shape ``(n,)``: ``‖r_t − P r_t‖₂``, how far the point is from its picture.
    rounding
        Shape ``(n,)``: L2 error of the stored point; ``distance`` and ``off_plane`` are known to within it.
    directions, direction_norms
        Names and L2 norms of the directions.
    loss, projected_loss
        Shape ``(n,)``: ``L(w_t)``, and ``L(center + P r_t)``, the loss that a slice shows at the point's picture.
        ``None`` where they were not measured.
    center_loss
        ``L(center)``, or ``None``.
    """

    label: str
    steps: Tensor
    coordinates: Tensor
    distance: Tensor
    off_plane: Tensor
    rounding: Tensor
    directions: tuple[str, ...]
    direction_norms: tuple[float, ...]
    loss: Tensor | None = None
    projected_loss: Tensor | None = None
    center_loss: float | None = None

    _asked: ClassVar = ("directions", "direction_norms")
    _shapes: ClassVar = {
        **dict.fromkeys(("steps", "distance", "off_plane", "rounding", "loss", "projected_loss"), "n"),
        **dict.fromkeys(("directions", "direction_norms"), "k"),
        "coordinates": "n k",
    }
    _ranges: ClassVar = {
        **dict.fromkeys(("distance", "off_plane", "rounding", "direction_norms"), "nonnegative"),
        "steps": "steps",
    }

    @property
    def off_plane_share(self) -> Tensor:
        """Shape ``(n,)``: ``‖r − P r‖² / ‖r‖²``, the part of the squared distance that the picture hides.

        0: the picture shows all of it; NaN at the centre.
        """
        return (self.off_plane / self.distance) ** 2

    def readings(self) -> list[Reading]:
        """Return whose trajectory it is, and how far it ends from the centre and from its picture."""
        ends = [("distance at the end", self.distance), ("distance from plane at the end", self.off_plane)]
        known = [Reading(name, float(values[-1]), float(self.rounding[-1])) for name, values in ends if len(values)]
        return [Reading("label", self.label), Reading("points", len(self.steps)), *known]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``step``, ``x``, ``y``, ``off_plane``, ``distance``, ``rounding``, the losses."""
        k = self.coordinates.shape[1]
        axes = ("x", "y") if k == 2 else tuple(f"x{index + 1}" for index in range(k))
        columns = {"step": self.steps, **dict(zip(axes, self.coordinates.T, strict=True))}
        columns |= {"off_plane": self.off_plane, "distance": self.distance, "rounding": self.rounding}
        losses = {"loss": self.loss, "projected_loss": self.projected_loss}
        return table(columns | {name: values for name, values in losses.items() if values is not None})
