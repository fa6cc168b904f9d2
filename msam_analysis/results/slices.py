"""Results about the loss on a line or a plane."""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch
from torch import Tensor

from msam_analysis.results.base import Result, column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice1D(Result):
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
    """

    coordinates: Tensor
    loss: Tensor
    center_loss: float
    direction: str
    direction_norm: float

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``coordinate``, ``distance``, ``loss``."""
        coordinates = column(self.coordinates)
        frame: pd.DataFrame = pd.DataFrame(
            {
                "coordinate": coordinates,
                "distance": coordinates * self.direction_norm,
                "loss": column(self.loss),
            }
        )
        return frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice2D(Result):
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
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    center_loss: float
    directions: tuple[str, str]
    direction_norms: tuple[float, float]
    cosine: float

    def __post_init__(self) -> None:
        """Turn lists from a file back into tuples."""
        object.__setattr__(self, "directions", tuple(self.directions))
        object.__setattr__(self, "direction_norms", tuple(self.direction_norms))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``x``, ``y``, ``loss``; ``x`` varies slowest."""
        x, y = torch.meshgrid(self.x, self.y, indexing="ij")
        frame: pd.DataFrame = pd.DataFrame(
            {"x": column(x.flatten()), "y": column(y.flatten()), "loss": column(self.loss.flatten())}
        )
        return frame
