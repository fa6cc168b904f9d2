"""What is asked of an eigensolver, and when a pair has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Which = Literal["largest", "smallest", "magnitude", "ends"]


def ordering(values: Tensor, which: Which) -> Tensor:
    """Return the permutation that puts the wanted end of the spectrum first; for ``"ends"`` they take turns."""
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)
    order = values.argsort(descending=which != "smallest", stable=True)
    if which == "ends":
        turns = torch.stack([order, order.flip(0)], dim=1).flatten()
        order = turns[: len(order)]
    return order


@dataclass(frozen=True)
class Goal:
    """How many eigenpairs are wanted, from where, how well.

    Attributes
    ----------
    k, which, tolerance
        See :func:`~msam_analysis.spectra.top_eigenvalues`.
    floor
        Residual, relative to ``‖A‖``, that is always small enough; at least what rounding leaves.
    """

    k: int
    which: Which
    tolerance: float
    floor: float

    def limits(self, values: Tensor, norm: float) -> Tensor:
        """Return the residual at which each value has converged; ``norm`` estimates ``‖A‖``."""
        return (self.tolerance * values.abs()).clamp_min(self.floor * norm)

    def bounds(self, wanted: Tensor) -> dict[int, float]:
        """Return, for the upper (1) and the lower (-1) end, ``sign ·`` the value that no further one may exceed."""
        last = float(wanted[-1])
        if self.which == "magnitude":
            return {1: abs(last), -1: abs(last)}
        if self.which == "ends":
            bottom = {-1: -float(wanted[1::2].max())} if len(wanted) > 1 else {}
            return {1: float(wanted[::2].min()), **bottom}
        return {1: last} if self.which == "largest" else {-1: -last}
