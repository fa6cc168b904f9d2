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
from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import widest

Norm = Literal["l2", "linf"]
Adaptive = bool | Literal["filter"]

_WHOLE = Space(0)  # of vectors of any size: a ball does not ask for it
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


def euclidean(vector: Tensor, space: Space) -> Tensor:
    """Return ``‖vector‖₂``, 0-dimensional and summed in float64, as a surface is recognised to six digits."""
    # The norm of the norms of its parts: that of one number is the number itself.
    return space.norm(torch.linalg.vector_norm(vector, dtype=widest(vector.device)).reshape(1))


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
    space
        Where vectors lie; by default every process has whole ones.
    """

    radius: float
    norm: Norm
    scale: Tensor | None = None
    space: Space = _WHOLE

    @classmethod
    def around(cls, objective: Objective, rho: float, norm: Norm, adaptive: bool | str) -> Ball:
        """Return a ball around the current weights; see :func:`adaptive_scale`."""
        return cls(float(rho), norm, adaptive_scale(objective, adaptive), objective.space)

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
        length = euclidean(z, self.space)
        return torch.where(length > self.radius, self._scaled(z, length), z)

    def stretch(self, z: Tensor) -> Tensor:
        """Return the point of the surface (l∞: the corner) in the direction of ``z``; 0 for ``z = 0``."""
        if self.norm == "linf":
            return self.radius * z.sign()
        length = euclidean(z, self.space)
        return torch.where(length > 0, self._scaled(z, length), 0.0)

    def _scaled(self, z: Tensor, length: Tensor) -> Tensor:
        """Return a vector of this length as one of the length of the radius."""
        # A number over a tensor is the number times a rounded reciprocal.
        return z * (torch.full_like(length, self.radius) / length)

    def ascend(self, slope: Tensor) -> Tensor:
        """Return ``argmax ⟨slope, z⟩`` over the ball; 0 for a slope of 0."""
        return self.stretch(slope)

    def holds_back(self, z: Tensor) -> bool:
        """Return whether a point of the ball lies on its surface."""
        if self.norm == "linf":
            return self.space.any(z.abs() >= self.radius * (1 - _SURFACE))
        return bool(self._at_surface(z))

    def _at_surface(self, z: Tensor) -> Tensor:
        """Return whether a point of an l2 ball lies on its surface, 0-dimensional."""
        return euclidean(z, self.space) >= self.radius * (1 - _SURFACE)

    def held(self, z: Tensor, slope: Tensor) -> Tensor:
        """Return the entries of an l∞ ball that the slope pushes against their bound, as a mask."""
        return (z.abs() >= self.radius * (1 - _SURFACE)) & (z.sign() * slope.sign() >= 0)

    def multiplier(self, z: Tensor, slope: Tensor) -> Tensor:
        """Return the ``λ ≥ 0``, 0-dimensional, with ``λ z`` closest to the slope on the surface of an l2 ball.

        It is 0 inside the ball, and in an l∞ ball, which has a multiplier for every entry.
        """
        if self.norm == "linf" or self.radius == 0:
            return torch.zeros((), dtype=widest(z.device), device=z.device)
        outwards = self.space.dot(slope, z).to(widest(z.device)).clamp_min(0.0)
        return torch.where(self._at_surface(z), outwards / self.radius**2, 0.0)

    def uphill(self, z: Tensor, slope: Tensor) -> Tensor:
        """Return the part of the slope along which the loss still rises within the ball, to first order.

        Inside the ball this is the slope; on the surface of an l2 ball ``slope − λ z``; in an l∞ ball the entries that
        are not held.
        """
        if self.norm == "linf":
            return slope.masked_fill(self.held(z, slope), 0.0)
        return slope - self.multiplier(z, slope) * z
