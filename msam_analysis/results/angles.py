"""How gradients at displaced weights point to one another."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pandas as pd
from torch import Tensor

from msam_analysis.results.base import Reading, Result, table


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
