"""What the solvers share: the shape of a search, and fresh random vectors for it."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor

from msam_analysis.objective.vectors import gaussian
from msam_analysis.spectra.beyond import Inside


@dataclass(frozen=True)
class Found:
    """Where a search stands.

    Attributes
    ----------
    values, norms
        The wanted Ritz values and the norms of their residuals, at most ``k``.
    done
        All ``k`` residuals are small enough.
    whole
        All of the space was searched: nothing can lie beyond.
    """

    values: Tensor
    norms: Tensor
    done: bool
    whole: bool


class Search(abc.ABC):
    """A search for eigenpairs that can be told of what it missed."""

    @abc.abstractmethod
    def run(self, stop: int) -> Found:
        """Go on until the wanted pairs have converged or ``operator.products`` reaches ``stop``."""

    @abc.abstractmethod
    def vectors(self) -> Tensor:
        """Return the wanted vectors in the order of the goal, shape ``(size, k)``."""

    @abc.abstractmethod
    def inside(self) -> Inside:
        """Return what was found, for a look beyond it."""

    @abc.abstractmethod
    def include(self, vector: Tensor) -> None:
        """Add a vector that leads beyond what was found."""


class Probes:
    """Fresh random vectors, each a draw of its own.

    Parameters
    ----------
    size
        Their length.
    like
        A tensor of their data type and device.
    seed
        Of all draws.
    """

    def __init__(self, size: int, like: Tensor, seed: int) -> None:
        self.size = size
        self.like = like
        self.seed = seed
        self.drawn = 0

    def next(self, columns: int = 1) -> Tensor:
        """Return a fresh Gaussian matrix of shape ``(size, columns)``."""
        self.drawn += 1
        return gaussian(self.size, columns, seed=self.seed, like=self.like, use=f"probe {self.drawn}")
