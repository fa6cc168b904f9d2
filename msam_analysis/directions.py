"""Directions in weight space: where a slice goes, what a curvature is measured along.

A :class:`Direction` is a flat vector with a name that says how it was made and normalised. Filter normalisation follows
Li et al., *Visualizing the Loss Landscape of Neural Nets* (2018), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from msam_analysis.eigen import top_eigenvalues
from msam_analysis.momentum import momentum_buffers
from msam_analysis.objective import Objective
from msam_analysis.vectors import Layout, gaussian

Normalization = Literal["filter", "layer", "l2", "none"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A flat vector and what it is.

    Attributes
    ----------
    vector
        Shape ``(size,)``.
    name
        What it is and how it was normalised; ends up on axes.
    """

    vector: Tensor
    name: str

    @property
    def norm(self) -> float:
        """L2 norm of the whole vector."""
        return float(self.vector.double().norm() if self.vector.device.type != "mps" else self.vector.norm())

    def normalized(
        self, objective: Objective, normalize: Normalization = "filter", *, one_d: bool = False
    ) -> Direction:
        """Return the direction rescaled; see :func:`normalized`."""
        vector = normalized(self.vector, objective.layout, objective.point(), normalize, one_d=one_d)
        return replace(self, vector=vector, name=f"{self.name}, {_label(normalize, one_d)}")


def normalized(
    vector: Tensor, layout: Layout, weights: Tensor, normalize: Normalization, *, one_d: bool = False
) -> Tensor:
    r"""Rescale a direction so that displacements along it are comparable between networks.

    ============ =======================================================================================
    ``"filter"`` ``d_ij ← d_ij ‖w_ij‖ / ‖d_ij‖`` for every filter ``j`` (first index) of every tensor ``i``
                 with at least two dimensions
    ``"layer"``  the same with whole tensors
    ``"l2"``     ``d ← d / ‖d‖``
    ``"none"``   unchanged
    ============ =======================================================================================

    For filter and layer normalisation, tensors with fewer than two dimensions (biases, normalisation layers) are left
    where they are (``d_i = 0``), as Li et al. do, or, with ``one_d=True``, take the norm of the tensor they perturb. A
    filter that is zero in the weights or in the direction stays put: its displacement is 0.

    Parameters
    ----------
    vector, weights
        Shape ``(size,)``: direction and point.
    layout
        What belongs to which tensor.
    normalize
        See above.
    one_d
        Move tensors with fewer than two dimensions too.

    Returns
    -------
    Tensor
        Shape ``(size,)``, a new tensor.

    Raises
    ------
    ValueError
        Unknown normalisation, or a zero vector to be given length 1.
    """
    if normalize not in get_args(Normalization):
        raise ValueError(f"normalize must be one of {get_args(Normalization)}, got {normalize!r}")
    layout.check(vector, "direction")
    if normalize == "none":
        return vector.clone()
    if normalize == "l2":
        norm = torch.linalg.vector_norm(vector, dtype=_wide(vector))
        if not float(norm) > 0:
            raise ValueError("the direction is zero: expected a direction with a positive norm to give it length 1")
        unit: Tensor = (vector / norm).to(vector.dtype)
        return unit
    scaled = vector.clone()
    for piece, weight in zip(layout.views(scaled).values(), layout.views(weights).values(), strict=True):
        if piece.ndim < 2 and not one_d:
            piece.zero_()
            continue
        rows = piece.shape[0] if normalize == "filter" and piece.ndim >= 2 else 1
        mine, theirs = piece.view(rows, -1), weight.reshape(rows, -1)
        length = torch.linalg.vector_norm(mine, dim=1, keepdim=True, dtype=_wide(mine))
        target = torch.linalg.vector_norm(theirs, dim=1, keepdim=True, dtype=_wide(mine))
        mine.mul_(torch.where(length > 0, target / length, torch.zeros_like(length)).to(mine.dtype))
    return scaled


def random(
    objective: Objective, seed: int = 0, normalize: Normalization = "filter", *, one_d: bool = False
) -> Direction:
    """Return a standard Gaussian direction, filter-normalised by default (exhibits F4C and A13).

    Parameters
    ----------
    objective
        Gives the shapes and the weights to normalise by.
    seed
        Of the draw; the global generators are untouched.
    normalize, one_d
        See :func:`normalized`.
    """
    weights = objective.point()
    draw = gaussian(objective.size, 1, seed=seed, like=weights)[:, 0]
    vector = normalized(draw, objective.layout, weights, normalize, one_d=one_d)
    return Direction(vector, f"random {seed}, {_label(normalize, one_d)}")


def gradient(objective: Objective, normalize: Normalization = "none") -> Direction:
    """Return ``∇L(w)`` on all the objective's data, uphill (exhibit F4A)."""
    return _finish(objective, objective.gradient(), "gradient", normalize)


def momentum(
    optimizer: torch.optim.Optimizer, objective: Objective | None = None, normalize: Normalization = "none"
) -> Direction:
    """Return the momentum buffer ``v`` (exhibit F4B); the step just taken was along ``−v``.

    Parameters
    ----------
    optimizer
        Any optimizer with ``momentum_buffer`` or ``exp_avg`` in its state.
    objective
        Whose parameter order and subset to follow. Without it, the order of the optimizer's parameters is used, which
        is the objective's if both were made from ``model.parameters()`` with nothing frozen.
    normalize
        See :func:`normalized`; only ``"none"`` and ``"l2"`` without an objective.

    Raises
    ------
    RuntimeError
        The optimizer keeps no momentum, or has not taken a step.
    """
    buffers = momentum_buffers(optimizer)
    if not buffers:
        raise RuntimeError("the optimizer has no momentum yet: take at least one step before asking for its direction")
    if objective is not None:
        return _finish(objective, objective.vector(buffers), "momentum", normalize)
    if normalize not in ("none", "l2"):
        raise ValueError(f"normalize={normalize!r} needs the weights: pass objective=..., or use 'none' or 'l2'")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pieces = [buffers.get(parameter, torch.zeros_like(parameter)).detach() for parameter in parameters]
    layout = Layout(tuple(map(str, range(len(pieces)))), tuple(piece.shape for piece in pieces))
    vector = layout.flatten(pieces)
    vector = normalized(vector, layout, vector, normalize)
    return Direction(vector, "momentum" if normalize == "none" else f"momentum, {_label(normalize, False)}")


def eigenvector(objective: Objective, index: int = 0, *, seed: int = 0) -> Direction:
    """Return the unit eigenvector of the Hessian's eigenvalue number ``index`` from the top (0: the largest).

    Its sign, which mathematics leaves open, is fixed so that its entry of largest magnitude is positive.

    Raises
    ------
    ValueError
        ``index`` is negative or not below ``objective.size``.
    """
    if not 0 <= index < objective.size:
        raise ValueError(f"index must be from 0 (the largest) to {objective.size - 1}, got {index}")
    pairs = top_eigenvalues(objective, index + 1, seed=seed)
    vector = pairs.vectors[:, index]
    return Direction(vector * vector[vector.abs().argmax()].sign(), f"eigenvector {index + 1}")


def interpolation(objective: Objective, other: Tensor) -> Direction:
    """Return ``other − w``: coordinate 0 is the current weights, coordinate 1 the other point (shape ``(size,)``)."""
    objective.layout.check(other, "point")
    return Direction(other.to(objective.point()) - objective.point(), "interpolation")


def as_direction(direction: Direction | Tensor, objective: Objective) -> Direction:
    """Return a checked direction on the objective's device and in its data type; a bare vector is named "direction".

    Raises
    ------
    TypeError
        Neither a direction nor a tensor.
    ValueError
        Wrong length, or not finite.
    """
    if isinstance(direction, Tensor):
        direction = Direction(direction, "direction")
    if not isinstance(direction, Direction):
        raise TypeError(
            f"expected a Direction or a flat tensor, got {type(direction).__name__}: see msam_analysis.directions"
        )
    objective.layout.check(direction.vector, "direction")
    if not bool(torch.isfinite(direction.vector).all()):
        raise ValueError(f"the direction {direction.name!r} holds NaN or infinity: expected finite entries")
    return replace(direction, vector=direction.vector.detach().to(device=objective.device, dtype=objective.dtype))


def _finish(objective: Objective, vector: Tensor, name: str, normalize: Normalization) -> Direction:
    direction = Direction(vector, name)
    return direction if normalize == "none" else direction.normalized(objective, normalize)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _label(normalize: Normalization, one_d: bool) -> str:
    label = {"filter": "filter-normalised", "layer": "layer-normalised", "l2": "unit length", "none": "not normalised"}
    return label[normalize] + (" with biases and norms" if one_d and normalize in ("filter", "layer") else "")
