"""A probe of the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msam_analysis.measures.edges import edge_of_stability, preconditioner, preconditions
from msam_analysis.measures.momentum import true_weights
from msam_analysis.monitor.probes.base import ObjectiveSource, current
from msam_analysis.monitor.probes.hessian import Tracked
from msam_analysis.objective.operators import ScaledOperator, SymmetricOperator


@dataclass(eq=False)
class EdgeOfStability(Tracked):
    """``edge_ratio``: the top eigenvalue over the curvature at which the optimizer's step begins to grow (exhibit E1).

    A ratio that settles at 1 says that the edge decides how flat the minimum is. The edge is that of
    :func:`~msam_analysis.edge_of_stability` at the recorded step; MSAM's moves with ``‖v‖`` from step to step. The
    eigenvalue is tracked as by :class:`TopEigenvalues`, at the true weights. For the Adam family it is that of the
    preconditioned Hessian ``P^{-1/2} H P^{-1/2}`` (Cohen et al. 2022), NaN before the first step.

    Parameters
    ----------
    objective
        The loss whose Hessian is used, or a function that returns it: in full-batch training that of the training data.
    tolerance, confirm, max_hvps, seed
        As for :class:`TopEigenvalues`; ``confirm`` is off by default.

    Raises
    ------
    ValueError
        At the first record, if no edge is known for the optimizer.

    Warns
    -----
    ConvergenceWarning
        A search did not converge.
    """

    objective: ObjectiveSource
    tolerance: float = 1e-2
    confirm: bool = False
    max_hvps: int | None = None
    seed: int = 0
    _start: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``edge``, ``edge_lambda``, its residual ``edge_residual``, and ``edge_ratio``."""
        edge = float(edge_of_stability(optimizer))
        operator = self._operator(optimizer)
        if operator is None:
            return {"edge": edge, "edge_lambda": math.nan, "edge_residual": math.nan, "edge_ratio": math.nan}
        found = self.search(operator, 1)
        value = float(found.values[0])
        return {
            "edge": edge,
            "edge_lambda": value,
            "edge_residual": float(found.residuals[0]),
            "edge_ratio": value / edge,
        }

    def _operator(self, optimizer: torch.optim.Optimizer) -> SymmetricOperator | None:
        """Return the Hessian at the true weights, preconditioned as the optimizer does it."""
        objective = current(self.objective)
        hessian = objective.hessian(objective.vector(true_weights(optimizer)))
        if not preconditions(optimizer):
            return hessian
        divided = preconditioner(optimizer)
        if not divided:
            return None
        ones = {parameter: torch.ones_like(parameter) for parameter in true_weights(optimizer)}
        return ScaledOperator(hessian, objective.vector(ones | divided).rsqrt())
