"""Results that are plain numbers: nothing was drawn at random or iterated for them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from msam_analysis.results.base import Reading, Result, row, table

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scalar(Result, float):
    """A number without a sampling error; it is a ``float`` as well, and works wherever one does.

    Attributes
    ----------
    quantity
        What the number is.
    value
        The number, as a plain ``float``.
    """

    quantity: str
    value: float

    def __new__(cls, *number: float, value: float = math.nan, **_: Any) -> Self:
        """Make the number itself; copies and pickles give it by position."""
        return float.__new__(cls, *number or (value,))

    def readings(self) -> list[Reading]:
        """Return the number."""
        return [Reading(self.quantity, self.value)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row: ``quantity``, ``value``."""
        return row(self, "quantity", "value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curvatures(Result):
    """The curvature along several directions.

    Attributes
    ----------
    values
        Shape ``(directions,)``, float64, in the unit of the operator: ``dᵀ A d / dᵀ d``.
    directions
        What each direction is.
    """

    values: Tensor
    directions: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of directions."""
        return len(self.values)

    def readings(self) -> list[Reading]:
        """Return the curvature along every direction."""
        return [Reading(name, value) for name, value in zip(self.directions, self.values.tolist(), strict=True)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per direction: ``direction``, ``value``."""
        return table({"direction": list(self.directions), "value": self.values})
