"""A direction in weight space: a flat vector with a name that says how it was made and normalised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from msam_analysis.objective.objective import Objective
from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import Layout, widest

Normalization = Literal["filter", "layer", "weight", "l2", "none"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A flat vector and what it is.

    Attributes
    ----------
    vector
        Shape ``(size,)``.
    name
        What it is and how it was normalised; ends up on axes.
    space
        Where the whole vector lies, if processes have parts of it; ``None``: this vector is the whole.
    """

    vector: Tensor
    name: str
    space: Space | None = field(default=None, repr=False)

    @property
    def norm(self) -> float:
        """L2 norm of the whole vector."""
        wide = self.vector.to(widest(self.vector.device))
        return float((self.space or Space(len(wide))).norm(wide))

    def normalized(
        self, objective: Objective, normalize: Normalization = "filter", *, one_d: bool = False
    ) -> Direction:
        """Return the direction rescaled; see :func:`normalized`."""
        weights, space = objective.point(), objective.space
        vector = normalized(self.vector, objective.layout, weights, normalize, one_d=one_d, space=space)
        return Direction(vector, f"{self.name}, {label(normalize, one_d, objective.layout)}", space)


def normalized(
    vector: Tensor,
    layout: Layout,
    weights: Tensor,
    normalize: Normalization,
    *,
    one_d: bool = False,
    space: Space | None = None,
) -> Tensor:
    r"""Rescale a direction so that displacements along it are comparable between networks.

    ============ =======================================================================================
    ``"filter"`` ``d_ij ← d_ij ‖w_ij‖ / ‖d_ij‖`` for every filter ``j`` (first index) of every tensor ``i``
                 with at least two dimensions
    ``"layer"``  the same with whole tensors
    ``"weight"`` ``d ← d |w|``, entry by entry, for the same tensors: every weight moves by its own size
    ``"l2"``     ``d ← d / ‖d‖``
    ``"none"``   unchanged
    ============ =======================================================================================

    For filter, layer and weight normalisation, tensors with fewer than two dimensions (biases, normalisation layers)
    are left where they are (``d_i = 0``), as Li et al. do, or, with ``one_d=True``, take the norm of the tensor they
    perturb (for weights: the size of each entry). A filter that is zero in the weights or in the direction stays put:
    its displacement is 0. The name of the direction says which was chosen.

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
    space
        Where the vectors lie; default: every process has whole ones. Filters are whole in any case.

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
    space = Space(layout.size) if space is None else space
    if normalize == "none":
        return vector.clone()
    if normalize == "l2":
        norm = space.norm(torch.linalg.vector_norm(vector, dtype=widest(vector.device)).reshape(1))
        if not float(norm) > 0:
            raise ValueError("the direction is zero: expected a direction with a positive norm to give it length 1")
        unit: Tensor = (vector / norm).to(vector.dtype)
        return unit
    scaled = vector.clone()
    for piece, weight in zip(layout.views(scaled).values(), layout.views(weights).values(), strict=True):
        if piece.ndim < 2 and not one_d:
            piece.zero_()
            continue
        if normalize == "weight":
            piece.mul_(weight.abs())
            continue
        apart = normalize == "filter" and piece.ndim >= 2
        mine, theirs = (tensor.flatten(1) if apart else tensor.reshape(1, -1) for tensor in (piece, weight))
        length, target = (
            torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=widest(rows.device)) for rows in (mine, theirs)
        )
        if not apart:  # a tensor may be in several processes
            length, target = (space.norm(whole, dim=1)[:, None] for whole in (length, target))
        mine.mul_(torch.where(length > 0, target / length, torch.zeros_like(length)).to(mine.dtype))
    return scaled


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
    if objective.space.any(~torch.isfinite(direction.vector)):
        raise ValueError(f"the direction {direction.name!r} holds NaN or infinity: expected finite entries")
    vector = direction.vector.detach().to(device=objective.device, dtype=objective.dtype)
    return Direction(vector, direction.name, objective.space)


def label(normalize: Normalization, one_d: bool, layout: Layout) -> str:
    """Return the words for a normalisation, as they stand in a direction's name."""
    words = {"l2": "unit length", "none": "not normalised"}.get(normalize, f"{normalize}-normalised")
    if normalize in ("l2", "none") or all(len(shape) >= 2 for shape in layout.shapes):
        return words
    return f"{words}, biases and norms {'moved' if one_d else 'fixed'}"
