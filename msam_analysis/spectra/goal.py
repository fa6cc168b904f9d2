"""The goal of an eigenvalue search, its state, and its random vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from msam_analysis.objective.space import Space

Which = Literal["largest", "smallest", "magnitude", "ends"]
Draw = Callable[[int], Tensor]
"""``draw(columns)`` returns a fresh random matrix of that many columns."""


def random_vectors(space: Space, like: Tensor, seed: int) -> Draw:
    """Return a function that draws Gaussian vectors, each call independent of all earlier ones.

    Parameters
    ----------
    space
        Where the vectors lie.
    like
        A tensor with the data type and the device that the vectors get.
    seed
        Seed of all draws.
    """
    calls = itertools.count(1)
    # The word is part of the seed: another one gives other vectors.
    return lambda columns: space.gaussian(columns, seed=seed, like=like, use=f"probe {next(calls)}")


def ordering(values: Tensor, which: Which) -> Tensor:
    """Return the permutation that puts the wanted end of the spectrum first; for ``"ends"`` the two ends alternate."""
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)
    order = values.argsort(descending=which != "smallest", stable=True)
    if which == "ends":
        order = torch.stack([order, order.flip(0)], dim=1).flatten()[: len(order)]
    return order


@dataclass(frozen=True)
class Goal:
    """The eigenpairs that are wanted: their number, their end of the spectrum, their accuracy.

    Attributes
    ----------
    k, which, tolerance
        See :func:`~msam_analysis.spectra.top_eigenvalues`.
    floor
        Residual, relative to ``‖A‖``, that is always small enough; at least the rounding error.
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


@dataclass(frozen=True)
class Found:
    """The state of a search.

    Attributes
    ----------
    values, norms
        The wanted Ritz values and the norms of their residuals, at most ``k``.
    done
        Whether all ``k`` residuals are small enough.
    whole
        Whether the whole space was searched, so that no further eigenvalue can exist.
    """

    values: Tensor
    norms: Tensor
    done: bool
    whole: bool
