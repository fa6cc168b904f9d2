"""Results that are plain numbers, one or a few: nothing was drawn at random or iterated for them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

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

    _shapes: ClassVar = {"values": "n", "directions": "n"}

    def __len__(self) -> int:
        return len(self.values)

    def readings(self) -> list[Reading]:
        """Return the curvature along every direction."""
        return [Reading(name, value) for name, value in zip(self.directions, self.values.tolist(), strict=True)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per direction: ``direction``, ``value``."""
        return table({"direction": list(self.directions), "value": self.values})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamMsamAngle(Result):
    """Where MSAM's gradient points in the plane of SAM's and the plain one, over the perturbation strength (F3).

    Attributes
    ----------
    rhos
        Shape ``(n,)``, increasing, 0 included: MSAM's gradient there is the plain one.
    angles
        Shape ``(n,)``, degrees in [−180, 180]: from ``g_SAM`` to the projection of ``g_MSAM(ρ)``, positive on the side
        of the plain gradient. NaN where there is no momentum, or the two gradients that span the plane are parallel.
    shares
        Shape ``(n,)``, in [0, 1]: length of that projection over that of ``g_MSAM(ρ)``. Where it is small the angle
        says little.
    rho_0
        Where the angle is 0, between the first two neighbours in ``rhos`` that differ in its sign, by linear
        interpolation; NaN where there are none.
    bracket
        Those two neighbours: by continuity a root lies between them, and more is not known. NaN, NaN where none.
    rho_sam
        Radius of SAM's displacement.
    """

    rhos: Tensor
    angles: Tensor
    shares: Tensor
    rho_0: float
    bracket: tuple[float, float] = (math.nan, math.nan)
    rho_sam: float

    _asked: ClassVar = ("rho_sam", "bracket")
    _shapes: ClassVar = dict.fromkeys(("rhos", "angles", "shares"), "n")
    _ranges: ClassVar = {"rhos": "rising", "shares": "nonnegative", "rho_sam": "finite"}

    def _disagreement(self) -> str:
        return "" if bool((self.rhos == 0).any()) else "its rhos lack 0, where MSAM's gradient is the plain one"

    def readings(self) -> list[Reading]:
        """Return where the angle is 0, with the farther end of the bracket, and the angle of the plain gradient."""
        low, high = self.bracket
        plain = float(self.angles[(self.rhos == 0).nonzero()[0, 0]])
        return [
            Reading("rho_0", self.rho_0, max(self.rho_0 - low, high - self.rho_0)),
            Reading("angle at rho = 0, degrees", plain),
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per perturbation strength: ``rho``, ``angle``, ``share``."""
        return table({"rho": self.rhos, "angle": self.angles, "share": self.shares})
