"""Curvature along given directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from msam_analysis.objective.direction import Direction
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.vectors import no_autocast, read
from msam_analysis.results import Curvatures, Scalar
from msam_analysis.spectra.top import as_operator


@overload
def curvature_along(target: SymmetricOperator | Objective, direction: Direction | Tensor) -> Scalar: ...


@overload
def curvature_along(target: SymmetricOperator | Objective, direction: Sequence[Direction | Tensor]) -> Curvatures: ...


def curvature_along(
    target: SymmetricOperator | Objective, direction: Direction | Tensor | Sequence[Direction | Tensor]
) -> Scalar | Curvatures:
    """Return ``dᵀ A d / dᵀ d``, the curvature along ``d`` (exhibit A8); it costs one product for each direction.

    Memory: three vectors for each direction, and the graphs that the Hessian keeps.

    Parameters
    ----------
    target
        A symmetric operator, or an objective, which stands for its Hessian.
    direction
        The direction ``d``, shape ``(size,)``; its length does not matter. Or several, whose products share work.

    Returns
    -------
    Scalar or Curvatures
        For one direction a number, which is a ``float`` too; for several their ``values`` of shape ``(directions,)``,
        float64 on the CPU. NaN for a direction that is zero or not finite.
    """
    operator = as_operator(target)
    several = not isinstance(direction, Direction | Tensor)
    given: Sequence[Direction | Tensor] = direction if several else [direction]  # type: ignore[assignment, list-item]
    found = torch.full((len(given),), math.nan, dtype=torch.float64)
    vectors = [item.vector if isinstance(item, Direction) else item for item in given]
    vectors = [vector.to(dtype=operator.dtype, device=operator.device) for vector in vectors]
    lengths = read(*(operator.space.norm(vector) for vector in vectors)) if vectors else []
    known = [index for index, length in enumerate(lengths) if 0 < length < math.inf]
    if known:
        with no_autocast(operator.device):
            units = torch.stack([vectors[index] / lengths[index] for index in known], dim=1)
            found[known] = operator.space.sum((units * operator.matmat(units)).sum(dim=0)).cpu().double()
    names = [item.name if isinstance(item, Direction) else "a vector" for item in given]
    if several:
        return Curvatures(values=found, directions=tuple(names), settings=operator.settings)
    return Scalar(quantity=f"curvature along {names[0]}", value=float(found[0]), settings=operator.settings)
