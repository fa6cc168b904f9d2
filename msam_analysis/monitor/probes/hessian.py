"""Curvature while a network is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msam_analysis.measures.along import curvature_along
from msam_analysis.measures.momentum import momentum_buffers, present_gradients, true_weights
from msam_analysis.monitor.probes.base import ObjectiveSource, current
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.vectors import gaussian
from msam_analysis.spectra.top import top_eigenvalues


@dataclass(frozen=True)
class Curvature:
    """Curvature ``dᵀHd / dᵀd`` at the true weights along momentum, gradient and a random direction (exhibit A8).

    Three Hessian-vector products over the objective's data.

    Parameters
    ----------
    objective
        The loss whose Hessian is meant.
    seed
        Of the random directions; a new one at every recorded step.
    """

    objective: Objective
    seed: int = 0

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``curvature_momentum`` (NaN at the first step), ``curvature_gradient`` and ``curvature_random``."""
        objective = self.objective
        hessian = objective.hessian(objective.vector(true_weights(optimizer)))
        seed = self.seed * 1_000_003 + step
        draw = gaussian(objective.size, 1, seed=seed, like=objective.point(), use="curvature")[:, 0]
        along = {
            "momentum": objective.vector(momentum_buffers(optimizer)),
            "gradient": objective.vector(present_gradients(optimizer)),
            "random": draw,
        }
        return {f"curvature_{name}": curvature_along(hessian, vector).value for name, vector in along.items()}


@dataclass(eq=False)
class TopEigenvalues:
    """``lambda_1``, ..., ``lambda_k``: largest eigenvalues of the Hessian at the true weights, tracked (exhibit TA1).

    Each search starts from the eigenvectors of the one before; see :func:`~msam_analysis.spectra.top_eigenvalues`.

    Parameters
    ----------
    objective
        The loss whose Hessian is meant, or a function that returns it.
    k
        How many. Default 1.
    tolerance
        Of the residuals, relative to the value. Default 1e-2, by which the values are right to about 1e-4 of themselves
        where the spectrum has a gap; the bound that always holds is recorded as ``lambda_residual``.
    confirm
        Whether every search looks for a larger value that the start has no part in (default). ``False`` leaves this
        out, at about a third of the cost: what is followed is an eigenvalue, but another may have overtaken it.
    max_hvps
        Budget of one search; default: that of :func:`~msam_analysis.spectra.top_eigenvalues`.
    seed
        Of random starts.

    Warns
    -----
    ConvergenceWarning
        A search did not converge; ``lambda_converged`` is 0 then.
    """

    objective: ObjectiveSource
    k: int = 1
    tolerance: float = 1e-2
    confirm: bool = True
    max_hvps: int | None = None
    seed: int = 0
    _start: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return the values, the largest of their residuals ``lambda_residual``, and ``lambda_converged``, 1 or 0."""
        objective = current(self.objective)
        found = top_eigenvalues(
            objective.hessian(objective.vector(true_weights(optimizer))),
            self.k,
            tolerance=self.tolerance,
            max_hvps=self.max_hvps,
            start=self._start,
            confirm=self.confirm,
            seed=self.seed,
        )
        self._start = found.vectors
        values = {f"lambda_{index}": value for index, value in enumerate(found.values.tolist(), start=1)}
        residual = float(found.residuals.max())
        return {**values, "lambda_residual": residual, "lambda_converged": float(found.converged)}

    def state_dict(self) -> dict[str, Any]:
        """Return the eigenvectors that the next search starts from."""
        return {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start the next search where it would have."""
        self._start = state["start"]
