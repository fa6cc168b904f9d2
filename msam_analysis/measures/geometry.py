"""Balls around the weights, in coordinates that make them plain.

A displacement is ``e = D z`` with a diagonal ``D``, and the ball is ``‖z‖ ≤ ρ``: ``D = 1`` for a plain one, ``D = |w|``
for an adaptive one. An entry with ``D = 0`` never moves, so nothing is divided by a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from msam_analysis.objective.objective import Objective
from msam_analysis.objective.vectors import widest

Norm = Literal["l2", "linf"]
Adaptive = bool | Literal["filter"]

_SURFACE = 1e-6  # a point this close to the surface, relative to the radius, lies on it


def adaptive_scale(objective: Objective, adaptive: bool | str) -> Tensor | None:
    """Return the diagonal of ``D`` at the current weights; ``None`` stands for ones.

    Parameters
    ----------
    objective
        The loss, with the weights ``w``.
    adaptive
        ``False``: 1. ``True``: ``|w|`` elementwise (``T`` in ASAM, Kwon et al., arXiv 2102.11600; ``c`` in
        Andriushchenko et al., arXiv 2302.07011). ``"filter"``: the norm of the entry's filter, which is the first index
        of a tensor with at least two dimensions; ``|w|`` for the entries of other tensors (ASAM's ``T`` by filters).

    Raises
    ------
    ValueError
        ``adaptive`` is something else.
    """
    if adaptive is False:
        return None
    if adaptive is not True and adaptive != "filter":
        raise ValueError(f"adaptive must be False, True or 'filter', got {adaptive!r}")
    scale = objective.point().abs()
    if adaptive is True:
        return scale
    for piece in objective.layout.views(scale).values():
        if piece.ndim >= 2:
            rows = piece.view(piece.shape[0], -1)
            rows.copy_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).expand_as(rows))
    return scale


def euclidean(vector: Tensor) -> float:
    """Return ``‖vector‖₂``, summed in float64, as a surface is recognised to six digits."""
    return float(torch.linalg.vector_norm(vector, dtype=widest(vector.device)))


def check_radius(rho: float) -> None:
    """Raise ``ValueError`` unless ``rho`` is a radius."""
    if not (isinstance(rho, int | float) and math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho must be a number >= 0, got {rho!r}: it is the radius of the ball, e.g. 0.05")


def check_norm(norm: str) -> None:
    """Raise ``ValueError`` unless ``norm`` is a known norm."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")


@dataclass(frozen=True, eq=False)
class Ball:
    """The set ``{e = D z, ‖z‖ ≤ ρ}``.

    Attributes
    ----------
    radius
        Radius ``ρ``.
    norm
        Norm of ``z``.
    scale
        The diagonal of ``D``, shape ``(size,)``; ``None`` for ones.
    """

    radius: float
    norm: Norm
    scale: Tensor | None = None

    def displacement(self, z: Tensor) -> Tensor:
        """Return ``e = D z``; also the map from a gradient to the slope ``D∇L``."""
        return z if self.scale is None else self.scale * z

    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return the coordinates ``z`` of a displacement; 0 where ``D = 0``."""
        if self.scale is None:
            return displacement
        return torch.where(self.scale > 0, displacement / self.scale, torch.zeros_like(displacement))

    def project(self, z: Tensor) -> Tensor:
        """Return the closest point of the ball."""
        if self.norm == "linf":
            return z.clamp(-self.radius, self.radius)
        length = self.length(z)
        return z * (self.radius / length) if length > self.radius else z

    def stretch(self, z: Tensor) -> Tensor:
        """Return the point of the surface (l∞: the corner) in the direction of ``z``; 0 for ``z = 0``."""
        if self.norm == "linf":
            return self.radius * z.sign()
        length = self.length(z)
        return z * (self.radius / length) if length > 0 else torch.zeros_like(z)

    def ascend(self, slope: Tensor) -> Tensor:
        """Return ``argmax ⟨slope, z⟩`` over the ball; 0 for a slope of 0."""
        return self.stretch(slope)

    def length(self, z: Tensor) -> float:
        """Return ``‖z‖`` in the norm of the ball."""
        return float(z.abs().max()) if self.norm == "linf" else euclidean(z)

    def holds_back(self, z: Tensor) -> bool:
        """Return whether a point of the ball lies on its surface."""
        return self.length(z) >= self.radius * (1 - _SURFACE)

    def held(self, z: Tensor, slope: Tensor) -> Tensor:
        """Return the entries of an l∞ ball that the slope pushes against their bound, as a mask."""
        return (z.abs() >= self.radius * (1 - _SURFACE)) & (z.sign() * slope.sign() >= 0)

    def multiplier(self, z: Tensor, slope: Tensor) -> float:
        """Return the ``λ ≥ 0`` with ``λ z`` closest to the slope on the surface of an l2 ball; 0 inside the ball."""
        if not self.holds_back(z) or self.radius == 0:
            return 0.0
        return max(float(slope.dot(z)), 0.0) / self.radius**2

    def uphill(self, z: Tensor, slope: Tensor) -> Tensor:
        """Return the part of the slope along which the loss still rises within the ball, to first order.

        Inside the ball this is the slope; on the surface of an l2 ball ``slope − λ z``; in an l∞ ball the entries that
        are not held.
        """
        if self.norm == "linf":
            return slope.masked_fill(self.held(z, slope), 0.0)
        return slope - self.multiplier(z, slope) * z
