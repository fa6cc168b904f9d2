"""Probes of the Hessian."""

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
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.results import Eigenpairs
from msam_analysis.spectra.top import top_eigenvalues


@dataclass(frozen=True)
class Curvature:
    """Curvature ``dᵀHd / dᵀd`` at the true weights along momentum, gradient and a random direction (exhibit A8).

    It costs three Hessian-vector products over the objective's data.

    Parameters
    ----------
    objective
        The loss whose Hessian is used.
    seed
        Seed of the random directions; every recorded step has a new direction.
    """

    objective: Objective
    seed: int = 0

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``curvature_momentum`` (NaN at the first step), ``curvature_gradient`` and ``curvature_random``."""
        objective = self.objective
        hessian = objective.hessian(objective.vector(true_weights(optimizer)))
        seed = self.seed * 1_000_003 + step
        draw = objective.space.gaussian(1, seed=seed, like=objective.point(), use="curvature")[:, 0]
        along = {
            "momentum": objective.vector(momentum_buffers(optimizer)),
            "gradient": objective.vector(present_gradients(optimizer)),
            "random": draw,
        }
        return {f"curvature_{name}": curvature_along(hessian, vector).value for name, vector in along.items()}


class Tracked:
    """Searches for eigenvalues that start from the vectors of the one before; the fields are those of the probe."""

    tolerance: float
    confirm: bool
    max_hvps: int | None
    seed: int
    _start: Tensor | None

    def search(self, operator: SymmetricOperator, k: int) -> Eigenpairs:
        """Return the largest eigenpairs."""
        found = top_eigenvalues(
            operator,
            k,
            tolerance=self.tolerance,
            max_hvps=self.max_hvps,
            start=self._start,
            confirm=self.confirm,
            seed=self.seed,
        )
        self._start = found.vectors
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the start vectors of the next search."""
        return {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the start vectors of the next search."""
        self._start = state["start"]


@dataclass(eq=False)
class TopEigenvalues(Tracked):
    """``lambda_1``, ..., ``lambda_k``: largest eigenvalues of the Hessian at the true weights, tracked (exhibit TA1).

    Each search starts from the eigenvectors of the one before; see :func:`~msam_analysis.spectra.top_eigenvalues`.

    Parameters
    ----------
    objective
        The loss whose Hessian is used, or a function that returns it.
    k
        Number of eigenvalues. Default 1.
    tolerance
        Largest residual, as a fraction of the value. Default 1e-2: the values then have a relative error of about 1e-4
        where the spectrum has a gap. ``lambda_residual`` is a bound on the error that always holds.
    confirm
        Whether every search looks for a larger value in which its start has no part (default). ``False`` leaves this
        out and costs about a third: the value is an eigenvalue, but another one may have become larger.
    max_hvps
        Largest number of Hessian-vector products of one search; default as in
        :func:`~msam_analysis.spectra.top_eigenvalues`.
    seed
        Seed of random start vectors.

    Warns
    -----
    ConvergenceWarning
        A search did not converge; ``lambda_converged`` is then 0.
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
        found = self.search(objective.hessian(objective.vector(true_weights(optimizer))), self.k)
        values = {f"lambda_{index}": value for index, value in enumerate(found.values.tolist(), start=1)}
        residual = float(found.residuals.max())
        return {**values, "lambda_residual": residual, "lambda_converged": float(found.converged)}
